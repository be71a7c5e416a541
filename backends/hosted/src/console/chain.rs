//! The buffers of one descriptor chain (virtio 1.3, section 2.7.5), read once and checked.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// Buffers of one direction, all of them in memory.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    parts: Vec<(GuestAddress, usize)>,
    len: usize,
}

impl Buffers {
    /// The buffers that the device reads, or those that it writes if `writable`; the others are passed over. `None` if
    /// the chain does not end, or one of them does not lie in memory.
    pub(super) fn collect(
        mem: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
        writable: bool,
    ) -> Option<Self> {
        let access = if writable { Permissions::Write } else { Permissions::Read };
        let mut buffers = Self::default();
        let mut is_complete = false;
        for desc in chain {
            // The iterator also ends at a loop, a bad index and an unreadable descriptor. Only the last descriptor of
            // a sound chain has no successor.
            is_complete = !desc.has_next();
            let len = desc.len() as usize;
            if desc.is_write_only() != writable || len == 0 {
                continue;
            }
            if !mem.check_range(desc.addr(), len, access) {
                return None;
            }
            buffers.parts.push((desc.addr(), len));
            buffers.len += len;
        }
        is_complete.then_some(buffers)
    }

    /// Bytes in all of them.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Copies out of the buffers from byte `offset` on, as much as `data` holds. Returns how much that was: less than
    /// asked for at the buffers' end, or if memory can't be read.
    pub(super) fn read(&self, mem: &GuestMemoryMmap, offset: usize, data: &mut [u8]) -> usize {
        self.each(offset, data.len(), |addr, at, len| mem.read_slice(&mut data[at..at + len], addr).is_ok())
    }

    /// Copies into the buffers from their first byte on. Returns how much that was.
    pub(super) fn write(&self, mem: &GuestMemoryMmap, data: &[u8]) -> usize {
        self.each(0, data.len(), |addr, at, len| mem.write_slice(&data[at..at + len], addr).is_ok())
    }

    fn each(&self, offset: usize, count: usize, mut copy: impl FnMut(GuestAddress, usize, usize) -> bool) -> usize {
        let (mut skip, mut done) = (offset, 0);
        for &(addr, len) in &self.parts {
            let from = skip.min(len);
            skip -= from;
            let part = (len - from).min(count - done);
            if part == 0 {
                continue;
            }
            // No overflow: the whole buffer was found in memory.
            if !copy(GuestAddress(addr.0 + from as u64), done, part) {
                break;
            }
            done += part;
        }
        done
    }
}
