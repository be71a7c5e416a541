//! A tenant that does nothing wrong: its requests are verified, and timed, while somebody attacks the process that serves it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::client::running;
use super::wait;

/// A tenant under load.
pub(crate) struct Honest {
    ends: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<Duration>,
}

impl Honest {
    /// Connects, and writes, reads and compares until it is told to end.
    pub(crate) fn connect(socket: &Path) -> Self {
        let (client, memory, mut ring) = running(socket);
        let (ends, rounds) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (told, counted) = (Arc::clone(&ends), Arc::clone(&rounds));
        let thread = std::thread::spawn(move || {
            let mut longest = Duration::ZERO;
            while !told.load(Ordering::Acquire) {
                let start = Instant::now();
                ring.works(counted.load(Ordering::Relaxed) as u8);
                longest = longest.max(start.elapsed());
                counted.fetch_add(1, Ordering::Release);
            }
            drop((client, memory, ring));
            longest
        });
        Self { ends, rounds, thread }
    }

    /// Waits until it has been served some more.
    ///
    /// # Panics
    /// When it is not, or a request of it went wrong.
    pub(crate) fn is_served(&self) {
        let before = self.rounds.load(Ordering::Acquire);
        wait("the honest tenant to be served", || {
            assert!(!self.thread.is_finished(), "the honest tenant's request went wrong");
            // One may have begun before.
            self.rounds.load(Ordering::Acquire) >= before + 2
        });
    }

    /// Ends it, and returns how long it waited at most for a write and a read.
    pub(crate) fn end(self) -> Duration {
        self.ends.store(true, Ordering::Release);
        self.thread.join().expect("every request of the honest tenant was served")
    }
}
