//! State that a device and its keeper share.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ringvm_backends::host::event::{borrow, take};
use ringvm_backends::trace;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use rustix::event::PollFlags;
use rustix::net::{Shutdown, shutdown};
use rustix::process::{Signal, pidfd_send_signal};
use tracing::{Span, warn};
use vmm_sys_util::eventfd::EventFd;

use super::sentinel::{Sentinel, wait_for};

/// Facts known without asking the keeper. The lock is never held over I/O.
pub(super) struct Shared {
    name: String,
    span: Span,
    view: Mutex<View>,
    /// Has the keeper look for jobs.
    wake: EventFd,
}

#[derive(Default)]
pub(super) struct View {
    /// The latest copy of the daemon's configuration space.
    pub(super) config: Vec<u8>,
    pub(super) config_changed: Interrupt,
    /// A daemon is there, and serves the driver's setup.
    pub(super) connected: bool,
    /// Of this daemon, or of the one before.
    pub(super) keeps_table: bool,
    pub(super) suspends: bool,
    pub(super) has_config: bool,
    pub(super) has_state: bool,
    /// Ends a connection when a thread has waited for it long enough.
    pub(super) breaker: Option<Breaker>,
    /// Tells when a lost daemon of ours has nothing in flight any more.
    pub(super) afterlife: Option<Arc<Sentinel>>,
}

/// The handles to a connection.
pub(super) struct Breaker {
    pub(super) socket: OwnedFd,
    pub(super) process: Option<Arc<OwnedFd>>,
}

impl Shared {
    pub(super) fn new(name: &str) -> io::Result<Self> {
        Ok(Self { name: name.to_owned(), span: trace::device(name), view: Mutex::default(), wake: super::event()? })
    }

    pub(super) fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The span that log lines about the device belong to.
    pub(super) fn span(&self) -> &Span {
        &self.span
    }

    /// Raised when the keeper is to look for jobs.
    pub(super) fn wakes(&self) -> &EventFd {
        &self.wake
    }

    /// Waits until the keeper is woken, or the pause has passed.
    pub(super) fn sleep(&self, pause: Duration) {
        wait_for(borrow(&self.wake), PollFlags::IN, Some(pause));
        take(borrow(&self.wake));
    }

    pub(super) fn wake(&self) {
        // A full counter is awake.
        let _ = self.wake.write(1);
    }

    /// Ends the connection, or the attempt to have one, from outside: whatever the keeper waits for ends with it.
    pub(super) fn break_off(&self) {
        let Some(Breaker { socket, process }) = self.view().breaker.take() else { return };
        warn!(parent: &self.span, "the daemon does not answer; its connection is ended");
        if let Some(process) = process {
            // One that has ended already is ended.
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
        let _ = shutdown(&socket, Shutdown::Both);
    }

    /// Waits until a lost daemon has nothing in flight, for the given time at most or for as long as it takes.
    /// Returns whether that is so.
    pub(super) fn outlast(&self, limit: Option<Duration>) -> bool {
        let Some(afterlife) = self.view().afterlife.clone() else { return true };
        let over = afterlife.is_over(limit);
        let mut view = self.view();
        if over && view.afterlife.as_ref().is_some_and(|now| Arc::ptr_eq(now, &afterlife)) {
            view.afterlife = None;
        }
        over
    }
}
