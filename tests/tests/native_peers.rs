//! Daemons of others under `ringvm` on the host's own KVM: qemu-storage-daemon's vhost-user-blk export, and the vhost port of
//! dpdk-testpmd.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ringvm_tests::embedded::{assert_success, figure, guest, image, ready, succeed};
use ringvm_tests::host::{Need, need, program};
use ringvm_tests::native::{self, LIMIT, Running};
use ringvm_tests::paths;
use rustix::process::Signal;
use tempfile::TempDir;

/// For frames in numbers, on a host of two CPUs where DPDK takes one for itself.
const FRAMES_LIMIT: Duration = Duration::from_secs(200);

fn folder() -> TempDir {
    TempDir::new_in(paths::target()).expect("the target folder is writable")
}

/// Starts one of them, and waits for its socket.
fn start(name: &str, arguments: &[&str], socket: &Path) -> Running {
    let path = program(name).expect("it was looked for");
    let running = native::program(path, arguments).start().expect("it starts");
    let deadline = Instant::now() + LIMIT;
    while !socket.exists() {
        assert!(Instant::now() < deadline, "{name} makes no socket at {}", socket.display());
        sleep(Duration::from_millis(10));
    }
    running
}

#[test]
fn qemu_storage_daemon_serves_a_disk() {
    if !(ready() && need(Need::StorageDaemon)) {
        return;
    }
    let (folder, image) = (folder(), image(64));
    let socket = folder.path().join("disk.sock");
    let file = format!("driver=file,node-name=file,filename={}", image.path().display());
    let export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues=2",
        socket.display()
    );
    let arguments = ["--blockdev", &file, "--blockdev", "driver=raw,node-name=disk,file=file", "--export", &export];
    let daemon = start("qemu-storage-daemon", &arguments, &socket);
    let disk = format!("socket={},queues=2", socket.display());
    for words in ["depth=32 ops=10000", "depth=16 ops=4000 irq=1", "depth=8 ops=2000 event_idx=0 indirect=0"] {
        let said = succeed(&format!("job=verify queues=2 {words}"), &["--disk", &disk]);
        for kind in ["reads", "writes", "discards", "write_zeroes", "flushes", "sectors_checked"] {
            assert!(figure(&said, kind) > 0, "{kind} in {said}");
        }
    }
    daemon.signal(Signal::TERM).expect("it runs");
    daemon.end(LIMIT).expect("it ends");
}

#[test]
fn dpdk_testpmd_sends_back_every_frame() {
    if !(ready() && need(Need::Dpdk)) {
        return;
    }
    let folder = folder();
    let socket = folder.path().join("net.sock");
    let port = format!("net_vhost0,iface={},queues=1", socket.display());
    // Without a terminal it wants statistics now and then instead of commands.
    let arguments = [
        &["--no-huge", "-m", "256", "--no-pci", "--no-shconf", "-l", "0-1", "--vdev", &port, "--"][..],
        &["--forward-mode=io", "--auto-start", "--stats-period", "10", "--total-num-mbufs=8192"],
    ]
    .concat();
    let net = format!("socket={}", socket.display());
    let testpmd = start("dpdk-testpmd", &arguments, &socket);
    // One guest after another. Without MRG_RXBUF it leaves num_buffers at 0, where virtio 1.3 (5.1.6.4.1) has 1.
    for words in ["frames=500000", "frames=200000 event_idx=0", "frames=100000 size=1500"] {
        let running = guest(&format!("job=net-echo {words} stall=60s"), &["--net", &net]).start();
        let ended = running.and_then(|running| running.end(FRAMES_LIMIT)).expect("it ends");
        assert_success(&ended);
        for key in ["lost", "corrupted", "reordered"] {
            assert_eq!(figure(&ended.stdout, key), 0, "{key} in {}", ended.stdout);
        }
        println!("{}", ended.stdout.lines().rfind(|line| line.contains(": result ")).unwrap_or_default());
    }
    testpmd.signal(Signal::INT).expect("it runs");
    let ended = testpmd.end(LIMIT).expect("it ends");
    let count = ended.stdout.matches("800000").count();
    assert!(count >= 2, "it tells of all frames, both ways: {}", ended.stdout);
}
