//! A running NIC changes its place, between `ringvm` and a daemon, under a guest that counts what it echoes.
//!
//! The frames have numbers. A move may lose none and double none: what the guest has sent is in its ring until the port has taken
//! it, what the port holds waits there for whoever serves the NIC next, and what was read is in the guest's buffers. The port is a
//! pair of sockets that makes a sender wait. A tap drops what overflows its queue during a pause, as it does whenever a reader is slow.

use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use ringvm_tests::embedded::{assert_success, figure, guest, net, ready};
use ringvm_tests::host::say;
use ringvm_tests::moves::{tell_fifty, there_and_back};
use ringvm_tests::native::{Ended, Place, Running, children, random, send};
use ringvm_tests::paths;
use rustix::process::Signal;
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(120);
const JOB_LIMIT: Duration = Duration::from_secs(300);

/// Pauses are measured here, so one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// A guest that echoes until [`end`], and has begun.
fn echoing(port: &str, words: &str) -> Running {
    let job = format!("job=net-echo until=told stall=60s {words}");
    paths::daemon("ringvm-net").expect("the daemon is built");
    let mut running = guest(&job, &["--net", port, "--cpus", "2"]).start().expect("it starts");
    running.expect("ringvm-guest: start job=net-echo", LIMIT).expect("the guest comes up");
    running
}

/// Tells a guest that it is enough, and says what it has counted.
fn end(mut running: Running) -> Ended {
    running.tell_enough().expect("the guest works");
    let ended = running.end(JOB_LIMIT).expect("it ends");
    assert_success(&ended);
    let count = |key| figure(&ended.stdout, key);
    let (frames, lost, twice) = (count("frames"), count("lost"), count("twice"));
    say(&format!("  {frames} frames came back, {lost} were lost, {twice} came twice, {} overtook", count("reordered")));
    assert!(frames > 0, "{}", ended.stdout);
    ended
}

fn assert_none_lost(ended: &Ended) {
    for key in ["lost", "twice", "reordered", "corrupted"] {
        assert_eq!(figure(&ended.stdout, key), 0, "{key} in {}{}", ended.stdout, ended.stderr);
    }
}

#[test]
fn a_nic_moves_fifty_times_there_and_back_and_no_frame_is_lost_or_doubled() {
    if !ready() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for (words, options) in [
        ("size=random", "queues=1"),
        // The guest has set the number of pairs over the control queue.
        ("size=random pairs=2 cpus=2", "queues=2"),
        ("size=60 irq=1", "queues=1,queue-size=64"),
        ("jumbo=1 bs=1024 depth=256", "queues=1"),
    ] {
        say(&format!("job=net-echo {words}, {options}:"));
        let mut running = echoing(&net(&format!("loopback=on,{options}"), Place::Process), words);
        there_and_back(&mut running, LIMIT);
        let ended = end(running);
        tell_fifty(&ended.stderr);
        assert_none_lost(&ended);
    }
}

#[test]
fn a_nic_that_begins_in_a_daemon_moves_too() {
    if !ready() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut running = echoing(&net("loopback=on,queues=2", Place::Daemon), "pairs=2 cpus=2");
    for count in 1..=5 {
        running.signal(Signal::USR2).expect("it runs");
        running.expect_said(": moved to ", count, LIMIT).expect("it moves");
    }
    assert!(children(running.pid()).is_empty(), "it is in the process, and no daemon is left");
    assert_none_lost(&end(running));
}

#[test]
fn a_side_of_a_link_moves_and_its_peer_notices_nothing() {
    if !ready() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = TempDir::new_in(paths::target()).expect("the target folder is writable");
    paths::daemon("ringvm-net").expect("the daemon is built");
    let net = net(&format!("link={},queues=2", folder.path().join("link").display()), Place::Process);
    let start = |role: &str| {
        let job = format!("job=net-peer role={role} pairs=2 frames=500000 stall=60s");
        guest(&job, &["--net", &net]).start().expect("it starts")
    };
    let (mut moving, other) = (start("a"), start("b"));
    moving.expect("start job=net-peer", LIMIT).expect("the guest comes up");
    let mut moves = 0;
    while !moving.shown().contains(": result ") && moves < 40 {
        sleep(random(Duration::from_millis(20)));
        moves += 1;
        moving.signal(Signal::USR2).expect("it runs");
        if moving.expect_said(": moved to ", moves, LIMIT).is_err() {
            // It has done its job, and is on its way out.
            break;
        }
    }
    for running in [moving, other] {
        let ended = running.end(JOB_LIMIT).expect("it ends");
        assert_success(&ended);
        assert_eq!(figure(&ended.stdout, "frames"), 500_000, "{}", ended.stdout);
        assert_none_lost(&ended);
    }
    say(&format!("a side of a link moved {moves} times"));
}

#[test]
fn a_nic_moves_while_its_daemon_is_killed() {
    if !ready() {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut running = echoing(&net("loopback=on", Place::Process), "");
    let (mut moved, mut stayed) = (0, 0);
    for count in 1..=40 {
        if count % 4 == 0 {
            // A daemon that was killed before is back by then, if the machine is not too busy. It lives through this move.
            sleep(Duration::from_millis(500));
        }
        // Before, during or after the move.
        running.signal(Signal::USR2).expect("it runs");
        sleep(random(Duration::from_millis(12)));
        if count % 4 != 0 {
            children(running.pid()).into_iter().for_each(|daemon| send(daemon, Signal::KILL));
        }
        running.expect_said_any(&[": moved to ", "it stays where it is"], count, LIMIT).expect("each move ends");
        let said = running.said();
        (moved, stayed) = (said.matches(": moved to ").count(), said.matches("it stays where it is").count());
    }
    say(&format!("40 moves, three in four with a kill: {moved} moved, {stayed} stayed"));
    assert!(moved > 0, "some moves arrive");
    // A daemon that is killed between taking a frame and saying so leaves it to its successor, who sends it again; one that has
    // read a frame and not said so has it lost.
    end(running);
}
