//! Children of this process, which do not outlive it.
#![allow(unsafe_code, reason = "what happens between fork and exec")]

use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Signal, set_parent_process_death_signal};

/// Has a child end with the thread that starts it.
pub(crate) fn end_with_parent(command: &mut Command) {
    // SAFETY: one system call, no allocation, no locks.
    unsafe {
        command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
    }
}
