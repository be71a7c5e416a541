//! Guest memory that the kernel holds for a ring (registered buffers): operations with it need not look its pages up and
//! lock them, each for itself. All of it is allocated and locked by that, so it is for memory that was allocated anyway.

use std::io;

use io_uring::Submitter;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::device::GuestMemory;

/// Longest piece that the kernel holds as one.
const LONGEST: usize = 1 << 30;
/// Pieces in the kernel's table, for a terabyte of memory.
const PLACES: u16 = 1024;

/// What is held.
#[derive(Default)]
pub(super) struct HeldMemory {
    regions: Vec<Region>,
    /// Free places in the kernel's table; `None` before there is one.
    free: Option<Vec<u16>>,
}

/// A region of guest memory, at the same host address for everybody who uses it.
struct Region {
    start: usize,
    len: usize,
    /// Its places in the kernel's table, one for each [`LONGEST`] of it.
    places: Vec<u16>,
    users: u32,
}

impl HeldMemory {
    /// Holds all regions, or none of those that were not held before.
    pub(super) fn hold(&mut self, submitter: &Submitter<'_>, memory: &GuestMemory) -> io::Result<()> {
        for (held, (start, len)) in regions(memory).enumerate() {
            if let Err(error) = self.hold_region(submitter, start, len) {
                regions(memory).take(held).for_each(|(start, _)| self.release_region(submitter, start));
                return Err(error);
            }
        }
        Ok(())
    }

    /// The counterpart of [`Self::hold`], where that has succeeded.
    pub(super) fn release(&mut self, submitter: &Submitter<'_>, memory: &GuestMemory) {
        regions(memory).for_each(|(start, _)| self.release_region(submitter, start));
    }

    /// Whether there is a table in the kernel.
    pub(super) fn has_table(&self) -> bool {
        self.free.is_some()
    }

    /// The place in the kernel's table of what a piece lies in.
    #[inline]
    pub(super) fn place(&self, piece: &libc::iovec) -> Option<u16> {
        for region in &self.regions {
            let offset = (piece.iov_base as usize).wrapping_sub(region.start);
            if offset < region.len {
                let within = offset % LONGEST + piece.iov_len <= LONGEST && piece.iov_len <= region.len - offset;
                return within.then(|| region.places[offset / LONGEST]);
            }
        }
        None
    }

    #[cfg(test)]
    pub(super) fn free_places(&self) -> usize {
        self.free.as_ref().map_or(0, Vec::len)
    }

    fn hold_region(&mut self, submitter: &Submitter<'_>, start: usize, len: usize) -> io::Result<()> {
        if let Some(region) = self.regions.iter_mut().find(|region| region.start == start) {
            region.users += 1;
            return Ok(());
        }
        if self.free.is_none() {
            submitter.register_buffers_sparse(u32::from(PLACES))?;
            self.free = Some((0..PLACES).rev().collect());
        }
        let free = self.free.get_or_insert_default();
        let mut region = Region { start, len, places: Vec::new(), users: 1 };
        for offset in (0..len).step_by(LONGEST) {
            let piece = libc::iovec {
                iov_base: std::ptr::without_provenance_mut(start + offset),
                iov_len: LONGEST.min(len - offset),
            };
            let place = free.pop().ok_or(io::ErrorKind::QuotaExceeded);
            let held = place.map_err(io::Error::from).and_then(|place| {
                // SAFETY: the region is mapped until its last user has released it.
                let updated = unsafe { submitter.register_buffers_update(u32::from(place), &[piece], None) };
                region.places.push(place);
                updated
            });
            if let Err(error) = held {
                give_back(submitter, free, region);
                return Err(error);
            }
        }
        self.regions.push(region);
        Ok(())
    }

    fn release_region(&mut self, submitter: &Submitter<'_>, start: usize) {
        let Some(index) = self.regions.iter().position(|region| region.start == start) else { return };
        self.regions[index].users -= 1;
        if self.regions[index].users == 0 {
            give_back(submitter, self.free.get_or_insert_default(), self.regions.swap_remove(index));
        }
    }
}

/// Empties the places of a region.
fn give_back(submitter: &Submitter<'_>, free: &mut Vec<u16>, region: Region) {
    for place in region.places {
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: nothing is held.
        let emptied = unsafe { submitter.register_buffers_update(u32::from(place), &[nothing], None) };
        debug_assert!(emptied.is_ok(), "{emptied:?}");
        free.push(place);
    }
}

/// Where the regions lie in this process, and how long they are.
fn regions(memory: &GuestMemory) -> impl Iterator<Item = (usize, usize)> {
    memory.iter().filter_map(|region| {
        let start = region.get_host_address(MemoryRegionAddress(0)).ok()?;
        Some((start.addr(), region.len() as usize))
    })
}
