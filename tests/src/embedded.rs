//! The embedded guest on the host's own KVM: starting it with a job, and reading what it says. Anything that goes wrong here
//! is a failure of the test, told by a panic.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use tempfile::{NamedTempFile, TempDir};

use crate::host::{Need, need};
use crate::native::{self, Ended, Place, RingVm};
use crate::paths;

/// The guest's image, written once.
static GUEST: LazyLock<(TempDir, PathBuf)> = LazyLock::new(|| {
    let dir = TempDir::new_in(paths::target()).expect("the target folder is writable");
    let path = ringvm_bench::guest::write_to(dir.path()).expect("the target folder is writable");
    (dir, path)
});

/// Whether this host can run such a guest; if not, and that was allowed, the test ends here.
pub fn ready() -> bool {
    need(Need::Kvm) && need(Need::IoUring)
}

/// An image on a disk, full of holes.
pub fn image(megabytes: u64) -> NamedTempFile {
    let image = NamedTempFile::new_in(paths::target()).expect("the target folder is writable");
    image.as_file().set_len(megabytes << 20).expect("the target folder has room for holes");
    image
}

/// What follows `--disk` for an image that is served in a place, with more options.
pub fn disk(image: &NamedTempFile, place: Place, more: &str) -> String {
    if place == Place::Daemon {
        paths::daemon("ringvm-blk").expect("the daemon is built");
    }
    format!("path={},{},{more}", image.path().display(), place.option())
}

/// What follows `--net` for a port of which this process needs no rights, in a place.
pub fn net(port: &str, place: Place) -> String {
    if place == Place::Daemon {
        paths::daemon("ringvm-net").expect("the daemon is built");
    }
    format!("{port},{}", place.option())
}

/// The guest's image.
pub fn kernel() -> &'static Path {
    &GUEST.1
}

/// The guest with its job and further options of `ringvm run`.
pub fn guest(job: &str, options: &[&str]) -> RingVm {
    guest_in("256M", job, options)
}

/// A guest as [`guest`], in memory as the option `--memory` has it. Unless the options say how long its end may take, it may take
/// as long as a busy machine needs to flush a disk.
pub fn guest_in(memory: &str, job: &str, options: &[&str]) -> RingVm {
    let kernel = kernel().to_str().expect("a path of ours is text");
    let fixed = ["run", "--kernel", kernel, "--cmdline", job, "--memory", memory, "--serial", "stdio"];
    let end: &[&str] = if options.contains(&"--stop-timeout") { &[] } else { &["--stop-timeout", "60"] };
    native::ringvm(fixed.iter().chain(end).chain(options)).expect("the binary is built")
}

/// Runs a job that must succeed, and returns what the guest said.
pub fn succeed(job: &str, options: &[&str]) -> String {
    let ended = guest(job, options).run().expect("it ends");
    assert_success(&ended);
    ended.stdout
}

/// Checks that the guest has done its jobs and that `ringvm` ended well.
pub fn assert_success(ended: &Ended) {
    let done = ended.stdout.contains("ringvm-guest: done") && !ended.stdout.contains("FAILED");
    assert!(done && ended.code() == 0, "code {}: {}{}", ended.code(), ended.stdout, ended.stderr);
}

/// The number behind `key=` in the guest's last result.
pub fn figure(said: &str, key: &str) -> u64 {
    let result = said.lines().rfind(|line| line.contains(": result ")).unwrap_or_else(|| panic!("no result in {said}"));
    let value = result.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {key} in {result}"))
}
