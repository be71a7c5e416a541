//! `ringvm-bench linux` as a whole, as far as that takes no guest: what is refused, the host's own run, and VMMs that fail.
//! With a guest it is a test of the lab. No test asserts how fast anything was.

mod common;

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use common::{bench, kvm_is_missing, refused, run};
use ringvm_bench::linux::program;
use tempfile::TempDir;

/// A folder on a real file system: files in memory are refused as disks.
fn folder() -> TempDir {
    tempfile::tempdir_in(Path::new(env!("CARGO_BIN_EXE_ringvm-bench")).parent().unwrap()).unwrap()
}

fn file(dir: &TempDir, name: &str, text: &[u8]) -> String {
    let path = dir.path().join(name);
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// What is taken for a kernel until it is booted; all its drivers are built in.
fn kernel(dir: &TempDir) -> String {
    file(dir, "vmlinux", b"\x7fELF\x02\x01 Linux version 0.0.1-none (test)")
}

const JOB: &[u8] =
    b"[global]\nruntime=100ms\ntime_based=1\nioengine=psync\n[reads]\nrw=randread\n[both]\nstonewall\nrw=randrw\n";

/// Whether the programs that go into a guest are missing, and that was allowed by the name that the workspace's tests have for it.
fn programs_are_missing() -> bool {
    let missing: Vec<_> = ["busybox", "fio"].into_iter().filter(|name| program(name).is_none()).collect();
    if missing.is_empty() {
        return false;
    }
    let allowed = env::var("RINGVM_ALLOW_MISSING").unwrap_or_default();
    assert!(
        allowed.split(',').any(|name| name.trim() == "lab"),
        "this test needs {missing:?}, which are not installed; to run the others without them: tests/run --allow-missing lab"
    );
    eprintln!("skipped: needs {missing:?}, allowed to be missing");
    true
}

#[test]
fn what_can_not_be_run_is_refused_in_a_line() {
    let dir = folder();
    let (job, nonsense) = (file(&dir, "a.fio", JOB), file(&dir, "nonsense", b"nonsense"));
    for (words, expected) in [
        (&["--fio", "/nowhere.fio"][..], "reading the job file /nowhere.fio: No such file"),
        (&["--fio", &nonsense], "line 1 (`nonsense`)"),
        (&["--iperf3", "/nowhere.txt"], "--iperf3 /nowhere.txt: there is no such file"),
        (&["--iperf3", "-t 1 -J"], "-J is given by the bench"),
        (
            &["--fio", &job, "--vmm", "host", "--kernel", "/nowhere/vmlinuz"],
            "reading the kernel /nowhere/vmlinuz: No such file",
        ),
        (&["--fio", &job, "--vmm", "host", "--kernel", &nonsense], "neither a bzImage nor an ELF image"),
        (&["--fio", &job, "--vmm", "bochs"], "unknown VMM bochs"),
        (&["--fio", &job, "--memory", "64M"], "128M or more"),
        (&["--modules", "/lib"], "--kernel"),
    ] {
        refused(&[&["linux"], words].concat(), expected);
        let (_, said) = run(&[&["linux"], words].concat());
        let own = said.lines().filter(|line| line.starts_with("ringvm-bench: ")).count();
        assert!(own <= 1, "{said}");
    }
}

#[test]
fn a_disk_that_exists_is_not_overwritten_unasked() {
    if programs_are_missing() {
        return;
    }
    let dir = folder();
    let (job, kernel, disk) = (file(&dir, "a.fio", JOB), kernel(&dir), file(&dir, "disk", &[1; 1 << 20]));
    let words = ["linux", "--fio", &job, "--vmm", "host", "--kernel", &kernel, "--file", &disk];
    refused(&words, "a's job both (rw=randrw) would overwrite");
}

#[test]
fn the_host_runs_the_same_job_file() {
    if programs_are_missing() {
        return;
    }
    let dir = folder();
    let (job, kernel, html) = (file(&dir, "a.fio", JOB), kernel(&dir), dir.path().join("a.html"));
    let words = ["linux", "--fio", &job, "--vmm", "host", "--kernel", &kernel, "--size", "4M", "--runs", "2", "--html"];
    let (said, result) = bench(&[&words[..], &[html.to_str().unwrap()]].concat());
    let series = result["series"].as_array().unwrap();
    let loads: Vec<_> = series.iter().map(|series| series["load"].as_str().unwrap()).collect();
    assert_eq!(loads, ["reads", "both: read", "both: write"], "{said}");
    for series in series {
        assert_eq!((&series["name"], &series["reference"]), (&"host".into(), &true.into()));
        assert!(series["median_iops"].as_f64().unwrap() > 0.0, "{series}");
        for run in series["runs"].as_array().unwrap() {
            assert!(run["ops"].as_u64().unwrap() > 0 && run["p99_ns"].as_u64().unwrap() > 0, "{run}");
            assert_eq!(run["bytes"].as_u64().unwrap(), run["ops"].as_u64().unwrap() * 4096);
        }
    }
    assert_eq!(result["job"]["kernel"], "0.0.1-none");
    assert!(result["programs"].to_string().contains("fio-"), "{}", result["programs"]);
    assert!(fs::read_to_string(&html).unwrap().contains("both: write") && said.contains("both: write"), "{said}");
}

#[test]
fn guests_that_do_not_come_up_are_quoted() {
    if programs_are_missing() || kvm_is_missing() {
        return;
    }
    let dir = folder();
    let (job, kernel) = (file(&dir, "a.fio", JOB), kernel(&dir));
    for (script, expected) in [
        ("echo '[ 0.1] booting'; exec sleep 60", "the guest under ringvm did not come up within 3s"),
        ("echo oh no >&2; exit 1", "the guest under ringvm ended before its init ran"),
        ("echo 'Kernel panic - not syncing: no init'; exec sleep 60", "the guest's kernel under ringvm has panicked"),
        (
            "echo ringvm-guest: FAILED: there is no disk /dev/vda; exec sleep 60",
            "says: FAILED: there is no disk /dev/vda",
        ),
    ] {
        let ringvm =
            file(&dir, "ringvm", format!("#!/bin/sh\n[ \"$1\" != --version ] || exit 0\n{script}\n").as_bytes());
        fs::set_permissions(&ringvm, fs::Permissions::from_mode(0o755)).unwrap();
        let words =
            ["linux", "--fio", &job, "--kernel", &kernel, "--size", "4M", "--vmm", "ringvm", "--boot-limit", "3s"];
        let words = [&words[..], &["--ringvm", &ringvm]].concat();
        refused(&words, expected);
        let (_, said) = run(&words);
        for wanted in ["measuring ringvm", "booting", "oh no", "not syncing", "no disk"] {
            assert!(said.contains(wanted) || !script.contains(wanted), "{wanted}: {said}");
        }
    }
}
