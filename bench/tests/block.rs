//! `ringvm-bench block` and `idle` as a whole, and what is made from their results. No test asserts how fast anything was.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use common::{bench, interrupt, kvm_is_missing, read, refused, ringvm, run, run_and};
use serde_json::Value;

/// Small enough to be filled quickly.
const SMALL: [&str; 5] = ["block", "--size", "4M", "--runs", "1"];

fn block(words: &[&str]) -> (String, Value) {
    bench(&[&SMALL, &["--time", "40ms"][..], words].concat())
}

/// Name, pattern, block size and depth of each series.
fn points(result: &Value) -> Vec<(String, String, u64, u64)> {
    let point = |series: &Value| {
        let text = |key: &str| series[key].as_str().unwrap().to_owned();
        (text("name"), text("rw"), series["bs"].as_u64().unwrap(), series["depth"].as_u64().unwrap())
    };
    result["series"].as_array().unwrap().iter().map(point).collect()
}

fn series<'a>(result: &'a Value, name: &str) -> &'a Value {
    result["series"].as_array().unwrap().iter().find(|series| series["name"] == name).unwrap()
}

#[test]
fn a_matrix_is_measured_with_a_table_for_each_pattern_and_size() {
    let ringvm = ringvm();
    let ringvm = ["--ringvm", ringvm.to_str().unwrap()];
    let matrix = ["--rw", "rand-read,write", "--bs", "4k,16k", "--depth", "1,8"];
    if kvm_is_missing() {
        return;
    }
    let (said, result) = block(&[&matrix[..], &ringvm].concat());
    let mut expected = Vec::new();
    for rw in ["rand-read", "write"] {
        for bs in [4096, 16384] {
            for depth in [1, 8] {
                let names = ["plain ring", "ringvm", "ringvm, daemon"];
                expected.extend(names.map(|name| (name.to_owned(), rw.to_owned(), bs, depth)));
            }
        }
    }
    assert_eq!(points(&result), expected, "{said}");
    for title in ["4 KiB random reads", "16 KiB random reads", "4 KiB sequential writes", "16 KiB sequential writes"] {
        assert!(said.contains(title), "{said}");
    }
    assert_eq!((&result["version"], &result["incomplete"]), (&2.into(), &Value::Null));
    for series in result["series"].as_array().unwrap() {
        let run = &series["runs"][0];
        let counted: u64 = series["latency_ns"].as_array().unwrap().iter().map(|step| step[1].as_u64().unwrap()).sum();
        assert_eq!(counted, run["ops"].as_u64().unwrap(), "{series}");
        assert!(run["ops"].as_u64().unwrap() > 0 && run["cpu_ns"].as_u64().is_some(), "{run}");
    }
}

#[test]
fn null_storage_is_measured_beside_nops() {
    if kvm_is_missing() {
        return;
    }
    let ringvm = ringvm();
    let (said, result) =
        block(&["--storage", "null", "--backend", "--depth", "8", "--ringvm", ringvm.to_str().unwrap()]);
    let names: Vec<_> = points(&result).into_iter().map(|(name, ..)| name).collect();
    assert_eq!(names, ["plain ring", "backend alone", "ringvm", "ringvm, daemon"], "{said}");
    assert!(said.contains("the plain ring's are NOPs") && result["job"]["disk"].is_null(), "{said}");
    assert!(series(&result, "ringvm")["command"].to_string().contains("storage=null"), "{result}");
}

#[test]
fn system_calls_are_counted_by_whatever_there_is() {
    if kvm_is_missing() {
        return;
    }
    let ringvm = ringvm();
    let common = ["--depth", "4", "--storage", "null", "--ringvm", ringvm.to_str().unwrap()];
    for how in ["--syscalls=tracepoints", "--syscalls=strace"] {
        let words = [&SMALL, &["--time", "40ms"][..], &common, &[how]].concat();
        let (status, said) = run(&words);
        if !status.success() {
            // Both take something that not every host has; then that is said.
            assert!(said.contains("can't be counted by tracepoints here") || said.contains("no strace"), "{said}");
            continue;
        }
        let (said, result) = block(&[&common[..], &[how]].concat());
        for name in ["ringvm", "ringvm, daemon"] {
            let counted = &series(&result, name)["counted"];
            assert!(how.ends_with(counted["by"].as_str().unwrap()), "{counted}");
            assert!(counted["ops"].as_u64().unwrap() > 0 && counted["syscalls"].as_u64().is_some(), "{counted}");
        }
        assert!(said.contains("system calls of the VMM and its daemons in a run of its own"), "{said}");
    }
}

#[test]
fn a_result_can_be_reported_and_compared() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (a, html, again) = (path("a.json"), path("a.html"), path("b.html"));
    // Without a VM: whatever a host has, the plain ring and the backend alone it has.
    let words = ["--time", "40ms", "--depth", "1,4", "--backend", "--json", &a, "--html", &html];
    let ringvm = ringvm();
    let all = [&SMALL, &words[..], &["--ringvm", ringvm.to_str().unwrap()]].concat();
    let (status, said) = run(&all);
    assert!(status.success(), "{said}");
    let page = fs::read_to_string(&html).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.contains("backend alone") && page.contains("<svg"), "{page}");

    let (status, _) = run(&["report", &a, "--html", &again]);
    assert!(status.success() && fs::read_to_string(&again).unwrap() == page);
    let (status, table) = run(&["report", &a]);
    assert!(status.success() && said.ends_with(&table), "{said}\n{table}");

    let (status, same) = run(&["compare", &a, &a, "--fail-below", "0.99"]);
    assert!(status.success() && same.contains("1.000") && same.contains("backend alone"), "{same}");
    let mut slower = read(a.as_ref());
    for run in slower["series"].as_array_mut().unwrap().iter_mut().flat_map(|one| one["runs"].as_array_mut().unwrap()) {
        run["ops"] = (run["ops"].as_u64().unwrap() / 4).into();
    }
    let b = path("b.json");
    fs::write(&b, slower.to_string()).unwrap();
    let (status, _) = run(&["compare", &a, &b]);
    assert!(status.success());
    let (status, said) = run(&["compare", &a, &b, "--fail-below", "0.9"]);
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("is below 0.9"), "{said}");
}

#[test]
fn files_that_are_none_of_ours_are_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.json");
    let path = path.to_str().unwrap();
    refused(&["report", path], "No such file");
    for (text, expected) in [
        ("no json", "no JSON"),
        ("{}", "no result of ringvm-bench"),
        ("{\"format\":1,\"series\":[]}", "older ringvm-bench"),
        ("{\"format\":\"ringvm-bench\",\"version\":9}", "version 9"),
    ] {
        fs::write(path, text).unwrap();
        for words in [&["report", path][..], &["compare", path, path]] {
            let (status, said) = run(words);
            assert!(!status.success() && said.contains(expected) && said.lines().count() == 1, "{said}");
        }
    }
    refused(&["compare", path, path, "--fail-below", "0"], "a ratio above 0");
    refused(&["block", "--storage", "null", "--direct"], "--direct");
    refused(&["block", "--against", "bochs=/x"], "unknown VMM bochs");
}

#[test]
fn what_was_measured_before_ctrl_c_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (json, html) = (dir.path().join("r.json"), dir.path().join("r.html"));
    let ringvm = ringvm();
    let words = ["block", "--size", "4M", "--depth", "1", "--runs", "1000", "--time", "50ms", "--backend", "--ringvm"];
    let files = [ringvm.to_str().unwrap(), "--json", json.to_str().unwrap(), "--html", html.to_str().unwrap()];
    // How long the first measurement takes to come is the disk's affair.
    let mut said = String::new();
    for wait in [4, 16, 64].map(Duration::from_secs) {
        let mut sent = false;
        let (status, told) = run_and(&[&words[..], &files].concat(), |pid, passed| {
            if !sent && passed > wait {
                sent = true;
                interrupt(pid);
            }
        });
        assert_eq!(status.code(), Some(130), "{told}");
        said = told;
        if said.contains("NOT COMPLETE: interrupted after") {
            break;
        }
    }
    assert!(said.contains("NOT COMPLETE: interrupted after"), "{said}");
    let result = read(&json);
    assert!(result["incomplete"].as_str().unwrap().starts_with("interrupted after"), "{result}");
    assert!(!result["series"][0]["runs"].as_array().unwrap().is_empty(), "{result}");
    assert!(fs::read_to_string(&html).unwrap().contains("Not complete"));
}

/// A program that is a shell script.
fn script(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn contestants_that_fail_are_taken_out_and_the_others_go_on() {
    if kvm_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let dies = script(dir.path(), "dies", "echo no thanks >&2; exit 7");
    let killed = script(dir.path(), "killed", "echo ringvm-guest: start job=x; kill -9 $$");
    let garbage =
        script(dir.path(), "garbage", "head -c 100000 /dev/urandom; echo; echo ringvm-guest: result ops=many");
    let others = [
        format!("qemu={dies}"),
        format!("cloud-hypervisor={killed}"),
        format!("qemu-tcg={garbage}"),
        "firecracker=/nowhere/firecracker".to_owned(),
    ];
    let (ringvm, json, html) = (ringvm(), path("r.json"), path("r.html"));
    let mut words = vec!["--depth", "1,4", "--time", "40ms", "--ringvm", ringvm.to_str().unwrap()];
    words.extend(others.iter().flat_map(|other| ["--against", other]));
    let (status, said) = run(&[&SMALL, &words[..], &["--json", &json, "--html", &html]].concat());
    assert!(status.success(), "{said}");
    let result = read(json.as_ref());
    let names: Vec<_> = points(&result).into_iter().map(|(name, _, _, depth)| (name, depth)).collect();
    let all = ["plain ring", "ringvm", "ringvm, daemon"];
    let expected: Vec<_> = [1, 4].into_iter().flat_map(|depth| all.map(|name| (name.to_owned(), depth))).collect();
    assert_eq!((names, &result["incomplete"]), (expected, &Value::Null), "{said}");

    let page = fs::read_to_string(&html).unwrap();
    let removed = result["removed"].as_array().unwrap();
    for (name, why) in [
        ("qemu", "ended without a result; its stderr ends with: no thanks"),
        ("cloud-hypervisor", "ended without a result"),
        ("qemu-tcg", "ended without a result"),
        ("firecracker", "starting /nowhere/firecracker"),
    ] {
        let removed = removed.iter().find(|removed| removed["name"] == name).unwrap();
        assert!(removed["why"].as_str().unwrap().contains(why), "{removed}");
        let at = "random reads of 4 KiB, depth 1";
        assert_eq!(removed["at"], at);
        let telling =
            |start: &str| said.lines().filter(|line| line.starts_with(&format!("{start} {name} at {at}: "))).count();
        assert_eq!((telling("ringvm-bench: taking out"), telling("TAKEN OUT:")), (1, 1), "{said}");
        assert!(page.contains(&format!("<li>{name} at {at}: ")), "{page}");
    }
    assert_eq!(removed.len(), 4, "{said}");

    let (status, table) = run(&["report", &json]);
    assert!(status.success() && table.matches("TAKEN OUT: ").count() == 4, "{table}");
    let (status, same) = run(&["compare", &json, &json, "--fail-below", "0.99"]);
    assert!(status.success() && same.contains("TAKEN OUT: A: qemu at") && same.contains("TAKEN OUT: B: "), "{same}");
}

#[test]
fn if_ringvm_fails_the_others_are_measured_and_the_exit_code_says_so() {
    if kvm_is_missing() {
        return;
    }
    let (dir, ringvm) = (tempfile::tempdir().unwrap(), ringvm());
    let measured = |fails: &str| {
        let text =
            format!("case \"$*\" in *{fails}*) echo no thanks >&2; exit 7;; esac; exec {} \"$@\"", ringvm.display());
        let (ringvm, json) = (script(dir.path(), "ringvm", &text), dir.path().join("r.json"));
        let words = ["--depth", "1,4", "--time", "40ms", "--ringvm", &ringvm, "--json", json.to_str().unwrap()];
        let (status, said) = run(&[&SMALL, &words[..]].concat());
        assert_eq!(status.code(), Some(1), "{said}");
        let error =
            "ringvm-bench: measuring ringvm at random reads of 4 KiB, depth 1: the guest under ringvm ended without";
        assert!(said.contains(error) && said.trim_end().ends_with("    no thanks"), "{said}");
        let result = read(&json);
        assert!(result["incomplete"].as_str().unwrap().contains("measuring ringvm"), "{result}");
        points(&result).into_iter().map(|(name, _, _, depth)| (name, depth)).collect::<Vec<_>>()
    };
    let ring = |depth| ("plain ring".to_owned(), depth);
    let daemon = |depth| ("ringvm, daemon".to_owned(), depth);
    assert_eq!(measured("place=process"), [ring(1), daemon(1), ring(4), daemon(4)]);
    // Without any ringvm there is nothing to wait for.
    assert_eq!(measured("place="), [ring(1)]);
}

#[test]
fn what_the_host_took_away_is_told() {
    let ringvm = ringvm();
    let (said, result) = block(&["--depth", "1", "--backend", "--ringvm", ringvm.to_str().unwrap()]);
    assert_eq!(said.lines().filter(|line| line.starts_with("steal: ")).count(), 1, "{said}");
    assert!(result["steal"]["repeated"].is_u64() && result["steal"]["limit_percent"] == 3.0, "{result}");
    for run in result["series"].as_array().unwrap().iter().flat_map(|series| series["runs"].as_array().unwrap()) {
        for part in ["steal_percent", "others_percent"] {
            assert!((0.0..=100.0).contains(&run[part].as_f64().unwrap()), "{run}");
        }
    }
}

#[test]
fn an_idle_guest_halts_with_its_devices_up() {
    if kvm_is_missing() {
        return;
    }
    let ringvm = ringvm();
    let words = ["idle", "--time", "1200ms", "--runs", "1", "--disks", "2", "--nics", "1", "--ringvm"];
    let (said, result) = bench(&[&words[..], &[ringvm.to_str().unwrap()]].concat());
    assert!(said.contains("2 disks, one NIC"), "{said}");
    for name in ["ringvm", "ringvm, daemon"] {
        let run = &series(&result, name)["runs"][0];
        let line = run["guest"].as_str().unwrap();
        assert!(line.contains("disks=2 nics=1"), "{line}");
        // Woken by its own timer and little else.
        let wakes: u64 = ringvm_bench::sample::fields(line)["wakes"].parse().unwrap();
        assert!((1..200).contains(&wakes), "{line}");
        assert!(run["cpu_ns"].as_u64().is_some() && run["time_ns"].as_u64().unwrap() >= 1_200_000_000, "{run}");
    }
}
