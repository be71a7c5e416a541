//! A client that cuts its memory file short, where it could not be sealed, must not end the daemon: touching what is gone
//! raises SIGBUS. The handler then puts empty memory in place of the whole mapping and raises the alarm of its session, which
//! drops the connection.
#![allow(unsafe_code, reason = "signal handlers and mappings at fixed places")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::mailbox::Event;

/// Most mappings of a process.
const PLACES: usize = 1024;

/// A mapping, for the handler to find: no lock, no allocation. A length of zero is a free place.
struct Place {
    start: AtomicUsize,
    len: AtomicUsize,
    alarm: AtomicI32,
}

static TABLE: [Place; PLACES] =
    [const { Place { start: AtomicUsize::new(0), len: AtomicUsize::new(0), alarm: AtomicI32::new(-1) } }; PLACES];
/// Held by those who change the table; the handler does without.
static CHANGE: Mutex<()> = Mutex::new(());
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

/// Protects a mapping until it is dropped, which must be before the mapping and the alarm are gone.
#[derive(Debug)]
pub(crate) struct Guard(usize);

/// Protects `len` bytes from `start` on.
///
/// # Errors
/// When the handler can't be installed, or there are too many mappings.
pub(crate) fn protect(start: usize, len: usize, alarm: &Event) -> io::Result<Guard> {
    INSTALLED.get_or_init(install).map_err(io::Error::from_raw_os_error)?;
    let _changing = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    let free = TABLE.iter().position(|place| place.len.load(Ordering::Relaxed) == 0);
    let free = free.ok_or_else(|| io::Error::other(format!("this process has {PLACES} regions already")))?;
    let place = &TABLE[free];
    place.start.store(start, Ordering::Relaxed);
    place.alarm.store(alarm.as_fd().as_raw_fd(), Ordering::Relaxed);
    place.len.store(len, Ordering::Release);
    Ok(Guard(free))
}

impl Drop for Guard {
    fn drop(&mut self) {
        let _changing = CHANGE.lock().unwrap_or_else(PoisonError::into_inner);
        TABLE[self.0].len.store(0, Ordering::Release);
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
    // SAFETY: the kernel passes a valid structure, whose address field SIGBUS fills in.
    let address = unsafe { (*info).si_addr() } as usize;
    let found = TABLE.iter().find_map(|place| {
        let len = place.len.load(Ordering::Acquire);
        let start = place.start.load(Ordering::Relaxed);
        (address.wrapping_sub(start) < len).then(|| (start, len, place.alarm.load(Ordering::Relaxed)))
    });
    // SAFETY: errno is this thread's own. What it was is put back below.
    let errno = unsafe { *libc::__errno_location() };
    if !found.is_some_and(|(start, len, alarm)| replace(start, len, alarm)) {
        // Not ours: the instruction runs again, and then the signal does what it always does.
        // SAFETY: the default action is always valid.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Puts empty memory in place of a mapping and says so.
fn replace(start: usize, len: usize, alarm: RawFd) -> bool {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the place is that of a mapping of ours that is alive as long as it is in the table.
    let mapped = unsafe { libc::mmap(start as *mut libc::c_void, len, protection, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    let one = 1u64;
    // SAFETY: eight bytes that live across the call. If the counter is full, the alarm is raised already.
    let _ = unsafe { libc::write(alarm, (&raw const one).cast(), 8) };
    true
}
