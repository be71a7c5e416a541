//! A budget for the log: what a guest, a client or a daemon can cause as often as it likes must not fill a disk, nor keep the thread
//! that writes it from its work.
//!
//! Every place in the code that logs has a bucket of its own, so that one that floods does not hide the others, and the number
//! of lines of the whole process is bounded. What is logged for `-vv` was asked for, and is not held back.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// Lines that a place may log in a row: more than an operator reads, less than a disk notices.
const BURST: u32 = 1000;
/// The time after which it may log one more.
const REFILL: Duration = Duration::from_millis(500);

/// Holds back lines of places that log too much.
#[derive(Debug, Default)]
pub(super) struct LogBudget {
    buckets: Mutex<HashMap<Identifier, Bucket>>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// Lines that may still be logged.
    left: u32,
    /// When the last one of those was added.
    filled: Instant,
    held_back: u64,
}

/// What becomes of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    Logged,
    /// After so many of its kind that were not.
    LoggedAfter(u64),
    /// The last of its kind for a while.
    LoggedAsLast,
    HeldBack,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self { left: BURST, filled: now, held_back: 0 }
    }

    fn take(&mut self, now: Instant) -> Line {
        let periods = now.saturating_duration_since(self.filled).as_millis() / REFILL.as_millis();
        let more = u32::try_from(periods).unwrap_or(u32::MAX).min(BURST);
        self.filled += REFILL * more;
        self.left = (self.left + more).min(BURST);
        if self.left == BURST {
            self.filled = now;
        }
        if self.left == 0 {
            self.held_back += 1;
            return Line::HeldBack;
        }
        self.left -= 1;
        match std::mem::take(&mut self.held_back) {
            0 if self.left == 0 => Line::LoggedAsLast,
            0 => Line::Logged,
            count => Line::LoggedAfter(count),
        }
    }
}

impl<S: Subscriber> Layer<S> for LogBudget {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let about = event.metadata();
        if *about.level() > Level::INFO {
            return true;
        }
        let now = Instant::now();
        let line = {
            let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
            buckets.entry(about.callsite()).or_insert_with(|| Bucket::new(now)).take(now)
        };
        let mut note = String::new();
        // Writing to a string does not fail.
        let _ = match line {
            Line::Logged => Ok(()),
            Line::LoggedAfter(count) => writeln!(note, "{count} lines like the next one were held back"),
            Line::LoggedAsLast => {
                writeln!(note, "the next line repeats without end, most of its kind are held back from here on")
            }
            Line::HeldBack => return false,
        };
        // Nobody can be told that standard error is closed.
        let _ = io::stderr().write_all(note.as_bytes());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_off_says_so_and_is_counted() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        let lines: Vec<_> = (0..10 * BURST).map(|_| bucket.take(start)).collect();
        let (logged, held_back) = lines.split_at(BURST as usize);
        let (last, first) = logged.split_last().unwrap();
        assert!(first.iter().all(|line| *line == Line::Logged));
        assert_eq!(*last, Line::LoggedAsLast);
        assert!(held_back.iter().all(|line| *line == Line::HeldBack));
        assert_eq!(bucket.take(start + REFILL), Line::LoggedAfter(9 * u64::from(BURST)));
        assert_eq!(bucket.take(start + REFILL), Line::HeldBack);
        let later = start + REFILL * 1_000_000;
        assert_eq!(bucket.take(later), Line::LoggedAfter(1));
        let burst = (0..10 * BURST).filter(|_| bucket.take(later) != Line::HeldBack).count();
        assert_eq!(burst, BURST as usize - 1, "no more than a burst");
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_nothing() {
        let start = Instant::now() + REFILL * 10;
        let mut bucket = Bucket::new(start);
        assert!((0..BURST).all(|_| bucket.take(start) != Line::HeldBack));
        assert_eq!(bucket.take(start - REFILL), Line::HeldBack);
        assert_eq!(bucket.take(start), Line::HeldBack);
    }

    #[test]
    fn one_place_that_floods_does_not_silence_another() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicUsize, Ordering};
        use tracing_subscriber::layer::SubscriberExt as _;

        struct Count(Arc<AtomicUsize>);
        impl<S: Subscriber> Layer<S> for Count {
            fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let count = Arc::new(AtomicUsize::new(0));
        let log = tracing_subscriber::registry().with(LogBudget::default()).with(Count(Arc::clone(&count)));
        tracing::subscriber::with_default(log, || {
            (0..10_000).for_each(|index| tracing::warn!(index, "the guest does it again"));
            let flood = count.swap(0, Ordering::Relaxed);
            assert!((BURST as usize..2 * BURST as usize).contains(&flood), "{flood}");
            tracing::warn!("something else");
            (0..10_000).for_each(|index| tracing::debug!(index, "asked for"));
            assert_eq!(count.load(Ordering::Relaxed), 10_001);
        });
    }
}
