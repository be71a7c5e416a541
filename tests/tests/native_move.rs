//! A running disk changes its place, between `ringvm` and a daemon, under a guest that verifies.

use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use ringvm_tests::embedded::{assert_success, disk, figure, guest, image, ready};
use ringvm_tests::host::say;
use ringvm_tests::moves::{tell_fifty, there_and_back};
use ringvm_tests::native::{Ended, Place, Running, children, random, send};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(60);
const JOB_LIMIT: Duration = Duration::from_secs(300);

/// Pauses are measured here, so one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// A guest that verifies over two queues until [`end_well`], and has begun.
fn verifying(disk: &str, words: &str) -> Running {
    let job = format!("job=verify queues=2 depth=32 until=told {words}");
    let mut running = guest(&job, &["--disk", disk]).start().expect("it starts");
    running.expect("ringvm-guest: start job=verify", LIMIT).expect("the guest comes up");
    running
}

/// Lets a guest come to the end of its job, which must go well.
fn end_well(mut running: Running) -> Ended {
    running.tell_enough().expect("the guest works");
    let ended = running.end(JOB_LIMIT).expect("it ends");
    assert_success(&ended);
    assert!(figure(&ended.stdout, "sectors_checked") > 0, "{}", ended.stdout);
    ended
}

#[test]
fn a_disk_moves_fifty_times_there_and_back_under_verified_load() {
    if !ready() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // A move waits for what can't be cancelled. The first load has much in flight that takes a file system long: a discard or
    // a write-zeroes is a sixth of its requests. The cache stays as it is: a write through it is a flush as well.
    let plain = "config_wce=0 discard=0 write_zeroes=0";
    for (words, options) in [
        ("config_wce=0".to_owned(), "queues=2"),
        (plain.to_owned(), "queues=2"),
        (format!("max=32768 irq=1 {plain}"), "queues=2,direct=on"),
    ] {
        let image = image(64);
        say(&format!("job=verify queues=2 depth=32 {words}, {options}:"));
        let mut running = verifying(&disk(&image, Place::Process, options), &words);
        there_and_back(&mut running, LIMIT);
        let ended = end_well(running);
        tell_fifty(&ended.stderr);
    }
}

#[test]
fn a_disk_moves_while_its_daemon_is_killed() {
    if !ready() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let image = image(64);
    let mut running = verifying(&disk(&image, Place::Process, "queues=2"), "");
    let (mut moved, mut stayed) = (0, 0);
    for count in 1..=80 {
        // Before, during or behind the move.
        running.signal(Signal::USR2).expect("it runs");
        sleep(random(Duration::from_millis(12)));
        children(running.pid()).into_iter().for_each(|daemon| send(daemon, Signal::KILL));
        running.expect_said_any(&[": moved to ", "it stays where it is"], count, LIMIT).expect("each move ends");
        let said = running.said();
        (moved, stayed) = (said.matches(": moved to ").count(), said.matches("it stays where it is").count());
    }
    say(&format!("80 moves with a kill each: {moved} moved, {stayed} stayed"));
    assert!(moved > 0, "some moves arrive");
    end_well(running);
}
