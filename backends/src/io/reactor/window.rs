//! How long an I/O thread polls before it parks.
//!
//! Polling works like halt polling of a hypervisor: the window grows when work came soon after the last was done and
//! shrinks when it did not, so an idle queue costs nothing and a busy one causes no kicks, wake-ups or context
//! switches.

use std::time::Duration;

/// How long to poll before parking.
#[derive(Debug)]
pub(super) struct Window {
    pub(super) current: Duration,
    pub(super) max: Duration,
    /// Polls in a row that ended in vain.
    misses: u32,
    /// Wake-ups to let pass before polling is tried again.
    pause: u32,
    /// The next such pause.
    next_pause: u32,
}

/// The shortest window worth having.
const MIN_WINDOW: Duration = Duration::from_micros(4);
/// This many polls in vain, each of which should have met its work, mean that polling keeps the guest from running.
const MAX_MISSES: u32 = 4;
const MIN_PAUSE: u32 = 16;
const MAX_PAUSE: u32 = 2048;

impl Window {
    pub(super) fn new(max: Duration) -> Self {
        // With one CPU the guest can't make anything available while we poll.
        let alone = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
        let max = if alone { Duration::ZERO } else { max };
        Self { current: Duration::ZERO, max, misses: 0, pause: 0, next_pause: MIN_PAUSE }
    }

    /// Polling met work.
    pub(super) fn hit(&mut self) {
        self.misses = 0;
        self.next_pause = MIN_PAUSE;
    }

    /// Polling was in vain.
    pub(super) fn missed(&mut self) {
        self.misses += 1;
        if self.misses >= MAX_MISSES {
            self.misses = 0;
            self.current = Duration::ZERO;
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(MAX_PAUSE);
        }
    }

    /// A wake-up brought work this long after the last was done: would polling have met it?
    pub(super) fn woken(&mut self, idle: Duration) {
        if self.pause > 0 {
            self.pause -= 1;
        } else if idle <= self.max {
            self.current = (idle * 2).clamp(MIN_WINDOW.min(self.max), self.max);
        } else if self.current > MIN_WINDOW {
            self.current /= 2;
        } else {
            self.current = Duration::ZERO;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(50);

    fn window() -> Window {
        Window { current: Duration::ZERO, max: MAX, misses: 0, pause: 0, next_pause: MIN_PAUSE }
    }

    #[test]
    fn polling_starts_when_work_comes_soon_and_ends_when_it_does_not() {
        let mut window = window();
        window.woken(Duration::from_millis(5));
        assert_eq!(window.current, Duration::ZERO);
        window.woken(Duration::from_micros(15));
        assert_eq!(window.current, Duration::from_micros(30));
        window.woken(Duration::from_micros(49));
        assert_eq!(window.current, MAX);
        for _ in 0..8 {
            window.woken(Duration::from_millis(5));
        }
        assert_eq!(window.current, Duration::ZERO, "an idle queue costs nothing");
    }

    #[test]
    fn polling_in_vain_is_given_up_for_longer_each_time() {
        let mut window = window();
        let mut polls = 0;
        for _ in 0..10_000 {
            // The work always comes just after the poll, as when poller and guest share a CPU.
            if window.current > Duration::ZERO {
                polls += 1;
                window.missed();
            }
            window.woken(Duration::from_micros(20));
        }
        assert!(polls < 100, "{polls} polls in vain");
        window.pause = 0;
        window.woken(Duration::from_micros(20));
        assert!(window.current > Duration::ZERO);
        window.hit();
        assert_eq!((window.misses, window.next_pause), (0, MIN_PAUSE), "one hit and it is worth it again");
    }

    #[test]
    fn no_polling_when_told_so() {
        let mut window = Window::new(Duration::ZERO);
        window.woken(Duration::ZERO);
        assert_eq!(window.current, Duration::ZERO);
    }
}
