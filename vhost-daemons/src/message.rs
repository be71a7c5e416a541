//! Messages on a stream socket (vhost-user specification, "Message specification"): whole ones, with their descriptors, within
//! a time.
//!
//! A peer may stay silent between two messages for as long as it likes, but not within one. Payloads may be longer than what
//! their kind needs; the rest is ignored.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;
use vhost::vhost_user::message::FrontendReq;
use vm_memory::ByteValued;

use crate::mailbox::poll;
use crate::received::Received;

/// Longest payload. The largest there is, a configuration space, may take 4 KiB after its 12 bytes of header.
const MAX_BODY: usize = 8 << 10;
/// Most descriptors of a message: a region each.
pub(crate) const MAX_FILES: usize = 32;
/// Longest time that a message may take once it has begun, and that a reply may wait to be read.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

const HEADER: usize = 12;
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Why there is no message.
#[derive(Debug, Error)]
pub(crate) enum WireError {
    #[error("the connection ended in the middle of a message")]
    Cut,
    #[error("a message that was begun did not come to its end within {} s", PATIENCE.as_secs())]
    Late,
    #[error("it has gone without waiting for a reply")]
    Gone,
    #[error("a reply was not read within {} s", PATIENCE.as_secs())]
    Unread,
    #[error("message {request} has a header that can't be: flags {flags:#x}, {size} bytes")]
    Header { request: u32, flags: u32, size: u32 },
    #[error("more than {MAX_FILES} descriptors came with a message")]
    Files,
    #[error("{what}: {source}")]
    Socket { what: &'static str, source: io::Error },
}

/// A request of the frontend.
#[derive(Debug)]
pub(crate) struct Message {
    /// The request's number, which may be unknown.
    pub(crate) request: u32,
    /// Whether an answer is wanted to what has none of its own.
    pub(crate) need_reply: bool,
    pub(crate) body: Vec<u8>,
    /// As many as a message of its kind can bring, of kinds that some message needs.
    pub(crate) files: Vec<OwnedFd>,
    /// The fault of the descriptors that came; none of them is kept then.
    pub(crate) wrong_files: Option<String>,
}

impl Message {
    /// The payload's beginning as a `T`; `None` if it is too short.
    pub(crate) fn parse<T: ByteValued + Default>(&self) -> Option<T> {
        let mut value = T::default();
        value.as_mut_slice().copy_from_slice(self.body.get(..size_of::<T>())?);
        Some(value)
    }
}

/// How many descriptors may come with a request.
fn most_files(request: u32) -> usize {
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

/// One connection to a frontend.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Connection {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// Whether there is something to receive.
    pub(crate) fn has_more(&self) -> Result<bool, WireError> {
        self.ready(PollFlags::IN, Instant::now())
    }

    /// Receives the message that has begun to come; `None` if it is the end of the connection that has come.
    pub(crate) fn receive(&mut self) -> Result<Option<Message>, WireError> {
        let deadline = Instant::now() + PATIENCE;
        let mut came = Received::default();
        let mut header = [0; HEADER];
        if !self.fill(&mut header, &mut came, deadline, true)? {
            return Ok(None);
        }
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (request, flags, size) = (word(0), word(4), word(8));
        if flags & VERSION_MASK != VERSION || flags & REPLY != 0 || size as usize > MAX_BODY {
            return Err(WireError::Header { request, flags, size });
        }
        let mut body = vec![0; size as usize];
        self.fill(&mut body, &mut came, deadline, false)?;
        // A message may be kept for a while with those that follow it, and its descriptors only if it can have some.
        let (count, most) = (came.count(), most_files(request));
        let wrong_files = if count > most {
            Some(format!("{count} descriptors came with it, at most {most} can"))
        } else if came.strange > 0 {
            Some("its descriptor is neither shared memory nor an eventfd, a pipe or a Unix socket".to_owned())
        } else {
            None
        };
        let files = if wrong_files.is_some() { Vec::new() } else { came.files };
        Ok(Some(Message { request, need_reply: flags & NEED_REPLY != 0, body, files, wrong_files }))
    }

    /// Reads exactly as much as there is room for. Returns `false` if the connection has ended before the first byte, where
    /// that may be.
    fn fill(
        &mut self,
        room: &mut [u8],
        came: &mut Received,
        deadline: Instant,
        may_end: bool,
    ) -> Result<bool, WireError> {
        let mut filled = 0;
        while filled < room.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received = recvmsg(&self.stream, &mut [IoSliceMut::new(&mut room[filled..])], &mut control, flags);
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(files) = message {
                    came.extend(files);
                }
            }
            match received {
                // The kernel has closed those that there was no room for.
                Ok(received) if received.flags.contains(ReturnFlags::CTRUNC) => return Err(WireError::Files),
                Ok(_) if came.count() > MAX_FILES => return Err(WireError::Files),
                Ok(received) if received.bytes == 0 => {
                    return if may_end && filled == 0 { Ok(false) } else { Err(WireError::Cut) };
                }
                Ok(received) => filled += received.bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.ready(PollFlags::IN, deadline)? {
                        return Err(WireError::Late);
                    }
                }
                Err(Errno::CONNRESET) if may_end && filled == 0 => return Ok(false),
                Err(Errno::CONNRESET) => return Err(WireError::Cut),
                Err(error) => return Err(WireError::Socket { what: "receiving a message", source: error.into() }),
            }
        }
        Ok(true)
    }

    /// Answers a request.
    pub(crate) fn reply(&mut self, request: u32, body: &[u8], file: Option<BorrowedFd<'_>>) -> Result<(), WireError> {
        let deadline = Instant::now() + PATIENCE;
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        for word in [request, VERSION | REPLY, body.len() as u32] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(body);
        let mut sent = 0;
        while sent < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let file = if sent == 0 { file.as_slice() } else { &[] };
            if !file.is_empty() {
                let fits = control.push(SendAncillaryMessage::ScmRights(file));
                debug_assert!(fits, "there is room for one descriptor");
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.stream, &[IoSlice::new(&bytes[sent..])], &mut control, flags) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.ready(PollFlags::OUT, deadline)? {
                        return Err(WireError::Unread);
                    }
                }
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(WireError::Gone),
                Err(error) => return Err(WireError::Socket { what: "sending a reply", source: error.into() }),
            }
        }
        Ok(())
    }

    fn ready(&self, flags: PollFlags, deadline: Instant) -> Result<bool, WireError> {
        let mut fds = [PollFd::new(&self.stream, flags)];
        let ready = poll(&mut fds, Some(deadline));
        Ok(ready.map_err(|source| WireError::Socket { what: "waiting for the frontend", source })? > 0)
    }
}
