//! Descriptors that come with a message. Nothing about them is believed.
#![allow(unsafe_code, reason = "descriptors by number have no owner yet")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use ringvm_backends::host::event::SharedEvent;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use vmm_sys_util::eventfd::EventFd;

/// Whether it is an eventfd. Without /proc there is no way to tell, and then it is taken for one.
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
