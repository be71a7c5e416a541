//! Descriptors that come with a message. Nothing about them is believed.
#![allow(unsafe_code, reason = "descriptors by number have no owner yet")]

use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use ringvm_backends::host::event::SharedEvent;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use vmm_sys_util::eventfd::EventFd;

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
