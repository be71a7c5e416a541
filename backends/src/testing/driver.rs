//! The driver's side of a split virtqueue, in a host process: for measuring a device without a guest, and for tests,
//! which also misuse it. Plain and safe; a guest's driver would be faster.

use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{Bytes, GuestAddress};

use crate::virtqueue::{GuestMemory, RingConfig};

/// One buffer of a chain, in guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// First byte.
    pub addr: u64,
    /// Number of bytes.
    pub len: u32,
    /// Whether the device writes it (else it reads it).
    pub writable: bool,
}

/// A descriptor as it lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address.
    pub addr: u64,
    /// Number of bytes.
    pub len: u32,
    /// VRING_DESC_F_*.
    pub flags: u16,
    /// The next one, with VRING_DESC_F_NEXT.
    pub next: u16,
}

impl Descriptor {
    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A driver of one queue.
pub struct Driver {
    mem: GuestMemory,
    ring: RingConfig,
    event_idx: bool,
    free: Vec<u16>,
    /// Descriptors of each chain in flight, by head.
    chains: BTreeMap<u16, Vec<u16>>,
    next_avail: u16,
    published: u16,
    last_used: u16,
}

impl Driver {
    /// Lays a ring of `size` descriptors out from `base` (4 KiB aligned) on and clears it.
    ///
    /// # Panics
    /// If it does not lie in memory.
    #[must_use]
    pub fn new(mem: GuestMemory, base: u64, size: u16, features: u64) -> Self {
        let avail = base + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let ring = RingConfig { size, desc: base, avail, used };
        mem.write_slice(&vec![0; Self::footprint(size) as usize], GuestAddress(base)).expect("the ring lies in memory");
        Self {
            mem,
            ring,
            event_idx: features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
            free: (0..size).rev().collect(),
            chains: BTreeMap::new(),
            next_avail: 0,
            published: 0,
            last_used: 0,
        }
    }

    /// Bytes that a ring of `size` descriptors takes.
    #[must_use]
    pub fn footprint(size: u16) -> u64 {
        26 * u64::from(size) + 16
    }

    /// Where the ring lies.
    #[must_use]
    pub fn ring(&self) -> RingConfig {
        self.ring
    }

    /// Chains made available and not given back.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.chains.len()
    }

    /// Adds a chain of direct descriptors; `None` if too few are free. Not seen before [`Self::publish`].
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || self.free.len() < buffers.len() {
            return None;
        }
        let indices = self.free.split_off(self.free.len() - buffers.len());
        for (i, desc) in linked(buffers, |i| indices[i]).enumerate() {
            self.write_descriptor(self.ring.desc, indices[i], desc);
        }
        Some(self.make_available(indices))
    }

    /// Adds a chain whose descriptors lie in a table at `table`; `None` if no descriptor is free.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> Option<u16> {
        let index = self.free.pop()?;
        for (i, desc) in linked(buffers, |i| i as u16).enumerate() {
            self.write_descriptor(table, i as u16, desc);
        }
        let flags = VRING_DESC_F_INDIRECT as u16;
        let desc = Descriptor { addr: table, len: 16 * buffers.len() as u32, flags, next: 0 };
        self.write_descriptor(self.ring.desc, index, desc);
        Some(self.make_available(vec![index]))
    }

    fn make_available(&mut self, indices: Vec<u16>) -> u16 {
        let head = indices[0];
        self.write_avail_entry(self.next_avail, head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.chains.insert(head, indices);
        head
    }

    /// Makes the added chains visible; returns whether the device asked for a kick.
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        self.published = self.next_avail;
        self.write_avail_index(self.next_avail);
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.load(self.ring.used + 4 + 8 * u64::from(self.ring.size));
            self.published.wrapping_sub(event).wrapping_sub(1) < self.published.wrapping_sub(old)
        } else {
            u32::from(self.load(self.ring.used)) & VRING_USED_F_NO_NOTIFY == 0
        }
    }

    /// Takes back a chain: its head and the number of bytes that the device reports as written.
    ///
    /// # Panics
    /// If the device gives back a chain that is not in flight: tests look for that.
    pub fn next_used(&mut self) -> Option<(u16, u32)> {
        let index = self.load(self.ring.used + 2);
        if index == self.last_used {
            return None;
        }
        assert!(index.wrapping_sub(self.last_used) <= self.ring.size, "used index jumped to {index}");
        let entry = self.ring.used + 4 + 8 * u64::from(self.last_used % self.ring.size);
        let id: u32 = self.mem.read_obj(GuestAddress(entry)).expect("the ring lies in memory");
        let len: u32 = self.mem.read_obj(GuestAddress(entry + 4)).expect("the ring lies in memory");
        self.last_used = self.last_used.wrapping_add(1);
        let head = u16::try_from(id).expect("a head is 16 bits");
        let indices = self.chains.remove(&head).unwrap_or_else(|| panic!("chain {head} given back, not in flight"));
        self.free.extend(indices);
        Some((head, len))
    }

    /// Asks for an interrupt at the next used buffer, or for none for as long as possible.
    pub fn want_interrupts(&mut self, want: bool) {
        if self.event_idx {
            let event = if want { self.last_used } else { self.last_used.wrapping_sub(1) };
            self.store(self.ring.avail + 4 + 2 * u64::from(self.ring.size), event);
        } else {
            self.store(self.ring.avail, u16::from(!want));
        }
        fence(Ordering::SeqCst);
    }

    /// Writes any value as a descriptor of the table at `table`.
    pub fn write_descriptor(&self, table: u64, index: u16, desc: Descriptor) {
        let addr = GuestAddress(table + 16 * u64::from(index));
        self.mem.write_slice(&desc.bytes(), addr).expect("the table lies in memory");
    }

    /// Writes any value as an entry of the available ring.
    pub fn write_avail_entry(&self, index: u16, head: u16) {
        self.store(self.ring.avail + 4 + 2 * u64::from(index % self.ring.size), head);
    }

    /// Publishes any value as the available index.
    pub fn write_avail_index(&self, index: u16) {
        self.store(self.ring.avail + 2, index);
    }

    /// The used index that the device has published.
    #[must_use]
    pub fn used_index(&self) -> u16 {
        self.load(self.ring.used + 2)
    }

    fn load(&self, addr: u64) -> u16 {
        self.mem.load(GuestAddress(addr), Ordering::Acquire).expect("the ring lies in memory")
    }

    fn store(&self, addr: u64, value: u16) {
        self.mem.store(value, GuestAddress(addr), Ordering::Release).expect("the ring lies in memory");
    }
}

/// Descriptors of a chain, each naming the index of the next.
fn linked<'a>(buffers: &'a [Buffer], index: impl Fn(usize) -> u16 + 'a) -> impl Iterator<Item = Descriptor> + 'a {
    buffers.iter().enumerate().map(move |(i, buffer)| {
        let last = i + 1 == buffers.len();
        let write = if buffer.writable { VRING_DESC_F_WRITE } else { 0 };
        let next = if last { 0 } else { VRING_DESC_F_NEXT };
        let next_index = if last { 0 } else { index(i + 1) };
        Descriptor { addr: buffer.addr, len: buffer.len, flags: (write | next) as u16, next: next_index }
    })
}
