//! Descriptors that come from elsewhere: with a message, or from whoever started this process. Nothing about them is believed.
#![allow(unsafe_code, reason = "descriptors by number have no owner yet")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use ringvm_backends::event::SharedEvent;
use ringvm_backends::interrupt::Interrupt;
use vmm_sys_util::eventfd::EventFd;

/// Whether it is an eventfd. Without /proc nobody can tell, and then it is taken for one.
pub(crate) fn is_eventfd(fd: BorrowedFd<'_>) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    link.map_or(true, |link| link.as_os_str() == "anon_inode:[eventfd]")
}

/// A line that raises an event of the client's: an eventfd, a pipe or a socket.
///
/// # Errors
/// When it is something else, or the host has no descriptor or memory left.
pub(crate) fn interrupt(fd: OwnedFd) -> io::Result<Interrupt> {
    Ok(Interrupt::Shared(Arc::new(SharedEvent::new(fd)?)))
}

/// The client's doorbell, which is only ever polled.
pub(crate) fn doorbell(fd: &OwnedFd) -> io::Result<EventFd> {
    let copy = fd.try_clone()?;
    // SAFETY: the descriptor is open, and given away.
    Ok(unsafe { EventFd::from_raw_fd(copy.into_raw_fd()) })
}

/// Takes a descriptor that this process was started with.
///
/// # Errors
/// When there is none of that number, or it is a standard stream.
pub(crate) fn inherited(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is a standard stream"));
    }
    // SAFETY: asking for the flags of a number that may be none is what the call is for.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and inherited: nothing in this process has made it, and every number is taken once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
