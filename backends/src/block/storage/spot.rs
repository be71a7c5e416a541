//! Writes to the page cache that are done on the spot, by the I/O thread itself.
//!
//! Many file systems can't tell beforehand whether a buffered write would have to wait, so io_uring hands each one to
//! a worker of the kernel, at several times the cost of the write. Nearly all of them only copy. A write that does
//! wait, for a page to be read or because too many are dirty, holds up every queue of its thread. So after a slow one
//! the next writes go through the ring, more of them each time.

use std::time::Duration;

/// Longest write, in bytes: a copy of it delays others by no more than a few of theirs.
pub(super) const LONGEST: u64 = 64 << 10;
/// A write that took longer has waited.
const SLOW: Duration = Duration::from_micros(500);
const FIRST_PAUSE: u32 = 32;
const LAST_PAUSE: u32 = 4096;
/// After this many quick ones in a row, the last slow one is forgotten.
const FORGET: u32 = 1024;

/// Whether the next write is done on the spot.
#[derive(Clone, Debug)]
pub(super) struct Spot {
    /// Number of writes that still go through the ring.
    pause: u32,
    next_pause: u32,
    quick: u32,
}

impl Spot {
    pub(super) fn new() -> Self {
        Self { pause: 0, next_pause: FIRST_PAUSE, quick: 0 }
    }

    /// Asked once for each write.
    pub(super) fn is_next(&mut self) -> bool {
        let next = self.pause == 0;
        self.pause = self.pause.saturating_sub(1);
        next
    }

    /// One was done, in this time.
    pub(super) fn took(&mut self, time: Duration) {
        if time > SLOW {
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(LAST_PAUSE);
            self.quick = 0;
        } else if self.next_pause > FIRST_PAUSE {
            self.quick += 1;
            if self.quick >= FORGET {
                (self.next_pause, self.quick) = (FIRST_PAUSE, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_slow_write_others_go_through_the_ring_more_of_them_each_time_until_it_is_forgotten() {
        let mut spot = Spot::new();
        let through_the_ring = |spot: &mut Spot| {
            let mut count = 0;
            while !spot.is_next() {
                count += 1;
            }
            count
        };
        assert_eq!(through_the_ring(&mut spot), 0);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            spot.took(SLOW * 2);
            pauses.push(through_the_ring(&mut spot));
        }
        assert_eq!(pauses, [32, 64, 128, 256, 512, 1024, 2048, 4096, 4096]);
        (0..FORGET).for_each(|_| spot.took(SLOW));
        assert_eq!(through_the_ring(&mut spot), 0);
        spot.took(SLOW * 2);
        assert_eq!(through_the_ring(&mut spot), FIRST_PAUSE);
    }
}
