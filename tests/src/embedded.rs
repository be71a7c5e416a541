//! The embedded guest on the host's own KVM: starting it with a job, and reading what it says. Anything that goes wrong here
//! is a failure of the test, told by a panic.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use tempfile::TempDir;

use crate::native::{self, Ended, RingVm};
use crate::paths;

/// The guest's image, written once.
static GUEST: LazyLock<(TempDir, PathBuf)> = LazyLock::new(|| {
    let dir = TempDir::new_in(paths::target()).expect("the target folder is writable");
    let path = ringvm_bench::guest::write_to(dir.path()).expect("the target folder is writable");
    (dir, path)
});

/// The guest's image.
pub fn kernel() -> &'static Path {
    &GUEST.1
}

/// The guest with its job and further options of `ringvm run`.
pub fn guest(job: &str, options: &[&str]) -> RingVm {
    let kernel = kernel().to_str().expect("a path of ours is text");
    let fixed = ["run", "--kernel", kernel, "--cmdline", job, "--memory", "256M", "--serial", "stdio"];
    native::ringvm(fixed.iter().chain(options)).expect("the binary is built")
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
