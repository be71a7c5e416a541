//! The entropy device (virtio 1.3, section 5.4): fills whatever the driver offers with the host's random bytes.

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use crate::device::{Device, DeviceError, DeviceInfo, QueueParts};
use crate::io::ops::Io;
use crate::io::queues::Queues;
use crate::io::reactor::ReactorPool;
use crate::io::worker::{Handler, Outcome, Step};
use crate::state::check_empty;
use crate::stats::DeviceStats;
use crate::virtqueue::End;
use crate::virtqueue::buffers::Chain;
use crate::virtqueue::split::RING_FEATURES;
use crate::virtqueue::stopping::Stopping;

const QUEUE_SIZE: u16 = 64;
const OPS: &[&str] = &["read"];

/// Most bytes given at once: a driver that wants more asks again (5.4.6.1 asks for one byte at least).
const MAX_BYTES: usize = 4096;

/// A source of entropy.
pub struct RngDevice {
    info: DeviceInfo,
    features: u64,
    queues: Queues,
}

impl RngDevice {
    /// An entropy device; a thread of `pool` serves its queue.
    #[must_use]
    pub fn new(name: &str, pool: &ReactorPool) -> Self {
        Self {
            info: DeviceInfo {
                device_type: VIRTIO_ID_RNG,
                name: name.to_owned(),
                features: RING_FEATURES,
                queue_sizes: vec![QUEUE_SIZE],
                config_len: 0,
            },
            features: 0,
            queues: Queues::new(name, 1, pool.clone()),
        }
    }
}

struct RngHandler {
    bytes: [u8; MAX_BYTES],
}

impl Handler for RngHandler {
    type Request = ();

    const OPS: &'static [&'static str] = OPS;

    fn start(&mut self, chain: &mut Chain, (): &mut (), _: &mut Io<'_>) -> Step {
        let want = chain.writable.len().min(MAX_BYTES as u64) as usize;
        // After boot the kernel's generator neither blocks nor fails for such lengths; if it does, nothing is given.
        let got = rustix::rand::getrandom(&mut self.bytes[..want], rustix::rand::GetRandomFlags::NONBLOCK).unwrap_or(0);
        let written = chain.writable.copy_from(&self.bytes[..got]);
        let ok = written > 0 && !chain.unmapped;
        Step::Done(Outcome { op: 0, written: written as u32, bytes: written as u64, ok })
    }

    fn resume(&mut self, _: &mut Chain, (): &mut (), _: i32, _: &mut Io<'_>) -> Step {
        Step::Fault("entropy requests have nothing to resume")
    }
}

impl Device for RngDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn ack_features(&mut self, features: u64) -> Result<(), DeviceError> {
        self.info.check_features(features)?;
        self.features = features;
        Ok(())
    }

    fn start_queue(&mut self, index: u16, parts: QueueParts) -> Result<(), DeviceError> {
        self.queues.start(index, parts, self.features, || RngHandler { bytes: [0; MAX_BYTES] })
    }

    fn stop(&mut self, queues: &[u16], end: End) -> Stopping {
        self.queues.stop(queues, end)
    }

    fn reset(&mut self) {
        self.queues.reset();
        self.features = 0;
    }

    fn save_state(&self) -> Result<Vec<u8>, DeviceError> {
        Ok(Vec::new())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        check_empty(&self.info.name, state)
    }

    fn stats(&self) -> DeviceStats {
        self.queues.stats()
    }
}
