//! What `ringvm` says of devices that move between it and a daemon.

use crate::host::say;

/// The pauses of the moves to a place, in microseconds.
///
/// # Panics
/// When one is no number.
pub fn pauses(said: &str, place: &str) -> Vec<u64> {
    let moves = said.lines().filter_map(|line| line.split_once(&format!(": moved to {place}, nobody served it for ")));
    let pauses = moves.map(|(_, rest)| rest.strip_suffix(" us").and_then(|number| number.parse().ok()));
    pauses.map(|pause| pause.unwrap_or_else(|| panic!("a pause that is no number in {said}"))).collect()
}

/// Says how long the pauses of the moves to a place were.
pub fn tell(place: &str, mut pauses: Vec<u64>) {
    say(&format!("pauses of {} moves to {place}, us: {pauses:?}", pauses.len()));
    pauses.sort_unstable();
    let median = pauses.get(pauses.len() / 2).copied().unwrap_or_default();
    say(&format!("  median {median}, longest {}", pauses.last().copied().unwrap_or_default()));
}
