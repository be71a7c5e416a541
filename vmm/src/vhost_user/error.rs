//! Errors between the frontend and a daemon, and whether the connection outlives them.

use std::error::Error;
use std::io;

use thiserror::Error;

/// A message that was not obeyed.
#[derive(Debug, Error)]
#[error("{what}: {source}")]
pub(super) struct LinkError {
    pub(super) what: &'static str,
    source: io::Error,
    /// The daemon has refused, or nothing was sent: the connection is as good as before.
    harmless: bool,
}

impl LinkError {
    /// The daemon did what can't be gone on with.
    pub(super) fn broken(what: &'static str, message: impl Into<String>) -> Self {
        Self { what, source: io::Error::other(message.into()), harmless: false }
    }

    /// There was nothing to send.
    pub(super) fn ours(what: &'static str, message: impl Into<String>) -> Self {
        Self { what, source: io::Error::other(message.into()), harmless: true }
    }

    /// Whether the connection can't be used any more.
    pub(super) fn ends_connection(&self) -> bool {
        !self.harmless
    }
}

pub(super) trait Context<T> {
    fn context(self, what: &'static str) -> Result<T, LinkError>;
}

impl<T, E: Error + Send + Sync + 'static> Context<T> for Result<T, E> {
    fn context(self, what: &'static str) -> Result<T, LinkError> {
        self.map_err(|error| {
            let harmless = is_harmless(&error);
            LinkError { what, source: io::Error::other(error), harmless }
        })
    }
}

/// Whether an error of the crate's leaves the connection as it was: the daemon has refused, or the crate did.
fn is_harmless(error: &(dyn Error + 'static)) -> bool {
    use vhost::vhost_user::Error as Protocol;
    matches!(
        error.downcast_ref(),
        Some(vhost::Error::VhostUserProtocol(
            Protocol::BackendInternalError | Protocol::InvalidParam | Protocol::InactiveFeature(_)
        ))
    )
}
