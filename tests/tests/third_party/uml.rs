//! User Mode Linux, a kernel that is a process: its disk verifies what it wrote to `ringvm-blk`, and its NIC moves TCP both ways
//! through `ringvm-net`. As a client it is unlike the others: call descriptors are pipes, memory is a file in a tmpfs, messages
//! are padded, the control queue is the guest's own.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ringvm_bench::linux::tree::Tree;
use ringvm_tests::host::{Need, need, say, uml_modules};
use ringvm_tests::native::{daemon, program};
use ringvm_tests::{Result, paths};

use crate::network::Network;
use crate::qemu::Guest;
use crate::served::{Daemon, operations};
use crate::{alone, ok, scratch};

const HOST: &str = "10.9.3.1";
const GUEST: &str = "10.9.3.2";
const MAC: &str = "52:54:00:0a:09:03";
/// The work takes some seconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(180);
/// Of the virtio specification, as UML's option wants them.
const NET: u32 = 1;
const BLOCK: u32 = 2;
pub(crate) const CONSOLE: u32 = 3;
pub(crate) const VSOCK: u32 = 19;

/// Boots it with a device of that kind that a daemon serves, with its root in a folder of the host.
pub(crate) fn boot(kind: u32, socket: &Path, tools: &[&str]) -> Guest {
    let folder = scratch();
    let root = folder.path().join("root");
    ok(std::fs::create_dir(&root));
    ok(tree(tools).and_then(|tree| Ok(tree.write_folder(&root)?)));
    let disks = u32::from(kind == BLOCK);
    let user: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--user", "--map-root-user"] };
    // It has children that would outlive it: they end with their PID namespace.
    let isolated = ["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let words = isolated.iter().chain(user).map(|&word| word.to_owned());
    let words = words.chain(["linux.uml", "mem=256M", "con=null", "con0=fd:0,fd:1", "quiet"].map(str::to_owned));
    let words = words.chain([
        format!("uml_dir={}/", folder.path().display()),
        format!("virtio_uml.device={}:{kind}", socket.display()),
        "root=/dev/root rootfstype=hostfs rw init=/init lab.shell=driven".into(),
        format!("rootflags={}", root.display()),
        format!("lab.disks={disks}"),
    ]);
    // Its memory is a file without a name in here.
    let in_tmpfs = |command: &mut Command| _ = command.env("TMPDIR", "/dev/shm");
    let started = program("setpriv", words).with(in_tmpfs).start();
    Guest::over(ok(started), folder)
}

/// What it boots into: the lab's init, the drivers, `lab-stream`, and these tools.
fn tree(tools: &[&str]) -> Result<Tree> {
    let mut tree = Tree::default();
    tree.busybox()?;
    for folder in ["dev", "proc", "sys", "run", "tmp", "mnt"] {
        tree.folder(folder);
    }
    tree.text("init", include_str!("../../src/lab/init/l2.sh"), 0o755);
    tree.binary("bin/lab-stream", &paths::helper("lab-stream")?)?;
    for tool in tools {
        tree.tool(tool)?;
    }
    let mut order = String::new();
    for module in uml_modules()? {
        let name = format!("modules/{}", module.file_name().unwrap_or_default().display());
        order += &format!("/{name}\n");
        tree.copy(&name, &module, 0o644);
    }
    tree.text("modules/order", &order, 0o644);
    Ok(tree)
}

#[test]
fn user_mode_linux_verifies_a_disk() {
    if !(need(Need::IoUring) && need(Need::Uml)) {
        return;
    }
    let _alone = alone();
    let folder = scratch();
    let (socket, image) = (folder.path().join("b.sock"), folder.path().join("disk.img"));
    ok(std::fs::File::create(&image).and_then(|file| file.set_len(64 << 20)));
    let disk = format!("path={},serial=user-mode", image.display());
    let path = socket.display().to_string();
    let served = Daemon::start(move || ok(daemon("ringvm-blk", ["-v", "--stats", "--socket", &path, "--disk", &disk])));
    let mut guest = boot(BLOCK, &socket, &["fio"]);
    assert_eq!(guest.run("cat /sys/block/vda/size /sys/block/vda/serial"), "131072\nuser-mode");
    for direct in [0, 1] {
        let output = guest.run_for(
            LIMIT,
            &format!(
                "fio --name=job --filename=/dev/vda --rw=randwrite --bsrange=4k-160k --blockalign=4k --direct={direct} \
                 --ioengine=libaio --iodepth=16 --iomem_align=4k --thread --size=48M --fsync=64 --verify=crc32c \
                 --do_verify=1 --verify_fatal=1 --randrepeat=0 --output-format=normal"
            ),
        );
        assert_eq!(output.matches("err= 0").count(), 1, "without errors:\n{output}");
        assert!(!output.contains("verify: bad") && !output.contains("verify failed"), "{output}");
    }
    guest.power_off();
    let said = served.terminate();
    for kind in ["read", "write", "flush"] {
        assert!(operations(&said, &format!("disk0: {kind}")) > 0, "no {kind}: {said}");
    }
}

#[test]
fn user_mode_linux_moves_tcp_both_ways() {
    if !(need(Need::IoUring) && need(Need::Uml) && need(Need::Tap)) {
        return;
    }
    let _alone = alone();
    let folder = scratch();
    let socket = folder.path().join("n.sock");
    let network = Network::new();
    network.run(&format!("ip tuntap add vm0 mode tap vnet_hdr; ip addr add {HOST}/24 dev vm0; ip link set vm0 up"));
    let words = ok(network.daemon("ringvm-net"));
    let (path, net) = (socket.display().to_string(), format!("tap=vm0,mac={MAC}"));
    let served = Daemon::start(move || {
        let options = ["-v", "--stats", "--socket", &path, "--net", &net].map(str::to_owned);
        program("setpriv", words.iter().cloned().chain(options))
    });
    let _server = ok(network.program("iperf3", &["-s"]).start());
    let mut guest = boot(NET, &socket, &["iperf3"]);
    assert_eq!(guest.run("cat /sys/class/net/eth0/address"), MAC);
    guest.run(&format!("ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up && ping -c 3 -W 5 {HOST}"));
    for direction in ["", "-R"] {
        let said = guest.run_for(LIMIT, &format!("iperf3 -c {HOST} -n 64M -f m --connect-timeout 5000 {direction}"));
        let received = said.lines().find(|line| line.trim_end().ends_with("receiver"));
        say(&format!("User Mode Linux, iperf3 {direction}: {}", received.unwrap_or_else(|| panic!("{said}")).trim()));
    }
    guest.power_off();
    let said = served.terminate();
    for queue in 0..2 {
        assert!(operations(&said, &format!("net0: queue {queue}")) > 1000, "queue {queue} moved little: {said}");
    }
}
