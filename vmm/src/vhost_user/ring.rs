//! What the frontend keeps of a ring that a daemon serves, beside what the driver has set up.

use std::sync::Arc;

use ringvm_backends::device::QueueState;
use ringvm_backends::host::event::SharedEvent;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use vmm_sys_util::eventfd::EventFd;

/// What a ring of a daemon has beside its setup.
pub(super) struct Ring {
    /// What the daemon raises: the driver's own interrupt, or an event of ours where that can't be given away.
    pub(super) call: Arc<EventFd>,
    /// Raises doorbell and call, which every daemon that was here holds as well.
    pub(super) again: [SharedEvent; 2],
    pub(super) err: EventFd,
    /// The fault was raised, which is the end until a reset.
    pub(super) faulty: bool,
    pub(super) from: QueueState,
    /// What the table of requests in flight does not hold yet.
    pub(super) left: Vec<u16>,
}

/// Where calls go that can't go straight.
pub(super) fn relay(call: &Interrupt) -> Option<&Interrupt> {
    (!matches!(call, Interrupt::Event(_) | Interrupt::None)).then_some(call)
}
