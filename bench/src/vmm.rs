//! The VMMs that can be measured, and how each is told to boot the guest with disks or NICs.

mod commands;
pub mod found;

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::document::Program;
use crate::host;

/// A VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ours.
    Ringvm,
    /// Ours, with its devices in a daemon.
    RingvmDaemon,
    /// Ours, with its disk in QEMU's storage daemon.
    StorageDaemon,
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
    ("qemu-storage-daemon", Kind::StorageDaemon),
];

/// For messages.
fn names() -> String {
    KINDS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

impl Kind {
    /// Reads a name as on the command line; `daemon` is short for ringvm's.
    ///
    /// # Errors
    /// There is no such kind.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = if text == "daemon" { "ringvm-daemon" } else { text };
        let known = KINDS.iter().find(|(name, _)| *name == text);
        known.map(|&(_, kind)| kind).ok_or_else(|| format!("unknown VMM {text}: expected one of {}", names()))
    }

    /// Whether a thread of this name runs a vCPU.
    pub fn is_vcpu(self, thread: &str) -> bool {
        match self {
            Self::Ringvm | Self::RingvmDaemon | Self::StorageDaemon | Self::CloudHypervisor => {
                thread.starts_with("vcpu")
            }
            Self::Firecracker | Self::FirecrackerAsync => thread.starts_with("fc_vcpu"),
            Self::Qemu | Self::QemuTcg => thread.starts_with("CPU "),
        }
    }

    /// Whether it needs /dev/kvm.
    pub fn needs_kvm(self) -> bool {
        self != Self::QemuTcg
    }

    /// Whether it boots ELF images only.
    pub fn needs_elf(self) -> bool {
        matches!(self, Self::Firecracker | Self::FirecrackerAsync)
    }

    /// Whether it has disks that hold nothing.
    pub fn has_null_storage(self) -> bool {
        !matches!(self, Self::CloudHypervisor | Self::Firecracker | Self::FirecrackerAsync)
    }

    /// Whether its NICs are its own, and no other contestant's.
    pub fn has_nics(self) -> bool {
        !matches!(self, Self::StorageDaemon | Self::FirecrackerAsync)
    }
}

/// What a user says of other VMMs.
#[derive(Clone, Debug)]
pub enum Against {
    /// This one.
    One(Contestant),
    /// Whatever is on the PATH.
    Found,
}

impl Against {
    /// Reads `KIND=PATH` or `found`.
    ///
    /// # Errors
    /// Neither.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text == "found" { Ok(Self::Found) } else { Contestant::parse(text).map(Self::One) }
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
    /// The ringvm whose disk it serves, if it is a daemon.
    pub frontend: Option<PathBuf>,
    /// Whether it is only compared with: a measurement from which it is missing has not failed.
    pub rival: bool,
}

/// How to start a contestant.
#[derive(Clone, Debug)]
pub struct Launch {
    /// What is to run first.
    pub daemon: Option<Daemon>,
    /// The VMM's command line.
    pub vmm: Vec<OsString>,
}

/// A daemon that serves a disk.
#[derive(Clone, Debug)]
pub struct Daemon {
    /// Its command line.
    pub words: Vec<OsString>,
    /// The socket that it makes.
    pub socket: PathBuf,
}

impl Contestant {
    /// Of that kind, named as on the command line.
    pub fn new(kind: Kind, path: PathBuf) -> Self {
        let name = KINDS.iter().find(|&&(_, known)| known == kind).map_or("", |&(name, _)| name);
        Self { kind, name: name.to_owned(), path, frontend: None, rival: false }
    }

    /// Reads `KIND=PATH`.
    ///
    /// # Errors
    /// An unknown kind, or no path.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, path) = text
            .split_once('=')
            .ok_or_else(|| format!("expected `found`, or KIND=PATH, KIND being one of {}", names()))?;
        Ok(Self::new(Kind::parse(name)?, PathBuf::from(path)))
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
        Ok(Self::new(Kind::Ringvm, path))
    }

    /// The same VMM with its devices in daemons.
    #[must_use]
    pub fn in_daemon(&self) -> Self {
        let kind = Kind::RingvmDaemon;
        Self { kind, name: format!("{}, daemon", self.name), path: self.path.clone(), frontend: None, rival: false }
    }

    /// How to start it with a VM, writing what files it needs into `dir`.
    ///
    /// # Errors
    /// A VM that it can't run, or a file that can't be written.
    pub fn launch(&self, vm: &Vm<'_>, dir: &Path) -> Result<Launch> {
        let mut words = vec![self.path.clone().into_os_string()];
        match self.kind {
            Kind::Ringvm => words.extend(commands::ringvm(vm, "process")),
            Kind::RingvmDaemon => words.extend(commands::ringvm(vm, "daemon")),
            Kind::StorageDaemon => return commands::storage_daemon(self, vm, dir),
            Kind::CloudHypervisor => words.extend(commands::cloud_hypervisor(vm)?),
            Kind::Firecracker => words.extend(commands::firecracker(vm, dir, "Sync")?),
            Kind::FirecrackerAsync => words.extend(commands::firecracker(vm, dir, "Async")?),
            Kind::Qemu => words.extend(commands::qemu(vm, "kvm", commands::qemu_host_cpu(host::is_amd()))),
            Kind::QemuTcg => words.extend(commands::qemu(vm, "tcg", "max")),
        }
        Ok(Launch { daemon: None, vmm: words })
    }

    /// For the document.
    pub fn program(&self) -> Program {
        let path = self.path.display().to_string();
        Program { name: self.name.clone(), path, version: found::version(&self.path) }
    }
}

/// A VM.
#[derive(Clone, Copy, Debug)]
pub struct Vm<'a> {
    /// The guest's image.
    pub kernel: &'a Path,
    /// The same as an ELF image, for those that boot nothing else; where it is not given, the image is one.
    pub elf: Option<&'a Path>,
    /// What a Linux guest starts from. Such a guest ends when it powers off, or where that takes more than its VMM has, when it
    /// reboots; which it is to do there is said on its command line ([`END_BY_REBOOT`]).
    pub initramfs: Option<&'a Path>,
    /// What it is to do.
    pub command_line: &'a str,
    /// vCPUs.
    pub cpus: u16,
    /// RAM in MiB.
    pub memory: u32,
    /// Whether it is allocated beforehand, where the VMM can do that.
    pub prefault: bool,
    /// Its disks.
    pub disks: &'a [Disk<'a>],
    /// Its NICs.
    pub nics: &'a [Nic<'a>],
}

/// A word on the command line of a Linux guest: it is to end by a reboot.
pub const END_BY_REBOOT: &str = "bench.end=reboot";

/// A disk.
#[derive(Clone, Copy, Debug)]
pub struct Disk<'a> {
    /// The image or block device; without one, nothing holds the bytes.
    pub path: Option<&'a Path>,
    /// Its bytes, where nothing holds them.
    pub size: u64,
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const NULL: Disk<'_> = Disk { path: None, size: 1 << 20, direct: true, queues: 2, queue_size: 256 };

    #[test]
    fn contestants_are_read_or_refused() {
        let qemu = Contestant::parse("qemu=/usr/bin/q").unwrap();
        assert_eq!((qemu.kind, qemu.name.as_str(), qemu.path), (Kind::Qemu, "qemu", PathBuf::from("/usr/bin/q")));
        assert!(matches!(Against::parse("found"), Ok(Against::Found)));
        assert!(Against::parse("qemu").unwrap_err().contains("KIND=PATH"));
        assert!(Contestant::parse("bochs=/x").unwrap_err().contains("unknown VMM bochs"));
    }

    fn vm<'a>(disks: &'a [Disk<'a>], nics: &'a [Nic<'a>]) -> Vm<'a> {
        Vm {
            kernel: Path::new("/k/guest.elf"),
            elf: None,
            initramfs: None,
            command_line: "job=none depth=1",
            cpus: 2,
            memory: 256,
            prefault: false,
            disks,
            nics,
        }
    }

    /// The command line of each kind, and the file that it names.
    fn commands(vm: &Vm<'_>) -> Vec<(Kind, Result<String>)> {
        let dir = tempfile::tempdir().unwrap();
        let command = |&(_, kind): &(&str, Kind)| {
            let path = PathBuf::from("/bin/vmm");
            let contestant = Contestant { frontend: Some(path.clone()), ..Contestant::new(kind, path) };
            let all = contestant.launch(vm, dir.path()).map(|launch| {
                let words = [launch.daemon.map(|daemon| daemon.words).unwrap_or_default(), launch.vmm].concat();
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
    fn qemu_leaves_out_arch_capabilities_on_amd() {
        assert_eq!(commands::qemu_host_cpu(false), "host");
        assert_eq!(commands::qemu_host_cpu(true), "host,-arch-capabilities");
        for (kind, all) in commands(&vm(&[], &[])) {
            let Ok(all) = all else { continue };
            let expected = kind == Kind::Qemu && host::is_amd();
            assert_eq!(all.contains("-arch-capabilities"), expected, "{kind:?}: {all}");
        }
    }

    #[test]
    fn every_kind_has_a_command_that_names_kernel_job_and_disk_or_nic() {
        let disk = Disk { path: Some(Path::new("/d/x.img")), ..NULL };
        let nic = Nic { tap: "tap7", pairs: 1, queue_size: 256 };
        for (kind, all) in commands(&vm(&[disk], &[])) {
            let all = all.unwrap();
            for wanted in ["/k/guest.elf", "job=none depth=1", "/d/x.img"] {
                assert!(all.contains(wanted), "{kind:?}: {all}");
            }
            assert!(!all.contains("tap"), "{kind:?}: {all}");
        }
        for (kind, all) in commands(&vm(&[], &[nic])) {
            let all = match all {
                Err(error) => {
                    assert!(kind == Kind::StorageDaemon && error.to_string().contains("no NICs"), "{kind:?}: {error}");
                    continue;
                }
                Ok(all) => all,
            };
            for wanted in ["/k/guest.elf", "job=none depth=1", "tap7"] {
                assert!(all.contains(wanted), "{kind:?}: {all}");
            }
            assert!(!all.contains("drive_id") && !all.contains("disk"), "{kind:?}: {all}");
        }
    }

    #[test]
    fn a_linux_guest_starts_from_its_initramfs_and_its_elf_image_where_it_must() {
        let (initramfs, elf) = (Some(Path::new("/k/guest.cpio")), Some(Path::new("/k/vmlinux")));
        for (kind, all) in commands(&Vm { initramfs, elf, ..vm(&[NULL], &[]) }) {
            let Ok(all) = all else { continue };
            assert!(all.contains("/k/guest.cpio"), "{kind:?}: {all}");
        }
        let disk = Disk { path: Some(Path::new("/d/x.img")), ..NULL };
        for (kind, all) in commands(&Vm { initramfs, elf, ..vm(&[disk], &[]) }) {
            let all = all.unwrap();
            assert_eq!(all.contains("/k/vmlinux"), kind.needs_elf(), "{kind:?}: {all}");
            assert_eq!(all.contains(END_BY_REBOOT), kind.needs_elf(), "{kind:?}: {all}");
        }
    }

    #[test]
    fn memory_is_allocated_beforehand_where_that_can_be_asked_for() {
        let disk = Disk { path: Some(Path::new("/d/x.img")), ..NULL };
        for prefault in [false, true] {
            for (kind, all) in commands(&Vm { prefault, ..vm(&[disk], &[]) }) {
                let all = all.unwrap();
                let asked = all.contains("256M,prefault=on") || all.contains("-mem-prealloc");
                let can = !matches!(kind, Kind::Firecracker | Kind::FirecrackerAsync);
                assert_eq!(asked, prefault && can, "{kind:?}: {all}");
            }
        }
    }

    #[test]
    fn null_storage_is_asked_for_or_refused() {
        for (kind, all) in commands(&vm(&[NULL], &[])) {
            match all {
                Ok(all) => assert!(kind.has_null_storage() && all.contains("null"), "{kind:?}: {all}"),
                Err(error) => {
                    assert!(!kind.has_null_storage() && error.to_string().contains("null"), "{kind:?}: {error}")
                }
            }
        }
    }

    #[test]
    fn several_disks_and_nics_are_told_apart() {
        let disks =
            [Disk { path: Some(Path::new("/d/x.img")), ..NULL }, Disk { path: Some(Path::new("/d/y.img")), ..NULL }];
        let nics = ["tap7", "tap8"].map(|tap| Nic { tap, pairs: 1, queue_size: 256 });
        for (kind, all) in commands(&vm(&disks, &nics)) {
            let Ok(all) = all else {
                assert_eq!(kind, Kind::StorageDaemon);
                continue;
            };
            for wanted in ["/d/x.img", "/d/y.img", "tap7", "tap8"] {
                assert!(all.contains(wanted), "{kind:?}: {all}");
            }
        }
    }

    #[test]
    fn two_pairs_are_refused_where_there_is_one() {
        let nic = Nic { tap: "tap7", pairs: 2, queue_size: 256 };
        for (kind, all) in commands(&vm(&[], &[nic])) {
            match kind {
                Kind::Firecracker | Kind::FirecrackerAsync => {
                    assert!(all.unwrap_err().to_string().contains("--pairs 1"));
                }
                Kind::StorageDaemon => assert!(all.is_err()),
                _ => assert!(all.unwrap().contains("queues="), "{kind:?}"),
            }
        }
    }
}
