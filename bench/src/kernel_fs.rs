//! File systems in which the kernel tells of itself, wherever they are mounted, and if nowhere, mounted for this process
//! alone: by fsopen(2) and fsmount(2), at no path.

use std::os::fd::OwnedFd;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// Opens the root of one; `None` without the right to, or where the kernel has none such.
pub(crate) fn open(name: &str) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let context = fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC).ok();
    let detached = context.and_then(|context| {
        fsconfig_create(&context).ok()?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).ok()
    });
    if let Some(mount) = detached {
        return openat(&mount, ".", flags, Mode::empty()).ok();
    }
    let path = match name {
        "debugfs" => "/sys/kernel/debug",
        "tracefs" => "/sys/kernel/tracing",
        _ => return None,
    };
    openat(CWD, path, flags, Mode::empty()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_does_not_have_is_not_there() {
        assert!(open("no-such-file-system").is_none());
    }
}
