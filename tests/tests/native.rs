//! The machine and its disk on the host's own KVM, with the embedded guest at native speed.
//!
//! The guest checks what it reads against a model of its own; what is looked at here is what it says, how `ringvm` ends and
//! what is left of it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use ringvm_tests::embedded::{self, assert_success, disk, figure, guest, guest_in, image, ready, succeed};
use ringvm_tests::native::{LIMIT, Place, RingVm, children, pinned, program};
use ringvm_tests::paths;
use rustix::process::Signal;

/// What is said where the kernel holds no more.
const REFUSED: &str = "the kernel does not hold all of the guest's memory";

/// Runs a test with the disk in every place.
fn everywhere(test: impl Fn(Place)) {
    if ready() {
        Place::ALL.into_iter().for_each(test);
    }
}

#[test]
fn random_operations_match_the_guests_model() {
    everywhere(|place| {
        for queues in [1, 2] {
            for mode in ["poll=1", "irq=1"] {
                for direct in ["off", "on"] {
                    let image = image(64);
                    let job = format!("job=verify queues={queues} cpus={queues} depth=16 ops=3000 {mode}");
                    let disk = disk(&image, place, &format!("queues={queues},direct={direct}"));
                    let said = succeed(&job, &["--cpus", &queues.to_string(), "--disk", &disk]);
                    for kind in
                        ["reads", "writes", "discards", "write_zeroes", "flushes", "sectors_checked", "indirect"]
                    {
                        assert!(figure(&said, kind) > 0, "{kind} in {said}");
                    }
                    assert_eq!(figure(&said, "irqs") > 0, mode == "irq=1", "{said}");
                }
            }
        }
    });
}

#[test]
fn every_ring_feature_can_be_left_out() {
    everywhere(|place| {
        for words in
            ["event_idx=0", "indirect=0", "event_idx=0 indirect=0 irq=1", "qsize=16", "flush=0", "config_wce=0"]
        {
            let image = image(64);
            let said =
                succeed(&format!("job=verify depth=4 ops=1000 {words}"), &["--disk", &disk(&image, place, "queues=1")]);
            assert!(figure(&said, "sectors_checked") > 0);
        }
    });
}

#[test]
fn two_disks_over_two_io_threads() {
    everywhere(|place| {
        let (one, two) = (image(64), image(64));
        let job = "depth=8 ops=1000 irq=1 job=verify disk=0 job=verify disk=1";
        let (one, two) = (disk(&one, place, "queues=2"), disk(&two, place, "queues=1,direct=on"));
        let said = succeed(job, &["--disk", &one, "--disk", &two, "--io-threads", "2"]);
        assert_eq!(said.matches("result job=verify").count(), 2, "{said}");
    });
}

#[test]
fn memory_that_the_kernel_holds_serves_requests_like_any_other() {
    everywhere(|place| {
        for direct in ["off", "on"] {
            let (one, two) = (image(64), image(64));
            let job =
                "queues=2 depth=16 ops=2000 irq=1 job=verify disk=1 job=reset disk=0 rounds=5 job=verify until=told";
            let [one, two] = [&one, &two].map(|image| disk(image, place, &format!("queues=2,direct={direct}")));
            let options = ["--io-threads", "2", "--disk", &one, "--disk", &two];
            let mut running = guest_in("size=256M,prefault=on", job, &options).start().expect("it starts");
            running.expect("ringvm-guest: start job=verify", LIMIT).expect("the guest comes up");
            let pid = if place == Place::Daemon { children(running.pid())[0] } else { running.pid() };
            // It is held piece by piece, while the guest works, for each thread.
            let held = (0..2000).any(|_| {
                sleep(Duration::from_millis(10));
                pinned(pid) >= 512 << 10 || running.said().contains(REFUSED)
            });
            running.tell_enough().expect("the guest works");
            let ended = running.end(LIMIT).expect("it ends");
            assert_success(&ended);
            assert!(figure(&ended.stdout, "sectors_checked") > 0, "{}", ended.stdout);
            // Whoever may lock no more goes on without, and says so.
            assert!(held, "not all is held; {}", ended.stderr);
        }
    });
}

#[test]
fn pitfalls_17_and_24_reset_in_the_middle_of_io() {
    everywhere(|place| {
        for direct in ["off", "on"] {
            let image = image(64);
            let job = "job=reset rounds=20 queues=2 cpus=2 depth=16 ops=200";
            let said =
                succeed(job, &["--cpus", "2", "--disk", &disk(&image, place, &format!("queues=2,direct={direct}"))]);
            assert!(figure(&said, "abandoned") > 0, "resets met requests in flight: {said}");
        }
    });
}

#[test]
fn a_malicious_guest_gets_errors_or_needs_reset_and_the_device_comes_back() {
    everywhere(|place| {
        let image = image(64);
        let said = succeed("job=hostile kind=all", &["--disk", &disk(&image, place, "queues=2")]);
        assert!(said.matches("hostile kind=").count() > 40, "{said}");
        assert_eq!(image.as_file().metadata().expect("it is ours").len(), 64 << 20, "the image keeps its size");
    });
}

#[test]
fn many_vcpus_come_up() {
    if !ready() {
        return;
    }
    for cpus in ["1", "2", "64"] {
        let said = succeed(&format!("job=info cpus={cpus}"), &["--cpus", cpus]);
        assert!(said.contains(&format!("info madt cpus={cpus} ")), "{said}");
    }
}

#[test]
fn a_device_has_the_name_that_it_was_given() {
    everywhere(|place| {
        let (named, other) = (image(1), image(1));
        let disks = [disk(&named, place, "queues=1,id=root"), disk(&other, place, "queues=1")];
        let options = ["--disk", &disks[0], "--disk", &disks[1], "--stats"];
        let ended = guest("ops=16 job=read disk=0 job=read disk=1", &options).run().expect("it ends");
        assert_success(&ended);
        for line in ["root: ", "disk1: "] {
            assert!(ended.stderr.contains(line), "{line} in {}", ended.stderr);
        }
        assert!(!ended.stderr.contains("disk0"), "{}", ended.stderr);
    });
}

#[test]
fn pitfall_60_exit_codes_tell_how_a_guest_ended() {
    everywhere(|place| {
        let image = image(64);
        let disk = disk(&image, place, "queues=1");
        let code = |job: &str, more: &[&str]| {
            let options: Vec<_> = ["--disk", &disk].iter().chain(more).copied().collect();
            let ended = guest(job, &options).run().expect("it ends");
            (ended.code(), ended.stderr)
        };
        assert_eq!(code("job=none", &[]).0, 0);
        assert_eq!(code("job=reboot via=keyboard", &["--no-reboot"]).0, 5);
        assert_eq!(code("job=reboot via=acpi", &["--no-reboot"]).0, 5);
        let (crashed, why) = code("job=crash", &[]);
        assert!(crashed == 4 && why.contains("triple fault"), "{crashed} {why}");
        assert_eq!(code("job=rand-write time=100ms job=crash", &[]).0, 4, "in the middle of a busy life");
    });
}

#[test]
fn pitfall_57_signals_end_it_with_the_disks_flushed() {
    everywhere(|place| {
        for signal in [Signal::TERM, Signal::INT] {
            let image = image(64);
            let mut running = guest("job=rand-write time=60s depth=32", &["--disk", &disk(&image, place, "queues=1")])
                .start()
                .expect("it starts");
            running.expect("start job=rand-write", LIMIT).expect("the guest comes up");
            std::thread::sleep(Duration::from_millis(200));
            running.signal(signal).expect("it is there");
            let ended = running.end(LIMIT).expect("it ends");
            assert_eq!(ended.code(), 0, "{}", ended.stderr);
            // The lock is gone with the process: the image can be used at once.
            succeed("job=verify ops=200 depth=4", &["--disk", &disk(&image, place, "queues=1")]);
        }
    });
}

#[test]
fn a_thousand_starts_and_stops_leak_nothing() {
    everywhere(|place| {
        let image = image(64);
        let mut running =
            guest("job=read ops=64 depth=8 job=reboot", &["--disk", &disk(&image, place, "queues=2"), "--cpus", "2"])
                .start()
                .expect("it starts");
        let mut early = None;
        let limit = Duration::from_secs(600);
        let start = Instant::now();
        for count in 1..=1000 {
            running
                .expect_count("ringvm-guest: hello", count, limit.saturating_sub(start.elapsed()))
                .expect("it boots again");
            // The first lives warm caches and grow buffers to their size.
            if count == 50 {
                early = Some(running.holdings());
            }
        }
        let (early, late) = (early.expect("fifty is less than a thousand"), running.holdings());
        running.signal(Signal::TERM).expect("it is there");
        assert_eq!(running.end(LIMIT).expect("it ends").code(), 0);
        println!("{place:?}: {early:?} after 50 starts, {late:?} after 1000");
        late.assert_flat(&early);
    });
}

#[test]
fn pitfall_56_serial_output_without_a_reader_is_bounded() {
    if !ready() {
        return;
    }
    // A pipe that nobody reads, full from the start: the guest's lines must neither stop it for ever nor fill memory.
    let (reader, mut writer) = std::io::pipe().expect("pipes can be made");
    rustix::io::ioctl_fionbio(&writer, true).expect("a pipe can be made non-blocking");
    while writer.write(&[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).expect("and blocking again");
    let started = Command::new(paths::ringvm().expect("the binary is built"))
        .args(["run", "--memory", "64M", "--cmdline", "job=info job=info job=info", "--kernel"])
        .arg(embedded::kernel())
        .stdin(Stdio::null())
        .stdout(writer)
        .spawn();
    let mut child = started.expect("it starts");
    let deadline = Instant::now() + LIMIT;
    let status = loop {
        match child.try_wait().expect("it is ours") {
            Some(status) => break status,
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            None => {
                child.kill().expect("it is ours");
                panic!("the guest hangs on a console that nobody reads");
            }
        }
    };
    drop(reader);
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_closed_stdout_is_said_before_the_guest_starts() {
    if !ready() {
        return;
    }
    let (reader, writer) = std::io::pipe().expect("pipes can be made");
    drop(reader);
    let child = Command::new(paths::ringvm().expect("the binary is built"))
        .args(["run", "--memory", "64M", "--cmdline", "job=info", "--kernel"])
        .arg(embedded::kernel())
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .expect("it starts");
    let said = String::from_utf8_lossy(&child.stderr).into_owned();
    assert!(child.status.code() == Some(2) && said.contains("standard output"), "{:?} {said}", child.status);
    assert_eq!(said.lines().count(), 1, "{said}");
}

/// `ringvm run` with these arguments, started by a shell that has done something first. `$0` of the script is a file.
fn after(script: &str, file: &str, arguments: &[&str]) -> RingVm {
    let ringvm = paths::ringvm().expect("the binary is built");
    let script = format!("{script}\nexec \"$@\"");
    let ringvm = ringvm.to_str().expect("a path of ours is text");
    let kernel = embedded::kernel().to_str().expect("a path of ours is text");
    let words = ["-ec", &script, file, ringvm, "run", "--kernel", kernel, "--memory", "64M"];
    program("sh", words.iter().chain(arguments))
}

/// Where the descriptors of a process lead, by their numbers, and whether they are closed to the programs that it starts.
fn descriptors(pid: u32) -> Vec<(u32, PathBuf, bool)> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs");
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let descriptor = |number: u32| {
        let link = std::fs::read_link(format!("/proc/{pid}/fd/{number}")).ok()?;
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?.trim();
        let closed = u32::from_str_radix(flags, 8).expect("flags are in octal") & 0o2_000_000 != 0;
        Some((number, link, closed))
    };
    numbers.filter_map(descriptor).collect()
}

#[test]
fn a_daemon_gets_no_descriptor_that_is_not_its_own() {
    if !ready() {
        return;
    }
    let (mine, theirs) = (image(16), image(16));
    let stray = tempfile::NamedTempFile::new().expect("a temporary file");
    let script = format!("exec 7<>{:?} 9<>\"$0\"", mine.path());
    let theirs = disk(&theirs, Place::Daemon, "queues=1");
    let job = "job=verify disk=1 depth=4 until=told";
    let options = ["--cmdline", job, "--disk", "fd=7", "--disk", &theirs];
    let mut running = after(&script, stray.path().to_str().expect("it is text"), &options).start().expect("it starts");
    running.expect("ringvm-guest: start job=verify", LIMIT).expect("the guest comes up");
    let leads = |all: &[(u32, PathBuf, bool)], to: &Path| all.iter().any(|(_, link, _)| link == to);
    let ours = descriptors(running.pid());
    assert!(ours.iter().any(|(number, link, _)| *number == 7 && link == mine.path()), "under its own number: {ours:?}");
    assert!(leads(&ours, stray.path()), "a path like /dev/fd/9 may lead to it: {ours:?}");
    let daemons = children(running.pid());
    assert_eq!(daemons.len(), 1, "{daemons:?}");
    let theirs = descriptors(daemons[0]);
    assert!(!leads(&theirs, mine.path()) && !leads(&theirs, stray.path()), "{theirs:?}");
    for (number, link, closed) in ours.iter().chain(&theirs).filter(|(number, ..)| *number > 2) {
        assert!(closed, "{number}, {}, would go to whatever is started", link.display());
    }
    running.tell_enough().expect("the guest works");
    assert_success(&running.end(LIMIT).expect("it ends"));
}

#[test]
fn a_write_beyond_the_file_size_limit_is_an_error_of_the_disk() {
    everywhere(|place| {
        let image = image(512);
        // In units of 512 bytes. The guest's memory is a file as well.
        let script = "ulimit -f 262144";
        let disk = disk(&image, place, "queues=1");
        let options = ["--cmdline", "job=rand-write ops=500 depth=8", "--disk", &disk];
        let ended = after(script, "sh", &options).run().expect("it ends");
        assert_success(&ended);
        let errors = figure(&ended.stdout, "errors");
        assert!((1..500).contains(&errors), "{errors} of 500 are beyond the limit: {}", ended.stdout);
    });
}

#[test]
fn nested_virtualization_and_counters_are_there_only_when_asked_for() {
    if !ready() {
        return;
    }
    const DTES64_VMX_PDCM: u64 = 1 << 2 | 1 << 5 | 1 << 15;
    let features = |cpus: &str| {
        let said = succeed("job=info", &["--cpus", cpus]);
        let hex = said.split("features_ecx=0x").nth(1).and_then(|rest| rest.split_whitespace().next());
        u64::from_str_radix(hex.expect("the guest says its features"), 16).expect("a number")
    };
    assert_eq!(features("1") & DTES64_VMX_PDCM, 0);
    // What there is then depends on the host.
    let all = features("1,nested=on,pmu=on");
    println!("with both: {:#x}", all & DTES64_VMX_PDCM);
    assert_eq!(all & !DTES64_VMX_PDCM, features("1") & !DTES64_VMX_PDCM);
}

#[test]
fn a_serial_file_grows_to_its_limit_and_the_guest_goes_on() {
    if !ready() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let log = folder.path().join("console.log");
    let run = |serial: &str| {
        let options = ["--cmdline", "job=info job=info job=info", "--serial", serial];
        let ended = after("", "sh", &options).run().expect("it ends");
        assert!(ended.code() == 0 && ended.stdout.is_empty(), "{} {}", ended.stdout, ended.stderr);
        ended.stderr
    };
    assert_eq!(run(&format!("file={}", log.display())), "");
    let whole = std::fs::read(&log).expect("the log");
    assert!(String::from_utf8_lossy(&whole).contains("ringvm-guest: done"));
    let said = run(&format!("file={},max=1000", log.display()));
    assert!(std::fs::read(&log).expect("the log") == whole[..1000]);
    assert!(said.lines().count() == 1 && said.contains("console.log has grown to its limit"), "{said}");
    // A device keeps nothing, so it has no limit.
    assert_eq!(run("file=/dev/null,max=1"), "");
}
