//! The frontend's messages so far, and their meaning for the device (vhost-user specification, "Front-end message
//! types").
//!
//! Messages are taken in any order that makes sense, and their contents are not trusted. Those about memory, those
//! about rings and those about state that outlives a backend have a file each.

mod memory;
mod records;
mod rings;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ringvm_backends::device::{Device, DeviceError, End, Stopping};
use ringvm_backends::virtqueue::interrupt::Interrupt;
use ringvm_vhost_user::message::{F_SKIP_DRAIN, Message};
use thiserror::Error;
use tracing::info;
use vhost::vhost_user::message::{FrontendReq, VhostUserConfig, VhostUserProtocolFeatures as Protocol, VhostUserU64};
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET};
use vm_memory::ByteValued;

use crate::dirty::{F_LOG_ALL, Logging};
use crate::inflight::Inflight;
use crate::mailbox::{Event, Wanted};
use crate::memory::{MAX_REGIONS, Memory, MemoryError};
use crate::state::{State, StateError};
use crate::vring::{Vring, VringError};
use crate::{backend_channel, nic};

/// VHOST_USER_F_PROTOCOL_FEATURES: protocol features are negotiated, and rings start disabled.
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Longest piece of configuration space that is read at once.
const MAX_CONFIG: u32 = 4096;
/// GET_VRING_BASE leaves requests that can be cancelled in the table of requests in flight.
const SUSPENDS: Protocol = Protocol::GET_VRING_BASE_INFLIGHT;

/// The offered features: all that the device serves.
fn protocol_features(device: &dyn Device) -> Protocol {
    let always = Protocol::MQ
        | Protocol::REPLY_ACK
        | Protocol::BACKEND_REQ
        | Protocol::CONFIG
        | Protocol::RESET_DEVICE
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::STATUS;
    let recovery = SUSPENDS | F_SKIP_DRAIN | Protocol::LOG_SHMFD | Protocol::INFLIGHT_SHMFD | Protocol::DEVICE_STATE;
    if device.recovers() { always | recovery } else { always }
}

/// The features of the protocol's own among those of the device.
fn own_features(device: &dyn Device) -> u64 {
    if device.recovers() { F_PROTOCOL_FEATURES | F_LOG_ALL } else { F_PROTOCOL_FEATURES }
}

/// The feature that a message goes with, where the device may be unable to serve it.
fn needed(kind: FrontendReq) -> Protocol {
    match kind {
        FrontendReq::GET_INFLIGHT_FD | FrontendReq::SET_INFLIGHT_FD => Protocol::INFLIGHT_SHMFD,
        FrontendReq::SET_LOG_BASE | FrontendReq::SET_LOG_FD => Protocol::LOG_SHMFD,
        FrontendReq::SET_DEVICE_STATE_FD | FrontendReq::CHECK_DEVICE_STATE => Protocol::DEVICE_STATE,
        _ => Protocol::empty(),
    }
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
    /// The frontend can continue: without these features no ring starts, and it may choose others.
    #[error(transparent)]
    Features(DeviceError),
    /// The device can't, whatever it is asked for.
    #[error(transparent)]
    Device(DeviceError),
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

/// The answer to a request.
pub(crate) enum Answer {
    /// Success, if an answer is wanted.
    Done,
    /// The requested data.
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
    /// The features that the device has accepted, once it has accepted some.
    features: Option<u64>,
    /// Whether rings start disabled.
    negotiates: bool,
    protocol: Protocol,
    status: u8,
    /// A driver broke its ring.
    broken: Arc<AtomicBool>,
    /// Raised when memory is cut short. Declared after `memory`, `inflight` and `logging`, whose guards refer to it.
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

    /// Whether a message without an answer of its own may ask for one.
    pub(crate) fn acks(&self) -> bool {
        self.protocol.contains(Protocol::REPLY_ACK)
    }

    /// Carries out a message.
    pub(crate) fn apply(&mut self, kind: FrontendReq, mut message: Message) -> Result<Answer, Refused> {
        let mut files = message.take_files().map_err(|wrong| malformed(wrong.to_string()))?.into_iter();
        // Clients use what was offered without accepting it. What was not offered is not served either.
        if !protocol_features(self.device).contains(needed(kind)) {
            return Err(malformed("it goes with a feature that was not offered"));
        }
        match kind {
            FrontendReq::SET_OWNER => Ok(Answer::Done),
            FrontendReq::GET_FEATURES => Ok(Answer::number(self.device.info().features | own_features(self.device))),
            FrontendReq::SET_FEATURES => self.set_features(number(&message)?),
            FrontendReq::GET_PROTOCOL_FEATURES => Ok(Answer::number(protocol_features(self.device).bits())),
            FrontendReq::SET_PROTOCOL_FEATURES => self.set_protocol_features(number(&message)?),
            FrontendReq::GET_QUEUE_NUM => Ok(Answer::number(nic::queue_num(self.device.info()))),
            FrontendReq::GET_CONFIG => self.get_config(&message),
            FrontendReq::SET_CONFIG => self.set_config(&message),
            FrontendReq::SET_BACKEND_REQ_FD => self.set_backend_req_fd(files.next()),

            FrontendReq::SET_MEM_TABLE => self.set_mem_table(&message, files.collect()),
            FrontendReq::GET_MAX_MEM_SLOTS => Ok(Answer::number(MAX_REGIONS as u64)),
            FrontendReq::ADD_MEM_REG => self.add_mem_reg(&payload(&message)?, files.next()),
            FrontendReq::REM_MEM_REG => self.rem_mem_reg(&payload(&message)?),

            FrontendReq::SET_VRING_NUM => self.set_vring_num(&payload(&message)?),
            FrontendReq::SET_VRING_ADDR => self.set_vring_addr(&payload(&message)?),
            FrontendReq::SET_VRING_BASE => self.set_vring_base(&payload(&message)?),
            FrontendReq::GET_VRING_BASE => self.get_vring_base(&message),
            FrontendReq::SET_VRING_KICK => self.set_vring_kick(&message, files.next()),
            FrontendReq::SET_VRING_CALL => self.set_vring_call(&message, files.next()),
            FrontendReq::SET_VRING_ERR => self.set_vring_err(&message, files.next()),
            FrontendReq::SET_VRING_ENABLE => self.set_vring_enable(&payload(&message)?),

            FrontendReq::GET_INFLIGHT_FD => self.get_inflight_fd(&message),
            FrontendReq::SET_INFLIGHT_FD => self.set_inflight_fd(&message, files.next()),
            FrontendReq::SET_LOG_BASE => self.set_log_base(&payload(&message)?, files.next()),
            FrontendReq::SET_LOG_FD => self.set_log_fd(files.next()),
            FrontendReq::SET_DEVICE_STATE_FD => self.set_device_state_fd(&payload(&message)?, files.next()),
            FrontendReq::CHECK_DEVICE_STATE => Ok(self.check_device_state()),

            FrontendReq::RESET_OWNER => self.end_all(End::Drained).map(|_| Answer::Done),
            FrontendReq::RESET_DEVICE => self.reset_device(),
            FrontendReq::SET_STATUS => self.set_status(number(&message)?),
            FrontendReq::GET_STATUS => Ok(self.get_status()),
            _ => Err(malformed("it goes with a feature that was not offered")),
        }
    }

    fn set_features(&mut self, features: u64) -> Result<Answer, Refused> {
        self.negotiates = features & F_PROTOCOL_FEATURES != 0;
        let log_all = features & F_LOG_ALL != 0;
        let features = nic::driver_features(self.device.info(), features & !own_features(self.device));
        let toggled = log_all != self.logging.all();
        // Sent again while rings run, as for each pair of a NIC, or while they are only disabled, to switch the log.
        // Otherwise it is another driver's choice.
        let in_service = self.rings.iter().any(|ring| ring.runs() || toggled && ring.kick.is_some());
        if self.features != Some(features) || !in_service {
            self.stop_all(End::Drained)?;
            self.forget();
            let accepted = self.device.ack_features(features).and_then(|()| self.state.reload(self.device));
            accepted.map_err(|error| match error {
                DeviceError::Host { .. } => Refused::Device(error),
                error => Refused::Features(error),
            })?;
            self.features = Some(features);
        }
        if toggled {
            self.change_logging(|logging| logging.set_all(log_all))?;
        } else {
            self.settle()?;
        }
        Ok(Answer::Done)
    }

    fn set_protocol_features(&mut self, bits: u64) -> Result<Answer, Refused> {
        let features = Protocol::from_bits_retain(bits);
        if !protocol_features(self.device).contains(features) {
            return Err(malformed(format!("{bits:#x} was not offered")));
        }
        self.protocol = features;
        Ok(Answer::Done)
    }

    fn set_backend_req_fd(&mut self, file: Option<OwnedFd>) -> Result<Answer, Refused> {
        let notify = file.and_then(backend_channel::config_change);
        let notify = notify.ok_or_else(|| malformed("it needs a stream socket"))?;
        if self.protocol.contains(Protocol::CONFIG) {
            self.device.on_config_change(notify.clone());
        }
        self._channel = notify;
        Ok(Answer::Done)
    }

    /// The device is as if no driver had come yet.
    fn forget(&mut self) {
        self.device.reset();
        self.features = None;
        self.broken.store(false, Ordering::Release);
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

    fn set_config(&mut self, message: &Message) -> Result<Answer, Refused> {
        let said: VhostUserConfig = payload(message)?;
        let bytes = message.body[size_of::<VhostUserConfig>()..].get(..said.size as usize);
        let bytes = bytes.ok_or_else(|| too_short(message))?;
        if let Err(error) = self.device.write_config(said.offset, bytes) {
            // A guest's mistake, and on hardware without consequence.
            info!("{error}");
        }
        Ok(Answer::Done)
    }

    fn set_status(&mut self, status: u64) -> Result<Answer, Refused> {
        if status == 0 {
            // Enabled rings stay so: not every frontend would say it again.
            self.reset()?;
        }
        let refused = if self.features.is_none() { VIRTIO_CONFIG_S_FEATURES_OK as u8 } else { 0 };
        self.status = status as u8 & !refused;
        Ok(Answer::Done)
    }

    fn get_status(&self) -> Answer {
        let fault = if self.broken.load(Ordering::Acquire) { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 };
        Answer::number(u64::from(self.status) | u64::from(fault))
    }

    fn reset_device(&mut self) -> Result<Answer, Refused> {
        self.reset()?;
        self.rings.fill_with(Vring::default);
        Ok(Answer::Done)
    }

    /// The driver has given the device up. It waits for none of its requests, and no server will answer them.
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

    /// Begins to end all work of the frontend, without waiting for requests that can be cancelled. The backend is
    /// dropped once nothing is in flight any more.
    pub(crate) fn begin_end(&mut self) -> Stopping {
        let indices: Vec<u16> = (0..self.rings.len() as u16).collect();
        self.device.stop(&indices, End::Suspended)
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
