//! KVM's errors, and advice on them.

use std::io;

use thiserror::Error;

/// A failure of KVM.
#[derive(Debug, Error)]
pub enum KvmError {
    /// `/dev/kvm` can't be opened.
    #[error("opening /dev/kvm: {source}; {}", advice(.source))]
    Open {
        /// What the host said.
        source: io::Error,
    },
    /// Not the KVM that was stable since 2007.
    #[error("/dev/kvm speaks API version {0}, not 12; is it KVM?")]
    Version(i32),
    /// A capability that ringvm can't do without.
    #[error("KVM of this host lacks {0}; a newer kernel is needed (5.10 or later has all of it)")]
    Capability(&'static str),
    /// More vCPUs than the host can run.
    #[error("{wanted} vCPUs are beyond what KVM of this host offers, {limit}; ask for fewer with --cpus")]
    Cpus {
        /// How many were wanted.
        wanted: u32,
        /// How many there can be.
        limit: u32,
    },
    /// A call failed.
    #[error("KVM, {what}: {source}{}", crate::advice::advice(.source))]
    Call {
        /// What was tried.
        what: String,
        /// What came back.
        source: io::Error,
    },
}

/// Advice for a `/dev/kvm` that does not open.
pub(super) fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "enable virtualization in the firmware and load kvm-intel or kvm-amd, or give this machine nested virtualization"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "add your user to the group that owns it, usually kvm (`ls -l /dev/kvm`), and log in again"
        }
        _ => "see `ringvm check`",
    }
}

/// Puts a name to a failed call.
pub(super) fn call(what: impl Into<String>) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    let what = what.into();
    move |error| KvmError::Call { what, source: error.into() }
}
