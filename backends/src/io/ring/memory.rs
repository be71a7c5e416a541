//! Guest memory that the kernel holds for a ring (registered buffers): operations with it need not look its pages up and
//! lock them, each for itself. All of it is allocated and locked by that, so it is for memory that was allocated anyway, and
//! never more than what the rings of a process may hold together ([`Budget`]).
//!
//! A gibibyte takes the kernel some 30 ms, in pages of 4 KiB, so it is held piece by piece while requests are served.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use io_uring::Submitter;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::virtqueue::GuestMemory;

/// Bytes held at a time, of at most 1 GiB that the kernel takes. Tests may not lock much.
pub(super) const PIECE: usize = if cfg!(test) { 1 << 20 } else { 64 << 20 };
/// Places in the kernel's table, as many as it can have: a tebibyte.
const PLACES: u16 = 1 << 14;

/// The memory that the rings of a process may hold together. Memory that several rings hold counts once.
#[derive(Debug)]
pub struct Budget(Mutex<Spent>);

#[derive(Debug)]
struct Spent {
    /// Bytes that may be held besides.
    left: u64,
    /// How many rings hold a piece, by its address and its length.
    pieces: HashMap<(usize, usize), u32>,
}

impl Budget {
    /// Room for so many bytes.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self(Mutex::new(Spent { left: bytes, pieces: HashMap::new() }))
    }

    /// Takes room for a piece. Returns whether there was some.
    fn take(&self, piece: (usize, usize)) -> bool {
        let mut spent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(rings) = spent.pieces.get_mut(&piece) {
            *rings += 1;
            return true;
        }
        let Some(left) = spent.left.checked_sub(piece.1 as u64) else { return false };
        spent.left = left;
        spent.pieces.insert(piece, 1);
        true
    }

    fn give_back(&self, piece: (usize, usize)) {
        let mut spent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(rings) = spent.pieces.get_mut(&piece) else { return };
        *rings -= 1;
        if *rings == 0 {
            spent.pieces.remove(&piece);
            spent.left += piece.1 as u64;
        }
    }
}

/// The memory that is held.
pub(super) struct HeldMemory {
    budget: Arc<Budget>,
    regions: Vec<Region>,
    /// Free places in the kernel's table; `None` before there is one.
    free: Option<Vec<u16>>,
    /// Whether some region is not all held yet.
    wanting: bool,
}

/// A region of guest memory, at the same host address for everybody who uses it.
struct Region {
    start: usize,
    len: usize,
    /// The places in the kernel's table of those of its pieces that are held, from its start on.
    places: Vec<u16>,
    users: u32,
    /// The kernel would hold no more of it.
    refused: bool,
}

impl HeldMemory {
    /// Nothing, of what may be held.
    pub(super) fn new(budget: Arc<Budget>) -> Self {
        Self { budget, regions: Vec::new(), free: None, wanting: false }
    }

    /// Takes note of all regions, for [`Self::hold_more`].
    pub(super) fn hold(&mut self, memory: &GuestMemory) {
        for (start, len) in regions(memory) {
            match self.regions.iter_mut().find(|region| (region.start, region.len) == (start, len)) {
                Some(region) => region.users += 1,
                None => {
                    self.regions.push(Region { start, len, places: Vec::new(), users: 1, refused: false });
                    self.wanting = true;
                }
            }
        }
    }

    /// Whether there is more to hold.
    pub(super) fn is_wanting(&self) -> bool {
        self.wanting
    }

    /// Has the kernel hold the next piece. Returns whether there was one.
    pub(super) fn hold_more(&mut self, submitter: &Submitter<'_>) -> io::Result<bool> {
        let Some(region) = self.regions.iter_mut().find(|region| region.is_wanting()) else {
            self.wanting = false;
            return Ok(false);
        };
        // Until it has succeeded: what is refused once is not tried again.
        region.refused = true;
        let free = match &mut self.free {
            Some(free) => free,
            free => {
                submitter.register_buffers_sparse(u32::from(PLACES))?;
                free.insert((0..PLACES).rev().collect())
            }
        };
        let &place = free.last().ok_or(io::ErrorKind::QuotaExceeded)?;
        let (at, len) = region.piece(region.places.len());
        if !self.budget.take((at, len)) {
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, "it holds as much as it was allowed to"));
        }
        let piece = libc::iovec { iov_base: std::ptr::without_provenance_mut(at), iov_len: len };
        // SAFETY: the region is mapped until its last user has released it.
        let registered = unsafe { submitter.register_buffers_update(u32::from(place), &[piece], None) };
        if let Err(error) = registered {
            self.budget.give_back((at, len));
            return Err(error);
        }
        free.pop();
        region.places.push(place);
        region.refused = false;
        Ok(true)
    }

    /// The counterpart of [`Self::hold`].
    pub(super) fn release(&mut self, submitter: &Submitter<'_>, memory: &GuestMemory) {
        for (start, len) in regions(memory) {
            let same = |region: &Region| (region.start, region.len) == (start, len);
            let Some(index) = self.regions.iter().position(same) else { continue };
            self.regions[index].users -= 1;
            if self.regions[index].users > 0 {
                continue;
            }
            let region = self.regions.swap_remove(index);
            for (piece, &place) in region.places.iter().enumerate() {
                let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
                // SAFETY: nothing is held in place of the piece.
                let emptied = unsafe { submitter.register_buffers_update(u32::from(place), &[nothing], None) };
                debug_assert!(emptied.is_ok(), "{emptied:?}");
                self.budget.give_back(region.piece(piece));
                self.free.get_or_insert_default().push(place);
            }
        }
    }

    /// Whether there is a table in the kernel.
    pub(super) fn has_table(&self) -> bool {
        self.free.is_some()
    }

    /// The place in the kernel's table of what a buffer lies in, if all of it is held as one.
    #[inline]
    pub(super) fn place(&self, buffer: &libc::iovec) -> Option<u16> {
        for region in &self.regions {
            let offset = (buffer.iov_base as usize).wrapping_sub(region.start);
            if offset < region.len {
                let within = offset % PIECE + buffer.iov_len <= PIECE && buffer.iov_len <= region.len - offset;
                return if within { region.places.get(offset / PIECE).copied() } else { None };
            }
        }
        None
    }

    #[cfg(test)]
    pub(super) fn free_places(&self) -> usize {
        self.free.as_ref().map_or(usize::from(PLACES), Vec::len)
    }
}

impl Region {
    fn is_wanting(&self) -> bool {
        !self.refused && self.held() < self.len
    }

    fn held(&self) -> usize {
        (self.places.len() * PIECE).min(self.len)
    }

    /// Address and length of a piece.
    fn piece(&self, index: usize) -> (usize, usize) {
        let at = index * PIECE;
        (self.start + at, PIECE.min(self.len - at))
    }
}

/// Where the regions lie in this process, and how long they are.
fn regions(memory: &GuestMemory) -> impl Iterator<Item = (usize, usize)> {
    memory.iter().filter_map(|region| {
        let start = region.get_host_address(MemoryRegionAddress(0)).ok()?;
        Some((start.addr(), region.len() as usize))
    })
}
