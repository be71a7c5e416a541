//! The exit codes of the daemons: those of `ringvm`, as far as they apply.

use std::process::ExitCode;

/// How a daemon ended, as its exit code tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// A signal ended it, or its only client has left, and every device was flushed.
    Success = 0,
    /// The daemon itself failed: a bug.
    Internal = 1,
    /// The configuration can't work; nobody was served.
    Configuration = 2,
    /// The host failed: io_uring, threads, a disk that would not flush.
    Host = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
