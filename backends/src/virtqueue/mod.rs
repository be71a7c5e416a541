//! The device's side of virtqueues (virtio 1.3, sections 2.6 to 2.8): the parts that a transport hands over, and how
//! they are served.
//!
//! The layout of the ring is confined to one file: [`split`]. Beside it are the parts common to all layouts: the
//! buffers of a chain ([`buffers`]), the table of requests in flight ([`inflight`]), the log of written pages
//! ([`dirty`]) and the way to the driver ([`interrupt`]).

pub mod buffers;
pub mod dirty;
pub mod inflight;
pub mod interrupt;
pub mod split;
pub mod stopping;
mod translate;

use std::sync::Arc;

use thiserror::Error;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use dirty::QueueLog;
use inflight::InflightTable;
use interrupt::Interrupt;

/// Guest memory as a queue sees it: every region is mapped into this process for as long as the handle lives.
pub type GuestMemory = Arc<GuestMemoryMmap>;

/// Where a split virtqueue lies and how long it is. Addresses are guest-physical.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingConfig {
    /// Number of descriptors, a power of two of at most 32768.
    pub size: u16,
    /// Descriptor table ("descriptor area"), 16-byte aligned.
    pub desc: u64,
    /// Available ring ("driver area"), 2-byte aligned.
    pub avail: u64,
    /// Used ring ("device area"), 4-byte aligned.
    pub used: u64,
}

/// The position of a queue: enough to continue elsewhere if nothing is left in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueState {
    /// Index of the next entry of the available ring to look at.
    pub next_avail: u16,
    /// Index of the next entry of the used ring to fill.
    pub next_used: u16,
}

/// A queue that was stopped with some of its requests unanswered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Suspended {
    /// Where it stands.
    pub state: QueueState,
    /// Heads of the chains before `next_avail` that were taken and not given back. Nothing of them is under way any more; what
    /// they ask for was done in part, in whole or not at all.
    pub left: Vec<u16>,
}

/// Everything a queue needs to run.
pub struct QueueParts {
    /// Layout of the ring.
    pub ring: RingConfig,
    /// Memory the ring and its buffers live in.
    pub mem: GuestMemory,
    /// Written to by the driver's doorbell. The counter is never read, only its edges count.
    pub kick: EventFd,
    /// Raised for used buffers.
    pub call: Interrupt,
    /// Raised once if the driver broke the ring and the queue has stopped for good (DEVICE_NEEDS_RESET).
    pub fault: Interrupt,
    /// Where to start.
    pub from: QueueState,
    /// Heads that a predecessor has left unanswered ([`Suspended::left`]), to be served first.
    pub left: Vec<u16>,
    /// Where requests in flight are noted, if the queue is to survive a crash of its server. Requests that are
    /// already noted there are served again first, and `from` must follow from the table.
    pub inflight: Option<InflightTable>,
    /// Where written pages are marked while another process copies the guest elsewhere.
    pub log: Option<QueueLog>,
    /// Return buffers in the order in which they came, whatever it costs: without a table of requests in flight, the
    /// next server of this queue after a crash knows only how many were used.
    pub in_order: bool,
}

impl QueueParts {
    /// A queue that starts at its beginning, without an interrupt.
    #[must_use]
    pub fn new(ring: RingConfig, mem: GuestMemory, kick: EventFd) -> Self {
        Self {
            ring,
            mem,
            kick,
            call: Interrupt::None,
            fault: Interrupt::None,
            from: QueueState::default(),
            left: Vec::new(),
            inflight: None,
            log: None,
            in_order: false,
        }
    }
}

/// How a queue comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With everything answered that was taken.
    Drained,
    /// With nothing under way, but what could be cancelled unanswered.
    Suspended,
}

/// How a driver broke its ring.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RingError {
    /// The queue size is zero, no power of two or too large.
    #[error("queue size {0} is not a power of two from 1 to 32768")]
    Size(u16),
    /// An area is misaligned.
    #[error("{area} at {addr:#x} is misaligned")]
    Misaligned {
        /// Which of the three areas.
        area: &'static str,
        /// Where the driver put it.
        addr: u64,
    },
    /// An area does not lie in one piece of guest memory.
    #[error("{area} at {addr:#x}, {len} bytes, is not in one piece of guest memory")]
    Unmapped {
        /// Which of the three areas.
        area: &'static str,
        /// Where the driver put it.
        addr: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// The available index is further ahead than the ring is long.
    #[error("available index {avail} is more than the queue size ahead of {next}")]
    AvailIndex {
        /// The index that the driver published.
        avail: u16,
        /// The next entry to look at.
        next: u16,
    },
    /// A descriptor index is out of range.
    #[error("descriptor index {0} is out of range")]
    Index(u16),
    /// A head was made available while it is in flight.
    #[error("descriptor {0} was made available twice")]
    Twice(u16),
    /// A chain is longer than the ring or the table it lies in: it has a cycle.
    #[error("chain at descriptor {0} has a cycle or is too long")]
    TooLong(u16),
    /// An indirect descriptor inside an indirect table, with a next flag, or not negotiated.
    #[error("chain at descriptor {0} has a misplaced indirect descriptor")]
    Indirect(u16),
    /// An indirect table is empty, of a broken length or outside memory.
    #[error("indirect table at {addr:#x}, {len} bytes, is unusable")]
    Table {
        /// Where the driver put it.
        addr: u64,
        /// Its length in bytes.
        len: u32,
    },
    /// A device-readable descriptor after a device-writable one.
    #[error("chain at descriptor {0} has a readable buffer behind a writable one")]
    Order(u16),
    /// The table of requests in flight can't be that of this queue.
    #[error("{0}")]
    Inflight(&'static str),
    /// The device could not find what a chain of its kind must have, e.g. room for a status.
    #[error("chain at descriptor {head}: {what}")]
    Content {
        /// The head of the chain.
        head: u16,
        /// The part that is missing.
        what: &'static str,
    },
}
