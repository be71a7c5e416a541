//! A disk whose storage answers no more drains for ever. Meanwhile the guest's other vCPUs reach every configuration space, the
//! operator gets statistics and moves other disks, and the end of the machine comes in time.

use std::time::{Duration, Instant};

use ringvm_tests::embedded::{disk, guest, image, ready};
use ringvm_tests::host::{Need, need};
use ringvm_tests::native::{Place, Running};
use ringvm_tests::stuck_disk::StuckDisk;
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(120);
/// Far above what an answer takes, and far below the time that the disk would need.
const SOON: Duration = Duration::from_secs(20);
/// Of the statistics of the other disk, once in each.
const STATISTICS: &str = "disk0: read: 64 operations";
/// Something was given up.
const GAVE_UP: i32 = 3;

/// Times what follows a signal.
fn answer(running: &mut Running, signal: Signal, text: &str, count: usize) -> Duration {
    let begun = Instant::now();
    running.signal(signal).expect("it runs");
    running.expect_said(text, count, SOON).expect("it is answered while the disk drains");
    begun.elapsed()
}

fn while_a_disk_drains(place: Place) {
    if !ready() || !need(Need::Fuse) {
        return;
    }
    let (image, stuck) = (image(64), StuckDisk::new().expect("FUSE works"));
    let drained = format!("path={},{}", stuck.path().display(), place.option());
    let options = ["--cpus", "2", "--disk", &disk(&image, Place::Process, "queues=1"), "--disk", &drained];
    let options = [&options[..], &["--stop-timeout", "5"]].concat();
    let mut running = guest("job=read disk=0 ops=64 job=drained disk=1", &options).start().expect("it starts");
    running.expect("watched resetting=0", LIMIT).expect("the guest reads the disk");
    stuck.stick();
    running.expect_count("watched resetting=1", 4, LIMIT).expect("configuration spaces are read while it drains");

    let statistics = answer(&mut running, Signal::USR1, STATISTICS, 1);
    // Disk 1 is asked to move as well, and may stay silent.
    let moved = answer(&mut running, Signal::USR2, "disk0: moved to a daemon", 1);
    let again = answer(&mut running, Signal::USR1, STATISTICS, 2);
    running.expect_count("watched resetting=1", 8, LIMIT).expect("and while others move");

    let begun = Instant::now();
    running.signal(Signal::TERM).expect("it runs");
    let ended = running.end(SOON).expect("it ends, whatever drains");
    let end = begun.elapsed();
    assert_eq!(ended.code(), GAVE_UP, "{}", ended.stderr);
    let longest = ended.stdout.lines().filter(|line| line.contains("watched resetting=1"));
    let longest = longest.filter_map(|line| line.split("longest_us=").nth(1)?.trim().parse::<u64>().ok()).max();
    let longest = Duration::from_micros(longest.expect("accesses were timed"));
    eprintln!(
        "{place:?}: the longest access to a configuration space took {longest:?}; statistics {statistics:?}, later {again:?}; \
         a move of the other disk {moved:?}; the end {end:?}"
    );
    assert!(longest < SOON);
}

#[test]
fn a_disk_that_drains_for_ever_delays_no_answer() {
    while_a_disk_drains(Place::Process);
}

#[test]
fn a_disk_that_drains_for_ever_in_a_daemon_delays_no_answer() {
    while_a_disk_drains(Place::Daemon);
}
