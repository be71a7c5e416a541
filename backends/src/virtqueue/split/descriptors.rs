//! From the head of a chain to its buffers: the descriptor table and indirect tables (virtio 1.3, sections 2.7.4 and
//! 2.7.5).
//!
//! Each field of a descriptor is read once and the copy checked. A chain is bounded in length.
#![allow(unsafe_code, reason = "descriptors are read through host pointers")]

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::virtqueue::buffers::{Chain, read_once};
use crate::virtqueue::translate::{Near, host_range, translate};
use crate::virtqueue::{GuestMemory, RingError};

/// Most descriptors followed in an indirect table, if the queue itself has no more: as many segments as the kernel
/// takes in one vector, and a header and a status. A driver may make a chain as long as the queue (2.7.5.3.1), which
/// bounds the work that one available entry can cause.
const MAX_INDIRECT: u32 = 1024 + 2;

/// Length of a descriptor.
pub(super) const DESC_LEN: u64 = 16;

/// A descriptor in guest memory.
pub(super) type RawDescriptor = [u8; DESC_LEN as usize];

/// A descriptor as it was when it was read.
#[derive(Clone, Copy)]
struct Descriptor {
    addr: u64,
    len: u32,
    /// The flags, and the next index above them.
    rest: u32,
}

impl Descriptor {
    /// Copies a descriptor out of guest memory.
    ///
    /// # Safety
    /// It must be mapped.
    #[inline(always)]
    unsafe fn read(from: *const RawDescriptor) -> Self {
        if from.cast::<u64>().is_aligned() {
            // SAFETY: promised by the caller, and it is aligned.
            unsafe { Self::read_aligned(from) }
        } else {
            // SAFETY: promised by the caller.
            let bytes = u128::from_le_bytes(unsafe { read_once(from.cast()) });
            Self { addr: bytes as u64, len: (bytes >> 64) as u32, rest: (bytes >> 96) as u32 }
        }
    }

    /// The same for one at a multiple of 8. Each of its fields is read once.
    ///
    /// # Safety
    /// It must be mapped and lie at a multiple of 8.
    #[inline(always)]
    unsafe fn read_aligned(from: *const RawDescriptor) -> Self {
        let words = from.cast::<u32>();
        // SAFETY: promised by the caller. All of these lie in the descriptor, at multiples of their size.
        let (addr, len, rest) =
            unsafe { (from.cast::<u64>().read_volatile(), words.add(2).read_volatile(), words.add(3).read_volatile()) };
        Self { addr: u64::from_le(addr), len: u32::from_le(len), rest: u32::from_le(rest) }
    }

    #[inline(always)]
    fn has(self, flag: u32) -> bool {
        self.rest & flag != 0
    }

    #[inline(always)]
    fn next(self) -> u16 {
        (self.rest >> 16) as u16
    }
}

/// Collects the descriptors of one chain.
pub(super) struct Walk<'a> {
    /// Empty but for its head.
    pub(super) chain: &'a mut Chain,
    pub(super) mem: &'a GuestMemory,
    /// Where the last buffer was found.
    pub(super) near: &'a mut Near,
}

impl Walk<'_> {
    /// Follows the chain that begins at `head` in a descriptor table of `size` descriptors. With `indirect` it may end
    /// in a table of its own.
    ///
    /// # Safety
    /// The table must be mapped and lie at a multiple of 8; the head must be below the size.
    #[inline(always)]
    pub(super) unsafe fn follow(
        mut self,
        head: u16,
        table: *const RawDescriptor,
        size: u16,
        indirect: bool,
    ) -> Result<(), RingError> {
        let (mut index, mut left) = (head, size);
        loop {
            // SAFETY: promised by the caller; every further index is checked below.
            let desc = unsafe { Descriptor::read_aligned(table.add(usize::from(index))) };
            if desc.has(VRING_DESC_F_INDIRECT) {
                if !indirect || desc.has(VRING_DESC_F_NEXT) {
                    return Err(RingError::Indirect(head));
                }
                return self.follow_table(desc, size);
            }
            self.add(desc)?;
            if !desc.has(VRING_DESC_F_NEXT) {
                return Ok(());
            }
            index = desc.next();
            if index >= size {
                return Err(RingError::Index(index));
            }
            left -= 1;
            if left == 0 {
                return Err(RingError::TooLong(head));
            }
        }
    }

    /// Follows an indirect table, of a queue of `size` descriptors.
    #[inline(never)]
    fn follow_table(mut self, table: Descriptor, size: u16) -> Result<(), RingError> {
        let head = self.chain.head;
        let bad = RingError::Table { addr: table.addr, len: table.len };
        let count = table.len / DESC_LEN as u32;
        if count == 0 || !u64::from(table.len).is_multiple_of(DESC_LEN) {
            return Err(bad);
        }
        let (addr, len) = (table.addr, table.len.into());
        let base = self.near.host(addr, len).or_else(|| host_range(self.mem, addr, len)).ok_or(bad)?;
        let mut index = 0;
        for _ in 0..count.min(MAX_INDIRECT.max(size.into())) {
            // SAFETY: `index` is below `count`, and the whole table is mapped. The driver may have placed it at any
            // address, hence unaligned; the guest may write to it at the same time, so it is copied once and the copy
            // used.
            let desc = unsafe { Descriptor::read(base.cast::<RawDescriptor>().add(index as usize)) };
            if desc.has(VRING_DESC_F_INDIRECT) {
                return Err(RingError::Indirect(head));
            }
            self.add(desc)?;
            if !desc.has(VRING_DESC_F_NEXT) {
                return Ok(());
            }
            index = desc.next().into();
            if index >= count {
                return Err(RingError::Index(desc.next()));
            }
        }
        Err(RingError::TooLong(head))
    }

    #[inline(always)]
    fn add(&mut self, desc: Descriptor) -> Result<(), RingError> {
        let io = if desc.has(VRING_DESC_F_WRITE) {
            &mut self.chain.writable
        } else if self.chain.writable.is_empty() {
            &mut self.chain.readable
        } else {
            return Err(RingError::Order(self.chain.head));
        };
        let (addr, len) = (desc.addr, u64::from(desc.len));
        if let Some(host) = self.near.host(addr, len) {
            // SAFETY: the region is mapped from there on for so many bytes, for as long as the queue lives.
            unsafe { io.push(host, len as usize) };
        } else {
            add_from_afar(self.mem, self.near, self.chain, desc);
        }
        Ok(())
    }
}

/// Adds a buffer that is not in the region of the last one, or empty, or behind a hole.
#[cold]
#[inline(never)]
fn add_from_afar(mem: &GuestMemory, near: &mut Near, chain: &mut Chain, desc: Descriptor) {
    let writable = desc.has(VRING_DESC_F_WRITE);
    let io = if writable { &mut chain.writable } else { &mut chain.readable };
    // A chain with a hole is answered with an error. That needs only the header in front and the status at the end, so
    // of the buffers after the first hole only the last is kept.
    if chain.unmapped && writable {
        io.clear();
    }
    if translate(mem, near, desc.addr, desc.len.into(), io).is_none() {
        io.clear();
        chain.unmapped = true;
    }
    if chain.unmapped {
        // All buffers of this chain that follow come here.
        *near = Near::NOWHERE;
    }
}
