//! The socket device (virtio 1.3, section 5.10), for `vhost-user-backend`: programs of a guest and of its host talk over
//! stream sockets, of the family AF_VSOCK there and Unix sockets here.
//!
//! The scheme is that of Firecracker and Cloud Hypervisor. A program of the host connects to the device's Unix socket and
//! sends `CONNECT <port>\n`. When a program of the guest accepts, it gets `OK <port of its end>\n`, and from there on the two
//! have a connection. A program of the guest connects to CID 2 and a port, and reaches the program that listens at the
//! socket's path with `_<port>` appended.
//!
//! A packet goes ring → `queues` → `muxer` → `connection` → socket, and back. One thread serves both queues and all
//! sockets; it waits for none of them.

mod connection;
mod handshake;
mod muxer;
mod options;
mod packet;
mod poll;
mod queues;
mod socket;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringvm_backends::options::Checked;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringRwLock};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use self::muxer::{Limits, Muxer};
use crate::hosted::Hosted;
use crate::listeners::Listeners;
use crate::serving::Turn;

pub use options::{OpenError, VsockOptions};

/// The guest's memory.
type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Receive, transmit, event.
const NUM_QUEUES: usize = 3;
const RX: u16 = 0;
const TX: u16 = 1;
/// Our own descriptors. The number above that of the queues is the server's.
const POLL_EVENT: u16 = NUM_QUEUES as u16 + 1;

const QUEUE_SIZE: usize = 256;
/// Bytes of the configuration space: `guest_cid`.
const CONFIG_LEN: u32 = 8;

/// VIRTIO_VSOCK_F_STREAM.
const F_STREAM: u64 = 1 << 0;
/// VIRTIO_VSOCK_F_NO_IMPLIED_STREAM: with it, no other type of sockets means no streams.
const F_NO_IMPLIED_STREAM: u64 = 1 << 2;

/// Most packets of a turn, each way. The thread has other things to do too, e.g. to stop.
const MAX_PACKETS: usize = 4 * QUEUE_SIZE;

/// Makes a vsock device.
///
/// # Errors
/// When its socket can't be made, or the host refuses something else.
pub fn open(name: &str, options: &Checked<VsockOptions>) -> Result<Hosted<Arc<Vsock>>, OpenError> {
    let backend = Arc::new(Vsock::new(name, options)?);
    let hosted = Hosted::new(name, VIRTIO_ID_VSOCK, CONFIG_LEN, Arc::clone(&backend))?;
    for listeners in hosted.listeners() {
        backend.listen(&*listeners).map_err(|source| OpenError::Host {
            device: name.to_owned(),
            what: "listening to its sockets",
            source,
        })?;
    }
    Ok(hosted)
}

/// The backend of a vsock device.
pub struct Vsock {
    cid: u32,
    state: Mutex<State>,
}

struct State {
    muxer: Muxer,
    mem: Option<Memory>,
    /// Where the receive and the transmit queue were left.
    left: [Option<u16>; 2],
}

impl Vsock {
    /// A backend whose socket is there. `name` stands in front of messages.
    ///
    /// # Errors
    /// When the socket can't be made, or the host refuses something else.
    pub fn new(name: &str, options: &Checked<VsockOptions>) -> Result<Self, OpenError> {
        Self::with_limits(name, options, Limits::default())
    }

    fn with_limits(name: &str, options: &VsockOptions, limits: Limits) -> Result<Self, OpenError> {
        let muxer = Muxer::new(name, options.cid, options.socket.clone(), limits)?;
        Ok(Self { cid: options.cid, state: Mutex::new(State { muxer, mem: None, left: [None; 2] }) })
    }

    /// Has the backend called for its sockets. They have one descriptor together, which stays for as long as the backend.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn listen(&self, listeners: &dyn Listeners) -> io::Result<()> {
        let fd = self.lock().muxer.poll().fd();
        listeners.register_listener(fd, EventSet::IN, u64::from(POLL_EVENT))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn reset(&mut self) {
        self.muxer.reset();
        self.left = [None; 2];
    }

    /// Serves both queues until neither goes on, or others are to have their turn.
    fn turn(&mut self, vrings: &[VringRwLock<Memory>]) -> io::Result<()> {
        let (Some(rx), Some(tx), Some(mem)) = (vrings.get(usize::from(RX)), vrings.get(usize::from(TX)), &self.mem)
        else {
            return Ok(());
        };
        // One look at the memory for all packets: the driver's may be replaced meanwhile.
        let mem = mem.memory();
        // Not every frontend says when the driver is reset. A queue that goes on elsewhere than it was left is that of a
        // driver that knows nothing of the connections.
        let now = [queues::position(rx), queues::position(tx)];
        let is_moved = |(left, now): (&Option<u16>, &Option<u16>)| left.is_some() && now.is_some() && left != now;
        if self.left.iter().zip(&now).any(is_moved) {
            self.muxer.reset();
            self.left = [None; 2];
        }
        let mut left = MAX_PACKETS;
        loop {
            let taken = queues::transmit(tx, &mem, &mut self.muxer, left)?;
            let given = queues::receive(rx, &mem, &mut self.muxer, left)?;
            if taken.turn == Turn::More || given.turn == Turn::More {
                self.muxer.poll().come_again();
                break;
            }
            if taken.chains + given.chains == 0 {
                break;
            }
            left = left.saturating_sub(taken.chains.max(given.chains));
        }
        for (left, vring) in self.left.iter_mut().zip([rx, tx]) {
            *left = queues::position(vring).or(*left);
        }
        Ok(())
    }
}

impl VhostUserBackend for Vsock {
    type Bitmap = ();
    type Vring = VringRwLock<Memory>;

    fn num_queues(&self) -> usize {
        NUM_QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | F_STREAM
            | F_NO_IMPLIED_STREAM
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn acked_features(&self, features: u64) {
        self.lock().muxer.streams = features & F_STREAM != 0 || features & F_NO_IMPLIED_STREAM == 0;
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn reset_device(&self) {
        self.lock().reset();
    }

    fn set_event_idx(&self, _: bool) {
        // The server tells the vrings, which do the rest.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = u64::from(self.cid).to_le_bytes();
        let start = offset as usize;
        let end = start.saturating_add(size as usize);
        config.get(start..end).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&self, mem: Memory) -> io::Result<()> {
        self.lock().mem = Some(mem);
        Ok(())
    }

    fn stop_vring(&self, _: u32) -> io::Result<()> {
        // No chain is kept between turns, so waiting for the turn at hand is enough.
        drop(self.lock());
        Ok(())
    }

    fn handle_event(&self, event: u16, _: EventSet, vrings: &[Self::Vring], _: usize) -> io::Result<()> {
        let mut state = self.lock();
        match event {
            RX | TX => {}
            POLL_EVENT => state.muxer.on_events()?,
            // Buffers for events, of which there are none: a connection does not outlive the guest's move to another host.
            _ => return Ok(()),
        }
        state.turn(vrings)
    }
}

#[cfg(test)]
mod tests;
