//! A disk in memory, written for the `vhost-user-backend` crate as anybody would write it who does not know RingVM. Its
//! daemon is the crate's own; `ringvm_hosted::Hosted` takes the same disk into a process of ours.
//!
//! ```text
//! cargo run --release -p ringvm-hosted --example ramdisk -- /run/r.sock 64
//! ringvm run --kernel vmlinuz … --disk socket=/run/r.sock
//! ```

use std::io::{self, Read, Write};
use std::sync::{Arc, RwLock};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{QueueOwnedT, Reader, Writer};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Statuses of requests.
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// The disk.
pub(crate) struct RamDisk {
    bytes: Vec<u8>,
    memory: Memory,
    event_idx: bool,
}

impl RamDisk {
    /// An empty disk of so many sectors of 512 bytes.
    pub(crate) fn new(sectors: usize) -> Self {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        Self { bytes: vec![0; sectors * 512], memory, event_idx: false }
    }

    /// Does what a request asks for. Returns its status.
    fn request(&mut self, reader: &mut Reader<'_>, data: &mut Writer<'_>) -> io::Result<u8> {
        let [kind, _, sector, sector_high] = [(); 4].map(|()| reader.read_obj::<u32>());
        let at = (u64::from(sector?) | u64::from(sector_high?) << 32).saturating_mul(512);
        let len = if kind.as_ref().is_ok_and(|kind| *kind == VIRTIO_BLK_T_OUT) {
            reader.available_bytes()
        } else {
            data.available_bytes()
        };
        let part = usize::try_from(at).ok().and_then(|at| self.bytes.get_mut(at..)?.get_mut(..len));
        match (kind?, part) {
            (VIRTIO_BLK_T_IN, Some(part)) => data.write_all(part).map(|()| OK),
            (VIRTIO_BLK_T_OUT, Some(part)) => reader.read_exact(part).map(|()| OK),
            (VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT, None) => Ok(IOERR),
            (VIRTIO_BLK_T_FLUSH, _) => Ok(OK),
            (VIRTIO_BLK_T_GET_ID, _) => data.write_all(b"ramdisk\0\0\0\0\0\0\0\0\0\0\0\0\0").map(|()| OK),
            _ => Ok(UNSUPP),
        }
    }
}

impl VhostUserBackendMut for RamDisk {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        const OWN: u32 = 30; // VHOST_USER_F_PROTOCOL_FEATURES
        [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_BLK_F_FLUSH, OWN]
            .iter()
            .fold(0, |features, bit| features | 1 << bit)
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut space = (self.bytes.len() as u64 / 512).to_le_bytes().to_vec();
        space.resize(60, 0);
        space.get(offset as usize..).unwrap_or_default().iter().copied().take(size as usize).collect()
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    /// Without it the crate's daemon waits for its threads for ever.
    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(&mut self, _: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        let memory = self.memory.memory();
        loop {
            vrings[0].disable_notification().map_err(io::Error::other)?;
            loop {
                let chain = vrings[0].get_mut().get_queue_mut().iter(memory.clone()).map_err(io::Error::other)?.next();
                let Some(chain) = chain else { break };
                let head = chain.head_index();
                let mut reader = chain.clone().reader(&*memory).map_err(io::Error::other)?;
                let mut data = chain.writer(&*memory).map_err(io::Error::other)?;
                let mut status = data.split_at(data.available_bytes().saturating_sub(1)).map_err(io::Error::other)?;
                let answer = self.request(&mut reader, &mut data).unwrap_or(IOERR);
                status.write_obj(answer)?;
                vrings[0].add_used(head, data.bytes_written() as u32 + 1).map_err(io::Error::other)?;
            }
            if vrings[0].needs_notification().map_err(io::Error::other)? {
                vrings[0].signal_used_queue()?;
            }
            if !vrings[0].enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, socket, megabytes] = &arguments[..] else { panic!("usage: ramdisk SOCKET MEGABYTES") };
    let megabytes: usize = megabytes.parse().expect("a number of megabytes");
    let disk = Arc::new(RwLock::new(RamDisk::new(megabytes << 11)));
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("ramdisk".into(), disk, memory).expect("the daemon starts");
    // One frontend: the crate's daemon takes no second one.
    daemon.serve(socket).expect("the frontend keeps to the protocol");
}
