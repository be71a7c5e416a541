//! Servers that are written for rust-vmm's `vhost-user-backend` crate, and run by it, under `ringvm` on the host's own KVM.

use ringvm_tests::embedded::{figure, ready, succeed};
use ringvm_tests::native::{self, LIMIT};
use ringvm_tests::paths;
use tempfile::TempDir;

/// The RAM disk of docs/daemons.md, which knows neither discards nor tables of requests in flight.
#[test]
fn a_ram_disk_over_the_crates_own_daemon_serves_a_guest() {
    if !ready() {
        return;
    }
    let folder = TempDir::new_in(paths::target()).expect("the target folder is writable");
    let socket = folder.path().join("disk.sock");
    let path = paths::helper("ramdisk").unwrap_or_else(|error| panic!("{error}"));
    for words in ["depth=32 ops=10000", "depth=16 ops=4000 irq=1", "depth=8 ops=2000 event_idx=0 indirect=0"] {
        let daemon = native::program(path.clone(), [&socket.display().to_string(), "64"]).start().expect("it starts");
        let disk = format!("socket={}", socket.display());
        let said = succeed(&format!("job=verify {words}"), &["--disk", &disk]);
        for kind in ["reads", "writes", "flushes", "sectors_checked"] {
            assert!(figure(&said, kind) > 0, "{kind} in {said}");
        }
        // It goes with its frontend.
        daemon.end(LIMIT).expect("it ends");
        assert!(!socket.exists(), "its socket is gone");
    }
}
