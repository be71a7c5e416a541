//! One connection with a frontend: message after message, each answered as it wants to be.
//!
//! A request that can't be met is refused: by an answer if the frontend asked for one, else by ending the connection.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use ringvm_backends::device::Device;
use ringvm_vhost_user::connection::{Connection, Limit, WireError};
use ringvm_vhost_user::message::{self, GET_VRING_BASE_SKIP_DRAIN as SKIP_DRAIN, Message, request_name};
use rustix::event::PollFlags;
use thiserror::Error;
use tracing::{debug_span, warn};
use vhost::vhost_user::message::FrontendReq;

use crate::backend::{Answer, Backend, Refused, has_reply};
use crate::mailbox::{Mailbox, Wanted, Woken};

/// Longest time that a message may take once it has begun, and that a reply may wait to be read.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most messages about ending rings that are taken before the first is answered: one for each ring that can be kicked.
const MOST_TOGETHER: usize = 256;
/// A frontend that is refused more often than this will not learn.
const MAX_REFUSALS: u32 = 64;
/// How often to look at the letter box while requests of a client that has gone come to their end.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// When to say that they do not.
const LONG: Duration = Duration::from_secs(5);

/// How a session ended without a fault of either side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The frontend has closed the connection.
    Disconnected,
    /// The daemon is to end.
    Stopped,
}

/// Why a connection was dropped.
#[derive(Debug, Error)]
pub(crate) enum SessionError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("{message}: {reason}")]
    Refused { message: String, reason: Refused },
    #[error("it was refused {MAX_REFUSALS} times")]
    Hopeless,
    #[error("it has cut its memory short while that was in use")]
    MemoryCut,
    #[error("waiting for it: {0}")]
    Host(io::Error),
}

/// A connection and its backend.
pub(crate) struct Session<'a> {
    connection: Connection,
    mailbox: &'a Mailbox,
    backend: Backend<'a>,
    refusals: u32,
}

impl<'a> Session<'a> {
    pub(crate) fn new(device: &'a mut dyn Device, connection: Connection, mailbox: &'a Mailbox) -> io::Result<Self> {
        let wanted = Wanted::by(connection.as_fd(), mailbox)?;
        Ok(Self { connection, mailbox, backend: Backend::new(device, wanted)?, refusals: 0 })
    }

    /// Serves the frontend until either side ends it.
    pub(crate) fn run(&mut self) -> Result<End, SessionError> {
        let mailbox = self.mailbox;
        loop {
            let socket = (self.connection.as_fd(), PollFlags::IN);
            match mailbox.wait(Some(socket), Some(self.backend.alarm()), None).map_err(SessionError::Host)? {
                Woken::Alarm => return Err(SessionError::MemoryCut),
                Woken::Mail => {
                    if mailbox.stopped() {
                        return Ok(End::Stopped);
                    }
                    mailbox.serve(self.backend.device());
                }
                Woken::Ready => match self.receive()? {
                    Some(message) => match self.handle_with_next(message) {
                        Err(SessionError::Wire(WireError::Gone)) => return Ok(End::Disconnected),
                        handled => handled?,
                    },
                    None => return Ok(End::Disconnected),
                },
                Woken::Late => {}
            }
        }
    }

    /// Ends the frontend's unfinished requests. Those that can be cancelled are not waited for. The others are,
    /// because the device can't serve another client until then; but for no longer than `grace` if the daemon is to
    /// end. Returns whether nothing is in flight.
    pub(crate) fn end(mut self, grace: Duration) -> bool {
        let begun = Instant::now();
        let (mut said, mut last) = (false, None);
        let mut stopping = self.backend.begin_end();
        while let Err(still) = stopping.wait_until(Instant::now() + LOOK_PAUSE) {
            stopping = still;
            if self.mailbox.stopped() && Instant::now() > *last.get_or_insert_with(|| Instant::now() + grace) {
                // The kernel may still write to the memory of this session, so that stays until the process has ended.
                std::mem::forget(self);
                return false;
            }
            self.mailbox.serve(self.backend.device());
            if !said && begun.elapsed() > LONG {
                said = true;
                warn!("requests of the last client do not end; until they do, no other is served");
            }
        }
        true
    }

    /// Receives the message that has begun to come.
    fn receive(&mut self) -> Result<Option<Message>, WireError> {
        self.connection.receive_request(Limit::after(PATIENCE))
    }

    fn reply(&self, request: u32, body: &[u8], file: Option<BorrowedFd<'_>>) -> Result<(), SessionError> {
        Ok(self.connection.send(&message::reply(request, body), file.as_slice(), Limit::after(PATIENCE))?)
    }

    /// Handles a message. If it is about a ring that must not be waited for, handles the messages that have come
    /// after it too: requests in flight on other rings would keep it waiting.
    fn handle_with_next(&mut self, first: Message) -> Result<(), SessionError> {
        let mut messages = vec![first];
        while messages.len() < MOST_TOGETHER
            && messages.last().is_some_and(|last| last.request == SKIP_DRAIN)
            && self.connection.has_more()?
        {
            let Some(next) = self.receive()? else { break };
            messages.push(next);
        }
        if let Err(reason) = self.backend.suspend(&messages) {
            return Err(refused("stopping rings".into(), reason));
        }
        messages.into_iter().try_for_each(|message| self.handle(message))
    }

    fn handle(&mut self, message: Message) -> Result<(), SessionError> {
        let (request, need_reply) = (message.request, message.need_reply);
        let known = FrontendReq::try_from(request).ok();
        let _handling = debug_span!("message", request, kind = ?known).entered();
        let answer = match known {
            Some(kind) => self.backend.apply(kind, message),
            None if request == SKIP_DRAIN => self.backend.skip_drain(&message),
            None => Err(Refused::Malformed("nobody knows this message".into())),
        };
        let (reason, code) = match answer {
            Ok(Answer::Reply(body, file)) => {
                return self.reply(request, &body, file.as_ref().map(AsFd::as_fd));
            }
            Ok(Answer::Done) => {
                if need_reply && self.backend.acks() {
                    self.reply(request, &0u64.to_ne_bytes(), None)?;
                }
                return Ok(());
            }
            Ok(Answer::Refused(code, reason)) => (reason, Some(code)),
            Err(reason) => (reason, None),
        };
        let name = request_name(request);
        // Rings are in between then.
        if matches!(reason, Refused::Busy | Refused::Unwanted) {
            return Err(refused(name, reason));
        }
        // Features are the guest's choice, which its frontend only passes on.
        self.refusals += u32::from(!matches!(reason, Refused::Features(_)));
        if self.refusals > MAX_REFUSALS {
            return Err(SessionError::Hopeless);
        }
        let answered = known.map_or(request == SKIP_DRAIN, has_reply);
        let nack = need_reply && self.backend.acks() && !answered;
        let code = code.or(nack.then_some(1));
        if code.is_none() && !matches!(reason, Refused::Features(_)) {
            return Err(refused(name, reason));
        }
        warn!("{name} refused: {reason}");
        if let Some(code) = code {
            self.reply(request, &code.to_ne_bytes(), None)?;
        }
        Ok(())
    }
}

/// Why the session ends: a message is refused, unless its sender is gone.
fn refused(message: String, reason: Refused) -> SessionError {
    if matches!(reason, Refused::Unwanted) { WireError::Gone.into() } else { SessionError::Refused { message, reason } }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
