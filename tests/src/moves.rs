//! What `ringvm` says of devices that move between it and a daemon.

use std::thread::sleep;
use std::time::Duration;

use rustix::process::Signal;

use crate::host::say;
use crate::native::{Running, children, random};

/// The pauses of the moves to a place, in microseconds.
fn pauses(said: &str, place: &str) -> Vec<u64> {
    let moves = said.lines().filter_map(|line| line.split_once(&format!(": moved to {place}, nobody served it for ")));
    let pauses = moves.map(|(_, rest)| rest.strip_suffix(" us").and_then(|number| number.parse().ok()));
    pauses.map(|pause| pause.unwrap_or_else(|| panic!("a pause that is no number in {said}"))).collect()
}

/// Says how long the pauses of the moves to a place were.
fn tell(place: &str, mut pauses: Vec<u64>) {
    say(&format!("pauses of {} moves to {place}, us: {pauses:?}", pauses.len()));
    pauses.sort_unstable();
    let median = pauses.get(pauses.len() / 2).copied().unwrap_or_default();
    say(&format!("  median {median}, longest {}", pauses.last().copied().unwrap_or_default()));
}

/// Moves the one device of a machine fifty times to a daemon and back, at any moment. Nothing of a move may stay.
///
/// # Panics
/// When a move does not come, or leaves something behind.
pub fn there_and_back(running: &mut Running, limit: Duration) {
    let mut early = None;
    for count in 1..=100 {
        sleep(random(Duration::from_millis(10)));
        running.signal(Signal::USR2).expect("it runs");
        running.expect_said(": moved to ", count, limit).expect("it moves");
        if count == 20 {
            early = Some(running.holdings());
        }
    }
    running.holdings().assert_flat(&early.expect("twenty is less than a hundred"));
    assert!(children(running.pid()).is_empty(), "it is back in the process, and no daemon is left");
}

/// Says how long the pauses of [`there_and_back`] were.
///
/// # Panics
/// When there were not fifty each way.
pub fn tell_fifty(stderr: &str) {
    let (there, back) = (pauses(stderr, "a daemon"), pauses(stderr, "this process"));
    assert_eq!((there.len(), back.len()), (50, 50), "{stderr}");
    tell("a daemon", there);
    tell("the process", back);
}
