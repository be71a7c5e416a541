//! What the lab's machines are made of: L1's kernel, initramfs and root disk, which carries the binary under test and the
//! guest's kernel and initramfs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ringvm_bench::linux::initramfs;
use ringvm_bench::linux::kernel::Kernel;
use ringvm_bench::linux::run_tool as run;
use ringvm_bench::linux::tree::Tree;

use crate::{Error, Result, host, paths};

/// Where L1's root disk has the guest's bzImage.
pub(crate) const BZIMAGE: &str = "/k/bzImage";
/// The same kernel as ELF.
pub(crate) const VMLINUX: &str = "/k/vmlinux";
/// The guest's initramfs.
pub(crate) const INITRAMFS: &str = "/k/guest.cpio";
/// The same with fio and its libraries, which are some 80 MB.
pub(crate) const INITRAMFS_FIO: &str = "/k/guest-fio.cpio";
/// The same with socat.
pub(crate) const INITRAMFS_SOCAT: &str = "/k/guest-socat.cpio";

/// The modules of a guest's devices, for the bench, which makes guests in L1.
pub(crate) const MODULES: &str = "/k/modules";
/// The program that moves random data, in L1 and in the guest.
const STREAM: &str = "bin/lab-stream";

/// Sparse; images of the tests are in it.
const ROOT_SIZE: &str = "8G";

/// The root disk of a machine, in its folder.
pub(crate) const ROOT_DISK: &str = "root.img";

/// The parts of L1 machines, in one folder of the host.
#[derive(Debug)]
pub(crate) struct Payload {
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// What the root disk of a machine is copied from.
    root_disk: PathBuf,
}

impl Payload {
    /// Builds everything anew in `folder`.
    pub(crate) fn build(folder: &Path) -> Result<Payload> {
        let package = host::kernel_package()?;
        let ringvm = paths::ringvm()?;
        let helpers = [
            ("bin/lab-agent", paths::helper("lab-agent")?),
            ("bin/without-io-uring", paths::helper("without-io-uring")?),
            (STREAM, paths::helper("lab-stream")?),
            ("bin/ringvm-blk", paths::daemon("ringvm-blk")?),
            ("bin/ringvm-net", paths::daemon("ringvm-net")?),
            ("bin/ringvm-console", paths::daemon("ringvm-console")?),
            ("bin/ringvm-vsock", paths::daemon("ringvm-vsock")?),
            ("bin/ringvm-bench", paths::daemon("ringvm-bench")?),
        ];
        if folder.exists() {
            fs::remove_dir_all(folder).map_err(Error::file("emptying", folder))?;
        }
        let scratch = folder.join("scratch");
        fs::create_dir_all(&scratch).map_err(Error::file("creating", &scratch))?;

        let initramfs = folder.join("l1.cpio");
        l1_initramfs(&package, &scratch)?.write_cpio(&initramfs)?;

        let [guest, fio, socat] = ["guest", "guest-fio", "guest-socat"].map(|name| scratch.join(name));
        let mut tree = guest_initramfs(&package, &scratch)?;
        tree.binary(STREAM, &paths::helper("lab-stream")?)?;
        tree.write_cpio(&guest)?;
        let mut with_socat = tree.clone();
        with_socat.tool("socat")?;
        with_socat.write_cpio(&socat)?;
        tree.tool("fio")?;
        tree.write_cpio(&fio)?;

        let mut root = Tree::default();
        root.copy(BZIMAGE, package.image(), 0o644);
        root.copy(VMLINUX, &package.elf(&scratch)?, 0o644);
        root.copy(INITRAMFS, &guest, 0o644);
        root.copy(INITRAMFS_FIO, &fio, 0o644);
        root.copy(INITRAMFS_SOCAT, &socat, 0o644);
        package.copy_modules(&mut root, &["virtio_pci", "virtio_blk", "virtio_net"], MODULES)?;
        l1_root(&mut root, &ringvm, &helpers)?;
        let staging = scratch.join("root");
        root.write_folder(&staging)?;
        let root_disk = folder.join(ROOT_DISK);
        let mke2fs = host::program("mke2fs").unwrap_or_else(|| PathBuf::from("mke2fs"));
        run(Command::new(mke2fs)
            .args(["-q", "-F", "-t", "ext4", "-E", "root_owner=0:0,lazy_itable_init=1,lazy_journal_init=1", "-d"])
            .args([&staging, &root_disk])
            .arg(ROOT_SIZE))?;
        fs::remove_dir_all(&scratch).map_err(Error::file("removing", &scratch))?;
        Ok(Payload { kernel: package.image().to_owned(), initramfs, root_disk })
    }

    /// Makes the folder of a machine, with a root disk of its own.
    pub(crate) fn machine(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).map_err(Error::file("creating", folder))?;
        run(Command::new("cp").arg("--sparse=always").args([&self.root_disk, &folder.join(ROOT_DISK)]))?;
        Ok(())
    }
}

fn l1_initramfs(package: &Kernel, scratch: &Path) -> Result<Tree> {
    let mut tree = Tree::default();
    tree.busybox()?;
    tree.console();
    tree.folder("proc");
    tree.text("init", include_str!("init/l1-initramfs.sh"), 0o755);
    package.add_modules(
        &mut tree,
        &["virtio_pci", "virtio_blk", "ext4", "virtio_console", "kvm_amd", "tun"],
        scratch,
    )?;
    Ok(tree)
}

fn l1_root(tree: &mut Tree, ringvm: &Path, helpers: &[(&str, PathBuf)]) -> Result<()> {
    tree.busybox()?;
    for tool in ["tmux", "e2fsck", "setpriv", "iperf3", "fio", "socat"] {
        tree.tool(tool)?;
    }
    tree.copy_folder("usr/lib/locale/C.utf8", Path::new("/usr/lib/locale/C.utf8"))?;
    for terminal in ["s/screen", "d/dumb"] {
        let from = ["/usr/share/terminfo", "/lib/terminfo"].map(|dir| Path::new(dir).join(terminal));
        let from = from.iter().find(|path| path.exists());
        let from = from.ok_or_else(|| Error::Missing(format!("no terminfo entry {terminal}; install ncurses-base")))?;
        tree.copy(&format!("usr/share/terminfo/{terminal}"), from, 0o644);
    }
    tree.binary("bin/ringvm", ringvm)?;
    for (path, helper) in helpers {
        tree.binary(path, helper)?;
    }
    for name in host::FOREIGN {
        // Tests that want one say so if it is missing.
        if let Some(path) = host::foreign(name) {
            tree.binary(&format!("bin/{name}"), &path)?;
        }
    }
    for folder in ["dev", "proc", "sys", "run", "tmp", "scratch", "etc"] {
        tree.folder(folder);
    }
    tree.text("etc/passwd", "root:x:0:0:root:/:/bin/sh\n", 0o644);
    tree.text("init", include_str!("init/l1.sh"), 0o755);
    Ok(())
}

/// What the guests of the tests boot into: a shell on the serial console (see init/l2.sh) with the tools of the tests.
pub fn guest_initramfs(package: &Kernel, scratch: &Path) -> Result<Tree> {
    let modules = [
        "virtio_pci",
        "virtio_blk",
        "virtio_rng",
        "virtio_net",
        "virtio_console",
        "vmw_vsock_virtio_transport",
        "virtiofs",
        "ext4",
    ];
    let mut tree = initramfs::base(package, &modules, include_str!("init/l2.sh"), scratch)?;
    // By names that busybox has no applet for, or by their path: its shell prefers its own.
    for tool in ["mkfs.ext4", "e2fsck", "lsblk", "fstrim", "ethtool", "iperf3"] {
        tree.tool(tool)?;
    }
    Ok(tree)
}
