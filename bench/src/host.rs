//! What machine this is, and whether it has what a measurement needs.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The machine, as far as it says what to make of figures.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Machine {
    /// CPU model.
    pub cpu: String,
    /// CPUs that are online.
    pub cpus: usize,
    /// Kernel release.
    pub kernel: String,
    /// RAM in bytes.
    pub memory: u64,
    /// The distribution.
    pub system: Option<String>,
    /// Whether the machine is a guest itself.
    pub virtual_machine: bool,
    /// The modules of KVM that are loaded; empty where it is built in, or missing.
    pub kvm: Vec<String>,
    /// How CPU frequencies are chosen, where that can be seen.
    pub governor: Option<String>,
    /// When transparent hugepages are used.
    pub hugepages: Option<String>,
    /// Known weaknesses of the CPU, and what is done about them, which costs at each exit and system call.
    pub mitigations: BTreeMap<String, String>,
}

impl Machine {
    /// Looks around.
    pub fn look() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let of_cpu = |key| {
            cpuinfo
                .lines()
                .find_map(|line| line.strip_prefix(key))
                .map(|text| text.trim_start_matches([' ', '\t', ':']))
        };
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kilobytes = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"))
            .and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
        Self {
            cpu: of_cpu("model name").unwrap_or("unknown").to_owned(),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: word("/proc/sys/kernel/osrelease").unwrap_or_default(),
            memory: kilobytes.unwrap_or(0) * 1024,
            system: distribution(),
            virtual_machine: of_cpu("flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            kvm: names("/sys/module").into_iter().filter(|name| name.starts_with("kvm")).collect(),
            governor: word("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
            hugepages: word("/sys/kernel/mm/transparent_hugepage/enabled").and_then(|text| chosen(&text)),
            mitigations: mitigations(),
        }
    }
}

/// Whether the CPU is AMD's, or one of its descendants.
pub fn is_amd() -> bool {
    fs::read_to_string("/proc/cpuinfo").is_ok_and(|cpuinfo| is_amd_by(&cpuinfo))
}

fn is_amd_by(cpuinfo: &str) -> bool {
    let vendor = cpuinfo.lines().find_map(|line| line.strip_prefix("vendor_id")).unwrap_or_default();
    ["AuthenticAMD", "HygonGenuine"].contains(&vendor.trim_start_matches([' ', '\t', ':']).trim_end())
}

/// The content of a file of one line.
fn word(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?.trim().to_owned();
    (!text.is_empty()).then_some(text)
}

/// The files of a directory, sorted.
fn names(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The word in brackets, as sysfs marks what is in force.
fn chosen(text: &str) -> Option<String> {
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

fn distribution() -> Option<String> {
    let text = fs::read_to_string("/etc/os-release").ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(name.trim_matches('"').to_owned())
}

fn mitigations() -> BTreeMap<String, String> {
    let dir = "/sys/devices/system/cpu/vulnerabilities";
    names(dir).into_iter().filter_map(|name| word(&format!("{dir}/{name}")).map(|text| (name, text))).collect()
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

/// Why a guest's stock kernel may not come up on this host's KVM; `None` if there is no reason to think so.
pub fn kvm_oddity() -> Option<&'static str> {
    Path::new("/sys/module/kvm_pvm").exists().then_some(
        "this host's KVM is kvm_pvm, which does without the CPU's virtualization and emulates what a stock kernel does: measure \
         on a host with VT-x or AMD-V, or see with --vmm qemu-tcg whether the loads run at all",
    )
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_cpus_memory_and_a_kernel() {
        let machine = Machine::look();
        assert!(machine.cpus > 0 && machine.memory > 1 << 20 && !machine.kernel.is_empty(), "{machine:?}");
        assert_eq!(chosen("always [madvise] never").as_deref(), Some("madvise"));
        assert_eq!(chosen("none"), None);
    }

    #[test]
    fn vendors_are_told_apart() {
        let cpuinfo = |vendor: &str| format!("processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: X AuthenticAMD\n");
        assert!(is_amd_by(&cpuinfo("AuthenticAMD")) && is_amd_by(&cpuinfo("HygonGenuine")));
        assert!(!is_amd_by(&cpuinfo("GenuineIntel")) && !is_amd_by(""));
    }
}
