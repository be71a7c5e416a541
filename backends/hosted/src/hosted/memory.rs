//! Guest memory with the bitmap that a backend wants on it.

use std::any::Any;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ringvm_backends::device::GuestMemory;
use vm_memory::mmap::NewBitmap;
use vm_memory::{
    GuestAddress, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

/// The memory that a backend sees while queues run. Without one it sees none: whoever has stopped all queues may unmap it.
pub(super) struct Shown<Bitmap: vm_memory::bitmap::Bitmap> {
    atomic: GuestMemoryAtomic<GuestMemoryMmap<Bitmap>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What is shown.
    memory: Weak<GuestMemoryMmap>,
    /// Queues that run, or start.
    queues: usize,
}

impl<Bitmap: NewBitmap + Clone + Send + Sync + 'static> Shown<Bitmap> {
    pub(super) fn new() -> Self {
        Self { atomic: GuestMemoryAtomic::new(GuestMemoryMmap::new()), state: Mutex::default() }
    }

    /// Where the backend and its vrings find it.
    pub(super) fn atomic(&self) -> GuestMemoryAtomic<GuestMemoryMmap<Bitmap>> {
        self.atomic.clone()
    }

    /// Shows memory for a queue that is to start. Returns whether it is other memory than before.
    pub(super) fn enter(&self, mem: &GuestMemory) -> io::Result<bool> {
        let mut state = self.state();
        let is_new = !std::ptr::eq(state.memory.as_ptr(), Arc::as_ptr(mem));
        if is_new {
            self.replace(as_seen_by(mem)?);
            state.memory = Arc::downgrade(mem);
        }
        state.queues += 1;
        Ok(is_new)
    }

    /// A queue has stopped, or did not start.
    pub(super) fn leave(&self) {
        let mut state = self.state();
        state.queues = state.queues.saturating_sub(1);
        if state.queues == 0 {
            state.memory = Weak::new();
            self.replace(GuestMemoryMmap::new());
        }
    }

    fn replace(&self, mem: GuestMemoryMmap<Bitmap>) {
        self.atomic.lock().unwrap_or_else(PoisonError::into_inner).replace(mem);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The same memory for a backend. Most want no bitmap, and share the mappings; for others the memory is mapped again.
fn as_seen_by<Bitmap: NewBitmap + Clone + Send + Sync + 'static>(
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
