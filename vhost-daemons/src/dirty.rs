//! The frontend's settings for the log of written pages (vhost-user specification, "Migration"). The backends keep
//! the log itself.
//!
//! Three things must come together before any page is marked, in whatever order they come and while rings run: the
//! place of the log, VHOST_F_LOG_ALL, and a running ring. Marking its used ring needs a flag of the ring besides.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringvm_backends::virtqueue::dirty::{DirtyLog, QueueLog};
use ringvm_backends::virtqueue::interrupt::Interrupt;
use vhost::vhost_user::message::VhostUserLog;

use crate::mailbox::Event;
use crate::sigbus::{self, Guard};

/// VHOST_F_LOG_ALL: writes to guest memory are to be logged.
pub(crate) const F_LOG_ALL: u64 = 1 << 26;
/// VHOST_VRING_F_LOG: those to the used ring as well.
const VRING_LOG: u32 = 1;

/// A mapped log. The guard goes first.
#[derive(Debug)]
pub(crate) struct Mapped {
    guard: Guard,
    log: DirtyLog,
}

impl Mapped {
    /// Maps the log that the frontend shares.
    pub(crate) fn new(said: &VhostUserLog, file: OwnedFd, alarm: &Event) -> io::Result<Self> {
        let log = DirtyLog::from_file(file, said.mmap_offset, said.mmap_size)?;
        Ok(Self { guard: sigbus::protect(log.extent(), alarm)?, log })
    }
}

/// Where the rings of a session mark. The guard goes first.
#[derive(Debug)]
struct Base {
    guard: Guard,
    log: Arc<DirtyLog>,
}

/// The log of a session. Rings that mark in it must have stopped before it is changed, but for [`Self::set_base`].
#[derive(Debug)]
pub(crate) struct Logging {
    base: Option<Base>,
    all: bool,
    event: Interrupt,
}

impl Default for Logging {
    fn default() -> Self {
        Self { base: None, all: false, event: Interrupt::None }
    }
}

impl Logging {
    /// Whether rings mark what they write.
    pub(crate) fn is_on(&self) -> bool {
        self.all && self.base.is_some()
    }

    /// Whether writes are to be marked, once there is a log.
    pub(crate) fn all(&self) -> bool {
        self.all
    }

    /// Whether it was said where the log is.
    pub(crate) fn has_base(&self) -> bool {
        self.base.is_some()
    }

    /// Where things are marked from now on, also by rings that run. In the log before nothing is marked any more.
    pub(crate) fn set_base(&mut self, Mapped { guard, log }: Mapped) {
        let Some(base) = &mut self.base else {
            self.base = Some(Base { guard, log: Arc::new(log) });
            return;
        };
        let before = base.log.replace(log);
        // Unmap the previous log only after its guard was replaced.
        base.guard = guard;
        drop(before);
    }

    /// Takes what the features say.
    pub(crate) fn set_all(&mut self, all: bool) {
        self.all = all;
    }

    /// Sets the event that is raised when a page was marked.
    pub(crate) fn set_event(&mut self, event: Interrupt) {
        self.event = event;
    }

    /// The log settings of a ring whose used ring is logged at `used`.
    pub(crate) fn of_ring(&self, used: Option<u64>) -> Option<QueueLog> {
        let base = self.base.as_ref().filter(|_| self.all)?;
        Some(QueueLog { log: Arc::clone(&base.log), used, marked: self.event.clone() })
    }
}

/// Where the used ring is logged, if it is, of what SET_VRING_ADDR says.
pub(crate) fn used_log(flags: u32, log: u64) -> Option<u64> {
    (flags & VRING_LOG != 0).then_some(log)
}
