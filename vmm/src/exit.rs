//! The exit codes of `ringvm run`, all in one place.

use std::process::ExitCode;

/// How `ringvm` ended, as its exit code tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The guest powered off, or SIGTERM, SIGINT or the console's escape ended the machine and every disk was flushed.
    Success = 0,
    /// `ringvm` itself failed: a bug.
    Internal = 1,
    /// The configuration can't work; no guest was started.
    Configuration = 2,
    /// The host failed: KVM, io_uring, memory, a disk that would not flush.
    Host = 3,
    /// The guest crashed: a triple fault, or an instruction that KVM could not go on with.
    GuestCrash = 4,
    /// The guest rebooted under `--no-reboot`.
    Reboot = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
