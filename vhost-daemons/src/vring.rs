//! The settings of one ring (vhost-user specification, "Ring states"), in whatever order they come, and the queue
//! made of them.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ringvm_backends::device::{Device, DeviceError, QueueParts, QueueState, RingConfig, Suspended};
use ringvm_backends::net;
use ringvm_backends::virtqueue::dirty::QueueLog;
use ringvm_backends::virtqueue::inflight::InflightArea;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use thiserror::Error;
use tracing::info;
use vm_memory::{Bytes, GuestAddress};

use crate::descriptor;
use crate::memory::Memory;

/// Most descriptors of a ring, whatever the device would like: it can't tell the frontend. NICs have the longest.
pub(crate) const MAX_SIZE: u16 = net::MAX_QUEUE_SIZE;

/// Why a ring does not start.
#[derive(Debug, Error)]
pub(crate) enum VringError {
    #[error("ring {index}: the {what} at {address:#x} is in no memory region")]
    Address { index: u16, what: &'static str, address: u64 },
    #[error("ring {index}: taking its descriptors: {source}")]
    Descriptor { index: u16, source: std::io::Error },
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Where a ring lies, in the frontend's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Addresses {
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
}

/// A ring.
#[derive(Debug, Default)]
pub(crate) struct Vring {
    pub(crate) size: Option<u16>,
    pub(crate) addresses: Option<Addresses>,
    /// Guest-physical address of the used ring, if writes to it are to be logged.
    pub(crate) log: Option<u64>,
    /// The next entry of the available ring to look at, while the ring does not run.
    pub(crate) base: u16,
    pub(crate) kick: Option<OwnedFd>,
    /// `None` for a driver that polls.
    pub(crate) call: Interrupt,
    pub(crate) err: Interrupt,
    pub(crate) enabled: bool,
    running: bool,
}

impl Vring {
    pub(crate) fn runs(&self) -> bool {
        self.running
    }

    /// Whether everything about it was said.
    pub(crate) fn is_complete(&self) -> bool {
        self.size.is_some() && self.addresses.is_some() && self.kick.is_some()
    }

    /// Starts the queue. It finds chains that the driver made available before without a kick, and interrupts the
    /// driver once: either notification may have been missed.
    pub(crate) fn start(
        &mut self,
        index: u16,
        device: &mut dyn Device,
        memory: &Memory,
        inflight: Option<&InflightArea>,
        log: Option<QueueLog>,
        broken: &Arc<AtomicBool>,
    ) -> Result<(), VringError> {
        let (Some(size), Some(addresses), Some(kick)) = (self.size, self.addresses, &self.kick) else { return Ok(()) };
        let translate = |what, address| memory.translate(address).ok_or(VringError::Address { index, what, address });
        let ring = RingConfig {
            size,
            desc: translate("descriptor table", addresses.desc)?,
            avail: translate("available ring", addresses.avail)?,
            used: translate("used ring", addresses.used)?,
        };
        let mem = memory.guest();
        let index_at = |what, area: u64, address| {
            let loaded = area.checked_add(2).and_then(|at| mem.load(GuestAddress(at), Ordering::Acquire).ok());
            loaded.ok_or(VringError::Address { index, what, address })
        };
        let next_used: u16 = index_at("used ring", ring.used, addresses.used)?;
        let avail: u16 = index_at("available ring", ring.avail, addresses.avail)?;
        if !is_plausible(self.base, next_used, avail, size) {
            info!(ring = index, base = self.base, used = next_used, "the base can't be, going on from the used index");
            self.base = next_used;
        }
        let taken = |source| VringError::Descriptor { index, source };
        let (err, broken) = (self.err.clone(), Arc::clone(broken));
        let parts = QueueParts {
            call: self.call.clone(),
            fault: Interrupt::Call(Arc::new(move || {
                broken.store(true, Ordering::Release);
                err.raise();
            })),
            from: QueueState { next_avail: self.base, next_used },
            inflight: inflight.and_then(|area| area.table(index)),
            log,
            in_order: inflight.is_none(),
            ..QueueParts::new(ring, mem, descriptor::doorbell(kick).map_err(taken)?)
        };
        device.start_queue(index, parts)?;
        self.running = true;
        self.call.raise();
        Ok(())
    }

    /// The queue was stopped. It may go on from where it was; what it has left is in its table.
    pub(crate) fn stopped(&mut self, end: Option<&Suspended>) {
        self.running = false;
        if let Some(end) = end {
            self.base = end.state.next_avail;
        }
    }
}

/// Whether a queue can go on from `base`: what it took it gave back, or still has, and what it did not take is in the ring.
/// DPDK's driver forgets where it was when it connects again.
fn is_plausible(base: u16, used: u16, avail: u16, size: u16) -> bool {
    base.wrapping_sub(used) <= size && avail.wrapping_sub(base) <= size
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_lies_between_what_was_used_and_what_is_available() {
        for (base, used, avail) in [(0, 0, 0), (5, 5, 9), (7, 5, 9), (2, 65534, 3), (65534, 65534, 200)] {
            assert!(is_plausible(base, used, avail, 256), "{base} {used} {avail}");
        }
        for (base, used, avail) in [(0, 4, 4), (0, 11, 267), (300, 5, 310), (9, 5, 6)] {
            assert!(!is_plausible(base, used, avail, 256), "{base} {used} {avail}");
        }
    }
}
