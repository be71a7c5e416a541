//! The log of guest pages that a device has written, for a process that copies a running guest elsewhere (vhost-user
//! specification, "Migration"): a file with one bit per page of 4 KiB, in the order of guest-physical addresses.
//!
//! The kernel writes to guest memory on our behalf, past any bitmap. So a queue notes the writable part of a chain
//! when it takes the chain, and marks all of it when it gives the chain back. The reader of the log clears bits at
//! any moment and copies their pages, hence a page is marked after its last write. The used length is no bound: a
//! read that fails half-way has written bytes that no used length covers. A queue without a log does none of this.

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, PoisonError, RwLock};

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::host::shared::{Mapping, SharedFile};
use crate::virtqueue::GuestMemory;
use crate::virtqueue::buffers::GuestIo;
use crate::virtqueue::interrupt::Interrupt;

/// Bytes of guest memory that a bit stands for, whatever the host's pages are.
pub const LOG_PAGE: u64 = 4096;

/// Most bytes that any device writes to the front of a chain. Behind them only the last byte is written, a status. A driver may
/// offer terabytes, by naming the same memory again and again, and each chain would take seconds to mark.
pub(crate) const MOST_WRITTEN: u64 = 1 << 30;

/// Ranges that are kept room for from one chain to the next.
const KEPT: usize = 256;

/// A log, shared with its reader.
#[derive(Debug)]
pub struct DirtyLog {
    /// Read-locked while pages are marked, so that [`Self::replace`] knows when no queue marks in the old area any
    /// more. Only queues that log pay for that.
    area: RwLock<Area>,
    /// Said once that it is too short.
    told: AtomicBool,
}

/// Where bits are.
#[derive(Debug)]
struct Area {
    map: Mapping,
    /// Its length in bytes.
    len: u64,
}

impl DirtyLog {
    /// Maps `len` bytes at `offset` of a file.
    ///
    /// # Errors
    /// When these are not all there, or can't be mapped.
    pub fn from_file(file: OwnedFd, offset: u64, len: u64) -> io::Result<Self> {
        let map = SharedFile::new(file)?.map(offset, len)?;
        Ok(Self { area: RwLock::new(Area { map, len }), told: AtomicBool::new(false) })
    }

    /// Where it is mapped: an address and a length.
    #[must_use]
    pub fn extent(&self) -> (usize, usize) {
        self.area.read().unwrap_or_else(PoisonError::into_inner).map.extent()
    }

    /// Puts the area of another log in place of this one's, for all queues that mark in it. The returned log has the
    /// earlier marks, and no page will be marked there any more.
    #[must_use]
    pub fn replace(&self, with: Self) -> Self {
        let with = with.area.into_inner().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *self.area.write().unwrap_or_else(PoisonError::into_inner), with);
        Self { area: RwLock::new(before), told: AtomicBool::new(false) }
    }

    /// Marks the pages of `len` bytes of guest memory from `addr` on, which have been written. Pages beyond the end
    /// of the log are left out: its reader knows how much memory it looks at.
    pub fn mark(&self, addr: u64, len: u64) {
        let Some(pages) = pages(addr, len) else { return };
        let (first, mut last) = pages.into_inner();
        let area = self.area.read().unwrap_or_else(PoisonError::into_inner);
        let end = area.len.saturating_mul(8);
        if last >= end {
            if !self.told.swap(true, Ordering::Relaxed) {
                tracing::warn!(page = last, pages = end, "the log of written pages is too short for the memory");
            }
            last = end - 1;
        }
        // Order the data before the check: if the bit is already set, the reader may clear it and copy the page right
        // now.
        fence(Ordering::SeqCst);
        // Nothing, if even the first page is beyond the end.
        for byte in first / 8..=last / 8 {
            let from = if byte == first / 8 { first % 8 } else { 0 };
            let to = if byte == last / 8 { last % 8 } else { 7 };
            if from > to {
                return;
            }
            let bits = (0xff_u8 << from) & (0xff >> (7 - to));
            let cell = area.map.byte(byte as usize).expect("the page is below the end, so its byte is mapped");
            if cell.load(Ordering::Relaxed) & bits != bits {
                cell.fetch_or(bits, Ordering::SeqCst);
            }
        }
    }
}

/// The pages of `len` bytes from `addr` on; `None` for no bytes. A range that wraps around ends with the last page
/// there is.
fn pages(addr: u64, len: u64) -> Option<RangeInclusive<u64>> {
    let last = addr.saturating_add(len.checked_sub(1)?);
    Some(addr / LOG_PAGE..=last / LOG_PAGE)
}

/// The parts that a queue needs to log its writes.
#[derive(Clone, Debug)]
pub struct QueueLog {
    /// Where pages are marked.
    pub log: Arc<DirtyLog>,
    /// Guest-physical address of the used ring, if writes to it are to be marked as well.
    pub used: Option<u64>,
    /// Raised when something was marked.
    pub marked: Interrupt,
}

/// The bookkeeping of one queue.
#[derive(Debug)]
pub(crate) struct Writes {
    to: QueueLog,
    /// Where regions lie: host address, length and guest-physical address, by host address.
    regions: Vec<(u64, u64, u64)>,
    /// The writable parts of the chains in flight, by head: guest-physical addresses and lengths.
    writable: Vec<Vec<(u64, u64)>>,
    /// Most bytes that are written to the front of one.
    most: u64,
}

impl Writes {
    /// For a queue of `size` descriptors.
    pub(crate) fn new(to: QueueLog, mem: &GuestMemory, size: u16) -> Self {
        let place = |region: &GuestRegionMmap| {
            (region.as_ptr() as u64, GuestMemoryRegion::len(region), region.start_addr().raw_value())
        };
        let mut regions: Vec<_> = mem.iter().map(place).collect();
        regions.sort_unstable();
        Self { to, regions, writable: vec![Vec::new(); size.into()], most: MOST_WRITTEN }
    }

    /// No more than so many bytes are written to the front of a chain.
    pub(crate) fn at_most(&mut self, bytes: u64) {
        self.most = self.most.min(bytes);
    }

    /// A chain was taken, of which this can be written.
    pub(crate) fn taken(&mut self, head: u16, writable: &GuestIo) {
        let regions = &self.regions;
        let place = |piece: &libc::iovec, offset: usize| {
            let host = piece.iov_base as u64;
            let behind = regions.partition_point(|&(start, ..)| start <= host);
            let (start, len, guest) = regions[behind.checked_sub(1).expect("pieces lie in memory")];
            debug_assert!(host - start + piece.iov_len as u64 <= len, "a piece lies in one region");
            guest + (host - start) + offset as u64
        };
        let ranges = &mut self.writable[usize::from(head)];
        ranges.clear();
        let mut room = self.most;
        for piece in writable.pieces() {
            if room == 0 {
                break;
            }
            let len = room.min(piece.iov_len as u64);
            ranges.push((place(piece, 0), len));
            room -= len;
        }
        if room == 0
            && let Some(last) = writable.pieces().last()
        {
            ranges.push((place(last, last.iov_len - 1), 1));
        }
    }

    /// Nothing will be written to a chain any more.
    pub(crate) fn returned(&mut self, head: u16) {
        let ranges = &mut self.writable[usize::from(head)];
        for (addr, len) in ranges.drain(..) {
            self.to.log.mark(addr, len);
        }
        if ranges.capacity() > KEPT {
            *ranges = Vec::new();
        }
    }

    /// So many bytes of the used ring were written.
    pub(crate) fn used_written(&self, offset: u64, len: u64) {
        if let Some(used) = self.to.used {
            self.to.log.mark(used.saturating_add(offset), len);
        }
    }

    /// Tells the log's reader.
    pub(crate) fn tell(&self) {
        self.to.marked.raise();
    }
}

#[cfg(test)]
#[path = "dirty_tests.rs"]
mod tests;
