//! What tests of the whole program have in common: running it with a limit, and what of the host they need.

#![allow(dead_code, reason = "each test program uses some of these")]

use std::env;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// For one bench.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs the bench; returns how it ended and all that it said.
pub(crate) fn run(words: &[&str]) -> (ExitStatus, String) {
    run_and(words, |_, _| {})
}

/// The same, with something to do meanwhile: it is given the process, and how long that has run.
pub(crate) fn run_and(words: &[&str], mut meanwhile: impl FnMut(Pid, Duration)) -> (ExitStatus, String) {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("output");
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringvm-bench"));
    command.args(words);
    let file = fs::File::create(&output).unwrap();
    let mut child = command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
    let (start, pid) = (Instant::now(), Pid::from_child(&child));
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > LIMIT {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{command:?} has not ended in {LIMIT:?}");
        }
        meanwhile(pid, start.elapsed());
        thread::sleep(Duration::from_millis(10));
    };
    (status, fs::read_to_string(&output).unwrap())
}

/// Ctrl-C.
pub(crate) fn interrupt(pid: Pid) {
    kill_process(pid, Signal::INT).unwrap();
}

/// Runs it, and returns its table and its result.
pub(crate) fn bench(words: &[&str]) -> (String, Value) {
    let dir = tempfile::tempdir().unwrap();
    let result = dir.path().join("result.json");
    let all = [words, &["--json", result.to_str().unwrap()]].concat();
    let (status, said) = run(&all);
    assert!(status.success(), "{words:?}: {said}");
    (said, read(&result))
}

/// A result.
pub(crate) fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Asserts that it ends with an error that says this.
pub(crate) fn refused(words: &[&str], expected: &str) {
    let (status, said) = run(words);
    assert!(!status.success() && said.contains(expected), "{words:?}: {said}");
}

/// Whether there is no KVM, and that was allowed by name as the tests of the workspace have it.
pub(crate) fn kvm_is_missing() -> bool {
    let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") else { return false };
    let allowed = env::var("RINGVM_ALLOW_MISSING").unwrap_or_default();
    assert!(
        allowed.split(',').any(|name| name.trim() == "kvm"),
        "this test needs /dev/kvm: {error}; to run the others without it: tests/run --allow-missing kvm"
    );
    eprintln!("skipped: needs /dev/kvm, allowed to be missing: {error}");
    true
}

/// RINGVM_BIN, or the release build.
pub(crate) fn ringvm() -> PathBuf {
    env::var_os("RINGVM_BIN").map_or_else(
        || {
            let bench = Path::new(env!("CARGO_BIN_EXE_ringvm-bench"));
            let target = bench.parent().and_then(Path::parent).expect("target/PROFILE/ringvm-bench");
            target.join("release").join("ringvm")
        },
        PathBuf::from,
    )
}
