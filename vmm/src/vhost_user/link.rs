//! One connection to a daemon: the messages that bring it to the device's state. A failure ends the connection, never
//! more than that.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ringvm_backends::device::{GuestMemory, QueueState, RingConfig};
use ringvm_backends::host::event::borrow;
use ringvm_vhost_user::connection::{Connection, Limit};
use ringvm_vhost_user::message::{
    self, F_SKIP_DRAIN, GET_VRING_BASE_SKIP_DRAIN, MAX_FILES, Message, NO_FILE, inflight_body, request_name,
};
use vhost::vhost_user::message::{
    BackendReq, FrontendReq as Request, VhostTransferStateDirection as Direction, VhostTransferStatePhase as Phase,
    VhostUserConfig, VhostUserConfigFlags, VhostUserInflight, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserProtocolFeatures as Protocol, VhostUserTransferDeviceState, VhostUserVirtioFeatures, VhostUserVringAddr,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::error::LinkError;
use super::inflight::Inflight;
use super::transfer::{Transfer, state_pipe};

/// Longest wait for one step: a greeting, a message with its answer, all rings of a device.
const PATIENCE: Duration = Duration::from_secs(10);
/// Protocol features to use if the daemon offers them.
const WANTED: Protocol = Protocol::MQ
    .union(Protocol::REPLY_ACK)
    .union(Protocol::CONFIG)
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::RESET_DEVICE)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::DEVICE_STATE);
/// Wanted both or not at all: a ring may leave requests in the table when it stops, and does so if it is asked to.
const SUSPENDING: Protocol = Protocol::GET_VRING_BASE_INFLIGHT.union(F_SKIP_DRAIN);
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// Events that are read before anything else is done.
const MOST_EVENTS: usize = 64;
/// Longest wait for the rest of events that have begun. Each is sent in one piece.
const EVENT_PATIENCE: Duration = Duration::from_secs(1);
/// More queues than this have no index in the messages that carry descriptors.
const MAX_QUEUES: u16 = 256;

/// The parts of one ring that the daemon needs.
pub(super) struct Vring<'a> {
    pub(super) ring: &'a RingConfig,
    pub(super) from: QueueState,
    pub(super) kick: &'a EventFd,
    pub(super) call: &'a EventFd,
    pub(super) err: &'a EventFd,
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
    wire: Connection,
    /// Where the daemon sends messages of its own.
    events: Option<Connection>,
    features: u64,
    protocol: Protocol,
    /// Of the present step.
    limit: Limit,
}

impl Link {
    /// Greets the daemon, and learns its abilities. With `counted` it is asked for the number of its queues: of a NIC
    /// that is the number of pairs. With `configured` it has the configuration space, if it can.
    pub(super) fn open(socket: UnixStream, counted: bool, configured: bool) -> Result<(Self, About), LinkError> {
        let mut link = Self {
            wire: Connection::new(socket),
            events: None,
            features: 0,
            protocol: Protocol::empty(),
            limit: Limit::after(PATIENCE),
        };
        link.tell(Request::SET_OWNER, &[], &[])?;
        link.features = link.ask(Request::GET_FEATURES)?;
        if link.features & PROTOCOL_FEATURES != 0 {
            let offered = Protocol::from_bits_retain(link.ask(Request::GET_PROTOCOL_FEATURES)?);
            let suspends = offered.contains(SUSPENDING | Protocol::INFLIGHT_SHMFD);
            let mut protocol = offered & if suspends { WANTED | SUSPENDING } else { WANTED };
            protocol.set(Protocol::CONFIG, configured && offered.contains(Protocol::CONFIG));
            link.tell(Request::SET_PROTOCOL_FEATURES, &protocol.bits().to_ne_bytes(), &[])?;
            link.protocol = protocol;
        }
        let mut queues = None;
        if counted && link.protocol.contains(Protocol::MQ) {
            queues = Some(link.ask(Request::GET_QUEUE_NUM)?.min(MAX_QUEUES.into()) as u16);
        }
        if link.protocol.contains(Protocol::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair().map_err(|error| LinkError::broken("making a channel", error))?;
            link.tell(Request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
            link.events = Some(Connection::new(ours));
        }
        let about = About { features: link.features & !PROTOCOL_FEATURES, queues };
        Ok((link, about))
    }

    /// Does something over the connection within the limit of one step.
    pub(super) fn within_limits<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, LinkError>,
    ) -> Result<T, LinkError> {
        self.limit = Limit::after(PATIENCE);
        work(self)
    }

    /// Sends a request that has no answer of its own. A daemon that can acknowledge it does.
    fn tell(&mut self, request: Request, body: &[u8], files: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        let acks = self.protocol.contains(Protocol::REPLY_ACK);
        self.send(request, &message::request(request, acks, body), files)?;
        if acks && whole::<u64>(&self.receive(request)?.0)? != 0 { Err(refused(request)) } else { Ok(()) }
    }

    /// Asks for a number.
    fn ask(&mut self, request: Request) -> Result<u64, LinkError> {
        whole(&self.exchange(request, &[], &[])?.0)
    }

    /// Sends a request that has an answer of its own, and receives that.
    fn exchange(
        &mut self,
        request: Request,
        body: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> Result<(Message, Option<OwnedFd>), LinkError> {
        self.send(request, &message::request(request, false, body), files)?;
        self.receive(request)
    }

    fn send(&self, request: impl Into<u32>, bytes: &[u8], files: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        self.wire.send(bytes, files, self.limit).map_err(|error| LinkError::wire(request_name(request), error))
    }

    /// Receives an answer, with the descriptor that a few bring.
    fn receive(&mut self, request: impl Into<u32>) -> Result<(Message, Option<OwnedFd>), LinkError> {
        let request = request.into();
        let received = self.wire.receive_reply(request, self.limit);
        let mut message = received.map_err(|error| LinkError::wire(request_name(request), error))?;
        let files = message.take_files().map_err(|wrong| LinkError::broken(request_name(request), wrong))?;
        Ok((message, files.into_iter().next()))
    }

    /// The socket, to learn when it ends.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.wire.as_fd()
    }

    /// Becomes readable when the daemon has sent a message.
    pub(super) fn events(&self) -> Option<BorrowedFd<'_>> {
        self.events.as_ref().map(AsFd::as_fd)
    }

    /// Hears it, up to a bound. Returns whether the configuration space has changed.
    pub(super) fn hear(&mut self) -> Result<bool, LinkError> {
        let what = "hearing an event";
        let limit = Limit::after(EVENT_PATIENCE);
        let mut changed = false;
        for _ in 0..MOST_EVENTS {
            let Some(events) = &mut self.events else { break };
            if !events.has_more().map_err(|error| LinkError::wire(what, error))? {
                break;
            }
            let event = events.receive_event(limit).map_err(|error| LinkError::wire(what, error))?;
            let Some(Message { request, need_reply, body, files }) = event else {
                // A daemon without anything to say need not keep its end open.
                self.events = None;
                break;
            };
            files.map_err(|wrong| LinkError::broken(what, wrong))?;
            if request != u32::from(BackendReq::CONFIG_CHANGE_MSG) || !body.is_empty() {
                let message = format!("message {request} of {} bytes is none that was negotiated", body.len());
                return Err(LinkError::broken(what, message));
            }
            changed = true;
            if need_reply && self.protocol.contains(Protocol::REPLY_ACK) {
                // There is room for it, unless the daemon reads none of its answers.
                let sent = events.send(&message::reply(request, &0_u64.to_ne_bytes()), &[], Limit::now());
                sent.map_err(|error| LinkError::broken(what, error))?;
            }
        }
        Ok(changed)
    }

    /// Whether the daemon notes requests in flight in a table.
    pub(super) fn keeps_table(&self) -> bool {
        self.protocol.contains(Protocol::INFLIGHT_SHMFD)
    }

    /// Whether rings end at once, with requests in flight left in the table.
    pub(super) fn suspends(&self) -> bool {
        self.protocol.contains(SUSPENDING)
    }

    /// Whether the configuration space is the daemon's.
    pub(super) fn has_config(&self) -> bool {
        self.protocol.contains(Protocol::CONFIG)
    }

    /// Reads `len` bytes of the configuration space.
    pub(super) fn read_config(&mut self, len: u32) -> Result<Vec<u8>, LinkError> {
        let request = Request::GET_CONFIG;
        let asked = VhostUserConfig::new(0, len, VhostUserConfigFlags::empty());
        let (answer, _) = self.exchange(request, &[asked.as_slice(), &vec![0; len as usize]].concat(), &[])?;
        let is_it = |head: &VhostUserConfig| (head.offset, head.size) == (0, len);
        match answer.body.split_at_checked(size_of::<VhostUserConfig>()) {
            _ if answer.body.is_empty() => Err(refused(request)),
            Some((_, space)) if space.len() == len as usize && answer.parse().as_ref().is_some_and(is_it) => {
                Ok(space.to_vec())
            }
            _ => Err(unfit(&answer)),
        }
    }

    /// Writes to the configuration space.
    pub(super) fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), LinkError> {
        let head = VhostUserConfig::new(offset, data.len() as u32, VhostUserConfigFlags::empty());
        self.tell(Request::SET_CONFIG, &[head.as_slice(), data].concat(), &[])
    }

    /// Sends the features that the driver has accepted.
    pub(super) fn set_features(&mut self, features: u64) -> Result<(), LinkError> {
        let features = features | self.features & PROTOCOL_FEATURES;
        self.tell(Request::SET_FEATURES, &features.to_ne_bytes(), &[])
    }

    /// Shows it the guest's memory.
    pub(super) fn set_memory(&mut self, memory: &GuestMemory) -> Result<(), LinkError> {
        let what = "sharing the guest's memory";
        let count = memory.num_regions();
        if count > MAX_FILES {
            return Err(LinkError::ours(what, format!("it lies in {count} pieces, and a message takes {MAX_FILES}")));
        }
        let (mut body, mut files) = (VhostUserMemory::new(count as u32).as_slice().to_vec(), Vec::new());
        for region in memory.iter() {
            let file = region.file_offset().ok_or_else(|| LinkError::ours(what, "it lies in no file"))?;
            let [guest, host] = [region.start_addr().0, region.as_ptr() as u64];
            body.extend(VhostUserMemoryRegion::new(guest, region.len(), host, file.start()).as_slice());
            files.push(file.file().as_fd());
        }
        self.tell(Request::SET_MEM_TABLE, &body, &files)
    }

    /// Lets the daemon note requests in flight: in the memory of `kept`, or else in memory of its own, which is kept
    /// then.
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
                let (answer, file) = self.exchange(Request::GET_INFLIGHT_FD, &inflight_body(&wanted), &[])?;
                let about = answer.parse_inflight().filter(|_| answer.body.len() <= size_of::<VhostUserInflight>());
                let (Some(about), Some(file)) = (about, file) else { return Err(unfit(&answer)) };
                // Keep the requested geometry; daemons answer with the size and offset only.
                let about = VhostUserInflight { num_queues: queues, queue_size, ..about };
                kept.insert(Inflight::new(about, file.into())?)
            }
        };
        self.tell(Request::SET_INFLIGHT_FD, &inflight_body(inflight.about()), &[inflight.file()])
    }

    /// Has a ring served.
    pub(super) fn start(&mut self, index: u16, memory: &GuestMemory, vring: &Vring<'_>) -> Result<(), LinkError> {
        let host = |address: u64| {
            let host = memory.get_host_address(GuestAddress(address));
            host.map(|host| host as u64)
                .map_err(|error| LinkError::ours("finding the ring in memory", error.to_string()))
        };
        if index >= MAX_QUEUES {
            return Err(LinkError::ours("starting a ring", format!("messages have no number for ring {index}")));
        }
        let RingConfig { size, desc, avail, used } = *vring.ring;
        let state = |number: u32| VhostUserVringState::new(index.into(), number);
        let flags = VhostUserVringAddrFlags::empty();
        let addresses = VhostUserVringAddr::new(index.into(), flags, host(desc)?, host(used)?, host(avail)?, 0);
        let line = u64::from(index).to_ne_bytes();
        self.tell(Request::SET_VRING_NUM, state(size.into()).as_slice(), &[])?;
        self.tell(Request::SET_VRING_ADDR, addresses.as_slice(), &[])?;
        self.tell(Request::SET_VRING_BASE, state(vring.from.next_avail.into()).as_slice(), &[])?;
        self.tell(Request::SET_VRING_CALL, &line, &[borrow(vring.call)])?;
        self.tell(Request::SET_VRING_ERR, &line, &[borrow(vring.err)])?;
        self.tell(Request::SET_VRING_KICK, &line, &[borrow(vring.kick)])?;
        if self.features & PROTOCOL_FEATURES != 0 {
            self.tell(Request::SET_VRING_ENABLE, state(1).as_slice(), &[])?;
        }
        Ok(())
    }

    /// Ends rings, all together, and returns the position of each. If the daemon supports it they end at once, with
    /// requests in flight left in the table; else with nothing in flight.
    pub(super) fn stop(&mut self, indices: &[u16]) -> Result<Vec<u16>, LinkError> {
        let request = if self.suspends() { GET_VRING_BASE_SKIP_DRAIN } else { Request::GET_VRING_BASE.into() };
        // All are asked, in one piece, before one is waited for.
        let ask = |&index: &u16| message::request(request, false, VhostUserVringState::new(index.into(), 0).as_slice());
        self.send(request, &indices.iter().flat_map(ask).collect::<Vec<_>>(), &[])?;
        let position = |&index: &u16| {
            let VhostUserVringState { index: ring, num: base } = whole(&self.receive(request)?.0)?;
            let position = u16::try_from(base).ok().filter(|_| ring == u32::from(index));
            position.ok_or_else(|| {
                let message = format!("the answer for ring {index} is {base} of ring {ring}");
                LinkError::broken(request_name(request), message)
            })
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
        let (out, into) = state_pipe().map_err(|error| LinkError::broken(what, error))?;
        self.begin_transfer(Direction::SAVE, into)?;
        // A daemon that fails closes its end, and says why when it is asked.
        let state = Transfer::new(out).read();
        self.check_state()?;
        state.map_err(|error| LinkError::ours(what, error))
    }

    /// Gives the daemon the state of another device. All rings are stopped.
    pub(super) fn load_state(&mut self, state: &[u8]) -> Result<(), LinkError> {
        let what = "loading the state of another device";
        let (out, into) = state_pipe().map_err(|error| LinkError::broken(what, error))?;
        self.begin_transfer(Direction::LOAD, out)?;
        let written = Transfer::new(into).write(state);
        self.check_state()?;
        written.map_err(|error| LinkError::ours(what, error))
    }

    /// Gives the daemon its end of a pipe.
    fn begin_transfer(&mut self, direction: Direction, theirs: OwnedFd) -> Result<(), LinkError> {
        let request = Request::SET_DEVICE_STATE_FD;
        let body = VhostUserTransferDeviceState::new(direction, Phase::STOPPED);
        let (answer, file) = self.exchange(request, body.as_slice(), &[theirs.as_fd()])?;
        match (whole(&answer)?, file) {
            (NO_FILE, None) => Ok(()),
            (0, Some(_)) => {
                let message = "it wants another descriptor than the pipe that it was given";
                Err(LinkError::ours(request_name(request), message))
            }
            _ => Err(refused(request)),
        }
    }

    /// Asks whether the transfer was a success.
    fn check_state(&mut self) -> Result<(), LinkError> {
        let request = Request::CHECK_DEVICE_STATE;
        if self.ask(request)? == 0 { Ok(()) } else { Err(refused(request)) }
    }

    /// Back to the state before the features were accepted, where the daemon knows of such a thing.
    pub(super) fn reset(&mut self) -> Result<(), LinkError> {
        if self.protocol.contains(Protocol::RESET_DEVICE) {
            self.tell(Request::RESET_DEVICE, &[], &[])?;
        }
        Ok(())
    }
}

/// The whole payload of an answer.
fn whole<T: ByteValued + Default>(answer: &Message) -> Result<T, LinkError> {
    answer.parse_all().ok_or_else(|| unfit(answer))
}

/// The daemon's answer is that it won't.
fn refused(request: Request) -> LinkError {
    LinkError::ours(request_name(request), "the daemon refuses it")
}

/// Answers to such a request have another form.
fn unfit(answer: &Message) -> LinkError {
    let what = format!("its answer of {} bytes has another form", answer.body.len());
    LinkError::broken(request_name(answer.request), what)
}
