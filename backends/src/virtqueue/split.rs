//! The device's side of a split virtqueue (virtio 1.3, section 2.7), with EVENT_IDX and INDIRECT_DESC.
//!
//! The guest may write anything at any moment. So the layout is checked once and frozen, and the three areas are
//! reached through host pointers made then; every index and descriptor is read once and its copy checked; a chain is
//! bounded in length. A chain that can't be answered breaks the queue ([`RingError`]), which then stays broken until
//! the driver resets. `virtio-queue` is the oracle of the tests; this one exists because it sits on the request path,
//! where it takes about a third of the time (`benches/queue.rs` measures both).
#![allow(unsafe_code, reason = "ring areas are reached through host pointers that were checked at creation")]

mod descriptors;
mod notes;
mod suppression;

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_USED_F_NO_NOTIFY};

use crate::virtqueue::buffers::Chain;
use crate::virtqueue::dirty::{QueueLog, Writes};
use crate::virtqueue::inflight::InflightTable;
use crate::virtqueue::interrupt::Interrupt;
use crate::virtqueue::translate::{Near, host_range};
use crate::virtqueue::{GuestMemory, QueueState, RingConfig, RingError};
use descriptors::{DESC_LEN, RawDescriptor, Walk};
use notes::Notes;
use suppression::{Words, ask_for_kick, wants_interrupt};

/// Feature bits that this ring implements; every device offers them.
pub const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The device's side of one virtqueue.
pub struct Queue {
    mem: GuestMemory,
    near: Near,
    size: u16,
    /// At a multiple of 16.
    desc: *const RawDescriptor,
    /// `flags`, `idx`, `ring[size]`, `used_event`.
    avail: *const AtomicU16,
    /// `flags`, `idx`, `ring[size]` of (id, len), `avail_event`.
    used: *const AtomicU16,
    event_idx: bool,
    indirect: bool,
    next_avail: u16,
    next_used: u16,
    /// The used index that the driver knows of.
    published: u16,
    /// The available index as last read.
    seen_avail: u16,
    /// One bit per head that was popped and not completed.
    in_flight: Vec<u64>,
    /// Notes of each chain, if anything is to be noted.
    notes: Option<Box<Notes>>,
    /// Buffers are to be used in the order in which they came.
    pub(crate) in_order: bool,
    /// Heads that a predecessor has left in flight, the oldest last.
    replay: Vec<u16>,
    call: Interrupt,
}

// SAFETY: the pointers go into `mem`, which is shared and moves along; nothing in here is bound to a thread.
unsafe impl Send for Queue {}

impl Queue {
    /// Checks the layout and resolves its addresses. `features` are those that the driver accepted.
    ///
    /// # Errors
    /// A size, alignment or address that can't be served.
    pub fn new(
        mem: GuestMemory,
        ring: &RingConfig,
        features: u64,
        from: QueueState,
        call: Interrupt,
    ) -> Result<Self, RingError> {
        let [desc, avail, used] = areas(&mem, ring)?;
        Ok(Self {
            mem,
            near: Near::NOWHERE,
            size: ring.size,
            desc: desc.cast(),
            avail: avail.cast(),
            used: used.cast(),
            event_idx: features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
            indirect: features & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0,
            next_avail: from.next_avail,
            next_used: from.next_used,
            published: from.next_used,
            seen_avail: from.next_avail,
            in_flight: vec![0; usize::from(ring.size).div_ceil(64)],
            notes: None,
            in_order: false,
            replay: Vec::new(),
            call,
        })
    }

    /// Notes from now on which pages are written. Before the first `pop`.
    pub(crate) fn log_writes(&mut self, to: QueueLog) {
        let writes = Writes::new(to, &self.mem, self.size);
        self.notes.get_or_insert_default().writes = Some(writes);
    }

    /// Promises that the device writes no more than so many bytes to the front of a chain, and to its last byte,
    /// whatever the chain offers.
    pub(crate) fn writes_at_most(&mut self, bytes: u64) {
        if let Some(writes) = self.notes.as_mut().and_then(|notes| notes.writes.as_mut()) {
            writes.at_most(bytes);
        }
    }

    /// Continues after a predecessor that may have ended at any moment: each chain that it popped is either published
    /// or in the table, which is kept from now on. Call it before the first `pop`.
    ///
    /// # Errors
    /// A table that can't be this queue's.
    pub fn take_over(&mut self, mut table: InflightTable) -> Result<(), RingError> {
        let used = self.used_word(1).load(Ordering::Acquire);
        self.replay = table.take_over(self.size, used).map_err(RingError::Inflight)?;
        if !self.replay.is_empty() {
            self.replay.reverse();
            (self.next_used, self.published) = (used, used);
            self.next_avail = used.wrapping_add(self.replay.len() as u16);
            self.seen_avail = self.next_avail;
        }
        self.notes.get_or_insert_default().table = Some(table);
        Ok(())
    }

    /// Continues where a predecessor was suspended, with the heads that it has taken and not given back. Call it
    /// before the first `pop`.
    ///
    /// # Errors
    /// Heads that can't be this queue's.
    pub fn take_left(&mut self, heads: &[u16]) -> Result<(), RingError> {
        for &head in heads.iter().rev() {
            if head >= self.size {
                return Err(RingError::Index(head));
            }
            if self.replay.contains(&head) {
                return Err(RingError::Twice(head));
            }
            self.replay.push(head);
        }
        if let Some(table) = self.notes.as_mut().and_then(|notes| notes.table.as_mut()) {
            heads.iter().for_each(|&head| table.popped(head));
        }
        Ok(())
    }

    /// The heads that were taken and not given back, including those of a predecessor.
    #[must_use]
    pub fn left(&self) -> Vec<u16> {
        let taken = (0..self.size).filter(|head| self.in_flight[usize::from(head / 64)] & 1 << (head % 64) != 0);
        taken.chain(self.replay.iter().rev().copied()).collect()
    }

    /// The memory that it lies in, and its buffers.
    pub(crate) fn memory(&self) -> &GuestMemory {
        &self.mem
    }

    /// The number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The queue's position. Of use to another server only once nothing is in flight, or together with
    /// [`Self::left`].
    #[must_use]
    pub fn state(&self) -> QueueState {
        QueueState { next_avail: self.next_avail, next_used: self.next_used }
    }

    /// Whether the driver has made something available that was not popped.
    #[must_use]
    pub fn has_avail(&self) -> bool {
        self.has_replay() || self.avail_index() != self.next_avail
    }

    /// Whether a predecessor has left anything that was not taken again.
    pub(crate) fn has_replay(&self) -> bool {
        !self.replay.is_empty()
    }

    /// Takes the next head that a predecessor has left, without a look at its chain.
    pub(crate) fn take_replay(&mut self) -> Option<u16> {
        let head = self.replay.pop()?;
        self.in_flight[usize::from(head / 64)] |= 1 << (head % 64);
        Some(head)
    }

    /// Takes the next chain into `chain`; `false` if there is none.
    ///
    /// # Errors
    /// When the ring or the chain can't be followed. The chain can't be answered; the queue must not be used any
    /// further.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        let is_new = self.replay.is_empty();
        let head = if is_new { self.next_head()? } else { self.replay.pop() };
        let Some(head) = head else { return Ok(false) };
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        let taken = &mut self.in_flight[word];
        if *taken & bit != 0 {
            return Err(RingError::Twice(head));
        }
        *taken |= bit;
        if let Err(error) = self.follow(head, chain) {
            self.not_taken(head);
            return Err(error);
        }
        self.next_avail = self.next_avail.wrapping_add(is_new.into());
        if let Some(notes) = &mut self.notes {
            notes.popped(chain, is_new);
        }
        Ok(true)
    }

    #[cold]
    fn not_taken(&mut self, head: u16) {
        self.in_flight[usize::from(head / 64)] &= !(1 << (head % 64));
    }

    /// The head of the next entry of the available ring, if there is one.
    #[inline(always)]
    fn next_head(&mut self) -> Result<Option<u16>, RingError> {
        if self.seen_avail == self.next_avail {
            // Pairs with the driver's barrier between filling ring entries and publishing the index.
            self.seen_avail = self.avail_word(1).load(Ordering::Acquire);
            if self.seen_avail == self.next_avail {
                return Ok(None);
            }
            if self.seen_avail.wrapping_sub(self.next_avail) > self.size {
                return Err(RingError::AvailIndex { avail: self.seen_avail, next: self.next_avail });
            }
        }
        let head = self.avail_word(2 + usize::from(self.next_avail & (self.size - 1))).load(Ordering::Relaxed);
        if head >= self.size { Err(RingError::Index(head)) } else { Ok(Some(head)) }
    }

    /// Takes back the last `pop`, if it was of `head` and the driver has not rewritten the entry since: the chain is
    /// available again, as if never seen.
    pub(crate) fn unpop(&mut self, head: u16) -> bool {
        let last = self.next_avail.wrapping_sub(1);
        if self.avail_word(2 + usize::from(last & (self.size - 1))).load(Ordering::Relaxed) != head {
            return false;
        }
        self.not_taken(head);
        self.next_avail = last;
        if let Some(notes) = &mut self.notes {
            notes.unpopped(head);
        }
        true
    }

    /// Gives a chain back with the number of bytes written into it. The driver learns of it at the next
    /// [`Self::notify`].
    #[inline]
    pub fn complete(&mut self, head: u16, len: u32) {
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        debug_assert!(self.in_flight[word] & bit != 0, "completing a chain that was not popped");
        self.in_flight[word] &= !bit;
        let slot = 2 + usize::from(self.next_used & (self.size - 1)) * 4;
        // SAFETY: the slot index is below the queue size, so both words lie in the used ring, which `new` checked to be
        // mapped for its whole length and aligned to 4 bytes.
        unsafe {
            let entry = self.used.add(slot).cast::<AtomicU32>();
            (*entry).store(u32::from(head), Ordering::Relaxed);
            (*entry.add(1)).store(len, Ordering::Relaxed);
        }
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(notes) = &mut self.notes {
            notes.completed(head);
        }
    }

    /// Publishes completed chains, and raises the interrupt if the driver asks for one. Returns `Some(raised)` if
    /// there was anything to publish.
    pub fn notify(&mut self) -> Option<bool> {
        if self.published == self.next_used {
            return None;
        }
        let old = self.published;
        self.published = self.next_used;
        if let Some(writes) = self.writes() {
            self.log_entries(writes, old);
        }
        self.used_word(1).store(self.next_used, Ordering::Release);
        if let Some(notes) = &mut self.notes {
            notes.published(self.next_used);
        }
        let wanted = wants_interrupt(self, self.event_idx, old, self.next_used);
        if wanted {
            self.call.raise();
        }
        Some(wanted)
    }

    /// Asks the driver not to kick, as far as possible: with EVENT_IDX a stale event index already says so.
    pub fn disable_kicks(&mut self) {
        if !self.event_idx {
            self.used_word(0).store(VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed);
            if let Some(writes) = self.writes() {
                writes.used_written(0, 2);
            }
        }
    }

    /// Asks for a kick at the next available entry. Returns whether one has appeared in the meantime; then look
    /// again.
    pub fn enable_kicks(&mut self) -> bool {
        let came = ask_for_kick(self, self.event_idx, self.next_avail);
        if let Some(writes) = self.writes() {
            // Either of the two that it was.
            writes.used_written(0, 2);
            writes.used_written(4 + 8 * u64::from(self.size), 2);
        }
        came || self.has_replay()
    }

    /// Raises the interrupt whatever the driver wishes: after a change of place it may have missed one.
    pub fn force_interrupt(&self) {
        self.call.raise();
    }

    /// The notes of written pages, if there is a log.
    fn writes(&self) -> Option<&Writes> {
        self.notes.as_ref()?.writes.as_ref()
    }

    /// Marks the entries of the used ring from `old` on: in one piece, or in two around its end.
    #[cold]
    fn log_entries(&self, writes: &Writes, old: u16) {
        let (size, count) = (u64::from(self.size), u64::from(self.next_used.wrapping_sub(old)));
        let from = u64::from(old & (self.size - 1));
        let behind = count.min(size - from);
        writes.used_written(4 + 8 * from, 8 * behind);
        writes.used_written(4, 8 * (count - behind).min(from));
    }

    fn avail_word(&self, index: usize) -> &AtomicU16 {
        // SAFETY: callers pass at most `size + 2`; `new` checked that the ring is mapped for `size + 3` aligned words,
        // and the mapping lives as long as `self.mem`.
        unsafe { &*self.avail.add(index) }
    }

    fn used_word(&self, index: usize) -> &AtomicU16 {
        // SAFETY: callers pass at most `4 * size + 2`; `new` checked that the ring is mapped for `4 * size + 3` aligned
        // words, and the mapping lives as long as `self.mem`.
        unsafe { &*self.used.add(index) }
    }

    #[inline(always)]
    fn follow(&mut self, head: u16, chain: &mut Chain) -> Result<(), RingError> {
        chain.head = head;
        chain.readable.reset(&self.mem);
        chain.writable.reset(&self.mem);
        chain.unmapped = false;
        let walk = Walk { chain, mem: &self.mem, near: &mut self.near };
        // SAFETY: `new` checked that the table is mapped for so many descriptors, at a multiple of 16; no head is taken
        // that is not below the size.
        unsafe { walk.follow(head, self.desc, self.size, self.indirect) }
    }
}

impl Words for Queue {
    #[inline(always)]
    fn avail_flags(&self) -> u16 {
        self.avail_word(0).load(Ordering::Relaxed)
    }

    #[inline(always)]
    fn avail_index(&self) -> u16 {
        self.avail_word(1).load(Ordering::Acquire)
    }

    #[inline(always)]
    fn used_event(&self) -> u16 {
        self.avail_word(2 + usize::from(self.size)).load(Ordering::Relaxed)
    }

    #[inline(always)]
    fn set_used_flags(&self, flags: u16) {
        self.used_word(0).store(flags, Ordering::Relaxed);
    }

    #[inline(always)]
    fn set_avail_event(&self, index: u16) {
        self.used_word(2 + usize::from(self.size) * 4).store(index, Ordering::Relaxed);
    }

    #[inline(always)]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

/// The used index of a ring that is not being served, or `None` if the ring does not lie in memory.
#[must_use]
pub fn used_index(mem: &GuestMemory, ring: &RingConfig) -> Option<u16> {
    let used = used_ring(mem, ring).ok()?;
    // SAFETY: the ring is mapped for as long as `mem` lives; its index follows the flags, at an even address.
    Some(unsafe { &*used.cast::<AtomicU16>().add(1) }.load(Ordering::Acquire))
}

/// The available index of a ring, or `None` if the ring does not lie in memory.
#[must_use]
pub fn avail_index(mem: &GuestMemory, ring: &RingConfig) -> Option<u16> {
    let avail = avail_ring(mem, ring).ok()?;
    // SAFETY: as above.
    Some(unsafe { &*avail.cast::<AtomicU16>().add(1) }.load(Ordering::Acquire))
}

/// Checks the layout of a ring that another process will serve: all three areas lie in memory as a whole.
///
/// # Errors
/// A size, alignment or address that can't be served.
pub fn check_ring(mem: &GuestMemory, ring: &RingConfig) -> Result<(), RingError> {
    areas(mem, ring).map(drop)
}

/// The descriptor table, the available ring and the used ring of a checked layout.
fn areas(mem: &GuestMemory, ring: &RingConfig) -> Result<[*mut u8; 3], RingError> {
    if !ring.size.is_power_of_two() || ring.size > 1 << 15 {
        return Err(RingError::Size(ring.size));
    }
    let desc = area(mem, "descriptor table", ring.desc, DESC_LEN * u64::from(ring.size), 16)?;
    Ok([desc, avail_ring(mem, ring)?, used_ring(mem, ring)?])
}

// The event words at the ends of both rings are part of them whether or not they are negotiated. A driver that leaves
// them out at the very end of memory has not been seen yet.

fn avail_ring(mem: &GuestMemory, ring: &RingConfig) -> Result<*mut u8, RingError> {
    area(mem, "available ring", ring.avail, 6 + 2 * u64::from(ring.size), 2)
}

fn used_ring(mem: &GuestMemory, ring: &RingConfig) -> Result<*mut u8, RingError> {
    area(mem, "used ring", ring.used, 6 + 8 * u64::from(ring.size), 4)
}

fn area(mem: &GuestMemory, area: &'static str, addr: u64, len: u64, align: u64) -> Result<*mut u8, RingError> {
    if !addr.is_multiple_of(align) {
        return Err(RingError::Misaligned { area, addr });
    }
    let host = host_range(mem, addr, len).ok_or(RingError::Unmapped { area, addr, len })?;
    // The accesses rely on the pointer. It differs in this only if a region begins elsewhere than at a page.
    if (host as u64).is_multiple_of(align) { Ok(host) } else { Err(RingError::Misaligned { area, addr }) }
}

#[cfg(test)]
mod tests;
