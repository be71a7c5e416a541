//! Notification suppression (virtio 1.3, sections 2.7.7 and 2.7.10): when a side that may be asleep has to be woken.
//!
//! The waiting side writes its wish and then looks once more whether an entry has come; the publishing side publishes
//! and then looks whether a wake-up is wanted. With a full barrier between the two steps on both sides, at least one
//! of them sees what the other wrote: no kick and no interrupt is lost. The steps are generic over the words of the
//! ring, so that a model can run them through every interleaving that the memory model allows; in a queue they are
//! plain loads and stores.

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;

/// The words of a ring by which driver and device wake each other.
pub(super) trait Words {
    /// `flags` of the available ring, the driver's.
    fn avail_flags(&self) -> u16;
    /// `idx` of the available ring, with all that was written before it.
    fn avail_index(&self) -> u16;
    /// `used_event`, the driver's.
    fn used_event(&self) -> u16;
    /// `flags` of the used ring, the device's.
    fn set_used_flags(&self, flags: u16);
    /// `avail_event`, the device's.
    fn set_avail_event(&self, index: u16);
    /// A full barrier: stores before it are visible before any load after it.
    fn fence(&self);
}

/// Whether the driver is to be interrupted for the entries from `old` up to `new` of the used ring, which were just published.
#[inline(always)]
pub(super) fn wants_interrupt(words: &impl Words, event_idx: bool, old: u16, new: u16) -> bool {
    // The index must be visible before the driver's wish is read (2.7.10.1), else both sides may go to sleep.
    words.fence();
    if event_idx {
        // The driver waits for an entry in [old, new).
        new.wrapping_sub(words.used_event()).wrapping_sub(1) < new.wrapping_sub(old)
    } else {
        u32::from(words.avail_flags()) & VRING_AVAIL_F_NO_INTERRUPT == 0
    }
}

/// Asks the driver for a kick at entry `next` of the available ring. Returns whether it has come in the meantime.
#[inline(always)]
pub(super) fn ask_for_kick(words: &impl Words, event_idx: bool, next: u16) -> bool {
    if event_idx {
        words.set_avail_event(next);
    } else {
        words.set_used_flags(0);
    }
    // The wish must be visible before the index is read once more (2.7.10.1), else a kick is lost.
    words.fence();
    words.avail_index() != next
}

#[cfg(test)]
#[path = "suppression_tests.rs"]
mod tests;
