//! Descriptors of a backend's own, beside its queues: sockets, timers, files.

use std::io;
use std::os::fd::RawFd;

use vhost_user_backend::{VhostUserBackend, VringEpollHandler};
use vmm_sys_util::epoll::EventSet;

/// A thread that calls a backend ([`VhostUserBackend::handle_event`]) when one of these descriptors has an event. The
/// crate's own server has such threads, and so has a hosted device: a backend is written against both.
pub trait Listeners: Send + Sync {
    /// Has the backend called with `data` for events of `fd`. `data` is above the number of the backend's queues, and
    /// fits 16 bits.
    ///
    /// # Errors
    /// When it does not, or the host refuses: the descriptor is listened to already, or can't be.
    fn register_listener(&self, fd: RawFd, events: EventSet, data: u64) -> io::Result<()>;

    /// Forgets a descriptor. The backend may be called for it once more.
    ///
    /// # Errors
    /// When it is not listened to.
    fn unregister_listener(&self, fd: RawFd, events: EventSet, data: u64) -> io::Result<()>;
}

impl<B: VhostUserBackend> Listeners for VringEpollHandler<B>
where
    B::Vring: Send + Sync,
    B::Bitmap: Send + Sync,
{
    fn register_listener(&self, fd: RawFd, events: EventSet, data: u64) -> io::Result<()> {
        Self::register_listener(self, fd, events, data)
    }

    fn unregister_listener(&self, fd: RawFd, events: EventSet, data: u64) -> io::Result<()> {
        Self::unregister_listener(self, fd, events, data)
    }
}
