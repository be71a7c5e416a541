//! `ringvm-bench net` as a whole, on a tap in a network namespace: with the plain process alone, and with VMs.

use std::env;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// For one bench.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs it with short measurements, and returns its table and its report.
fn bench(words: &[&str]) -> (String, Value) {
    let dir = tempfile::tempdir().unwrap();
    let (report, output) = (dir.path().join("report.json"), dir.path().join("output"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringvm-bench"));
    command.args(["net", "--time", "60ms", "--json"]).arg(&report).args(words);
    let file = fs::File::create(&output).unwrap();
    let mut child = command.stdin(Stdio::null()).stdout(file.try_clone().unwrap()).stderr(file).spawn().unwrap();
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > LIMIT {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{command:?} has not ended in {LIMIT:?}");
        }
        thread::sleep(Duration::from_millis(10));
    };
    let said = fs::read_to_string(&output).unwrap();
    assert!(status.success(), "{command:?}: {said}");
    (said, serde_json::from_slice(&fs::read(&report).unwrap()).unwrap())
}

/// Asserts that each series has so many runs, each with frames and no more than the tap has carried; returns their names
/// with direction and size.
fn series(report: &Value, runs: usize) -> Vec<(String, String, u64)> {
    let assert_sound = |run: &Value| {
        let (counted, carried) = (run["ops"].as_u64().unwrap(), run["carried"].as_u64().unwrap());
        assert!(counted > 0 && carried >= counted, "{run}");
        assert!(run["cpu_ns"].as_u64().unwrap() > 0 && run["time_ns"].as_u64().unwrap() >= 50_000_000, "{run}");
    };
    let all = report["series"].as_array().unwrap();
    all.iter()
        .map(|series| {
            let measured = series["runs"].as_array().unwrap();
            assert_eq!(measured.len(), runs, "{series}");
            measured.iter().for_each(assert_sound);
            let text = |key: &str| series[key].as_str().unwrap().to_owned();
            (text("name"), text("direction"), series["size"].as_u64().unwrap())
        })
        .collect()
}

#[test]
fn the_plain_process_sends_and_receives_over_one_queue_and_two() {
    for pairs in ["1", "2"] {
        let (said, report) = bench(&["--plain", "--runs", "2", "--size", "64,65000", "--pairs", pairs]);
        let expected = [("out", 64), ("out", 65_000), ("in", 1_500)];
        let expected = expected.map(|(direction, size)| ("plain process".to_owned(), direction.to_owned(), size));
        assert_eq!(series(&report, 2), expected);
        assert!(said.contains("out 65000 TSO") && said.contains("in 1500"), "{said}");
    }
}

#[test]
fn ringvm_sends_and_receives_beside_the_plain_process() {
    if kvm_is_missing() {
        return;
    }
    let ringvm = ringvm();
    for pairs in ["1", "2"] {
        let words = ["--ringvm", ringvm.to_str().unwrap(), "--runs", "1", "--size", "1500,65000", "--pairs", pairs];
        let (said, report) = bench(&words);
        let found = series(&report, 1);
        let names: Vec<_> = found.iter().map(|(name, direction, _)| (name.as_str(), direction.as_str())).collect();
        let out = [("plain process", "out"), ("ringvm", "out")];
        let all = [&out[..], &out, &[("plain process", "in"), ("plain, CPU shared", "in"), ("ringvm", "in")]].concat();
        assert_eq!(names, all, "{said}");
        assert!(said.contains("to the guest's first instruction"), "{said}");
    }
}

#[test]
fn what_can_not_be_measured_is_refused_in_one_line() {
    let refused = |words: &[&str], expected: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringvm-bench"));
        let output = command.arg("net").args(words).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(expected), "{words:?}: {said}");
    };
    refused(&["--size", "59"], "59");
    refused(&["--receive-size", "1515"], "1515");
    refused(&["--plain", "--against", "qemu=/x"], "--against");
    if !kvm_is_missing() {
        refused(&["--ringvm", "/nowhere/ringvm"], "no ringvm at /nowhere/ringvm");
    }
}

/// Whether there is no KVM, and that was allowed by name as the tests of the workspace have it.
fn kvm_is_missing() -> bool {
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
fn ringvm() -> PathBuf {
    env::var_os("RINGVM_BIN").map_or_else(
        || {
            let bench = Path::new(env!("CARGO_BIN_EXE_ringvm-bench"));
            let target = bench.parent().and_then(Path::parent).expect("target/PROFILE/ringvm-bench");
            target.join("release").join("ringvm")
        },
        PathBuf::from,
    )
}
