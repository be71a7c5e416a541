//! A client that cuts its memory file short, where it could not be sealed, must not end the daemon: touching what is gone
//! raises SIGBUS. The handler then puts empty memory in place of the whole mapping and raises the alarm of its session, which
//! drops the connection.
#![allow(unsafe_code, reason = "signal handlers and mappings at fixed places")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::mailbox::Event;

static TABLE: Table = Table::new();
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

/// Protects a mapping until it is dropped, which must be before the mapping and the alarm are gone.
#[derive(Debug)]
pub(crate) struct Guard(&'static Place);

/// Protects a mapping of whole pages: its address and its length.
///
/// # Errors
/// When the handler can't be installed.
pub(crate) fn protect(extent: (usize, usize), alarm: &Event) -> io::Result<Guard> {
    INSTALLED.get_or_init(install).map_err(io::Error::from_raw_os_error)?;
    Ok(Guard(TABLE.insert(Entry { start: extent.0, len: extent.1, alarm: alarm.as_fd().as_raw_fd() })))
}

impl Drop for Guard {
    fn drop(&mut self) {
        TABLE.remove(self.0);
    }
}

/// The facts about a mapping that the handler needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    start: usize,
    len: usize,
    alarm: RawFd,
}

/// Room for one mapping. A length of zero is a free place.
#[derive(Debug)]
struct Place {
    /// Odd while the place changes, another number after each change.
    changes: AtomicUsize,
    start: AtomicUsize,
    len: AtomicUsize,
    alarm: AtomicI32,
}

impl Place {
    const fn new() -> Self {
        Self {
            changes: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            alarm: AtomicI32::new(-1),
        }
    }

    /// Changes the place. One thread at a time.
    fn set(&self, entry: Entry) {
        let changes = self.changes.load(Ordering::Relaxed);
        self.changes.store(changes.wrapping_add(1), Ordering::Relaxed);
        // A reader that sees a field of the new entry sees the odd number, at the latest when it looks a second time.
        fence(Ordering::Release);
        self.start.store(entry.start, Ordering::Relaxed);
        self.len.store(entry.len, Ordering::Relaxed);
        self.alarm.store(entry.alarm, Ordering::Relaxed);
        self.changes.store(changes.wrapping_add(2), Ordering::Release);
    }

    /// The entry here; `None` while it changes.
    fn get(&self) -> Option<Entry> {
        let changes = self.changes.load(Ordering::Acquire);
        let entry = Entry {
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            alarm: self.alarm.load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        (changes.is_multiple_of(2) && self.changes.load(Ordering::Relaxed) == changes).then_some(entry)
    }
}

/// Places in a piece of the table.
const PIECE: usize = 256;

/// All mappings, for the handler to find: it takes no lock and allocates nothing. The table grows by pieces that stay, so that
/// no client can use up the places of others: how many mappings a client has is bounded where they are made.
struct Table {
    first: Piece,
    /// Held by those who change the table.
    change: Mutex<()>,
}

struct Piece {
    places: [Place; PIECE],
    next: OnceLock<&'static Piece>,
}

impl Piece {
    const fn new() -> Self {
        Self { places: [const { Place::new() }; PIECE], next: OnceLock::new() }
    }
}

impl Table {
    const fn new() -> Self {
        Self { first: Piece::new(), change: Mutex::new(()) }
    }

    fn pieces(&'static self) -> impl Iterator<Item = &'static Piece> {
        std::iter::successors(Some(&self.first), |piece| piece.next.get().copied())
    }

    fn insert(&'static self, entry: Entry) -> &'static Place {
        let _changing = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let free = |piece: &'static Piece| piece.places.iter().find(|place| place.len.load(Ordering::Relaxed) == 0);
        let place = self.pieces().find_map(free).unwrap_or_else(|| {
            let last = self.pieces().last().expect("there is a first piece");
            &last.next.get_or_init(|| Box::leak(Box::new(Piece::new()))).places[0]
        });
        place.set(entry);
        place
    }

    fn remove(&self, place: &Place) {
        let _changing = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        place.set(Entry { start: 0, len: 0, alarm: -1 });
    }

    /// The mapping that an address lies in. A thread that touches a mapping has protected it before, and keeps it
    /// protected while it touches it, so its place does not change then. A place that does change belongs to another
    /// mapping, and is passed over.
    fn find(&'static self, address: usize) -> Option<Entry> {
        let entries = self.pieces().flat_map(|piece| &piece.places).filter_map(Place::get);
        entries.into_iter().find(|entry| address.wrapping_sub(entry.start) < entry.len)
    }
}

fn install() -> Result<(), i32> {
    // SAFETY: all fields are numbers, sets of them or absent pointers, for which zero is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the handler keeps to what is allowed in one.
    let done = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)) }
}

extern "C" fn on_sigbus(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure.
    let code = unsafe { (*info).si_code };
    // BUS_ADRERR is a page that is not there, as of a file that was cut short. A memory error of the hardware (BUS_MCEERR_AR,
    // BUS_MCEERR_AO) is not the client's doing: what was lost there must not come back as zeroes. A signal that another process
    // sends has no address at all.
    let found = if code == libc::BUS_ADRERR {
        // SAFETY: with this code the kernel fills in the address.
        TABLE.find(unsafe { (*info).si_addr() } as usize)
    } else {
        None
    };
    // SAFETY: errno is this thread's own. Its value is put back below.
    let errno = unsafe { *libc::__errno_location() };
    if !found.is_some_and(replace) {
        // Not ours. The signal comes once more when this handler returns, and takes its default action.
        // SAFETY: the default action is always valid, and raising a signal is allowed in a handler.
        unsafe {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            libc::raise(libc::SIGBUS);
        }
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Puts empty memory in place of a mapping and says so.
fn replace(entry: Entry) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the place belongs to a mapping of ours that is alive as long as it is in the table.
    let mapped = unsafe { libc::mmap(entry.start as *mut libc::c_void, entry.len, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    let one = 1u64;
    // SAFETY: eight bytes that live across the call. If the counter is full, the alarm is raised already.
    let _ = unsafe { libc::write(entry.alarm, (&raw const one).cast(), 8) };
    true
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    /// An entry that can be told from a mixture of two.
    fn entry(number: usize) -> Entry {
        Entry { start: number << 20, len: 1 + number % 1000, alarm: number as RawFd }
    }

    fn is_whole(found: Entry) -> bool {
        found == entry(found.start >> 20)
    }

    /// Ends the others also when a thread of the test fails.
    struct End<'a>(&'a AtomicBool);

    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    #[test]
    fn an_entry_is_never_seen_torn() {
        let table: &'static Table = Box::leak(Box::new(Table::new()));
        // One that stays, which must always be found, whatever happens around it.
        table.insert(entry(7));
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for changer in 0..2 {
                let ended = &ended;
                scope.spawn(move || {
                    for number in (100 + changer..).step_by(2).take_while(|_| !ended.load(Ordering::Relaxed)) {
                        let place = table.insert(entry(100 + number % 5000));
                        table.remove(place);
                    }
                });
            }
            let (_end, mut seen) = (End(&ended), 0);
            for round in 0..2_000_000 {
                let entries = table.first.places[..4].iter().filter_map(Place::get).filter(|found| found.len > 0);
                for found in entries {
                    assert!(is_whole(found), "{found:?}");
                    seen += 1;
                }
                if round % 100 == 0 {
                    assert_eq!(table.find(7 << 20), Some(entry(7)));
                }
            }
            assert!(seen >= 2_000_000, "at least the one that stays, {seen}");
        });
    }

    #[test]
    fn the_table_grows_and_its_places_are_used_again() {
        let table: &'static Table = Box::leak(Box::new(Table::new()));
        for _ in 0..2 {
            let places: Vec<_> = (1..=3 * PIECE).map(|number| table.insert(entry(number))).collect();
            for number in 1..=3 * PIECE {
                let last = (number << 20) + entry(number).len;
                assert_eq!((table.find(last - 1), table.find(last)), (Some(entry(number)), None));
            }
            places.into_iter().for_each(|place| table.remove(place));
            assert_eq!((table.pieces().count(), table.find(1 << 20)), (3, None));
        }
    }

    /// How a child ends to which a SIGBUS with this code comes, for an address in a mapping that is protected.
    fn end_after(code: i32) -> i32 {
        let (len, alarm) = (4096, Event::new().unwrap());
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        let guard = protect((start.addr(), len), &alarm).unwrap();
        // SAFETY: zero is valid for all of its fields.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        (info.si_signo, info.si_code) = (libc::SIGBUS, code);
        // SAFETY: the address follows three numbers and what aligns it.
        unsafe { (&raw mut info).cast::<*mut libc::c_void>().add(2).write(start) };
        // SAFETY: the child does nothing but system calls.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            // SAFETY: a process may send itself any signal with anything.
            unsafe {
                libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
                let (pid, thread) = (libc::getpid(), libc::gettid());
                libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, thread, libc::SIGBUS, &raw const info);
                libc::_exit(0);
            }
        }
        assert!(child > 0);
        let mut status = 0;
        // SAFETY: it is our child.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        drop(guard);
        // SAFETY: the mapping of this test.
        assert_eq!(unsafe { libc::munmap(start, len) }, 0);
        status
    }

    #[test]
    fn a_memory_error_of_the_hardware_is_no_empty_memory() {
        assert_eq!(end_after(libc::BUS_ADRERR), 0, "a file that was cut short is borne");
        for code in [libc::BUS_MCEERR_AR, libc::BUS_MCEERR_AO, libc::SI_USER, libc::SI_TKILL] {
            let status = end_after(code);
            assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS, "code {code}: {status:#x}");
        }
    }
}
