//! Errors between the frontend and a daemon, and whether the connection outlives them.

use std::borrow::Cow;
use std::error::Error;

use ringvm_vhost_user::connection::WireError;
use thiserror::Error;

/// A message that was not obeyed.
#[derive(Debug, Error)]
#[error("{what}: {source}")]
pub(super) struct LinkError {
    what: Cow<'static, str>,
    source: Box<dyn Error + Send + Sync>,
    fate: Fate,
}

/// What becomes of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The daemon has refused, or nothing was sent: it is as good as before.
    Lasts,
    /// It can't be used any more.
    Ends,
    /// Neither can the daemon, which was waited for in vain.
    Hangs,
}

impl LinkError {
    fn new(what: impl Into<Cow<'static, str>>, source: impl Into<Box<dyn Error + Send + Sync>>, fate: Fate) -> Self {
        Self { what: what.into(), source: source.into(), fate }
    }

    /// The daemon broke the protocol, or the host failed, so that the connection can't go on.
    pub(super) fn broken(what: impl Into<Cow<'static, str>>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(what, source, Fate::Ends)
    }

    /// There was nothing to send, or the daemon has refused.
    pub(super) fn ours(what: impl Into<Cow<'static, str>>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(what, source, Fate::Lasts)
    }

    /// No whole message came or went.
    pub(super) fn wire(what: impl Into<Cow<'static, str>>, error: WireError) -> Self {
        let hangs = matches!(error, WireError::Late(_) | WireError::Unread(_));
        Self::new(what, error, if hangs { Fate::Hangs } else { Fate::Ends })
    }

    /// Whether the connection can't be used any more.
    pub(super) fn ends_connection(&self) -> bool {
        self.fate != Fate::Lasts
    }

    /// Whether the daemon was waited for in vain.
    pub(super) fn hangs(&self) -> bool {
        self.fate == Fate::Hangs
    }
}
