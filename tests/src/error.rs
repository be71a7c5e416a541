//! What can go wrong in the harness, each message with what was tried and on what.

use std::path::PathBuf;
use std::time::Duration;

pub(crate) use ringvm_bench::linux::tail;

/// The harness's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything the harness can report. A failed check of a test is a panic or [`Error::Check`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation of the harness failed.
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
    /// A guest could not be put together.
    #[error(transparent)]
    Guest(#[from] ringvm_bench::linux::Error),
    /// A command in a machine of the lab ended with another code than 0.
    #[error("`{command}` in {place} ended with {status}:\n{output}")]
    Command {
        /// The command line.
        command: String,
        /// "L1" or "the guest".
        place: &'static str,
        /// "code N" or "signal N".
        status: String,
        /// What it printed.
        output: String,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {limit:?}; last seen:\n{tail}")]
    TimedOut {
        /// What was waited for.
        what: String,
        /// The time it was given.
        limit: Duration,
        /// The end of the console or output.
        tail: String,
    },
    /// A machine or process that should be running is gone.
    #[error("{what} ended unexpectedly; last seen:\n{tail}")]
    Ended {
        /// Which one.
        what: String,
        /// The end of the console or output.
        tail: String,
    },
    /// The L1 machine answers no more.
    #[error("the L1 machine no longer answers ({0})")]
    L1Silent(String),
    /// A check of a test does not hold.
    #[error("{0}")]
    Check(String),
}

impl Error {
    /// For `map_err` after a file operation.
    pub fn file(tried: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::File { tried, path, source }
    }
}
