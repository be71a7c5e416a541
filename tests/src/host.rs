//! What a test needs of the host. Nothing is skipped silently: what is missing fails the test by name, unless the caller
//! allowed that name (RINGVM_ALLOW_MISSING=kvm,lab or `tests/run --allow-missing kvm,lab`); then the test says that it
//! was skipped and why.

use std::env;
use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use ringvm_bench::linux::kernel::Kernel;
pub use ringvm_bench::linux::program;

use crate::stuck_disk::StuckDisk;
use crate::{Error, Result, paths};

/// The variable that lists the names that may be missing.
pub const ALLOW_MISSING: &str = "RINGVM_ALLOW_MISSING";

/// Something a test can't do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// /dev/kvm, to be opened for reading and writing.
    Kvm,
    /// io_uring, not switched off by the kernel or a sandbox.
    IoUring,
    /// The nested lab: QEMU, the guest's tools and the Debian kernel package.
    Lab,
    /// Taps in a network namespace of the test's own.
    Tap,
    /// DPDK's testpmd.
    Dpdk,
    /// QEMU's storage daemon.
    StorageDaemon,
    /// Valgrind, to count instructions.
    Valgrind,
    /// User Mode Linux, and what its guests are made of.
    Uml,
    /// FUSE, and the right to mount.
    Fuse,
    /// Daemons and programs of others that cargo installs.
    Foreign,
}

impl Need {
    const ALL: [Need; 10] = [
        Need::Kvm,
        Need::IoUring,
        Need::Lab,
        Need::Tap,
        Need::Dpdk,
        Need::StorageDaemon,
        Need::Valgrind,
        Need::Uml,
        Need::Fuse,
        Need::Foreign,
    ];

    /// The name by which its absence is allowed.
    pub fn name(self) -> &'static str {
        match self {
            Need::Kvm => "kvm",
            Need::IoUring => "io-uring",
            Need::Lab => "lab",
            Need::Tap => "tap",
            Need::StorageDaemon => "storage-daemon",
            Need::Dpdk => "dpdk",
            Need::Valgrind => "valgrind",
            Need::Uml => "uml",
            Need::Fuse => "fuse",
            Need::Foreign => "foreign",
        }
    }

    /// Why the host does not have it, if so.
    pub fn missing(self) -> Option<String> {
        match self {
            Need::Kvm => {
                let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
                opened.err().map(|e| format!("opening /dev/kvm: {e}"))
            }
            Need::IoUring => io_uring::IoUring::new(8).err().map(|e| format!("setting up an io_uring: {e}")),
            Need::Lab => missing_of_lab(),
            Need::Tap => missing_of_tap(),
            Need::StorageDaemon => absent(&["qemu-storage-daemon"]),
            Need::Dpdk => missing_of_dpdk(),
            Need::Valgrind => absent(&["valgrind"]),
            Need::Uml => absent(&["linux.uml", "busybox", "fio", "iperf3", "setpriv", "unshare"])
                .or_else(|| uml_modules().err().map(|e| e.to_string())),
            Need::Foreign => {
                let absent: Vec<_> = FOREIGN.into_iter().filter(|name| foreign(name).is_none()).collect();
                (!absent.is_empty()).then(|| format!("cargo has not installed {}; tests/run does", absent.join(", ")))
            }
            Need::Fuse => StuckDisk::new().err().map(|e| format!("mounting a file system of /dev/fuse: {e}")),
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The kernel of the lab: the package that tests/run unpacked into target/lab/kernel.
pub fn kernel_package() -> Result<Kernel> {
    Kernel::unpacked(&paths::lab().join("kernel"))
        .map_err(|error| Error::Missing(format!("{error}; tests/run does that")))
}

/// The programs of the host that the lab uses or packs, beside the libraries that the dynamic linker names.
pub(crate) const LAB_PROGRAMS: [&str; 16] = [
    "qemu-system-x86_64",
    "busybox",
    "fio",
    "ethtool",
    "iperf3",
    "tmux",
    "lsblk",
    "fstrim",
    "setpriv",
    "socat",
    "mke2fs",
    "mkfs.ext4",
    "e2fsck",
    "depmod",
    "lz4",
    "xz",
];

/// Programs of others, published as crates.
pub(crate) const FOREIGN: [&str; 4] = ["fsx", "vhost-device-console", "vhost-device-vsock", "virtiofsd"];

/// A third-party program that is a crate, where tests/run has cargo install it.
pub fn foreign(name: &str) -> Option<PathBuf> {
    Some(paths::lab().join("foreign/bin").join(name)).filter(|path| path.exists())
}

fn absent(names: &[&str]) -> Option<String> {
    let absent: Vec<_> = names.iter().copied().filter(|name| program(name).is_none()).collect();
    (!absent.is_empty()).then(|| format!("not installed: {}; tests/run installs them", absent.join(", ")))
}

fn missing_of_lab() -> Option<String> {
    if let Some(missing) = absent(&LAB_PROGRAMS) {
        return Some(missing);
    }
    kernel_package().err().map(|e| e.to_string())
}

fn missing_of_tap() -> Option<String> {
    let absent: Vec<_> =
        ["ip", "nsenter", "setpriv", "unshare"].into_iter().filter(|name| program(name).is_none()).collect();
    if !absent.is_empty() {
        return Some(format!("not installed: {}; tests/run installs them", absent.join(", ")));
    }
    let tap = "PATH=$PATH:/usr/sbin:/sbin; ip tuntap add t0 mode tap vnet_hdr";
    let user: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--user", "--map-root-user"] };
    let mut command = Command::new("unshare");
    command.args(user).args(["--net", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", tap]);
    match command.output() {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!("making a tap in a namespace: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(e) => Some(format!("running unshare: {e}")),
    }
}

fn missing_of_dpdk() -> Option<String> {
    let absent: Vec<_> = ["dpdk-testpmd", "stdbuf"].into_iter().filter(|name| program(name).is_none()).collect();
    (!absent.is_empty()).then(|| format!("not installed: {}; tests/run installs them", absent.join(", ")))
}

/// The drivers of User Mode Linux's devices, in the order in which they are loaded.
pub fn uml_modules() -> Result<Vec<PathBuf>> {
    let folder = Path::new("/usr/lib/uml/modules");
    let versions = std::fs::read_dir(folder).map_err(Error::file("reading", folder))?;
    let newest = versions.filter_map(|version| Some(version.ok()?.path())).max();
    let kernel = newest.ok_or_else(|| Error::Missing(format!("no modules in {}", folder.display())))?.join("kernel");
    let names = [
        "drivers/block/virtio_blk",
        "net/core/failover",
        "drivers/net/net_failover",
        "drivers/net/virtio_net",
        "drivers/char/virtio_console",
        "net/vmw_vsock/vsock",
        "net/vmw_vsock/vmw_vsock_virtio_transport_common",
        "net/vmw_vsock/vmw_vsock_virtio_transport",
    ];
    let modules: Vec<_> = names.iter().map(|name| kernel.join(name).with_extension("ko")).collect();
    match modules.iter().find(|module| !module.exists()) {
        Some(module) => Err(Error::Missing(format!("{} is not installed", module.display()))),
        None => Ok(modules),
    }
}

/// True when the host has what the calling test needs, false when its absence was allowed by name.
///
/// # Panics
/// When it is missing and was not allowed: the test fails and names it.
pub fn need(need: Need) -> bool {
    let allowed = allowed();
    let Some(why) = need.missing() else { return true };
    let test = current_test();
    assert!(
        allowed.contains(&need),
        "{test} needs `{need}`, which this host lacks: {why}. To run the other tests without it, allow that by name: \
         tests/run --allow-missing {need} (or {ALLOW_MISSING}={need})"
    );
    say(&format!("skipped {test}: needs `{need}`, allowed to be missing: {why}"));
    record_skip(&test, need, &why);
    false
}

fn allowed() -> Vec<Need> {
    let list = env::var(ALLOW_MISSING).unwrap_or_default();
    list.split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .map(|name| {
            Need::ALL.into_iter().find(|need| need.name() == name).unwrap_or_else(|| {
                panic!("{ALLOW_MISSING} names `{name}`; the names are {}", Need::ALL.map(Need::name).join(", "))
            })
        })
        .collect()
}

/// The name of the running test, as libtest names its threads.
pub fn current_test() -> String {
    thread::current().name().unwrap_or("main").to_owned()
}

/// A line for the person who runs the tests, which libtest does not capture.
pub fn say(line: &str) {
    // Written in one piece past the capturing of `eprintln!`; when stderr is closed there is nobody to tell.
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// `tests/run` repeats the skipped tests at its end from this file.
fn record_skip(test: &str, need: Need, why: &str) {
    let path: &Path = &paths::lab().join("skipped");
    let opened =
        std::fs::create_dir_all(paths::lab()).and_then(|()| OpenOptions::new().create(true).append(true).open(path));
    if let Ok(mut file) = opened {
        // The line on stderr above has said it already.
        let _ = writeln!(file, "{test}: {need}: {why}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_need_has_a_name_of_its_own() {
        for a in Need::ALL {
            assert_eq!(Need::ALL.iter().filter(|b| b.name() == a.name()).count(), 1, "{a}");
        }
    }
}
