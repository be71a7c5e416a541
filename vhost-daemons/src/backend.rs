//! What a frontend has said so far, and what that means for the device (vhost-user specification, "Front-end message types").
//!
//! Messages are taken in any order that makes sense, and nothing in them is believed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ringvm_backends::device::{Device, DeviceError, End, Suspended};
use ringvm_backends::virtqueue::interrupt::Interrupt;
use thiserror::Error;
use tracing::info;
use vhost::vhost_user::message::{
    FrontendReq, VhostUserConfig, VhostUserInflight, VhostUserLog, VhostUserMemory, VhostUserMemoryRegion,
    VhostUserProtocolFeatures as Protocol, VhostUserSingleMemoryRegion, VhostUserU64, VhostUserVringAddr,
    VhostUserVringState,
};
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use vm_memory::ByteValued;

use crate::dirty::{self, F_LOG_ALL, Logging, Mapped};
use crate::inflight::Inflight;
use crate::mailbox::{Event, Wanted};
use crate::memory::{MAX_REGIONS, Memory, MemoryError};
use crate::message::{MAX_FILES, Message};
use crate::state::{State, StateError};
use crate::vring::{Addresses, MAX_SIZE, Vring, VringError};
use crate::{backend_channel, descriptor, inflight, nic};

/// VHOST_USER_F_PROTOCOL_FEATURES: protocol features are negotiated, and rings start disabled.
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// The payload of SET_VRING_KICK and its kin: the ring, and a flag for "no descriptor".
const VRING_INDEX: u64 = 0xff;
const VRING_NO_FD: u64 = 1 << 8;
/// In the answer to SET_DEVICE_STATE_FD: there is no descriptor, the one that came is taken. The bits below tell of an error.
const STATE_NO_FD: u64 = 1 << 8;
/// Longest piece of configuration space that is read at once.
const MAX_CONFIG: u32 = 4096;
/// How often to look whether a ring that drains is still wanted to.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// Longest time that rings which are reset may need for what can't be cancelled.
const RESET_PATIENCE: Duration = Duration::from_secs(10);

/// VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT: GET_VRING_BASE leaves what can be cancelled in the table of requests in flight.
const SUSPENDS: Protocol = Protocol::from_bits_retain(1 << 20);
/// VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN: it is [`SKIP_DRAIN`] that does, and GET_VRING_BASE does not.
const SUSPENDS_IF_ASKED: Protocol = Protocol::from_bits_retain(1 << 23);
/// VHOST_USER_GET_VRING_BASE_SKIP_DRAIN, for which the crate has no name yet.
pub(crate) const SKIP_DRAIN: u32 = 45;

/// What is offered: all that is served.
fn protocol_features() -> Protocol {
    SUSPENDS
        | SUSPENDS_IF_ASKED
        | Protocol::MQ
        | Protocol::LOG_SHMFD
        | Protocol::REPLY_ACK
        | Protocol::BACKEND_REQ
        | Protocol::CONFIG
        | Protocol::INFLIGHT_SHMFD
        | Protocol::RESET_DEVICE
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::STATUS
        | Protocol::DEVICE_STATE
}

/// Why a request is not met.
#[derive(Debug, Error)]
pub(crate) enum Refused {
    #[error("{0}")]
    Malformed(String),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Vring(#[from] VringError),
    /// The frontend can go on: without these features no ring starts, and it may choose others.
    #[error(transparent)]
    Features(DeviceError),
    #[error("the table of requests in flight: {0}")]
    Inflight(io::Error),
    #[error("the log of written pages: {0}")]
    Log(io::Error),
    #[error("its descriptor: {0}")]
    Event(io::Error),
    #[error(transparent)]
    State(#[from] StateError),
    #[error("requests are in flight that do not end, the storage does not answer")]
    Busy,
    #[error("the client does not wait for its requests")]
    Unwanted,
}

fn malformed(what: impl Into<String>) -> Refused {
    Refused::Malformed(what.into())
}

/// What a request is answered.
pub(crate) enum Answer {
    /// Success, if anybody wants to know.
    Done,
    /// What was asked for.
    Reply(Vec<u8>, Option<OwnedFd>),
    /// That it is not met, in the way that the message has for it.
    Refused(u64, Refused),
}

impl Answer {
    fn number(value: u64) -> Self {
        Self::Reply(value.to_ne_bytes().into(), None)
    }

    fn value(value: &impl ByteValued) -> Self {
        Self::Reply(value.as_slice().into(), None)
    }
}

/// A device as one frontend has set it up.
pub(crate) struct Backend<'a> {
    device: &'a mut dyn Device,
    wanted: Wanted<'a>,
    rings: Vec<Vring>,
    memory: Memory,
    inflight: Option<Inflight>,
    logging: Logging,
    /// Kept open though a device has nothing to tell: User Mode Linux takes its end for the end of the device.
    _channel: Interrupt,
    state: State,
    /// What the device has accepted, if it has.
    features: Option<u64>,
    /// Whether rings start disabled.
    negotiates: bool,
    protocol: Protocol,
    status: u8,
    /// A driver broke its ring.
    broken: Arc<AtomicBool>,
    /// Raised when memory is cut short. Behind `memory`, `inflight` and `logging`, whose guards know it.
    alarm: Event,
}

impl<'a> Backend<'a> {
    pub(crate) fn new(device: &'a mut dyn Device, wanted: Wanted<'a>) -> io::Result<Self> {
        device.reset();
        let rings = device.info().queue_sizes.iter().map(|_| Vring::default()).collect();
        Ok(Self {
            device,
            wanted,
            rings,
            memory: Memory::default(),
            inflight: None,
            logging: Logging::default(),
            _channel: Interrupt::None,
            state: State::default(),
            features: None,
            negotiates: false,
            protocol: Protocol::empty(),
            status: 0,
            broken: Arc::default(),
            alarm: Event::new()?,
        })
    }

    pub(crate) fn device(&mut self) -> &mut dyn Device {
        self.device
    }

    /// Raised when the frontend has cut its memory short.
    pub(crate) fn alarm(&self) -> &Event {
        &self.alarm
    }

    /// Whether an answer may be asked for to what has none of its own.
    pub(crate) fn acks(&self) -> bool {
        self.protocol.contains(Protocol::REPLY_ACK)
    }

    /// Does what a message says.
    pub(crate) fn apply(&mut self, kind: FrontendReq, mut message: Message) -> Result<Answer, Refused> {
        if let Some(what) = message.wrong_files.take() {
            return Err(malformed(what));
        }
        let mut files = std::mem::take(&mut message.files).into_iter();
        match kind {
            FrontendReq::SET_OWNER => {}
            FrontendReq::GET_FEATURES => {
                return Ok(Answer::number(self.device.info().features | F_PROTOCOL_FEATURES | F_LOG_ALL));
            }
            FrontendReq::SET_FEATURES => self.set_features(number(&message)?)?,
            FrontendReq::GET_PROTOCOL_FEATURES => return Ok(Answer::number(protocol_features().bits())),
            FrontendReq::SET_PROTOCOL_FEATURES => {
                let bits = number(&message)?;
                let features = Protocol::from_bits_retain(bits);
                if !protocol_features().contains(features) {
                    return Err(malformed(format!("{bits:#x} was not offered")));
                }
                self.protocol = features;
            }
            FrontendReq::GET_QUEUE_NUM => return Ok(Answer::number(nic::queue_num(self.device.info()))),
            FrontendReq::SET_MEM_TABLE => self.set_mem_table(&message, files.collect())?,
            FrontendReq::GET_MAX_MEM_SLOTS => return Ok(Answer::number(MAX_REGIONS as u64)),
            FrontendReq::ADD_MEM_REG => {
                let region: VhostUserSingleMemoryRegion = payload(&message)?;
                let file = files.next().ok_or_else(|| malformed("a region without a descriptor"))?;
                // QEMU's net device says each region once for each pair.
                if !self.memory.has(&region) {
                    self.change_memory(|memory, alarm| memory.add(&region, file, alarm))?;
                }
            }
            FrontendReq::REM_MEM_REG => {
                let region: VhostUserSingleMemoryRegion = payload(&message)?;
                let index = self.memory.find(&region)?;
                self.change_memory(|memory, _| memory.remove(index))?;
            }
            FrontendReq::SET_VRING_NUM => self.set_vring_num(&payload(&message)?)?,
            FrontendReq::SET_VRING_ADDR => self.set_vring_addr(&payload(&message)?)?,
            FrontendReq::SET_VRING_BASE => {
                let state: VhostUserVringState = payload(&message)?;
                let base = u16::try_from(state.num).map_err(|_| malformed("an index of more than 16 bits"))?;
                let ring = self.ring(state.index)?;
                if ring.runs() && ring.base != base {
                    return Err(malformed("the ring runs"));
                }
                ring.base = base;
            }
            FrontendReq::GET_VRING_BASE => {
                if self.protocol.contains(SUSPENDS) && !self.protocol.contains(SUSPENDS_IF_ASKED) {
                    let state: VhostUserVringState = payload(&message)?;
                    self.ring(state.index)?;
                    self.suspend_rings(vec![state.index as usize])?;
                }
                return self.get_vring_base(&message);
            }
            FrontendReq::SET_VRING_KICK => {
                let (index, file) = self.vring_file(&message, files.next())?;
                let file =
                    file.ok_or_else(|| malformed("a ring without a kick would have to be polled; give it one"))?;
                if !descriptor::is_eventfd(file.as_fd()) {
                    return Err(malformed("its descriptor is not an eventfd"));
                }
                self.stop_ring(index)?;
                self.rings[index].kick = Some(file);
                self.settle()?;
            }
            FrontendReq::SET_VRING_CALL => {
                let (index, call) = self.vring_interrupt(&message, files.next())?;
                // What was raised before nobody may have seen: the queue starts again and interrupts once.
                self.stop_ring(index)?;
                self.rings[index].call = call;
                self.settle()?;
            }
            FrontendReq::SET_VRING_ERR => {
                let (index, err) = self.vring_interrupt(&message, files.next())?;
                self.stop_ring(index)?;
                self.rings[index].err = err;
                self.settle()?;
            }
            FrontendReq::SET_VRING_ENABLE => {
                let state: VhostUserVringState = payload(&message)?;
                let enabled = match state.num {
                    0 => false,
                    1 => true,
                    _ => return Err(malformed("neither on nor off")),
                };
                self.ring(state.index)?.enabled = enabled;
                self.settle()?;
            }
            FrontendReq::GET_CONFIG => return self.get_config(&message),
            FrontendReq::SET_CONFIG => self.set_config(&message)?,
            FrontendReq::SET_BACKEND_REQ_FD => {
                let notify = files.next().and_then(backend_channel::config_change);
                let notify = notify.ok_or_else(|| malformed("it needs a stream socket"))?;
                if self.protocol.contains(Protocol::CONFIG) {
                    self.device.on_config_change(notify.clone());
                }
                self._channel = notify;
            }
            FrontendReq::GET_INFLIGHT_FD => {
                let (said, area) = inflight::make(&inflight_payload(message)?, self.rings.len() as u16, MAX_SIZE)
                    .map_err(Refused::Inflight)?;
                let file = area.file().try_clone().map_err(Refused::Inflight)?;
                return Ok(Answer::Reply(said.as_slice().into(), Some(file.into())));
            }
            FrontendReq::SET_INFLIGHT_FD => {
                let file = files.next().ok_or_else(|| malformed("a table without a descriptor"))?;
                let said = inflight_payload(message)?;
                let taken = inflight::take(&said, file, self.rings.len() as u16, MAX_SIZE, &self.alarm);
                let taken = taken.map_err(Refused::Inflight)?;
                self.stop_all(End::Drained)?;
                self.inflight = Some(taken);
                self.settle()?;
            }
            FrontendReq::SET_LOG_BASE => return self.set_log_base(&payload(&message)?, files.next()),
            FrontendReq::SET_LOG_FD => {
                let file = files.next().ok_or_else(|| malformed("its descriptor is missing"))?;
                let event = descriptor::interrupt(file).map_err(Refused::Event)?;
                self.change_logging(|logging| logging.set_event(event))?;
            }
            FrontendReq::SET_DEVICE_STATE_FD => {
                let said = payload(&message)?;
                let begun = self.state.begin(&said, files.next(), self.device, self.rings.iter().any(Vring::runs));
                return Ok(match begun {
                    Ok(()) => Answer::number(STATE_NO_FD),
                    Err(error) => Answer::Refused(STATE_NO_FD | 1, error.into()),
                });
            }
            FrontendReq::CHECK_DEVICE_STATE => {
                let rings_run = self.rings.iter().any(Vring::runs);
                return Ok(match self.state.end(self.device, rings_run, &self.wanted) {
                    Ok(()) => Answer::number(0),
                    Err(error) => Answer::Refused(1, error.into()),
                });
            }
            FrontendReq::RESET_OWNER => drop(self.end_all(End::Drained)?),
            FrontendReq::RESET_DEVICE => {
                self.reset()?;
                self.rings.fill_with(Vring::default);
            }
            FrontendReq::SET_STATUS => self.set_status(number(&message)?)?,
            FrontendReq::GET_STATUS => {
                let fault = if self.broken.load(Ordering::Acquire) { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 };
                return Ok(Answer::number(u64::from(self.status) | u64::from(fault)));
            }
            _ => return Err(malformed("it goes with a feature that was not offered")),
        }
        Ok(Answer::Done)
    }

    /// Stops the rings that these messages want ended at once, together.
    pub(crate) fn suspend(&mut self, messages: &[Message]) -> Result<(), Refused> {
        if !self.protocol.contains(SUSPENDS_IF_ASKED) {
            return Ok(());
        }
        let asked = messages.iter().filter(|message| message.request == SKIP_DRAIN && message.wrong_files.is_none());
        let rings = asked.filter_map(|message| Some(message.parse::<VhostUserVringState>()?.index as usize));
        self.suspend_rings(rings.filter(|&index| index < self.rings.len()).collect())
    }

    /// Ends a ring that was suspended ([`SKIP_DRAIN`]).
    pub(crate) fn skip_drain(&mut self, message: &Message) -> Result<Answer, Refused> {
        if !self.protocol.contains(SUSPENDS_IF_ASKED) {
            return Err(malformed("it goes with a protocol feature that was not accepted"));
        }
        if let Some(what) = &message.wrong_files {
            return Err(malformed(what));
        }
        self.get_vring_base(message)
    }

    /// Stops rings with what can be cancelled left in their tables. Those without one are drained when they end: nobody would
    /// hear of what is left.
    fn suspend_rings(&mut self, mut rings: Vec<usize>) -> Result<(), Refused> {
        rings.sort_unstable();
        rings.dedup();
        rings.retain(|&index| {
            self.inflight.as_ref().is_some_and(|inflight| inflight.area().table(index as u16).is_some())
        });
        self.stop_rings(rings, End::Suspended).map(drop)
    }

    fn get_vring_base(&mut self, message: &Message) -> Result<Answer, Refused> {
        let state: VhostUserVringState = payload(message)?;
        self.ring(state.index)?;
        let base = self.end_ring(state.index as usize)?;
        Ok(Answer::value(&VhostUserVringState::new(state.index, base.into())))
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refused> {
        self.negotiates = features & F_PROTOCOL_FEATURES != 0;
        let log_all = features & F_LOG_ALL != 0;
        let features = nic::driver_features(self.device.info(), features & !(F_PROTOCOL_FEATURES | F_LOG_ALL));
        let toggled = log_all != self.logging.all();
        // Said again while rings run, as each pair of a NIC does, or while they are only disabled, to log what is written.
        // Else it is another driver's choice.
        let in_service = self.rings.iter().any(|ring| ring.runs() || toggled && ring.kick.is_some());
        if self.features != Some(features) || !in_service {
            self.stop_all(End::Drained)?;
            self.forget();
            self.device.ack_features(features).map_err(Refused::Features)?;
            self.state.reload(self.device).map_err(Refused::Features)?;
            self.features = Some(features);
        }
        if toggled {
            return self.change_logging(|logging| logging.set_all(log_all));
        }
        self.settle()
    }

    fn set_log_base(&mut self, said: &VhostUserLog, file: Option<OwnedFd>) -> Result<Answer, Refused> {
        let file = file.ok_or_else(|| malformed("a log without a descriptor"))?;
        let base = Mapped::new(said, file, &self.alarm).map_err(Refused::Log)?;
        if self.logging.has_base() {
            // Said with each pass over the memory by some. Rings go on meanwhile.
            self.logging.set_base(base);
        } else {
            self.change_logging(|logging| logging.set_base(base))?;
        }
        // The specification asks for a reply and not for what is in it: some take any, some only what they have sent.
        Ok(Answer::value(said))
    }

    /// Changes how writes are logged while nothing is written. Rings go on where they were.
    fn change_logging(&mut self, change: impl FnOnce(&mut Logging)) -> Result<(), Refused> {
        let was_on = self.logging.is_on();
        if was_on {
            self.stop_all(End::Drained)?;
        }
        change(&mut self.logging);
        if self.logging.is_on() && !was_on {
            self.stop_all(End::Drained)?;
        }
        self.settle()
    }

    /// The device is as if no driver had come yet.
    fn forget(&mut self) {
        self.device.reset();
        self.features = None;
        self.broken.store(false, Ordering::Release);
    }

    fn set_mem_table(&mut self, message: &Message, files: Vec<OwnedFd>) -> Result<(), Refused> {
        let head: VhostUserMemory = payload(message)?;
        let count = head.num_regions as usize;
        if count > MAX_FILES || count != files.len() {
            return Err(malformed(format!("{count} regions with {} descriptors", files.len())));
        }
        let mut table = Vec::with_capacity(count);
        let mut rest = &message.body[size_of::<VhostUserMemory>()..];
        for file in files {
            let mut region = VhostUserMemoryRegion::default();
            let (bytes, behind) =
                rest.split_at_checked(size_of::<VhostUserMemoryRegion>()).ok_or_else(|| too_short(message))?;
            region.as_mut_slice().copy_from_slice(bytes);
            rest = behind;
            table.push((region, file));
        }
        let new = Memory::new(table, &self.alarm)?;
        self.change_memory(|memory, _| {
            *memory = new;
            Ok(())
        })
    }

    /// Changes the memory while nothing uses it.
    fn change_memory(
        &mut self,
        change: impl FnOnce(&mut Memory, &Event) -> Result<(), MemoryError>,
    ) -> Result<(), Refused> {
        self.stop_all(End::Drained)?;
        let changed = change(&mut self.memory, &self.alarm);
        let settled = self.settle();
        changed?;
        settled
    }

    fn set_vring_num(&mut self, state: &VhostUserVringState) -> Result<(), Refused> {
        let num = state.num;
        let size = u16::try_from(num).ok().filter(|size| size.is_power_of_two() && *size <= MAX_SIZE);
        let size =
            size.ok_or_else(|| malformed(format!("{num} descriptors are not a power of two up to {MAX_SIZE}")))?;
        let ring = self.ring(state.index)?;
        if ring.runs() && ring.size != Some(size) {
            return Err(malformed("the ring runs"));
        }
        ring.size = Some(size);
        self.settle()
    }

    fn set_vring_addr(&mut self, said: &VhostUserVringAddr) -> Result<(), Refused> {
        let log = dirty::used_log(said.flags, said.log);
        let logs = self.logging.is_on();
        let addresses = Addresses { desc: said.descriptor, avail: said.available, used: said.used };
        let ring = self.ring(said.index)?;
        if ring.runs() && ring.addresses != Some(addresses) {
            return Err(malformed("the ring runs"));
        }
        ring.addresses = Some(addresses);
        if std::mem::replace(&mut ring.log, log) != log && logs {
            self.stop_ring(said.index as usize)?;
        }
        self.settle()
    }

    /// The ring and the descriptor of a message that brings one.
    fn vring_file(&mut self, message: &Message, file: Option<OwnedFd>) -> Result<(usize, Option<OwnedFd>), Refused> {
        let said = number(message)?;
        if said & !(VRING_INDEX | VRING_NO_FD) != 0 {
            return Err(malformed(format!("{said:#x} is no ring")));
        }
        let index = (said & VRING_INDEX) as u32;
        self.ring(index)?;
        match (said & VRING_NO_FD != 0, &file) {
            (true, Some(_)) => return Err(malformed("a descriptor came, and that there is none")),
            (false, None) => return Err(malformed("its descriptor is missing")),
            _ => {}
        }
        Ok((index as usize, file))
    }

    /// The ring, and what the descriptor of a message is to tell its driver.
    fn vring_interrupt(&mut self, message: &Message, file: Option<OwnedFd>) -> Result<(usize, Interrupt), Refused> {
        let (index, file) = self.vring_file(message, file)?;
        let interrupt = file.map(descriptor::interrupt).transpose().map_err(Refused::Event)?;
        Ok((index, interrupt.unwrap_or_default()))
    }

    fn get_config(&self, message: &Message) -> Result<Answer, Refused> {
        let said: VhostUserConfig = payload(message)?;
        let (offset, size) = (said.offset, said.size);
        if size > MAX_CONFIG {
            return Err(malformed(format!("{size} bytes of configuration space")));
        }
        let mut bytes = said.as_slice().to_vec();
        let head = bytes.len();
        bytes.resize(head + size as usize, 0);
        self.device.read_config(offset, &mut bytes[head..]);
        Ok(Answer::Reply(bytes, None))
    }

    fn set_config(&mut self, message: &Message) -> Result<(), Refused> {
        let said: VhostUserConfig = payload(message)?;
        let bytes = message.body[size_of::<VhostUserConfig>()..].get(..said.size as usize);
        let bytes = bytes.ok_or_else(|| too_short(message))?;
        if let Err(error) = self.device.write_config(said.offset, bytes) {
            // A guest's mistake, and on hardware without consequence.
            info!("{error}");
        }
        Ok(())
    }

    fn set_status(&mut self, status: u64) -> Result<(), Refused> {
        if status == 0 {
            // Enabled rings stay so: not every frontend would say it again.
            self.reset()?;
        }
        let refused = if self.features.is_none() { VIRTIO_CONFIG_S_FEATURES_OK as u8 } else { 0 };
        self.status = status as u8 & !refused;
        Ok(())
    }

    /// The driver has given the device up. It waits for none of its requests, and they are nobody's.
    fn reset(&mut self) -> Result<(), Refused> {
        for (index, end) in self.end_all(End::Suspended)? {
            let table = self.inflight.as_ref().and_then(|inflight| inflight.area().table(index as u16));
            if let (Some(mut table), Some(size)) = (table, self.rings[index].size) {
                // Of another layout it is refused when a ring is to run with it.
                drop(table.take_out(size, end.state.next_used));
            }
        }
        self.state.forget();
        self.forget();
        Ok(())
    }

    fn ring(&mut self, index: u32) -> Result<&mut Vring, Refused> {
        let count = self.rings.len();
        self.rings.get_mut(index as usize).ok_or_else(|| malformed(format!("ring {index} of {count}")))
    }

    /// Starts and stops rings until those run that can and should.
    fn settle(&mut self) -> Result<(), Refused> {
        let mut result = Ok(());
        for index in 0..self.rings.len() {
            let log = self.logging.of_ring(self.rings[index].log);
            let ring = &mut self.rings[index];
            let wanted = self.features.is_some()
                && (ring.enabled || !self.negotiates)
                && ring.is_complete()
                && !self.memory.is_empty();
            if !wanted {
                self.stop_ring(index)?;
            } else if !ring.runs() {
                let inflight = self.inflight.as_ref().map(Inflight::area);
                let started = ring.start(index as u16, self.device, &self.memory, inflight, log, &self.broken);
                if started.is_ok() {
                    self.state.forget();
                }
                if let Err(error) = started {
                    // Not again with every message: with a new doorbell.
                    ring.kick = None;
                    result = result.and(Err(error.into()));
                }
            }
        }
        result
    }

    fn stop_ring(&mut self, index: usize) -> Result<(), Refused> {
        self.stop_rings(vec![index], End::Drained).map(drop)
    }

    fn stop_all(&mut self, end: End) -> Result<(), Refused> {
        self.stop_rings((0..self.rings.len()).collect(), end).map(drop)
    }

    /// Stops those of the rings that run, and returns where each stands. What they have under way is waited for as long as
    /// somebody wants that; then it is suspended, and the session over.
    fn stop_rings(&mut self, mut rings: Vec<usize>, end: End) -> Result<Vec<(usize, Suspended)>, Refused> {
        rings.retain(|&index| self.rings[index].runs());
        if rings.is_empty() {
            return Ok(Vec::new());
        }
        let indices: Vec<u16> = rings.iter().map(|&index| index as u16).collect();
        let limit = (end == End::Suspended).then(|| Instant::now() + RESET_PATIENCE);
        let mut stopping = self.device.stop(&indices, end);
        let ends = loop {
            let look = Instant::now() + LOOK_PAUSE;
            stopping = match stopping.wait_until(look) {
                Ok(ends) => break ends,
                Err(stopping) => stopping,
            };
            if !self.wanted.still() {
                return Err(Refused::Unwanted);
            }
            if limit.is_some_and(|limit| look > limit) {
                return Err(Refused::Busy);
            }
        };
        for (&index, end) in rings.iter().zip(&ends) {
            self.rings[index].stopped(end.as_ref());
        }
        Ok(rings.into_iter().zip(ends).filter_map(|(index, end)| Some((index, end?))).collect())
    }

    /// Ends everything of the frontend's, without waiting for what can be cancelled. Returns whether nothing is in flight any
    /// more; if there is, it is to be called again before the backend is dropped.
    pub(crate) fn end(&mut self, deadline: Instant) -> bool {
        let indices: Vec<u16> = (0..self.rings.len() as u16).collect();
        self.device.stop(&indices, End::Suspended).wait_until(deadline).is_ok()
    }

    /// Stops a ring until it gets another doorbell, and says where it is.
    fn end_ring(&mut self, index: usize) -> Result<u16, Refused> {
        self.stop_ring(index)?;
        self.rings[index].kick = None;
        Ok(self.rings[index].base)
    }

    fn end_all(&mut self, end: End) -> Result<Vec<(usize, Suspended)>, Refused> {
        let ends = self.stop_rings((0..self.rings.len()).collect(), end)?;
        self.rings.iter_mut().for_each(|ring| ring.kick = None);
        Ok(ends)
    }
}

impl Drop for Backend<'_> {
    /// Nothing of a frontend stays.
    fn drop(&mut self) {
        self.device.on_config_change(Interrupt::None);
        let indices: Vec<u16> = (0..self.rings.len() as u16).collect();
        self.device.suspend(&indices);
        self.device.reset();
    }
}

/// Whether a message has an answer of its own, in which success can't be told from failure.
pub(crate) fn has_reply(kind: FrontendReq) -> bool {
    matches!(
        kind,
        FrontendReq::GET_FEATURES
            | FrontendReq::GET_PROTOCOL_FEATURES
            | FrontendReq::GET_QUEUE_NUM
            | FrontendReq::GET_MAX_MEM_SLOTS
            | FrontendReq::GET_VRING_BASE
            | FrontendReq::GET_CONFIG
            | FrontendReq::GET_INFLIGHT_FD
            | FrontendReq::GET_STATUS
            | FrontendReq::SET_LOG_BASE
            | FrontendReq::SET_DEVICE_STATE_FD
            | FrontendReq::CHECK_DEVICE_STATE
    )
}

fn payload<T: ByteValued + Default>(message: &Message) -> Result<T, Refused> {
    message.parse().ok_or_else(|| too_short(message))
}

fn number(message: &Message) -> Result<u64, Refused> {
    payload::<VhostUserU64>(message).map(|number| number.value)
}

fn too_short(message: &Message) -> Refused {
    malformed(format!("its {} bytes are too few", message.body.len()))
}

/// The structure ends with four bytes of nothing, which not everybody sends.
fn inflight_payload(mut message: Message) -> Result<VhostUserInflight, Refused> {
    let len = message.body.len();
    if len + 4 == size_of::<VhostUserInflight>() {
        message.body.resize(len + 4, 0);
    }
    payload(&message)
}
