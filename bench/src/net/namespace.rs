//! A network namespace of this process's own, so that nothing of the host's network is touched, and nothing of it is in
//! what is measured. It goes with the last process in it.

#![allow(unsafe_code, reason = "leaving a namespace changes what other threads share")]

use std::fs;
use std::io;

use anyhow::{Context, Result, anyhow};
use rustix::thread::UnshareFlags;

/// Takes the calling thread, and all that it starts from here on, into a namespace of its own. Without the right to do so
/// it gets that in a user namespace, where the kernel lets everybody have one; for this the process must not have other
/// threads yet.
///
/// # Errors
/// Neither is allowed.
pub fn enter() -> Result<()> {
    match leave(UnshareFlags::NEWNET) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => unprivileged()?,
        Err(error) => return Err(error).context("making a network namespace"),
    }
    // Or the kernel would send neighbour and multicast messages of its own. Without IPv6 there is no such file.
    for place in ["all", "default"] {
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{place}/disable_ipv6"), "1");
    }
    Ok(())
}

fn unprivileged() -> Result<()> {
    let (user, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    leave(UnshareFlags::NEWUSER | UnshareFlags::NEWNET).map_err(|error| {
        anyhow!(
            "making a network namespace without being root: {error}: run it as root, or allow user namespaces \
             (kernel.unprivileged_userns_clone=1, user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0)"
        )
    })?;
    // Who has no name in the namespace has no rights in it either. Older kernels have no setgroups to deny.
    let _ = fs::write("/proc/self/setgroups", "deny");
    fs::write("/proc/self/uid_map", format!("0 {user} 1")).context("naming this user in a user namespace")?;
    fs::write("/proc/self/gid_map", format!("0 {group} 1")).context("naming this group in a user namespace")
}

fn leave(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: descriptors (FILES) stay shared, which is all that this asks for.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(io::Error::from)
}
