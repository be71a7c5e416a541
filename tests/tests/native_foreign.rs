//! Servers that are written for rust-vmm's `vhost-user-backend` crate, and run by it, under `ringvm` on the host's own KVM.

use std::thread::sleep;
use std::time::{Duration, Instant};

use ringvm_tests::embedded::{figure, ready, succeed};
use ringvm_tests::native::{self, LIMIT};
use ringvm_tests::paths;
use rustix::process::Signal;
use tempfile::TempDir;

/// The RAM disk of docs/daemons.md, which knows neither discards nor tables of requests in flight.
#[test]
fn a_ram_disk_over_the_crates_own_daemon_serves_one_guest_after_another() {
    if !ready() {
        return;
    }
    let folder = TempDir::new_in(paths::target()).expect("the target folder is writable");
    let socket = folder.path().join("disk.sock");
    let path = paths::helper("ramdisk").unwrap_or_else(|error| panic!("{error}"));
    let daemon = native::program(path, [&socket.display().to_string(), "64"]).start().expect("it starts");
    let deadline = Instant::now() + LIMIT;
    while !socket.exists() {
        assert!(Instant::now() < deadline, "there is no socket");
        sleep(Duration::from_millis(10));
    }
    let disk = format!("socket={}", socket.display());
    for words in ["depth=32 ops=10000", "depth=16 ops=4000 irq=1", "depth=8 ops=2000 event_idx=0 indirect=0"] {
        let said = succeed(&format!("job=verify {words}"), &["--disk", &disk]);
        for kind in ["reads", "writes", "flushes", "sectors_checked"] {
            assert!(figure(&said, kind) > 0, "{kind} in {said}");
        }
    }
    daemon.signal(Signal::TERM).expect("it runs");
    daemon.end(LIMIT).expect("it ends");
}
