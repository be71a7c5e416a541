//! Descriptors that this process was started with. The parent names some of them by number (`fd=`, `fds=`, `--fd`);
//! each of those gets one owner. The others are not passed on to children.
//!
//! They are collected before `main`, when no other code in the process can own one: a number that was named by
//! mistake is then never that of a descriptor which the process has opened for itself.
#![allow(
    unsafe_code,
    reason = "descriptors by number have no owner yet, and a function in .init_array, which runs before main"
)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::FdFlags;
use rustix::process::{Resource, getrlimit};

/// The first number that is no standard stream.
const FIRST: RawFd = 3;
/// Numbers that are looked at; those beyond are closed to children like the others, but can't be named.
const NUMBERS: u64 = 1 << 16;

/// The descriptors found at the start; a number that was taken maps to nothing.
static FOUND: Mutex<BTreeMap<RawFd, Option<OwnedFd>>> = Mutex::new(BTreeMap::new());

fn found() -> MutexGuard<'static, BTreeMap<RawFd, Option<OwnedFd>>> {
    FOUND.lock().unwrap_or_else(PoisonError::into_inner)
}

// SAFETY: the section holds pointers to functions that the C runtime calls once before main; this one uses system calls and the heap.
#[used]
#[unsafe(link_section = ".init_array")]
static CLAIM: extern "C" fn() = claim;

/// Takes note of every descriptor that is open, and closes it to programs that this process will start. They stay open here: a path
/// like /dev/fd/63 may lead to one.
extern "C" fn claim() {
    // SAFETY: with this flag nothing is closed; numbers that are not open do not count.
    let marked =
        unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) } == 0;
    for number in open_numbers() {
        if !marked {
            // SAFETY: the number was open just now, and the call takes no pointer.
            unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
        // SAFETY: it is open, and before main nothing of this program owns it.
        leave(unsafe { OwnedFd::from_raw_fd(number) });
    }
}

/// The numbers under which something is open, asked for with one call that needs no /proc.
fn open_numbers() -> Vec<RawFd> {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(NUMBERS).min(NUMBERS);
    let numbers = FIRST..limit as RawFd;
    let mut polled: Vec<libc::pollfd> = numbers.map(|fd| libc::pollfd { fd, events: 0, revents: 0 }).collect();
    // SAFETY: the list is as long as said and lives across the call, which does not wait.
    let result = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, 0) };
    let is_open = |polled: &libc::pollfd| result >= 0 && polled.revents & libc::POLLNVAL == 0;
    polled.iter().filter(|polled| is_open(polled)).map(|polled| polled.fd).collect()
}

/// Leaves a descriptor for [`take`], as though this process had been started with it, and returns its number.
pub fn leave(fd: OwnedFd) -> RawFd {
    let number = fd.as_raw_fd();
    found().insert(number, Some(fd));
    number
}

/// Takes a descriptor that this process was started with. The number itself is owned from now on, so that nothing
/// stays open under it when the owner goes.
///
/// # Errors
/// When there is no such descriptor, when it is a standard stream, or when it was taken before.
pub fn take(number: RawFd) -> io::Result<OwnedFd> {
    if number < FIRST {
        let what = "it is a standard stream (0, 1 and 2); inherit it under a higher number";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    match found().get_mut(&number).map(Option::take) {
        Some(Some(fd)) => {
            rustix::io::fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
            Ok(fd)
        }
        Some(None) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "it is named twice; name each number once")),
        None => Err(io::Error::from_raw_os_error(libc::EBADF)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_descriptor_has_one_owner() {
        let number = leave(File::open("/dev/null").unwrap().into());
        let fd = take(number).unwrap();
        assert_eq!(fd.as_raw_fd(), number, "the number itself, not a copy");
        assert!(take(number).unwrap_err().to_string().contains("named twice"));
        assert_eq!(take(0x7fff_fff0).unwrap_err().raw_os_error(), Some(libc::EBADF));
        for standard in [-1, 0, 1, 2] {
            assert!(take(standard).unwrap_err().to_string().contains("0, 1 and 2"), "{standard}");
        }
    }

    #[test]
    fn open_numbers_are_found() {
        let file = File::open("/dev/null").unwrap();
        assert!(open_numbers().contains(&file.as_raw_fd()));
        assert!(!open_numbers().contains(&0));
    }
}
