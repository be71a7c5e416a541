//! A split virtqueue from the driver's side. It knows descriptors and rings, and nothing of what they carry.
//! Virtio 1.3, sections 2.6 and 2.7.

use core::sync::atomic::{Ordering, fence};

use crate::machine::mem::{self, Region};

/// Bytes of one descriptor.
pub const DESCRIPTOR: usize = 16;
/// VIRTQ_DESC_F_NEXT.
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE: the device writes.
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT.
pub const INDIRECT: u16 = 4;

const IDX: usize = 2;
const RING: usize = 4;
const USED_ELEMENT: usize = 8;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
/// How far `used_event` is kept from `used.idx` while no interrupt is wanted, and how often it is moved on.
const FAR: u16 = 0x8000;
const REFRESH: u16 = 0x2000;

/// The three areas of a queue in memory.
#[derive(Clone, Copy)]
pub struct Layout {
    /// Queue size.
    pub size: u16,
    /// Descriptor area.
    pub desc: Region,
    /// Driver area: flags, idx, ring[size], used_event.
    pub avail: Region,
    /// Device area: flags, idx, ring[size] of id and len, avail_event.
    pub used: Region,
}

impl Layout {
    /// Takes zeroed memory for a queue of this size.
    pub fn new(size: u16) -> Self {
        let entries = usize::from(size);
        // Each on pages of its own: what the driver writes and what the device writes share no cache line.
        Self {
            size,
            desc: mem::dma(entries * DESCRIPTOR, 4096),
            avail: mem::dma(RING + entries * 2 + 2, 4096),
            used: mem::dma(RING + entries * USED_ELEMENT + 2, 4096),
        }
    }

    fn used_event(&self) -> usize {
        RING + usize::from(self.size) * 2
    }

    fn avail_event(&self) -> usize {
        RING + usize::from(self.size) * USED_ELEMENT
    }
}

/// Writes the descriptor `index` of a table: the queue's own or an indirect one.
#[inline(always)]
pub fn write_descriptor(table: Region, index: u16, address: usize, len: u32, flags: u16, next: u16) {
    let at = usize::from(index) * DESCRIPTOR;
    table.write(at, address as u64);
    table.write(at + 8, len);
    table.write(at + 12, u32::from(flags) | u32::from(next) << 16);
}

/// A queue that the device serves.
pub struct Queue {
    /// Its number.
    pub index: u16,
    /// Its memory.
    pub layout: Layout,
    /// How often the device was notified.
    pub kicks: u64,
    doorbell: Region,
    event_idx: bool,
    avail_idx: u16,
    published: u16,
    used_idx: u16,
    quiet_until: u16,
}

impl Queue {
    /// A queue that was just enabled: interrupts are not wanted yet.
    pub fn new(index: u16, layout: Layout, doorbell: Region, event_idx: bool) -> Self {
        let mut queue = Self {
            index,
            layout,
            kicks: 0,
            doorbell,
            event_idx,
            avail_idx: 0,
            published: 0,
            used_idx: 0,
            quiet_until: 0,
        };
        queue.silence();
        queue
    }

    /// How many chains the device has and has not returned.
    pub fn in_flight(&self) -> u16 {
        self.avail_idx.wrapping_sub(self.used_idx)
    }

    /// `used.idx` as the device last wrote it.
    pub fn device_used_idx(&self) -> u16 {
        self.layout.used.read(IDX)
    }

    /// What the driver has seen of `used.idx`.
    pub fn used_idx(&self) -> u16 {
        self.used_idx
    }

    /// Puts a chain in the avail ring; the device does not see it before [`Queue::publish`].
    #[inline(always)]
    pub fn offer(&mut self, head: u16) {
        let slot = usize::from(self.avail_idx & (self.layout.size - 1));
        self.layout.avail.write(RING + slot * 2, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// Shows the device all chains offered since the last time, and notifies it if it asked for that.
    #[inline(always)]
    pub fn publish(&mut self) {
        let (old, new) = (self.published, self.avail_idx);
        if old == new {
            return;
        }
        fence(Ordering::Release);
        self.layout.avail.write(IDX, new);
        self.published = new;
        // The device's wish must be read after the index is visible, or both sides may wait for each other.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event: u16 = self.layout.used.read(self.layout.avail_event());
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.layout.used.read::<u16>(0) & NO_NOTIFY == 0
        };
        if wanted {
            self.kick();
        }
    }

    /// Notifies the device.
    #[inline(always)]
    pub fn kick(&mut self) {
        self.ring_doorbell(self.index);
    }

    /// Writes any queue index to the queue's doorbell.
    #[inline(always)]
    pub fn ring_doorbell(&mut self, index: u16) {
        self.kicks += 1;
        self.doorbell.write(0, index);
    }

    /// Whether the device has returned chains that were not taken yet.
    #[inline(always)]
    pub fn pending(&self) -> bool {
        self.device_used_idx() != self.used_idx
    }

    /// Takes the next chain that the device has returned: its head and how many bytes the device wrote.
    #[inline(always)]
    pub fn next_used(&mut self) -> Option<(u32, u32)> {
        if !self.pending() {
            return None;
        }
        fence(Ordering::Acquire);
        let at = RING + usize::from(self.used_idx & (self.layout.size - 1)) * USED_ELEMENT;
        let element = (self.layout.used.read(at), self.layout.used.read(at + 4));
        self.used_idx = self.used_idx.wrapping_add(1);
        Some(element)
    }

    /// Keeps a polled queue from interrupting. To be called now and then: the index that stands for "never" must stay far
    /// away, but its cache line is the device's too, so that it is moved on rarely.
    #[inline(always)]
    pub fn keep_quiet(&mut self) {
        if self.event_idx && self.quiet_until.wrapping_sub(self.used_idx) > REFRESH {
            self.silence();
        }
    }

    fn silence(&mut self) {
        self.layout.avail.write::<u16>(0, if self.event_idx { 0 } else { NO_INTERRUPT });
        if self.event_idx {
            self.layout.avail.write(self.layout.used_event(), self.used_idx.wrapping_add(FAR));
            self.quiet_until = self.used_idx.wrapping_add(REFRESH);
        }
    }

    /// Asks for an interrupt after the next chain. Returns whether chains came back meanwhile: then there may be none.
    #[inline(always)]
    pub fn arm(&mut self) -> bool {
        self.arm_after(1)
    }

    /// Asks for an interrupt after so many chains, at least one; without EVENT_IDX, after the next. Returns whether as many
    /// came back meanwhile: then there may be none.
    #[inline(always)]
    pub fn arm_after(&mut self, count: u16) -> bool {
        let count = if self.event_idx {
            self.layout.avail.write(self.layout.used_event(), self.used_idx.wrapping_add(count - 1));
            count
        } else {
            self.layout.avail.write::<u16>(0, 0);
            1
        };
        fence(Ordering::SeqCst);
        self.device_used_idx().wrapping_sub(self.used_idx) >= count
    }

    /// Takes [`Queue::arm`] back. With EVENT_IDX there is nothing to do: the index that was asked for has gone by, or is going
    /// to, with one interrupt that nobody waits for.
    #[inline(always)]
    pub fn disarm(&mut self) {
        if !self.event_idx {
            self.layout.avail.write(0, NO_INTERRUPT);
        }
    }
}
