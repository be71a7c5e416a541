//! What SIGTERM meets: queues full of long requests, a storage that answers no more, in the process and in a daemon. The machine
//! ends in time, flushes the other disks, and says by its exit code what it has given up.

use std::time::{Duration, Instant};

use ringvm_tests::embedded::{disk, guest_in, image, ready};
use ringvm_tests::host::{Need, need};
use ringvm_tests::native::{Ended, Place, Running};
use ringvm_tests::stuck_disk::StuckDisk;
use rustix::process::{Pid, Resource, Rlimit, Signal};

const LIMIT: Duration = Duration::from_secs(60);
/// Far above what an end takes, and far below what the requests would.
const SOON: Duration = Duration::from_secs(20);
/// The usual limit of an end, and one for what has to be through on a busy machine.
const USUAL: [&str; 2] = ["--stop-timeout", "5"];
const AMPLE: [&str; 2] = ["--stop-timeout", "15"];
/// Something was given up.
const GAVE_UP: i32 = 3;

/// A guest whose last job has begun.
fn busy(jobs: &str, disks: &[&str], more: &[&str]) -> Running {
    let options: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", disk]).chain(more.iter().copied()).collect();
    let mut running = guest_in("1G", jobs, &options).start().expect("it starts");
    running.expect_count("ringvm-guest: start job=", jobs.matches("job=").count(), LIMIT).expect("the guest comes up");
    running
}

/// Ends it as an operator does, and says how long that took.
fn terminate(running: Running) -> Ended {
    let begun = Instant::now();
    running.signal(Signal::TERM).expect("it runs");
    let ended = running.end(SOON).expect("it ends, whatever is in flight");
    eprintln!("it ended after {:?}", begun.elapsed());
    ended
}

#[test]
fn queues_full_of_long_requests_hold_up_no_end() {
    if !ready() {
        return;
    }
    for place in [Place::Process, Place::Daemon] {
        for direct in ["on", "off"] {
            let image = image(512);
            let option = disk(&image, place, &format!("queues=2,direct={direct}"));
            let running = busy("job=write bs=16M depth=24 queues=2 time=600s", &[&option], &AMPLE);
            let ended = terminate(running);
            assert_eq!(ended.code(), 0, "{}", ended.stderr);
        }
    }
}

/// A guest that has written to its second disk, and writes to the first, which then answers no more.
fn stuck(place: Place, after: impl FnOnce(Ended)) {
    if !ready() || !need(Need::Fuse) {
        return;
    }
    let (stuck, other) = (StuckDisk::new().expect("FUSE works"), StuckDisk::new().expect("FUSE works"));
    let option = |disk: &StuckDisk, place: Place| format!("path={},queues=2,{}", disk.path().display(), place.option());
    let jobs = "job=write disk=1 ops=100 bs=4k job=rand-write disk=0 time=600s bs=4k depth=16 queues=2";
    let running = busy(jobs, &[&option(&stuck, place), &option(&other, Place::Process)], &USUAL);
    stuck.stick();
    let flushes = other.flushes();
    after(terminate(running));
    assert!(other.flushes() > flushes, "the other disk is flushed");
}

#[test]
fn a_storage_that_answers_no_more_holds_up_no_end() {
    stuck(Place::Process, |ended| {
        assert_eq!(ended.code(), GAVE_UP, "{}", ended.stderr);
    });
}

#[test]
fn a_daemon_whose_storage_answers_no_more_holds_up_no_end() {
    stuck(Place::Daemon, |ended| {
        assert_eq!(ended.code(), GAVE_UP, "{}", ended.stderr);
    });
}

#[test]
fn signals_that_come_together_are_one() {
    if !ready() {
        return;
    }
    let image = image(64);
    let running = busy("job=write bs=64k depth=16 time=600s", &[&disk(&image, Place::Process, "queues=1")], &AMPLE);
    // As a terminal that is closed, a service manager or timeout(1) sends them.
    for signal in [Signal::TERM, Signal::HUP, Signal::TERM] {
        running.signal(signal).expect("it runs");
    }
    let ended = running.end(SOON).expect("it ends");
    assert_eq!(ended.code(), 0, "{}", ended.stderr);
}

#[test]
fn a_machine_that_can_not_be_built_again_leaves_its_disks_flushed() {
    if !ready() || !need(Need::Fuse) {
        return;
    }
    let (image, other) = (image(64), StuckDisk::new().expect("FUSE works"));
    let disks = [disk(&image, Place::Process, "queues=1"), format!("path={}", other.path().display())];
    let options = ["--disk", &disks[0], "--disk", &disks[1]];
    let mut running = guest_in("256M", "job=read ops=64 depth=8 job=reboot", &options).start().expect("it starts");
    running.expect("ringvm-guest: start job=", LIMIT).expect("the guest comes up");
    // From now on there is no descriptor for the next machine's memory.
    let pid = Pid::from_raw(running.pid().cast_signed()).expect("it runs");
    let none = Rlimit { current: Some(3), maximum: Some(3) };
    rustix::process::prlimit(Some(pid), Resource::Nofile, none).expect("it is ours");
    let flushes = other.flushes();
    // The guest reboots again and again.
    let ended = running.end(LIMIT).expect("it ends");
    assert_eq!(ended.code(), GAVE_UP, "{}", ended.stderr);
    assert!(ended.stderr.contains("memfd"), "{}", ended.stderr);
    assert!(other.flushes() > flushes, "the disks are flushed");
}
