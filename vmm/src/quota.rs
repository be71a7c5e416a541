//! Warnings that a guest can cause as often as it likes, of which only the first are shown.

use std::sync::atomic::{AtomicU32, Ordering};

/// How many are shown.
const SHOWN: u32 = 10;

/// Counts the warnings of one device.
#[derive(Debug, Default)]
pub struct Quota(AtomicU32);

impl Quota {
    /// Whether one more is to be shown; says so when it is the last.
    pub fn take(&self, device: &str) -> bool {
        // Saturates in practice: nobody waits for 2^32 warnings, and the worst is to show ten more.
        let count = self.0.fetch_add(1, Ordering::Relaxed);
        if count + 1 == SHOWN {
            tracing::warn!(device, "its guest causes many warnings; this is the last of them that is shown");
        }
        count < SHOWN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_are_shown() {
        let quota = Quota::default();
        assert_eq!((0..1000).filter(|_| quota.take("disk0")).count(), SHOWN as usize);
    }
}
