//! The exit codes of all programs, in one place.

use std::process::ExitCode;

/// How a program ended, as its exit code tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// The guest powered off, or a signal, the console's escape or the leaving of a daemon's only client ended the program. Every
    /// device was flushed.
    Success = 0,
    /// The program itself failed: a bug.
    Internal = 1,
    /// The configuration can't work; nothing was started.
    Configuration = 2,
    /// The host failed: KVM, io_uring, threads, memory, a disk that would not flush.
    Host = 3,
    /// The guest crashed: a triple fault, or an instruction that KVM could not go on with. Only `ringvm` has a guest.
    GuestCrash = 4,
    /// The guest rebooted under `--no-reboot`.
    Reboot = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}
