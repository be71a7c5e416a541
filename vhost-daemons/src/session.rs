//! One connection with a frontend: message after message, each answered as it wants to be.
//!
//! A request that can't be met is refused: by an answer if the frontend asked for one, else by ending the connection.

use std::io;
use std::os::fd::AsFd;

use ringvm_backends::device::Device;
use rustix::event::PollFlags;
use thiserror::Error;
use tracing::warn;
use vhost::vhost_user::message::FrontendReq;

use crate::backend::{Answer, Backend, Refused, SKIP_DRAIN, has_reply};
use crate::mailbox::{Mailbox, Woken};
use crate::message::{Connection, Message, WireError};

/// Most messages about ending rings that are taken before the first is answered: one for each ring that can be kicked.
const MOST_TOGETHER: usize = 256;
/// A frontend that is refused more often than this will not learn.
const MAX_REFUSALS: u32 = 64;

/// How a session ended that nobody is to blame for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The frontend has closed the connection.
    Disconnected,
    /// The daemon shall end.
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

/// A connection's backend.
pub(crate) struct Session<'a> {
    backend: Backend<'a>,
    refusals: u32,
}

impl<'a> Session<'a> {
    pub(crate) fn new(device: &'a mut dyn Device) -> io::Result<Self> {
        Ok(Self { backend: Backend::new(device)?, refusals: 0 })
    }

    /// Serves the frontend until either side ends it.
    pub(crate) fn run(&mut self, mut connection: Connection, mailbox: &Mailbox) -> Result<End, SessionError> {
        loop {
            let socket = (connection.as_fd(), PollFlags::IN);
            match mailbox.wait(Some(socket), Some(self.backend.alarm()), None).map_err(SessionError::Host)? {
                Woken::Alarm => return Err(SessionError::MemoryCut),
                Woken::Mail => {
                    if mailbox.stopped() {
                        return Ok(End::Stopped);
                    }
                    mailbox.serve(self.backend.device());
                }
                Woken::Ready => match connection.receive()? {
                    Some(message) => match self.handle_with_next(&mut connection, message) {
                        Err(SessionError::Wire(WireError::Gone)) => return Ok(End::Disconnected),
                        handled => handled?,
                    },
                    None => return Ok(End::Disconnected),
                },
                Woken::Late => {}
            }
        }
    }

    /// Handles a message and, if it is about a ring that shall not be waited for, those that have come behind it: what other
    /// rings have under way would keep it waiting.
    fn handle_with_next(&mut self, connection: &mut Connection, first: Message) -> Result<(), SessionError> {
        let mut messages = vec![first];
        while messages.len() < MOST_TOGETHER
            && messages.last().is_some_and(|last| last.request == SKIP_DRAIN)
            && connection.has_more()?
        {
            let Some(next) = connection.receive()? else { break };
            messages.push(next);
        }
        self.backend.suspend(&messages);
        messages.into_iter().try_for_each(|message| self.handle(connection, message))
    }

    fn handle(&mut self, connection: &mut Connection, message: Message) -> Result<(), SessionError> {
        let (request, need_reply) = (message.request, message.need_reply);
        let known = FrontendReq::try_from(request).ok();
        let answer = match known {
            Some(kind) => self.backend.apply(kind, message),
            None if request == SKIP_DRAIN => self.backend.skip_drain(&message),
            None => Err(Refused::Malformed("nobody knows this message".into())),
        };
        let (refused, code) = match answer {
            Ok(Answer::Reply(body, file)) => {
                return Ok(connection.reply(request, &body, file.as_ref().map(AsFd::as_fd))?);
            }
            Ok(Answer::Done) => {
                if need_reply && self.backend.acks() {
                    connection.reply(request, &0u64.to_ne_bytes(), None)?;
                }
                return Ok(());
            }
            Ok(Answer::Refused(code, refused)) => (refused, Some(code)),
            Err(refused) => (refused, None),
        };
        let name = known.map_or_else(|| format!("message {request}"), |known| format!("{known:?}"));
        // Features are the guest's choice, which its frontend only passes on.
        self.refusals += u32::from(!matches!(refused, Refused::Features(_)));
        if self.refusals > MAX_REFUSALS {
            return Err(SessionError::Hopeless);
        }
        let answered = known.map_or(request == SKIP_DRAIN, has_reply);
        let nack = need_reply && self.backend.acks() && !answered;
        let code = code.or(nack.then_some(1));
        if code.is_none() && !matches!(refused, Refused::Features(_)) {
            return Err(SessionError::Refused { message: name, reason: refused });
        }
        warn!(device = %self.backend.device().info().name, "{name} refused: {refused}");
        if let Some(code) = code {
            connection.reply(request, &code.to_ne_bytes(), None)?;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
