//! The one seam that every placement shares: a virtio device as a synchronous control plane over queues that run
//! elsewhere.
//!
//! The virtio-pci transport and, in a daemon, the vhost-user server both drive a [`Device`]; neither knows which kind
//! it is. Requests are processed below `start_queue`, on I/O threads, and never cross this trait. The terms are those
//! of the virtio 1.3 specification, sections 2.1 to 2.7.

use thiserror::Error;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use crate::stats::DeviceStats;
use crate::virtqueue::RingError;
use crate::virtqueue::interrupt::Interrupt;
pub use crate::virtqueue::stopping::{Ends, Stopping};
pub use crate::virtqueue::{End, GuestMemory, QueueParts, QueueState, RingConfig, Suspended};

/// A device's fixed properties.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Virtio device ID (section 5), e.g. 2 for block.
    pub device_type: u32,
    /// Name in logs and statistics, unique within a machine (e.g. `disk0`).
    pub name: String,
    /// Every feature bit offered, transport and ring features included.
    pub features: u64,
    /// One entry per queue: the largest size it can have, a power of two.
    pub queue_sizes: Vec<u16>,
    /// Length in bytes of the device-specific configuration space.
    pub config_len: u32,
}

impl DeviceInfo {
    /// Refuses features that were not offered, and drivers older than virtio 1.
    ///
    /// # Errors
    /// [`DeviceError::Features`].
    pub fn check_features(&self, features: u64) -> Result<(), DeviceError> {
        let reason = if features & !self.features != 0 {
            "not all of them were offered"
        } else if features & 1 << VIRTIO_F_VERSION_1 == 0 {
            "VIRTIO_F_VERSION_1 is missing, legacy drivers are not served"
        } else {
            return Ok(());
        };
        Err(DeviceError::Features { device: self.name.clone(), features, reason })
    }
}

/// Reads a configuration space; bytes beyond its end are zero.
pub fn read_space(space: &[u8], offset: u32, data: &mut [u8]) {
    data.fill(0);
    let from = space.get(offset as usize..).unwrap_or_default();
    let count = from.len().min(data.len());
    data[..count].copy_from_slice(&from[..count]);
}

/// Why a device refused a request of its transport.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The driver accepted features that were not offered or do not go together.
    #[error("{device}: features {features:#x} refused: {reason}")]
    Features {
        /// Name of the device.
        device: String,
        /// The features that the driver asked for.
        features: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A queue index beyond those of the device, or a queue that runs already.
    #[error("{device}: queue {index} {reason}")]
    Queue {
        /// Name of the device.
        device: String,
        /// The queue.
        index: u16,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The ring's layout can't be served.
    #[error("{device}: queue {index}: {source}")]
    Ring {
        /// Name of the device.
        device: String,
        /// The queue.
        index: u16,
        /// What is wrong with the ring.
        source: RingError,
    },
    /// A write to read-only or absent configuration space.
    #[error("{device}: write of {len} bytes at configuration offset {offset:#x} refused")]
    Config {
        /// Name of the device.
        device: String,
        /// First byte written.
        offset: u32,
        /// Number of bytes.
        len: usize,
    },
    /// Bytes that are not the state of such a device, or can't become its state.
    #[error("{device}: the state of another device can't be taken over: {reason}")]
    State {
        /// Name of the device.
        device: String,
        /// What is wrong with them.
        reason: &'static str,
    },
    /// The device can't obtain its state.
    #[error("{device}: its state can't be saved: {reason}")]
    Save {
        /// Name of the device.
        device: String,
        /// Why not.
        reason: String,
    },
    /// The host failed the device.
    #[error("{device}: {what}: {source}")]
    Host {
        /// Name of the device.
        device: String,
        /// The operation that failed.
        what: &'static str,
        /// The error that it returned.
        source: std::io::Error,
    },
}

/// Makes everything durable that a device has acknowledged, from any thread and whatever the device is busy with.
pub type Flusher = Box<dyn Fn() -> Result<(), DeviceError> + Send>;

/// A virtio device.
///
/// Calls come from one thread at a time and may block for as long as requests in flight take to end; none of them is
/// on the request path. A device starts with no features accepted and no queue running. The transport calls
/// `ack_features` once per negotiation, before the first `start_queue`, and stops every queue before it negotiates
/// again.
pub trait Device: Send {
    /// The device's fixed properties.
    fn info(&self) -> &DeviceInfo;

    /// Whether its queues can note requests in flight, log the pages that they write and be suspended, and the device
    /// hands its state over. A server offers these to its clients only then.
    fn recovers(&self) -> bool {
        true
    }

    /// Accepts the driver's choice among the offered features.
    ///
    /// # Errors
    /// [`DeviceError::Features`] for bits not offered or a combination that can't be served; the transport then leaves
    /// FEATURES_OK clear.
    fn ack_features(&mut self, features: u64) -> Result<(), DeviceError>;

    /// Fills `data` from the device-specific configuration space; bytes beyond its end read as zero. A device that has none
    /// leaves this as it is.
    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0);
    }

    /// Bytes of the configuration space that belong to the driver: it reads back its own writes, even before the
    /// device has seen them.
    fn driver_fields(&self) -> Vec<std::ops::Range<u32>> {
        Vec::new()
    }

    /// Writes the device-specific configuration space.
    ///
    /// # Errors
    /// [`DeviceError::Config`] where it is not writable, which is everywhere unless the device says otherwise; nothing was
    /// changed then.
    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        Err(DeviceError::Config { device: self.info().name.clone(), offset, len: data.len() })
    }

    /// Starts to serve queue `index`. The ring is looked at once without waiting for a kick.
    ///
    /// # Errors
    /// When the index is out of range, the queue runs already, its layout does not lie in memory or the host refuses.
    fn start_queue(&mut self, index: u16, parts: QueueParts) -> Result<(), DeviceError>;

    /// Begins to stop queues, all at once, and returns a handle that tells when they have stopped. From then on none
    /// of their requests is in flight, every completion is published, and each queue has reported its position. A
    /// queue that does not run reports nothing, or its earlier position.
    ///
    /// `End::Drained` answers every request that was taken. `End::Suspended` waits only for requests that can't be
    /// cancelled; the others are cancelled and left to the next server of the queue. Another call with
    /// `End::Suspended` suspends queues that are already draining. A queue starts again only after it has stopped.
    fn stop(&mut self, queues: &[u16], end: End) -> Stopping;

    /// Drains one queue, waits for the end, and returns the queue's position, or `None` if it was not running.
    fn drain(&mut self, index: u16) -> Option<QueueState> {
        Some(self.stop(&[index], End::Drained).wait().pop()??.state)
    }

    /// Suspends queues, waits for the end, and returns their positions, or `None` for those that were not running.
    fn suspend(&mut self, queues: &[u16]) -> Ends {
        self.stop(queues, End::Suspended).wait()
    }

    /// Returns the device to its state before `ack_features`. All queues are stopped first.
    fn reset(&mut self);

    /// Tells the device how to notify the driver of a change of configuration space that the device makes itself.
    /// Devices whose space never changes ignore it.
    fn on_config_change(&mut self, _notify: Interrupt) {}

    /// Makes everything that was acknowledged durable, e.g. before the process ends.
    ///
    /// # Errors
    /// [`DeviceError::Host`] when the host could not.
    fn flush(&mut self) -> Result<(), DeviceError> {
        (self.flusher())()
    }

    /// Does the same without access to the device itself, which may be waiting for a request that never ends.
    fn flusher(&self) -> Flusher {
        Box::new(|| Ok(()))
    }

    /// The device's memory of its driver besides features and queue positions, for [`Self::load_state`] of another
    /// device of its kind: at most [`MAX_STATE`](crate::state::MAX_STATE) bytes. No queue runs during the call. A
    /// device that remembers nothing returns the empty state.
    ///
    /// # Errors
    /// [`DeviceError::Save`] when the device can't obtain its state.
    fn save_state(&self) -> Result<Vec<u8>, DeviceError>;

    /// Continues with the state of another device, which may have come from anywhere. No queue runs during the call.
    /// A call before `ack_features` only tests whether the state could be taken over: `reset` forgets it, and the
    /// caller loads it once more after the features.
    ///
    /// # Errors
    /// [`DeviceError::State`] when the bytes can't be such a state; nothing was changed then. [`DeviceError::Host`]
    /// when the host refuses. A device that remembers nothing takes the empty state alone
    /// ([`check_empty`](crate::state::check_empty)).
    fn load_state(&mut self, state: &[u8]) -> Result<(), DeviceError>;

    /// Counters since the device was created.
    fn stats(&self) -> DeviceStats;
}
