//! Guests and daemons that do what they must not, on the host's own KVM: a guest is no reason to start a daemon again, and a daemon
//! that does not answer keeps no end waiting.

use std::thread::sleep;
use std::time::Duration;

use ringvm_tests::embedded::{assert_success, disk, figure, guest, image, ready, succeed};
use ringvm_tests::native::{self, Place, Running, child_after, children, send};
use ringvm_tests::paths;
use rustix::process::Signal;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(60);
/// For an end that waits for nobody who hangs: above it on any machine, and below what a wait for a daemon once took.
const SOON: Duration = Duration::from_secs(20);
const AWAY: &str = " is away (";

/// A guest that writes at random to its disks, and has begun.
fn writing(disks: &[&str]) -> Running {
    let end = ["--stop-timeout", "15"];
    let options: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", disk]).chain(end).collect();
    let mut running = guest("job=rand-write time=600s depth=32 queues=2", &options).start().expect("it starts");
    running.expect("ringvm-guest: start job=", LIMIT).expect("the guest comes up");
    running
}

#[test]
fn a_hostile_guest_costs_no_daemon() {
    if !ready() {
        return;
    }
    let image = image(64);
    let ended =
        guest("job=hostile kind=all", &["--disk", &disk(&image, Place::Daemon, "queues=2")]).run().expect("it ends");
    assert_success(&ended);
    assert!(!ended.stderr.contains(AWAY), "{}", ended.stderr);
    let lines = ended.stderr.lines().count();
    assert!(lines < 300, "{lines} lines: {}", ended.stderr);
}

#[test]
fn a_stopped_daemon_keeps_no_end_waiting() {
    if !ready() {
        return;
    }
    let (stopped, other) = (image(64), image(64));
    let disks = [disk(&stopped, Place::Daemon, "queues=2"), disk(&other, Place::Process, "queues=2")];
    let running = writing(&[&disks[0], &disks[1]]);
    let daemon = child_after(running.pid(), 0, LIMIT).expect("a daemon is started");
    send(daemon, Signal::STOP);
    running.signal(Signal::TERM).expect("it runs");
    let ended = running.end(SOON).expect("it ends without the daemon's answer");
    assert_eq!(ended.code(), 0, "{}", ended.stderr);
    // Both images are free, and good.
    disks.iter().for_each(|disk| drop(succeed("job=verify ops=200 depth=4", &["--disk", disk])));
}

#[test]
fn a_stopped_daemon_of_somebody_else_keeps_no_end_waiting() {
    if !ready() {
        return;
    }
    let folder = TempDir::new_in(paths::target()).expect("the target folder is writable");
    let socket = folder.path().join("disk.sock").display().to_string();
    let image = image(64);
    let option = format!("path={},queues=2", image.path().display());
    let mut daemon = native::daemon("ringvm-blk", ["--socket", &socket, "--disk", &option])
        .and_then(native::RingVm::start)
        .expect("the daemon starts");
    daemon.expect_said(" is ready at ", 1, LIMIT).expect("the daemon comes up");
    let running = writing(&[&format!("socket={socket},queues=2")]);
    daemon.signal(Signal::STOP).expect("it runs");
    running.signal(Signal::TERM).expect("it runs");
    let ended = running.end(SOON).expect("it ends without the daemon's answer");
    assert_eq!(ended.code(), 0, "{}", ended.stderr);
    daemon.signal(Signal::CONT).expect("it runs");
    daemon.signal(Signal::TERM).expect("it runs");
    assert_eq!(daemon.end(LIMIT).expect("it ends").code(), 0);
}

#[test]
fn a_stopped_daemon_is_replaced_when_the_guest_resets_its_disk() {
    if !ready() {
        return;
    }
    let image = image(64);
    let job = "job=reset until=told rounds=20 time=50ms depth=16 ops=2000 stall=60s";
    let mut running = guest(job, &["--disk", &disk(&image, Place::Daemon, "queues=2")]).start().expect("it starts");
    running.expect("ringvm-guest: start job=", LIMIT).expect("the guest comes up");
    let daemon = child_after(running.pid(), 0, LIMIT).expect("a daemon is started");
    send(daemon, Signal::STOP);
    child_after(running.pid(), daemon, LIMIT).expect("another daemon is started");
    running.expect_said(" is back", 1, LIMIT).expect("it serves the disk");
    running.tell_enough().expect("the guest works");
    let ended = running.end(LIMIT).expect("it ends");
    assert_success(&ended);
    assert!(figure(&ended.stdout, "abandoned") > 0, "{}", ended.stdout);
}

#[test]
fn a_daemon_does_not_outlive_a_ringvm_that_is_killed() {
    if !ready() {
        return;
    }
    let image = image(64);
    let running = writing(&[&disk(&image, Place::Daemon, "queues=2")]);
    let daemon = child_after(running.pid(), 0, LIMIT).expect("a daemon is started");
    // One that hangs does not notice that its connection has ended.
    send(daemon, Signal::STOP);
    assert_eq!(children(running.pid()), [daemon]);
    running.signal(Signal::KILL).expect("it runs");
    assert_eq!(running.end(LIMIT).expect("it ends").code(), 128 + 9);
    let deadline = std::time::Instant::now() + LIMIT;
    while native::is_alive(daemon) {
        assert!(std::time::Instant::now() < deadline, "the daemon lives on");
        sleep(Duration::from_millis(5));
    }
    succeed("job=verify ops=200 depth=4", &["--disk", &disk(&image, Place::Daemon, "queues=2")]);
}
