//! What machine this is, and whether it has what a measurement needs.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use serde::Serialize;

/// The machine, for the report.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// CPU model.
    pub cpu: String,
    /// CPUs that are online.
    pub cpus: usize,
    /// Kernel release.
    pub kernel: String,
    /// RAM in bytes.
    pub memory: u64,
}

impl Machine {
    /// Looks around.
    pub fn look() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("unknown");
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kilobytes = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"))
            .and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
        Self {
            cpu: model.trim_start_matches([' ', '\t', ':']).to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            memory: kilobytes.unwrap_or(0) * 1024,
        }
    }
}

/// Why /dev/kvm can't be used, and what to do; `None` if it can.
pub fn kvm_trouble() -> Option<String> {
    let error = OpenOptions::new().read(true).write(true).open("/dev/kvm").err()?;
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => {
            "load the kvm_intel or kvm_amd module (modprobe), switch virtualization on in the firmware, or, in a VM or a \
             container, have nested virtualization or the device passed through"
        }
        io::ErrorKind::PermissionDenied => "become a member of the group that owns it (usually `kvm`), or root",
        _ => "look into the kernel's log for messages of kvm",
    };
    Some(format!("opening /dev/kvm: {error}: {remedy}"))
}

/// The file system that a path is on.
#[derive(Clone, Debug, Serialize)]
pub struct FileSystem {
    /// Its name, or its magic number.
    pub name: String,
    /// Whether its files live in memory only.
    pub in_memory: bool,
    /// Bytes that a user may still take.
    pub available: u64,
}

impl FileSystem {
    /// Asks the kernel.
    ///
    /// # Errors
    /// What statfs says.
    pub fn of(path: &Path) -> io::Result<Self> {
        let stat = rustix::fs::statfs(path)?;
        let magic = stat.f_type as u64 & 0xffff_ffff;
        let (name, in_memory) = match magic {
            0xef53 => ("ext4".to_owned(), false),
            0x5846_5342 => ("xfs".to_owned(), false),
            0x9123_683e => ("btrfs".to_owned(), false),
            0xf2f5_2010 => ("f2fs".to_owned(), false),
            0x2fc1_2fc1 => ("zfs".to_owned(), false),
            0x794c_7630 => ("overlayfs".to_owned(), false),
            0x6969 => ("nfs".to_owned(), false),
            0x0102_1994 => ("tmpfs".to_owned(), true),
            0x8584_58f6 => ("ramfs".to_owned(), true),
            other => (format!("file system {other:#x}"), false),
        };
        Ok(Self { name, in_memory, available: stat.f_bavail.saturating_mul(stat.f_bsize as u64) })
    }
}
