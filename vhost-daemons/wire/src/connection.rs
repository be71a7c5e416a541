//! One end of a stream socket: whole messages, with their descriptors, within a time limit.
//!
//! A peer may stay silent between two messages for as long as it likes, but not within one, and not when an answer is
//! awaited. No thread but the caller's takes part: each wait is a poll.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use thiserror::Error;
use vhost::vhost_user::message::VhostUserHeaderFlag;

use crate::files::Received;
use crate::message::{Header, MAX_FILES, Message, most_files, most_files_of_reply, request_name};

/// Why there is no message.
#[derive(Debug, Error)]
pub enum WireError {
    /// Part of a message came.
    #[error("the connection ended in the middle of a message")]
    Cut,
    /// The peer does not listen, or has left without an answer.
    #[error("the connection has ended")]
    Gone,
    /// An answer, or the rest of a message, did not come within the limit.
    #[error("a message did not come to its end within {} s", .0.as_secs())]
    Late(Duration),
    /// The peer did not read a message within the limit.
    #[error("a message was not read within {} s", .0.as_secs())]
    Unread(Duration),
    /// No message of the awaited kind has such a header.
    #[error("message {request} has a header that can't be: flags {flags:#x}, {size} bytes")]
    Header {
        /// The number of the request.
        request: u32,
        /// Version, reply, reply wanted.
        flags: u32,
        /// Length of the payload.
        size: u32,
    },
    /// The answer is to another request.
    #[error("the answer is one to {}", request_name(*.0))]
    Answer(u32),
    /// The kernel has closed those for which there was no room.
    #[error("more than {MAX_FILES} descriptors came with a message")]
    Files,
    /// A call that failed.
    #[error("{what}: {source}")]
    Socket {
        /// The purpose of the call.
        what: &'static str,
        /// Its failure.
        source: io::Error,
    },
}

/// A limit to waiting. It runs from the moment that it was made.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    time: Duration,
    end: Instant,
}

impl Limit {
    /// Ends after so much time.
    #[must_use]
    pub fn after(time: Duration) -> Self {
        Self { time, end: Instant::now() + time }
    }

    /// Does not wait.
    #[must_use]
    pub fn now() -> Self {
        Self::after(Duration::ZERO)
    }
}

/// One end of a connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Connection {
    /// The connection over a socket. Whether calls on the socket block does not matter.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    /// Whether there is something to receive, which may be the end.
    ///
    /// # Errors
    /// When the host can't tell.
    pub fn has_more(&self) -> Result<bool, WireError> {
        self.ready(PollFlags::IN, Limit::now())
    }

    /// Receives a request of the frontend's. `None` at the end of the connection.
    ///
    /// # Errors
    /// When no whole message comes within the limit, or what comes is none.
    pub fn receive_request(&mut self, limit: Limit) -> Result<Option<Message>, WireError> {
        self.receive(limit, |header| header.is_sound(false), most_files)
    }

    /// Receives a request of a daemon's, none of which brings a descriptor here. `None` at the end of the connection.
    ///
    /// # Errors
    /// As [`Self::receive_request`].
    pub fn receive_event(&mut self, limit: Limit) -> Result<Option<Message>, WireError> {
        self.receive(limit, |header| header.is_sound(false), |_| 0)
    }

    /// Receives the answer to a frontend's request.
    ///
    /// # Errors
    /// As [`Self::receive_request`]; also when it is the answer to another request, or the connection has ended.
    pub fn receive_reply(&mut self, request: u32, limit: Limit) -> Result<Message, WireError> {
        let message = self.receive(limit, |header| header.is_sound(true), most_files_of_reply)?;
        match message {
            Some(message) if message.request == request => Ok(message),
            Some(message) => Err(WireError::Answer(message.request)),
            None => Err(WireError::Gone),
        }
    }

    fn receive(
        &mut self,
        limit: Limit,
        is_sound: impl FnOnce(Header) -> bool,
        most_files: impl FnOnce(u32) -> usize,
    ) -> Result<Option<Message>, WireError> {
        let mut came = Received::default();
        let mut header = [0; Header::LEN];
        if !self.fill(&mut header, &mut came, limit, true)? {
            return Ok(None);
        }
        let header = Header::decode(header);
        let Header { request, flags, size } = header;
        if !is_sound(header) {
            return Err(WireError::Header { request, flags, size });
        }
        let mut body = vec![0; size as usize];
        self.fill(&mut body, &mut came, limit, false)?;
        // A message may be kept for a while with those that follow it, and its descriptors only if it can have some.
        let files = came.at_most(most_files(request));
        Ok(Some(Message { request, need_reply: header.has(VhostUserHeaderFlag::NEED_REPLY), body, files }))
    }

    /// Fills the whole room. Returns `false` if the connection has ended before the first byte, where that is
    /// allowed.
    fn fill(&mut self, room: &mut [u8], came: &mut Received, limit: Limit, may_end: bool) -> Result<bool, WireError> {
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
                    if !self.ready(PollFlags::IN, limit)? {
                        return Err(WireError::Late(limit.time));
                    }
                }
                Err(Errno::CONNRESET) if may_end && filled == 0 => return Ok(false),
                Err(Errno::CONNRESET) => return Err(WireError::Cut),
                Err(error) => return Err(WireError::Socket { what: "receiving a message", source: error.into() }),
            }
        }
        Ok(true)
    }

    /// Sends the bytes of one or more messages. The descriptors go with the first byte.
    ///
    /// # Errors
    /// When the peer is gone, or does not read them within the limit.
    pub fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>], limit: Limit) -> Result<(), WireError> {
        let mut sent = 0;
        while sent < bytes.len() {
            let files = if sent == 0 { files } else { &[] };
            let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(files.len()))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !files.is_empty() {
                let fits = control.push(SendAncillaryMessage::ScmRights(files));
                debug_assert!(fits, "there is room for all of them");
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.stream, &[IoSlice::new(&bytes[sent..])], &mut control, flags) {
                Ok(count) => sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.ready(PollFlags::OUT, limit)? {
                        return Err(WireError::Unread(limit.time));
                    }
                }
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(WireError::Gone),
                Err(error) => return Err(WireError::Socket { what: "sending a message", source: error.into() }),
            }
        }
        Ok(())
    }

    /// Waits until the socket is ready, also across signals. Returns whether it is.
    fn ready(&self, flags: PollFlags, limit: Limit) -> Result<bool, WireError> {
        loop {
            let left = limit.end.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.stream, flags)], Some(&left)) {
                Err(Errno::INTR) => {}
                Err(error) => return Err(WireError::Socket { what: "waiting for the peer", source: error.into() }),
                Ok(ready) => return Ok(ready > 0),
            }
        }
    }
}

#[cfg(test)]
mod tests;
