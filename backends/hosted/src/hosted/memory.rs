//! Guest memory with the bitmap that a backend wants on it.

use std::any::Any;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use ringvm_backends::device::GuestMemory;
use vm_memory::mmap::NewBitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

/// Counts the queues that run. A client's memory is unmapped when nobody holds it any more, so the backend sees it for as
/// long as one of them does.
pub(super) struct Users {
    count: AtomicUsize,
    hide: Box<dyn Fn() + Send + Sync>,
}

impl Users {
    /// `hide` takes the memory from the backend's sight.
    pub(super) fn new(hide: impl Fn() + Send + Sync + 'static) -> Self {
        Self { count: AtomicUsize::new(0), hide: Box::new(hide) }
    }

    pub(super) fn are_there(&self) -> bool {
        self.count.load(Ordering::Acquire) > 0
    }

    /// A queue runs from now on.
    pub(super) fn add(&self) {
        self.count.fetch_add(1, Ordering::AcqRel);
    }

    /// A queue has ended.
    pub(super) fn remove(&self) {
        if self.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            (self.hide)();
        }
    }
}

/// The same memory for a backend. Most want no bitmap, and share the mappings; for others the memory is mapped again.
pub(super) fn as_seen_by<Bitmap: NewBitmap + Clone + Send + Sync + 'static>(
    mem: &GuestMemory,
) -> io::Result<GuestMemoryMmap<Bitmap>> {
    let same: &dyn Any = &**mem;
    if let Some(same) = same.downcast_ref::<GuestMemoryMmap<Bitmap>>() {
        return Ok(same.clone());
    }
    let regions = mem.iter().map(|region| {
        let file = region.file_offset().cloned().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::Unsupported,
                "it logs writes itself, for which memory must be shared (not ksm=on)",
            )
        })?;
        let mapped = MmapRegion::<Bitmap>::from_file(file, region.len() as usize).map_err(io::Error::other)?;
        GuestRegionMmap::new(mapped, GuestAddress(region.start_addr().0))
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    });
    let regions = regions.collect::<io::Result<Vec<_>>>()?;
    GuestMemoryMmap::from_regions(regions).map_err(io::Error::other)
}
