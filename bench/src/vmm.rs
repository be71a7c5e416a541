//! The VMMs that can be measured, and how each is told to boot the guest with a disk or a NIC.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;

/// A VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ours.
    Ringvm,
    /// Ours, with its devices in a daemon.
    RingvmDaemon,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker with its default block engine.
    Firecracker,
    /// Firecracker with its io_uring engine.
    FirecrackerAsync,
    /// QEMU with KVM.
    Qemu,
    /// QEMU without KVM.
    QemuTcg,
}

const KINDS: &[(&str, Kind)] = &[
    ("ringvm", Kind::Ringvm),
    ("ringvm-daemon", Kind::RingvmDaemon),
    ("cloud-hypervisor", Kind::CloudHypervisor),
    ("firecracker", Kind::Firecracker),
    ("firecracker-async", Kind::FirecrackerAsync),
    ("qemu", Kind::Qemu),
    ("qemu-tcg", Kind::QemuTcg),
];

impl Kind {
    /// Whether a thread of this name runs a vCPU.
    pub fn is_vcpu(self, thread: &str) -> bool {
        match self {
            Self::Ringvm | Self::RingvmDaemon | Self::CloudHypervisor => thread.starts_with("vcpu"),
            Self::Firecracker | Self::FirecrackerAsync => thread.starts_with("fc_vcpu"),
            Self::Qemu | Self::QemuTcg => thread.starts_with("CPU "),
        }
    }

    /// Whether it needs /dev/kvm.
    pub fn needs_kvm(self) -> bool {
        self != Self::QemuTcg
    }
}

/// A VMM that takes part.
#[derive(Clone, Debug)]
pub struct Contestant {
    /// Which.
    pub kind: Kind,
    /// Its name in the table.
    pub name: String,
    /// Its program.
    pub path: PathBuf,
}

impl Contestant {
    /// Reads `KIND=PATH`.
    ///
    /// # Errors
    /// An unknown kind, or no path.
    pub fn parse(text: &str) -> Result<Self, String> {
        let names = || KINDS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
        let (name, path) =
            text.split_once('=').ok_or_else(|| format!("expected KIND=PATH, KIND being one of {}", names()))?;
        let Some(&(_, kind)) = KINDS.iter().find(|(known, _)| *known == name) else {
            return Err(format!("unknown VMM {name}: expected one of {}", names()));
        };
        Ok(Self { kind, name: name.to_owned(), path: PathBuf::from(path) })
    }

    /// The ringvm to measure: the given one, or the one beside this program.
    ///
    /// # Errors
    /// There is none.
    pub fn ringvm(path: Option<&Path>) -> Result<Self> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => env::current_exe().context("finding this program")?.with_file_name("ringvm"),
        };
        if !path.is_file() {
            bail!("no ringvm at {}: build it with `cargo build --release`, or give --ringvm PATH", path.display());
        }
        Ok(Self { kind: Kind::Ringvm, name: "ringvm".to_owned(), path })
    }

    /// The same VMM with its devices in daemons.
    #[must_use]
    pub fn in_daemon(&self) -> Self {
        Self { kind: Kind::RingvmDaemon, name: format!("{}, daemon", self.name), path: self.path.clone() }
    }

    /// The command line for a VM, writing what files it needs into `dir`.
    ///
    /// # Errors
    /// A file that can't be written.
    pub fn command(&self, vm: &Vm<'_>, dir: &Path) -> Result<Vec<OsString>> {
        let mut words = vec![self.path.clone().into_os_string()];
        match self.kind {
            Kind::Ringvm => words.extend(ringvm(vm, "process")),
            Kind::RingvmDaemon => words.extend(ringvm(vm, "daemon")),
            Kind::CloudHypervisor => words.extend(cloud_hypervisor(vm)),
            Kind::Firecracker => words.extend(firecracker(vm, dir, "Sync")?),
            Kind::FirecrackerAsync => words.extend(firecracker(vm, dir, "Async")?),
            Kind::Qemu => words.extend(qemu(vm, "kvm", "host")),
            Kind::QemuTcg => words.extend(qemu(vm, "tcg", "max")),
        }
        Ok(words)
    }
}

/// A VM.
#[derive(Clone, Copy, Debug)]
pub struct Vm<'a> {
    /// The guest's image.
    pub kernel: &'a Path,
    /// What it is to do.
    pub command_line: &'a str,
    /// vCPUs.
    pub cpus: u16,
    /// RAM in MiB.
    pub memory: u32,
    /// Its disk.
    pub disk: Option<Disk<'a>>,
    /// Its NIC.
    pub nic: Option<Nic<'a>>,
}

/// A disk.
#[derive(Clone, Copy, Debug)]
pub struct Disk<'a> {
    /// The image or block device.
    pub path: &'a Path,
    /// O_DIRECT.
    pub direct: bool,
    /// Its queues.
    pub queues: u16,
    /// Descriptors per queue.
    pub queue_size: u16,
}

/// A NIC on a tap that exists.
#[derive(Clone, Copy, Debug)]
pub struct Nic<'a> {
    /// The interface: multi-queue if it has more than one pair.
    pub tap: &'a str,
    /// Its queue pairs.
    pub pairs: u16,
    /// Descriptors per queue.
    pub queue_size: u16,
}

fn words<const N: usize>(words: [&str; N]) -> Vec<OsString> {
    words.into_iter().map(OsString::from).collect()
}

fn on(flag: bool) -> &'static str {
    if flag { "on" } else { "off" }
}

fn ringvm(vm: &Vm<'_>, place: &str) -> Vec<OsString> {
    let mut all = words([
        "run",
        "--kernel",
        &vm.kernel.to_string_lossy(),
        "--cmdline",
        vm.command_line,
        "--cpus",
        &vm.cpus.to_string(),
        "--memory",
        &format!("{}M", vm.memory),
        "--serial",
        "stdio",
    ]);
    if let Some(disk) = &vm.disk {
        let (path, direct) = (disk.path.display(), on(disk.direct));
        let disk =
            format!("path={path},place={place},direct={direct},queues={},queue-size={}", disk.queues, disk.queue_size);
        all.extend(words(["--disk", &disk]));
    }
    if let Some(nic) = &vm.nic {
        let nic = format!("tap={},place={place},queues={},queue-size={}", nic.tap, nic.pairs, nic.queue_size);
        all.extend(words(["--net", &nic]));
    }
    all
}

fn cloud_hypervisor(vm: &Vm<'_>) -> Vec<OsString> {
    let mut all = words([
        "--kernel",
        &vm.kernel.to_string_lossy(),
        "--cmdline",
        vm.command_line,
        "--cpus",
        &format!("boot={}", vm.cpus),
        "--memory",
        &format!("size={}M", vm.memory),
        "--serial",
        "tty",
        "--console",
        "off",
    ]);
    if let Some(disk) = &vm.disk {
        let (path, direct) = (disk.path.display(), on(disk.direct));
        let (queues, size) = (disk.queues, disk.queue_size);
        let disk = format!("path={path},image_type=raw,direct={direct},num_queues={queues},queue_size={size}");
        all.extend(words(["--disk", &disk]));
    }
    if let Some(nic) = &vm.nic {
        let nic = format!("tap={},num_queues={},queue_size={}", nic.tap, nic.pairs * 2, nic.queue_size);
        all.extend(words(["--net", &nic]));
    }
    all
}

fn firecracker(vm: &Vm<'_>, dir: &Path, engine: &str) -> Result<Vec<OsString>> {
    let drives = vm.disk.iter().map(|disk| {
        json!({
            "drive_id": "disk",
            "path_on_host": disk.path,
            "is_root_device": false,
            "is_read_only": false,
            "io_engine": engine,
        })
    });
    if let Some(nic) = vm.nic.filter(|nic| nic.pairs > 1) {
        bail!("Firecracker's NICs have one queue pair, not {}: leave it out, or measure with --pairs 1", nic.pairs);
    }
    let nics = vm.nic.iter().map(|nic| json!({ "iface_id": "nic", "host_dev_name": nic.tap }));
    let config = json!({
        "boot-source": { "kernel_image_path": vm.kernel, "boot_args": vm.command_line },
        "machine-config": { "vcpu_count": vm.cpus, "mem_size_mib": vm.memory },
        "drives": drives.collect::<Vec<_>>(),
        "network-interfaces": nics.collect::<Vec<_>>(),
    });
    let path = dir.join(format!("firecracker-{engine}.json"));
    fs::write(&path, config.to_string()).with_context(|| format!("writing {}", path.display()))?;
    // Its log goes to stdout otherwise, before the guest's first byte.
    let log = dir.join(format!("firecracker-{engine}.log"));
    fs::write(&log, "").with_context(|| format!("making {}", log.display()))?;
    let (path, log) = (path.to_string_lossy(), log.to_string_lossy());
    Ok(words(["--no-api", "--enable-pci", "--level", "Error", "--log-path", &log, "--config-file", &path]))
}

fn qemu(vm: &Vm<'_>, accelerator: &str, cpu: &str) -> Vec<OsString> {
    let mut all = words([
        "-M",
        "q35",
        "-accel",
        accelerator,
        "-cpu",
        cpu,
        "-smp",
        &vm.cpus.to_string(),
        "-m",
        &vm.memory.to_string(),
        "-nodefaults",
        "-no-user-config",
        // Names threads, so that vCPUs can be told from the others.
        "-name",
        "bench,debug-threads=on",
        "-no-reboot",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-kernel",
        &vm.kernel.to_string_lossy(),
        "-append",
        vm.command_line,
    ]);
    if let Some(disk) = &vm.disk {
        // QEMU doubles commas in option values.
        let path = disk.path.to_string_lossy().replace(',', ",,");
        let cache = if disk.direct { "none" } else { "writeback" };
        let (queues, size) = (disk.queues, disk.queue_size);
        let drive = format!("file={path},format=raw,if=none,id=disk,cache={cache},aio=io_uring,discard=unmap");
        let device =
            format!("virtio-blk-pci,drive=disk,iothread=io0,disable-legacy=on,num-queues={queues},queue-size={size}");
        all.extend(words(["-object", "iothread,id=io0", "-drive", &drive, "-device", &device]));
    }
    if let Some(nic) = &vm.nic {
        let netdev = format!("tap,id=net0,ifname={},script=no,downscript=no,queues={}", nic.tap, nic.pairs);
        let (mq, size) = (on(nic.pairs > 1), nic.queue_size);
        // Without a ROM: it is for booting from the network only, and not always installed.
        let device = format!(
            "virtio-net-pci,netdev=net0,disable-legacy=on,romfile=,mq={mq},rx_queue_size={size},tx_queue_size={}",
            // All that it takes where frames go out to a tap.
            size.min(256)
        );
        all.extend(words(["-netdev", &netdev, "-device", &device]));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contestants_are_read_or_refused() {
        let qemu = Contestant::parse("qemu=/usr/bin/q").unwrap();
        assert_eq!((qemu.kind, qemu.name.as_str(), qemu.path), (Kind::Qemu, "qemu", PathBuf::from("/usr/bin/q")));
        assert!(Contestant::parse("qemu").unwrap_err().contains("KIND=PATH"));
        assert!(Contestant::parse("bochs=/x").unwrap_err().contains("unknown VMM bochs"));
    }

    fn vm<'a>(disk: Option<Disk<'a>>, nic: Option<Nic<'a>>) -> Vm<'a> {
        Vm { kernel: Path::new("/k/guest.elf"), command_line: "job=none depth=1", cpus: 2, memory: 256, disk, nic }
    }

    /// The command line of each kind, and the file that it names.
    fn commands(vm: &Vm<'_>) -> Vec<(Kind, Result<String>)> {
        let dir = tempfile::tempdir().unwrap();
        let command = |&(name, kind): &(&str, Kind)| {
            let contestant = Contestant { kind, name: name.to_owned(), path: PathBuf::from("/bin/vmm") };
            let all = contestant.command(vm, dir.path()).map(|words| {
                let mut all: String = words.iter().map(|word| word.to_string_lossy() + "\n").collect();
                if let Some(config) = words.iter().find(|word| word.to_string_lossy().ends_with(".json")) {
                    all += &fs::read_to_string(config).unwrap();
                }
                all
            });
            (kind, all)
        };
        KINDS.iter().map(command).collect()
    }

    #[test]
    fn every_kind_has_a_command_that_names_kernel_job_and_disk_or_nic() {
        let disk = Disk { path: Path::new("/d/x.img"), direct: true, queues: 2, queue_size: 256 };
        let nic = Nic { tap: "tap7", pairs: 1, queue_size: 256 };
        for (kind, all) in commands(&vm(Some(disk), None)) {
            let all = all.unwrap();
            for wanted in ["/k/guest.elf", "job=none depth=1", "/d/x.img"] {
                assert!(all.contains(wanted), "{kind:?}: {all}");
            }
            assert!(!all.contains("tap"), "{kind:?}: {all}");
        }
        for (kind, all) in commands(&vm(None, Some(nic))) {
            let all = all.unwrap();
            for wanted in ["/k/guest.elf", "job=none depth=1", "tap7"] {
                assert!(all.contains(wanted), "{kind:?}: {all}");
            }
            assert!(!all.contains("drive_id") && !all.contains("disk"), "{kind:?}: {all}");
        }
    }

    #[test]
    fn two_pairs_are_refused_where_there_is_one() {
        let nic = Nic { tap: "tap7", pairs: 2, queue_size: 256 };
        for (kind, all) in commands(&vm(None, Some(nic))) {
            match kind {
                Kind::Firecracker | Kind::FirecrackerAsync => {
                    assert!(all.unwrap_err().to_string().contains("--pairs 1"));
                }
                _ => assert!(all.unwrap().contains("queues="), "{kind:?}"),
            }
        }
    }
}
