//! One connection to a daemon: the messages that bring it to the device's state. A failure ends the connection, never
//! more than that.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ringvm_backends::device::{GuestMemory, QueueState, RingConfig};
use ringvm_backends::host::event::is_raised;
use vhost::vhost_user::message::{
    VhostTransferStateDirection as Direction, VhostTransferStatePhase as Phase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{
    Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandlerMut,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::error::{Context, LinkError};
use super::inflight::{Inflight, close_elsewhere};
use super::patience::Patience;
use super::transfer::{Transfer, state_pipe};

/// Longest wait for what is done in one go: a greeting, a message with its answer, all rings of a device.
const PATIENCE: Duration = Duration::from_secs(10);
/// Protocol features to use if the daemon offers them.
const WANTED: Protocol = Protocol::MQ
    .union(Protocol::REPLY_ACK)
    .union(Protocol::CONFIG)
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::RESET_DEVICE)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::DEVICE_STATE);
/// Bits that the crate has no names for, wanted both or not at all: a ring may leave requests in the table when it
/// stops, and does so if it is asked to.
const SUSPENDING: Protocol = Protocol::from_bits_retain(1 << 20 | 1 << 23);
/// GET_VRING_BASE.
const GET_VRING_BASE: u32 = 11;
/// GET_PROTOCOL_FEATURES.
const GET_PROTOCOL_FEATURES: u32 = 15;
/// GET_VRING_BASE_SKIP_DRAIN.
const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;
/// Version 1 of the protocol, and the bit of a reply.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// Events that are heard before anything else is done.
const MOST_EVENTS: usize = 64;
/// More queues than this have no index in the messages that carry descriptors.
const MAX_QUEUES: u64 = 256;

/// The parts of one ring that the daemon needs.
pub(super) struct Vring<'a> {
    pub(super) ring: &'a RingConfig,
    pub(super) from: QueueState,
    pub(super) kick: &'a EventFd,
    pub(super) call: &'a EventFd,
    pub(super) err: &'a EventFd,
}

/// Hears of changes to the configuration space.
struct Listener {
    changed: Arc<AtomicBool>,
}

impl VhostUserFrontendReqHandlerMut for Listener {
    fn handle_config_change(&mut self) -> HandlerResult<u64> {
        // Looked at without being in the middle of a message of ours.
        self.changed.store(true, Ordering::Release);
        Ok(0)
    }
}

/// A daemon's description of its device.
pub(super) struct About {
    /// Device features, without those of the protocol.
    pub(super) features: u64,
    /// Most queues it serves, if it says.
    pub(super) queues: Option<u16>,
}

/// A live connection.
pub(super) struct Link {
    frontend: Frontend,
    socket: UnixStream,
    features: u64,
    protocol: Protocol,
    events: Option<FrontendReqHandler<Mutex<Listener>>>,
    patience: Patience,
    config_changed: Arc<AtomicBool>,
}

impl Link {
    /// Greets the other side, and hears what it can. `counted` is whether it is asked for the number of its queues: of a NIC it
    /// is the number of pairs, and the crate would refuse the others.
    pub(super) fn open(socket: UnixStream, counted: bool) -> Result<(Self, About), LinkError> {
        let patience = Patience::new(socket.as_fd()).context("limiting waits")?;
        patience.limit(Some(PATIENCE));
        let copy = socket.try_clone().context("duplicating the socket")?;
        let mut frontend = Frontend::from_stream(copy, MAX_QUEUES);
        frontend.set_owner().context("SET_OWNER")?;
        let features = frontend.get_features().context("GET_FEATURES")?;
        let mut protocol = Protocol::empty();
        let mut queues = None;
        if features & PROTOCOL_FEATURES != 0 {
            protocol = frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")? & WANTED;
            // Once more, for what the crate leaves out of the answer.
            let what = "GET_PROTOCOL_FEATURES";
            (&socket).write_all(&message(GET_PROTOCOL_FEATURES, &[])).context(what)?;
            let [low, high] = hear(&socket, GET_PROTOCOL_FEATURES).context(what)?;
            if Protocol::from_bits_retain(u64::from(high) << 32 | u64::from(low))
                .contains(SUSPENDING | Protocol::INFLIGHT_SHMFD)
            {
                protocol |= SUSPENDING;
            }
            frontend.set_protocol_features(protocol).context("SET_PROTOCOL_FEATURES")?;
        }
        if protocol.contains(Protocol::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        if counted && protocol.contains(Protocol::MQ) {
            let count = frontend.get_queue_num().context("GET_QUEUE_NUM")?;
            queues = Some(count.min(MAX_QUEUES) as u16);
        }
        let config_changed = Arc::new(AtomicBool::new(false));
        let mut events = None;
        if protocol.contains(Protocol::BACKEND_REQ) {
            let listener = Arc::new(Mutex::new(Listener { changed: Arc::clone(&config_changed) }));
            let mut handler = FrontendReqHandler::new(listener).context("making a channel for events")?;
            handler.set_reply_ack_flag(protocol.contains(Protocol::REPLY_ACK));
            let socket = handler.as_raw_fd();
            // SAFETY: the handler owns the socket, and is borrowed for as long.
            #[allow(unsafe_code, reason = "the crate shows this socket as a number only")]
            let socket = unsafe { BorrowedFd::borrow_raw(socket) };
            patience.also(socket).context("limiting waits")?;
            frontend.set_backend_request_fd(&handler.get_tx_raw_fd()).context("SET_BACKEND_REQ_FD")?;
            events = Some(handler);
        }
        let about = About { features: features & !PROTOCOL_FEATURES, queues };
        patience.limit(None);
        Ok((Self { frontend, socket, features, protocol, events, patience, config_changed }, about))
    }

    /// Does something over the connection that ends when it is not answered.
    pub(super) fn within_limits<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, LinkError>,
    ) -> Result<T, LinkError> {
        self.patience.limit(Some(PATIENCE));
        let result = work(self);
        self.patience.limit(None);
        result.map_err(|error| match self.patience.has_ended() {
            true => LinkError::broken(error.what, "it does not answer"),
            false => error,
        })
    }

    /// Whether the other side was waited for in vain.
    pub(super) fn hangs(&self) -> bool {
        self.patience.has_ended()
    }

    /// The socket, to learn when it ends.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Becomes readable when the daemon has sent a message.
    #[allow(unsafe_code, reason = "the crate shows this socket as a number only")]
    pub(super) fn events(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the handler owns the socket, and is borrowed for as long.
        self.events.as_ref().map(|events| unsafe { BorrowedFd::borrow_raw(events.as_raw_fd()) })
    }

    /// Hears it, up to a bound. Returns whether the configuration space has changed.
    pub(super) fn hear(&mut self) -> Result<bool, LinkError> {
        for _ in 0..MOST_EVENTS {
            if !self.events().is_some_and(is_raised) {
                break;
            }
            if let Some(events) = &mut self.events {
                events.handle_request().context("hearing an event")?;
            }
        }
        Ok(self.config_changed.swap(false, Ordering::AcqRel))
    }

    /// Whether the daemon notes requests in flight in a table.
    pub(super) fn keeps_table(&self) -> bool {
        self.protocol.contains(Protocol::INFLIGHT_SHMFD)
    }

    /// Whether rings end at once, with what is in flight left in the table.
    pub(super) fn suspends(&self) -> bool {
        self.protocol.contains(SUSPENDING)
    }

    /// Whether the configuration space is the daemon's.
    pub(super) fn has_config(&self) -> bool {
        self.protocol.contains(Protocol::CONFIG)
    }

    /// Reads `len` bytes of the configuration space.
    pub(super) fn read_config(&mut self, len: u32) -> Result<Vec<u8>, LinkError> {
        let (_, space) = self
            .frontend
            .get_config(0, len, VhostUserConfigFlags::empty(), &vec![0; len as usize])
            .context("GET_CONFIG")?;
        Ok(space)
    }

    /// Writes to the configuration space.
    pub(super) fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), LinkError> {
        self.frontend.set_config(offset, VhostUserConfigFlags::empty(), data).context("SET_CONFIG")
    }

    /// Says what the driver has accepted.
    pub(super) fn set_features(&mut self, features: u64) -> Result<(), LinkError> {
        self.frontend.set_features(features | self.features & PROTOCOL_FEATURES).context("SET_FEATURES")
    }

    /// Shows it the guest's memory.
    pub(super) fn set_memory(&mut self, memory: &GuestMemory) -> Result<(), LinkError> {
        let regions = memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect::<Result<Vec<_>, _>>();
        let regions = regions.map_err(|error| LinkError::ours("sharing the guest's memory", error.to_string()))?;
        self.frontend.set_mem_table(&regions).context("SET_MEM_TABLE")?;
        Ok(())
    }

    /// Has the daemon note requests in flight: in the memory that `kept` names, or else in some of its own, which is kept then.
    pub(super) fn set_inflight(
        &mut self,
        kept: &mut Option<Inflight>,
        queues: u16,
        queue_size: u16,
    ) -> Result<(), LinkError> {
        if !self.protocol.contains(Protocol::INFLIGHT_SHMFD) {
            return Ok(());
        }
        let inflight = match kept {
            Some(inflight) => inflight,
            None => {
                let wanted = VhostUserInflight { num_queues: queues, queue_size, ..VhostUserInflight::default() };
                let (about, file) = self.frontend.get_inflight_fd(&wanted).context("GET_INFLIGHT_FD")?;
                // The crate leaves what it receives open to programs that are started later.
                rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::CLOEXEC).context("GET_INFLIGHT_FD")?;
                // Keep the requested geometry; daemons answer with the size and offset only.
                let about = VhostUserInflight { num_queues: queues, queue_size, ..about };
                kept.insert(Inflight::new(about, file)?)
            }
        };
        self.frontend.set_inflight_fd(inflight.about(), inflight.fd()).context("SET_INFLIGHT_FD")
    }

    /// Has a ring served.
    pub(super) fn start(&mut self, index: u16, memory: &GuestMemory, vring: &Vring<'_>) -> Result<(), LinkError> {
        let host = |address: u64| {
            let host = memory.get_host_address(GuestAddress(address));
            host.map(|host| host as u64)
                .map_err(|error| LinkError::ours("finding the ring in memory", error.to_string()))
        };
        let RingConfig { size, desc, avail, used } = *vring.ring;
        let addresses = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: host(desc)?,
            used_ring_addr: host(used)?,
            avail_ring_addr: host(avail)?,
            log_addr: None,
        };
        let queue = usize::from(index);
        self.frontend.set_vring_num(queue, size).context("SET_VRING_NUM")?;
        self.frontend.set_vring_addr(queue, &addresses).context("SET_VRING_ADDR")?;
        self.frontend.set_vring_base(queue, vring.from.next_avail).context("SET_VRING_BASE")?;
        self.frontend.set_vring_call(queue, vring.call).context("SET_VRING_CALL")?;
        self.frontend.set_vring_err(queue, vring.err).context("SET_VRING_ERR")?;
        self.frontend.set_vring_kick(queue, vring.kick).context("SET_VRING_KICK")?;
        if self.features & PROTOCOL_FEATURES != 0 {
            self.frontend.set_vring_enable(queue, true).context("SET_VRING_ENABLE")?;
        }
        Ok(())
    }

    /// Has rings ended, all together, and hears where each stands. Where the daemon knows how, that is at once, with what is in
    /// flight left in the table; else with nothing in flight.
    pub(super) fn stop(&mut self, indices: &[u16]) -> Result<Vec<u16>, LinkError> {
        let (request, what) = match self.suspends() {
            true => (GET_VRING_BASE_SKIP_DRAIN, "GET_VRING_BASE_SKIP_DRAIN"),
            false => (GET_VRING_BASE, "GET_VRING_BASE"),
        };
        // The ring, and room for a position. All are asked before one is waited for.
        let ask = |&index: &u16| message(request, [index.into(), 0].map(u32::to_ne_bytes).as_flattened());
        (&self.socket).write_all(&indices.iter().flat_map(ask).collect::<Vec<_>>()).context(what)?;
        let position = |&index: &u16| {
            let [ring, base] = hear(&self.socket, request).context(what)?;
            let position = u16::try_from(base).ok().filter(|_| ring == u32::from(index));
            position
                .ok_or_else(|| LinkError::broken(what, format!("the answer for ring {index} is {base} of ring {ring}")))
        };
        indices.iter().map(position).collect()
    }

    /// Whether the daemon hands the state of its device over.
    pub(super) fn has_state(&self) -> bool {
        self.protocol.contains(Protocol::DEVICE_STATE)
    }

    /// Has the daemon say the state of its device. All rings are stopped.
    pub(super) fn save_state(&mut self) -> Result<Vec<u8>, LinkError> {
        let what = "saving the state of its device";
        let (out, into) = state_pipe().context(what)?;
        self.begin_transfer(Direction::SAVE, into)?;
        // A daemon that fails closes its end, and says why when it is asked.
        let state = Transfer::new(out).read();
        self.frontend.check_device_state().context("CHECK_DEVICE_STATE")?;
        state.map_err(|error| LinkError::ours(what, error.to_string()))
    }

    /// Gives the daemon the state of another device. All rings are stopped.
    pub(super) fn load_state(&mut self, state: &[u8]) -> Result<(), LinkError> {
        let what = "loading the state of another device";
        let (out, into) = state_pipe().context(what)?;
        self.begin_transfer(Direction::LOAD, out)?;
        let written = Transfer::new(into).write(state);
        self.frontend.check_device_state().context("CHECK_DEVICE_STATE")?;
        written.map_err(|error| LinkError::ours(what, error.to_string()))
    }

    /// Gives the daemon its end of a pipe.
    fn begin_transfer(&mut self, direction: Direction, theirs: OwnedFd) -> Result<(), LinkError> {
        let what = "SET_DEVICE_STATE_FD";
        match self.frontend.set_device_state_fd(direction, Phase::STOPPED, theirs).context(what)? {
            None => Ok(()),
            Some(file) => {
                close_elsewhere(file);
                Err(LinkError::ours(what, "it wants another descriptor than the pipe that it was given"))
            }
        }
    }

    /// Back to the state before the features were accepted, where the daemon knows of such a thing.
    pub(super) fn reset(&mut self) -> Result<(), LinkError> {
        if self.protocol.contains(Protocol::RESET_DEVICE) {
            self.frontend.reset_device().context("RESET_DEVICE")?;
        }
        Ok(())
    }
}

/// A message that the crate has no name for. Nothing else is under way on the socket: whatever the crate sends has its answer
/// before it returns.
fn message(request: u32, body: &[u8]) -> Vec<u8> {
    let header = [request, VERSION, body.len() as u32];
    header.map(u32::to_ne_bytes).as_flattened().iter().chain(body).copied().collect()
}

/// Receives the answer to such a message: two fields of 32 bits.
fn hear(mut socket: &UnixStream, request: u32) -> io::Result<[u32; 2]> {
    let mut header = [[0; 4]; 3];
    socket.read_exact(header.as_flattened_mut())?;
    let [what, flags, size] = header.map(u32::from_ne_bytes);
    if what != request || flags & REPLY == 0 || size != 8 {
        let what = format!("the answer is message {what} with flags {flags:#x} and {size} bytes");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let mut fields = [[0; 4]; 2];
    socket.read_exact(fields.as_flattened_mut())?;
    Ok(fields.map(u32::from_ne_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pitfall_54_an_answer_to_something_else_is_none() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut say = |words: &[u32]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            theirs.write_all(&bytes).unwrap();
        };
        say(&[45, 5, 8, 1, 77]);
        assert_eq!(hear(&ours, 45).unwrap(), [1, 77]);
        for header in [[11, 5, 8], [45, 1, 8], [45, 5, 12]] {
            say(&header);
            assert_eq!(hear(&ours, 45).unwrap_err().kind(), io::ErrorKind::InvalidData, "{header:?}");
        }
        drop(theirs);
        assert_eq!(hear(&ours, 45).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
