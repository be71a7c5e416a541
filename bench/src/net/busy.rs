//! Threads that poll as a guest's vCPUs do, without a guest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// What the threads are called.
const NAME: &str = "busy";

/// Does the work while so many threads keep CPUs busy.
pub fn beside<T>(threads: u16, work: impl FnOnce() -> T) -> T {
    /// Ends the threads even if the work panics: the scope waits for them.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let _stop = Stop(&over);
        for _ in 0..threads {
            let spin = || {
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            };
            // A host that has no thread left says so soon enough.
            let _ = thread::Builder::new().name(NAME.to_owned()).spawn_scoped(scope, spin);
        }
        work()
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::process::threads_time;

    #[test]
    fn cpus_are_busy_meanwhile_and_free_afterwards() {
        let used = || threads_time(std::process::id(), |name| name == NAME).unwrap();
        let result = beside(2, || {
            let enough = Duration::from_millis(10);
            (0..2_000).any(|_| {
                thread::sleep(Duration::from_millis(10));
                used() >= enough
            })
        });
        assert!(result, "no CPU is busy");
        let died = std::panic::catch_unwind(|| beside(1, || panic!("as it should")));
        assert!(died.is_err());
    }
}
