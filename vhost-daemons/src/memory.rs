//! The memory that a frontend shares (vhost-user specification, "Memory region description", "Memory access"): checked,
//! mapped, and found again by the addresses that the frontend itself uses.
#![allow(unsafe_code, reason = "regions over mappings that this module owns")]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringvm_backends::device::GuestMemory;
use ringvm_backends::host::shared::{Mapping, SharedFile};
use thiserror::Error;
use tracing::error;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::mailbox::Event;
use crate::sigbus::{self, Guard};

/// Most regions. QEMU uses a handful, and one more for each memory device that is plugged in.
pub(crate) const MAX_REGIONS: usize = 256;
/// Longest wait for an I/O thread to let go of memory that it does not use any more, and the pause between two looks.
const LET_GO_PATIENCE: Duration = Duration::from_secs(10);
const LET_GO_PAUSE: Duration = Duration::from_micros(50);

/// Why a region can't be used.
#[derive(Debug, Error)]
pub(crate) enum MemoryError {
    #[error("memory region {region}: {what}")]
    Region { region: String, what: String },
    #[error("memory region {region}: {what}: {source}")]
    Host { region: String, what: &'static str, source: io::Error },
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    #[error("memory region {0} is not there")]
    Unknown(String),
}

/// Where a region lies, as the frontend says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    guest: u64,
    size: u64,
    user: u64,
    offset: u64,
}

impl From<&VhostUserMemoryRegion> for Layout {
    fn from(region: &VhostUserMemoryRegion) -> Self {
        Self {
            guest: region.guest_phys_addr,
            size: region.memory_size,
            user: region.user_addr,
            offset: region.mmap_offset,
        }
    }
}

impl Layout {
    fn name(&self) -> String {
        format!("{:#x}+{:#x}", self.guest, self.size)
    }

    fn refuse(&self, what: impl Into<String>) -> MemoryError {
        MemoryError::Region { region: self.name(), what: what.into() }
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.guest < other.guest + other.size && other.guest < self.guest + self.size
    }
}

/// A region, protected as long as it is mapped. The guard goes first.
#[derive(Debug)]
struct Region {
    _guard: Guard,
    layout: Layout,
    mapped: Mapped,
}

/// A mapped region. Its descriptor was closed: a client may have many regions, and descriptors are the whole process's.
#[derive(Debug)]
struct Mapped {
    guest: Arc<GuestRegionMmap>,
    /// Taken only to be unmapped.
    mapping: Option<Mapping>,
}

impl Mapped {
    fn new(layout: &Layout, file: &SharedFile) -> Result<Self, MemoryError> {
        let host = |what, source| MemoryError::Host { region: layout.name(), what, source };
        let mapping = file.map(layout.offset, layout.size).map_err(|e| host("mapping it", e))?;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: it stays mapped until ours is the only handle to the region.
        let region = unsafe { MmapRegion::build_raw(mapping.base(), layout.size as usize, protection, flags) };
        let region = region.map_err(|e| host("mapping it", io::Error::other(e)))?;
        let guest = GuestRegionMmap::new(region, GuestAddress(layout.guest));
        let guest = Arc::new(guest.ok_or_else(|| layout.refuse("it ends beyond the address space"))?);
        Ok(Self { guest, mapping: Some(mapping) })
    }
}

impl Drop for Mapped {
    /// Unmaps the region once all other handles are gone. An I/O thread drops its handle just after it has reported
    /// that a queue is stopped.
    fn drop(&mut self) {
        let deadline = Instant::now() + LET_GO_PATIENCE;
        while Arc::get_mut(&mut self.guest).is_none() {
            if Instant::now() >= deadline {
                error!("the device still uses memory of a client after its queues have stopped; it stays mapped");
                return std::mem::forget(self.mapping.take());
            }
            std::thread::sleep(LET_GO_PAUSE);
        }
    }
}

/// All regions of a session. Their users must have stopped before one is taken away.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// Goes first: regions wait until no other handle is left.
    guest: GuestMemory,
    regions: Vec<Region>,
}

impl Memory {
    /// Maps a table of regions.
    pub(crate) fn new(table: Vec<(VhostUserMemoryRegion, OwnedFd)>, alarm: &Event) -> Result<Self, MemoryError> {
        let mut memory = Self::default();
        for (region, file) in table {
            memory.insert((&region).into(), file, alarm)?;
        }
        memory.collect()?;
        Ok(memory)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Whether just this region is there already.
    pub(crate) fn has(&self, region: &VhostUserMemoryRegion) -> bool {
        let layout = Layout::from(region);
        self.regions.iter().any(|region| region.layout == layout)
    }

    /// Maps one more region. The memory's users see it when they ask for the memory again.
    pub(crate) fn add(
        &mut self,
        region: &VhostUserMemoryRegion,
        file: OwnedFd,
        alarm: &Event,
    ) -> Result<(), MemoryError> {
        self.insert(region.into(), file, alarm)?;
        let done = self.collect();
        if done.is_err() {
            self.regions.pop();
        }
        done
    }

    /// Whether there is a region of that place and size; the offset is not compared, as the specification says.
    pub(crate) fn find(&self, region: &VhostUserMemoryRegion) -> Result<usize, MemoryError> {
        let wanted = Layout::from(region);
        let same =
            |layout: &Layout| (layout.guest, layout.size, layout.user) == (wanted.guest, wanted.size, wanted.user);
        let found = self.regions.iter().position(|region| same(&region.layout));
        found.ok_or_else(|| MemoryError::Unknown(wanted.name()))
    }

    /// Takes away a region that was found.
    pub(crate) fn remove(&mut self, index: usize) -> Result<(), MemoryError> {
        let _removed = self.regions.remove(index);
        self.collect()
    }

    /// The memory as queues want it.
    pub(crate) fn guest(&self) -> GuestMemory {
        Arc::clone(&self.guest)
    }

    /// The guest-physical address for the frontend's address `user`.
    pub(crate) fn translate(&self, user: u64) -> Option<u64> {
        let found = self.regions.iter().find(|region| user.wrapping_sub(region.layout.user) < region.layout.size)?;
        Some(found.layout.guest + (user - found.layout.user))
    }

    fn insert(&mut self, layout: Layout, file: OwnedFd, alarm: &Event) -> Result<(), MemoryError> {
        if self.regions.len() == MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        if layout.size == 0 {
            return Err(layout.refuse("it is empty"));
        }
        let wraps = |start: u64| start.checked_add(layout.size).is_none();
        if wraps(layout.guest) || wraps(layout.user) {
            return Err(layout.refuse(format!("it wraps around (user address {:#x})", layout.user)));
        }
        if let Some(other) = self.regions.iter().find(|other| other.layout.overlaps(&layout)) {
            return Err(layout.refuse(format!("it overlaps {}", other.layout.name())));
        }
        let host = |what, source| MemoryError::Host { region: layout.name(), what, source };
        let file = SharedFile::new(file).map_err(|e| host("its descriptor", e))?;
        file.check(layout.offset, layout.size).map_err(|e| host("its place", e))?;
        let page = file.page();
        // No client shares part of a huge page; some clients share part of an ordinary one, at the end of a region.
        if !layout.offset.is_multiple_of(page) || file.is_huge() && !layout.size.is_multiple_of(page) {
            let what =
                format!("offset {:#x} or size are no multiple of its file's pages of {page} bytes", layout.offset);
            return Err(layout.refuse(what));
        }
        let mapped = Mapped::new(&layout, &file)?;
        let extent = mapped.mapping.as_ref().map(Mapping::extent).unwrap_or_default();
        let guard = sigbus::protect(extent, alarm).map_err(|e| host("guarding it", e))?;
        self.regions.push(Region { _guard: guard, layout, mapped });
        Ok(())
    }

    fn collect(&mut self) -> Result<(), MemoryError> {
        let mut regions: Vec<_> = self.regions.iter().collect();
        regions.sort_by_key(|region| region.layout.guest);
        let regions: Vec<_> = regions.into_iter().map(|region| Arc::clone(&region.mapped.guest)).collect();
        self.guest = if regions.is_empty() {
            Arc::default()
        } else {
            let collected = GuestMemoryMmap::from_arc_regions(regions);
            Arc::new(collected.map_err(|e| MemoryError::Region { region: "table".into(), what: e.to_string() })?)
        };
        Ok(())
    }
}
