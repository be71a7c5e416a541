//! From guest-physical addresses to host pointers.
#![allow(unsafe_code, reason = "pointers into regions that are mapped")]

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::virtqueue::GuestMemory;
use crate::virtqueue::buffers::{GuestIo, MAX_PIECES};

/// Most pieces of a list that has buffers across several regions of guest memory. A buffer has as many pieces as it
/// touches regions, and 256 regions of a page each would make a quarter of a million of a chain. This is two for each
/// segment of the longest request.
pub(super) const MAX_SPREAD: usize = 2 * MAX_PIECES;

/// The region of guest memory that a buffer was found in last: the next one is most likely in it too.
#[derive(Clone, Copy)]
pub(super) struct Near {
    start: u64,
    len: u64,
    host: *mut u8,
}

impl Near {
    pub(super) const NOWHERE: Self = Self { start: 0, len: 0, host: std::ptr::null_mut() };

    /// Where a guest range is mapped that lies in the region and is not empty.
    #[inline]
    pub(super) fn host(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let offset = addr.wrapping_sub(self.start);
        let room = self.len.checked_sub(offset)?;
        // Without a byte it wraps, and is not inside either.
        let inside = len.wrapping_sub(1) < room;
        // SAFETY: the region is mapped from `host` on for all of its length.
        inside.then(|| unsafe { self.host.add(offset as usize) })
    }
}

/// The host address of a guest range that lies in one region.
pub(super) fn host_range(mem: &GuestMemory, addr: u64, len: u64) -> Option<*mut u8> {
    let region = mem.find_region(GuestAddress(addr))?;
    let offset = addr - region.start_addr().raw_value();
    if len > region.len() - offset {
        return None;
    }
    region.get_host_address(MemoryRegionAddress(offset)).ok()
}

/// Appends a guest range, which may span regions, to an I/O vector. `None` if any of it is not memory, or there are
/// too many pieces.
pub(super) fn translate(
    mem: &GuestMemory,
    near: &mut Near,
    mut addr: u64,
    mut len: u64,
    io: &mut GuestIo,
) -> Option<()> {
    while len > 0 {
        if io.pieces().len() >= MAX_SPREAD {
            return None;
        }
        let region = mem.find_region(GuestAddress(addr))?;
        let offset = addr - region.start_addr().raw_value();
        let count = len.min(region.len() - offset);
        let host = region.get_host_address(MemoryRegionAddress(offset)).ok()?;
        let start = region.get_host_address(MemoryRegionAddress(0)).ok()?;
        *near = Near { start: region.start_addr().raw_value(), len: region.len(), host: start };
        // SAFETY: the region is mapped from `host` on for at least `count` bytes, for as long as the queue lives.
        unsafe { io.push(host, count as usize) };
        len -= count;
        addr = addr.checked_add(count).or((len == 0).then_some(0))?;
    }
    Some(())
}
