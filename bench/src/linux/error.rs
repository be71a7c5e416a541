//! What can go wrong while a Linux guest is put together, each message with what was tried and on what.

use std::path::PathBuf;

/// The result of putting a guest together.
pub(super) type Result<T> = std::result::Result<T, Error>;

/// Why a guest could not be put together.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation failed.
    #[error("{tried} {path}: {source}", path = path.display())]
    File {
        /// A verb phrase, such as "reading".
        tried: &'static str,
        /// What it was tried on.
        path: PathBuf,
        /// What the host said.
        source: std::io::Error,
    },
    /// A program of the host could not be started, or failed.
    #[error("running `{command}` on the host: {why}")]
    Tool {
        /// The command line.
        command: String,
        /// Its status and the end of its output.
        why: String,
    },
    /// Something that the host should have is absent; the text says what to do.
    #[error("{0}")]
    Missing(String),
}

impl Error {
    /// For `map_err` after a file operation.
    pub fn file(tried: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::File { tried, path, source }
    }
}
