//! `ringvm-bench net` as a whole, on a tap in a network namespace: with the plain process alone, and with VMs.

mod common;

use std::time::Duration;

use common::{kvm_is_missing, ringvm};
use ringvm_bench::guest;
use ringvm_bench::net::generator::Generator;
use ringvm_bench::net::interface::Interface;
use ringvm_bench::net::namespace;
use ringvm_bench::run::{self, Look, Moment, Running};
use ringvm_bench::sample::fields;
use ringvm_bench::vmm::{Contestant, Nic, Vm};
use serde_json::Value;

/// Runs it with short measurements, and returns its table and its report.
fn bench(words: &[&str]) -> (String, Value) {
    common::bench(&[&["net", "--time", "60ms"], words].concat())
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
        let vms = ["plain process", "ringvm", "ringvm, daemon"];
        let all: Vec<_> = ["out", "out", "in"].into_iter().flat_map(|way| vms.map(|name| (name, way))).collect();
        assert_eq!(names, all, "{said}");
        assert!(said.contains("in 1500, irq"), "{said}");
        assert!(said.contains("to the guest's first instruction"), "{said}");
    }
}

#[test]
fn a_guest_that_polls_is_put_beside_a_plain_process_whose_cpu_is_shared() {
    if kvm_is_missing() {
        return;
    }
    let ringvm = ringvm();
    let words = ["--ringvm", ringvm.to_str().unwrap(), "--runs", "1", "--only", "in", "--irq=none"];
    let (said, report) = bench(&words);
    let names: Vec<_> = series(&report, 1).into_iter().map(|(name, ..)| name).collect();
    assert_eq!(names, ["plain process", "plain, CPU shared", "ringvm", "ringvm, daemon"], "{said}");
    assert!(report["series"].as_array().unwrap().iter().all(|series| series["irq"] == false), "{report}");
}

#[test]
fn a_guest_that_sleeps_sends_too() {
    if kvm_is_missing() {
        return;
    }
    let ringvm = ringvm();
    let words = ["--ringvm", ringvm.to_str().unwrap(), "--runs", "1", "--only", "out", "--size", "1500", "--irq"];
    let (said, report) = bench(&words);
    assert_eq!(series(&report, 1).len(), 3, "{said}");
    assert!(said.contains("out 1500, irq"), "{said}");
    for run in report["series"].as_array().unwrap()[1..].iter().map(|series| &series["runs"][0]) {
        assert_slept(run["guest"].as_str().unwrap());
    }
}

/// Asserts that the guest was halted, and that no tick of its timer had to find what an interrupt should have announced: one
/// in a hundred may come in between.
fn assert_slept(line: &str) {
    let number = |key| fields(line)[key].parse::<u64>().unwrap();
    assert!(number("irqs") > 0 && number("halts") > 0, "{line}");
    assert!(number("late") <= number("halts") / 100 + 1, "{line}");
}

#[test]
fn a_frame_every_ten_milliseconds_wakes_the_guest_each_time() {
    if kvm_is_missing() {
        return;
    }
    namespace::enter().unwrap();
    let (dir, interface) = (tempfile::tempdir().unwrap(), Interface::create("drip0", 1).unwrap());
    let kernel = guest::write_to(dir.path()).unwrap();
    let vm = Vm {
        kernel: &kernel,
        elf: None,
        initramfs: None,
        command_line: "job=net-rx irq=1 time=1000ms",
        cpus: 1,
        memory: 256,
        prefault: false,
        disks: &[],
        nics: &[Nic { tap: "drip0", pairs: 1, queue_size: 256 }],
    };
    let ringvm = Contestant::ringvm(Some(&ringvm())).unwrap();
    for contestant in [ringvm.in_daemon(), ringvm] {
        let mut generator = None;
        let before = interface.counters().unwrap();
        let look = Look::Plain;
        let observed = run::observe(&contestant, &vm, dir.path(), Duration::from_secs(1), look, |moment| {
            match moment {
                Moment::Start => generator = Some(Generator::drip(&interface, 60, Duration::from_millis(10))?),
                Moment::End => generator.take().map_or(Ok(()), Generator::stop)?,
            }
            Ok(())
        })
        .unwrap();
        let carried = interface.counters().unwrap().since(before).to_user;
        let sample = observed.vm;
        let number = |key| sample.number(key).unwrap();
        assert_slept(&sample.line);
        // A host that is busy sends fewer, but whatever it sends is counted, but for what lies outside of the measured time.
        let frames = number("frames");
        assert!((20..=101).contains(&frames) && (frames..=frames + 8).contains(&carried), "{carried}: {}", sample.line);
        // Frames of a host that is busy come in twos and threes.
        assert!(number("irqs") >= frames / 2, "at such a rate frames have interrupts of their own: {}", sample.line);
    }
}

#[test]
fn a_frame_that_waits_for_the_one_before_it_is_echoed_by_interrupts() {
    if kvm_is_missing() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let kernel = guest::write_to(dir.path()).unwrap();
    let ringvm = Contestant::ringvm(Some(&ringvm())).unwrap();
    for (words, cpus, net) in [
        ("depth=1 frames=3000", 1, "loopback=on"),
        ("depth=1 frames=3000 event_idx=0", 1, "loopback=on"),
        ("depth=64 frames=20000 pairs=2", 1, "loopback=on,queues=2"),
        ("depth=64 frames=20000 pairs=2 cpus=2", 2, "loopback=on,queues=2"),
    ] {
        let command_line = format!("job=net-echo irq=1 {words}");
        let vm = Vm {
            kernel: &kernel,
            elf: None,
            initramfs: None,
            command_line: &command_line,
            cpus,
            memory: 256,
            prefault: false,
            disks: &[],
            nics: &[],
        };
        let mut command = ringvm.launch(&vm, dir.path()).unwrap().vmm;
        command.extend(["--net", net].map(Into::into));
        let mut running = Running::start("ringvm", &command, dir.path(), Duration::ZERO).unwrap();
        let mut result = None;
        while let Some(line) = running.next_line().unwrap() {
            result = line.strip_prefix("result ").map(str::to_owned).or(result);
        }
        let status = running.wait().unwrap();
        let line = result.unwrap_or_default();
        assert!(status.success() && line.contains("lost=0"), "{words}: {status}: {line}");
        assert_slept(&line);
        println!("{line}");
    }
}

#[test]
fn what_can_not_be_measured_is_refused_in_one_line() {
    let refused = |words: &[&str], expected| common::refused(&[&["net"], words].concat(), expected);
    refused(&["--size", "59"], "59");
    refused(&["--receive-size", "1515"], "1515");
    refused(&["--irq=never"], "never");
    refused(&["--plain", "--against", "qemu=/x"], "--against");
    if !kvm_is_missing() {
        refused(&["--ringvm", "/nowhere/ringvm"], "no ringvm at /nowhere/ringvm");
    }
}
