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
    /// The backend has been told of it.
    is_told: bool,
    /// Queues that run, or start.
    queues: usize,
}

/// A queue's part in the memory that is shown. The memory is hidden with the last one.
pub(super) struct Lease<Bitmap: vm_memory::bitmap::Bitmap>(Arc<Shown<Bitmap>>);

impl<Bitmap: vm_memory::bitmap::Bitmap> Lease<Bitmap> {
    /// Whether the backend is to be told of the memory.
    pub(super) fn is_news(&self) -> bool {
        !self.0.state().is_told
    }

    /// The backend has been told.
    pub(super) fn told(&self) {
        self.0.state().is_told = true;
    }
}

impl<Bitmap: vm_memory::bitmap::Bitmap> Drop for Lease<Bitmap> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.queues -= 1;
        if state.queues == 0 {
            state.memory = Weak::new();
            self.0.replace(GuestMemoryMmap::new());
        }
    }
}

impl<Bitmap: NewBitmap + Clone + Send + Sync + 'static> Shown<Bitmap> {
    pub(super) fn new() -> Self {
        Self { atomic: GuestMemoryAtomic::new(GuestMemoryMmap::new()), state: Mutex::default() }
    }

    /// Where the backend and its vrings find it.
    pub(super) fn atomic(&self) -> GuestMemoryAtomic<GuestMemoryMmap<Bitmap>> {
        self.atomic.clone()
    }

    /// Shows memory for a queue that is to start.
    pub(super) fn enter(self: &Arc<Self>, mem: &GuestMemory) -> io::Result<Lease<Bitmap>> {
        let mut state = self.state();
        if !std::ptr::eq(state.memory.as_ptr(), Arc::as_ptr(mem)) {
            self.replace(as_seen_by(mem)?);
            state.memory = Arc::downgrade(mem);
            state.is_told = false;
        }
        state.queues += 1;
        Ok(Lease(Arc::clone(self)))
    }
}

impl<Bitmap: vm_memory::bitmap::Bitmap> Shown<Bitmap> {
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
