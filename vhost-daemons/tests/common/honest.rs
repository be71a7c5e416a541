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
    state: Arc<State>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    ends: AtomicBool,
    /// Blocks that were written, read and compared.
    rounds: AtomicU64,
    /// The longest of them in nanoseconds.
    longest: AtomicU64,
}

impl Honest {
    /// Connects, and writes, reads and compares until it is told to end.
    pub(crate) fn connect(socket: &Path) -> Self {
        let (client, memory, mut ring) = running(socket);
        let state = Arc::<State>::default();
        let own = Arc::clone(&state);
        let thread = std::thread::spawn(move || {
            while !own.ends.load(Ordering::Acquire) {
                let start = Instant::now();
                ring.works(own.rounds.load(Ordering::Relaxed) as u8);
                own.longest.fetch_max(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
                own.rounds.fetch_add(1, Ordering::Release);
            }
            drop((client, memory, ring));
        });
        Self { state, thread }
    }

    /// Waits until it has been served some more.
    ///
    /// # Panics
    /// When it is not, or a request of it went wrong.
    pub(crate) fn is_served(&self) {
        let before = self.state.rounds.load(Ordering::Acquire);
        wait("the honest tenant to be served", || {
            assert!(!self.thread.is_finished(), "the honest tenant's request went wrong");
            // One may have begun before.
            self.state.rounds.load(Ordering::Acquire) >= before + 2
        });
    }

    /// The longest time that a write and a read took since this was asked last.
    pub(crate) fn longest(&self) -> Duration {
        Duration::from_nanos(self.state.longest.swap(0, Ordering::Relaxed))
    }

    /// Ends it, and returns how long it waited at most since that was asked last.
    pub(crate) fn end(self) -> Duration {
        self.state.ends.store(true, Ordering::Release);
        self.thread.join().expect("every request of the honest tenant was served");
        Duration::from_nanos(self.state.longest.load(Ordering::Relaxed))
    }
}
