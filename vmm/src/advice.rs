//! Advice for a host that ran out of a resource.

use std::io;

/// Advice for `error`, with its own punctuation in front, or nothing.
#[must_use]
pub fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "; raise the limit of open files of this process (ulimit -n)",
        Some(libc::ENFILE) => "; the host has no open files left, raise fs.file-max",
        Some(libc::ENOMEM) => "; free some memory on the host, or raise the limits of this process (ulimit -a)",
        Some(libc::EAGAIN) => "; raise the limit of processes and threads (ulimit -u, or pids.max of the cgroup)",
        Some(libc::ENOSPC) => "; the host is out of space or of slots for it",
        _ => "",
    }
}
