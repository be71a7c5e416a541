//! Exits of a guest, as KVM counts them for each VM: `kvm/PID-FD/exits` in debugfs. Nothing is slowed by reading it. It takes
//! root, and a kernel that lets debugfs be read; where either is missing there is no count.
//!
//! (KVM_GET_STATS_FD has the same number, but KVM answers only the process that made the VM: from any other a vCPU's
//! descriptor returns EIO, even one got by pidfd_getfd(2).)

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Dir, Mode, OFlags, openat};

use crate::kernel_fs;

/// A VM's count when it was first looked at.
pub struct Exits {
    files: Vec<OwnedFd>,
    first: u64,
}

impl Exits {
    /// Of the VMs of a process; `None` if they can't be seen.
    pub fn of(pid: u32) -> Option<Self> {
        let root = kernel_fs::open("debugfs")?;
        let kvm = openat(&root, "kvm", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let prefix = format!("{pid}-");
        let entries = Dir::read_from(&kvm).ok()?.filter_map(Result::ok);
        let names = entries.filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned));
        let open =
            |name: String| openat(&kvm, format!("{name}/exits"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok();
        let files: Vec<_> = names.filter(|name| name.starts_with(&prefix)).filter_map(open).collect();
        let first = sum(&files)?;
        Some(Self { files, first })
    }

    /// How many there have been since then.
    pub fn since(&self) -> Option<u64> {
        // A count that stands still is none: a guest that works exits, if only for its host's timer.
        sum(&self.files)?.checked_sub(self.first).filter(|&exits| exits != 0)
    }
}

fn sum(files: &[OwnedFd]) -> Option<u64> {
    if files.is_empty() {
        return None;
    }
    files.iter().map(number).sum()
}

fn number(file: &OwnedFd) -> Option<u64> {
    let mut text = String::new();
    // Opened anew: what debugfs shows was put together when it was first read.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file.as_fd()));
    fs::File::open(path).ok()?.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_without_a_vm_has_no_exits() {
        assert!(Exits::of(std::process::id()).is_none());
    }

    #[test]
    fn counts_are_read_as_they_are_now() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exits");
        fs::write(&path, "5\n").unwrap();
        let files = vec![OwnedFd::from(fs::File::open(&path).unwrap())];
        let exits = Exits { first: sum(&files).unwrap(), files };
        assert_eq!(exits.since(), None);
        fs::write(&path, "12\n").unwrap();
        assert_eq!(exits.since(), Some(7));
    }
}
