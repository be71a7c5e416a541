//! Messages and their headers (vhost-user specification, "Message specification").

use std::mem::size_of;
use std::os::fd::OwnedFd;

use vhost::vhost_user::message::{FrontendReq, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures};
use vm_memory::ByteValued;

use crate::files::WrongFiles;

/// VHOST_USER_GET_VRING_BASE_SKIP_DRAIN: stops a ring without waiting for its requests, which stay in the table of
/// requests in flight.
pub const GET_VRING_BASE_SKIP_DRAIN: u32 = 45;
/// VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN: the backend knows [`GET_VRING_BASE_SKIP_DRAIN`], and
/// GET_VRING_BASE drains.
pub const F_SKIP_DRAIN: VhostUserProtocolFeatures = VhostUserProtocolFeatures::from_bits_retain(1 << 23);
/// In a number that goes with a descriptor: there is no descriptor.
pub const NO_FILE: u64 = 1 << 8;
/// Most descriptors of a message: a region each.
pub const MAX_FILES: usize = 32;
/// Longest payload. The largest there is, a configuration space, may take 4 KiB after its 12 bytes of header.
pub(crate) const MAX_BODY: u32 = 8 << 10;

const VERSION: u32 = 1;

/// The name of a frontend's request.
#[must_use]
pub fn request_name(request: impl Into<u32>) -> String {
    let request = request.into();
    match FrontendReq::try_from(request) {
        Ok(known) => format!("{known:?}"),
        Err(_) if request == GET_VRING_BASE_SKIP_DRAIN => "GET_VRING_BASE_SKIP_DRAIN".to_owned(),
        Err(_) => format!("message {request}"),
    }
}

/// The first part of each message.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub(crate) request: u32,
    pub(crate) flags: u32,
    pub(crate) size: u32,
}

impl Header {
    pub(crate) const LEN: usize = 12;

    fn encode(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let words = [self.request, self.flags, self.size].map(u32::to_ne_bytes);
        bytes.copy_from_slice(words.as_flattened());
        bytes
    }

    pub(crate) fn decode(bytes: [u8; Self::LEN]) -> Self {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { request: word(0), flags: word(4), size: word(8) }
    }

    /// Whether it can stand before a message of the side that asks, or else of the side that answers.
    pub(crate) fn is_sound(self, is_reply: bool) -> bool {
        let version = self.flags & VhostUserHeaderFlag::VERSION.bits();
        version == VERSION && self.has(VhostUserHeaderFlag::REPLY) == is_reply && self.size <= MAX_BODY
    }

    pub(crate) fn has(self, flag: VhostUserHeaderFlag) -> bool {
        self.flags & flag.bits() != 0
    }
}

/// The bytes of a request, of either side.
#[must_use]
pub fn request(request: impl Into<u32>, need_reply: bool, body: &[u8]) -> Vec<u8> {
    encode(
        request.into(),
        if need_reply { VhostUserHeaderFlag::NEED_REPLY } else { VhostUserHeaderFlag::empty() },
        body,
    )
}

/// The bytes of the answer to a request.
#[must_use]
pub fn reply(request: u32, body: &[u8]) -> Vec<u8> {
    encode(request, VhostUserHeaderFlag::REPLY, body)
}

fn encode(request: u32, flags: VhostUserHeaderFlag, body: &[u8]) -> Vec<u8> {
    let header = Header { request, flags: VERSION | flags.bits(), size: body.len() as u32 };
    [&header.encode(), body].concat()
}

/// The payload that describes a table of requests in flight. The structure ends with four bytes of padding.
#[must_use]
pub fn inflight_body(about: &VhostUserInflight) -> Vec<u8> {
    let counts = [about.num_queues, about.queue_size, 0, 0].map(u16::to_ne_bytes);
    let area = [about.mmap_size, about.mmap_offset].map(u64::to_ne_bytes);
    [area.as_flattened(), counts.as_flattened()].concat()
}

/// A message that has come.
#[derive(Debug)]
pub struct Message {
    /// The request's number, which may be unknown.
    pub request: u32,
    /// Whether a message without an answer of its own wants one.
    pub need_reply: bool,
    /// The payload.
    pub body: Vec<u8>,
    /// As many descriptors as a message of its kind can bring, of kinds that some message needs. If others came, none
    /// is kept.
    pub files: Result<Vec<OwnedFd>, WrongFiles>,
}

impl Message {
    /// Takes the descriptors out, or their fault.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn take_files(&mut self) -> Result<Vec<OwnedFd>, WrongFiles> {
        std::mem::replace(&mut self.files, Ok(Vec::new()))
    }

    /// The payload's beginning as a `T`, whatever follows; `None` if it is too short.
    #[must_use]
    pub fn parse<T: ByteValued + Default>(&self) -> Option<T> {
        let mut value = T::default();
        value.as_mut_slice().copy_from_slice(self.body.get(..size_of::<T>())?);
        Some(value)
    }

    /// The payload as a `T`; `None` if it has another size.
    #[must_use]
    pub fn parse_all<T: ByteValued + Default>(&self) -> Option<T> {
        self.parse().filter(|_| self.body.len() == size_of::<T>())
    }

    /// The payload that describes a table of requests in flight. Not every peer sends its padding.
    #[must_use]
    pub fn parse_inflight(&self) -> Option<VhostUserInflight> {
        let (area, counts) = self.body.split_at_checked(16)?;
        let long = |at: usize| Some(u64::from_ne_bytes(area.get(at..at + 8)?.try_into().ok()?));
        let short = |at: usize| Some(u16::from_ne_bytes(counts.get(at..at + 2)?.try_into().ok()?));
        Some(VhostUserInflight::new(long(0)?, long(8)?, short(0)?, short(2)?))
    }
}

/// How many descriptors may come with a frontend's request.
pub(crate) fn most_files(request: u32) -> usize {
    match FrontendReq::try_from(request) {
        Ok(FrontendReq::SET_MEM_TABLE) => MAX_FILES,
        Ok(
            FrontendReq::SET_VRING_KICK
            | FrontendReq::SET_VRING_CALL
            | FrontendReq::SET_VRING_ERR
            | FrontendReq::SET_BACKEND_REQ_FD
            | FrontendReq::SET_INFLIGHT_FD
            | FrontendReq::SET_LOG_BASE
            | FrontendReq::SET_LOG_FD
            | FrontendReq::SET_DEVICE_STATE_FD
            | FrontendReq::ADD_MEM_REG
            // Not to be sent, but some do (it is closed then).
            | FrontendReq::REM_MEM_REG,
        ) => 1,
        _ => 0,
    }
}

/// How many descriptors may come with the answer to a frontend's request.
pub(crate) fn most_files_of_reply(request: u32) -> usize {
    let one = [FrontendReq::GET_INFLIGHT_FD, FrontendReq::SET_DEVICE_STATE_FD];
    usize::from(one.iter().any(|&with| u32::from(with) == request))
}
