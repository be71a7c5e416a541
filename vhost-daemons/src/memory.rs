//! The memory that a frontend shares (vhost-user specification, "Memory region description", "Memory access"): checked,
//! mapped, and found again by the addresses that the frontend itself uses.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringvm_backends::device::GuestMemory;
use rustix::fs::{FileType, SealFlags};
use thiserror::Error;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::mailbox::Event;
use crate::sigbus::{self, Guard};

/// Most regions. QEMU uses a handful, and one more for each memory device that is plugged in.
pub(crate) const MAX_REGIONS: usize = 256;

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

/// A mapped region. The guard goes first.
#[derive(Debug)]
struct Region {
    _guard: Guard,
    layout: Layout,
    mapping: Arc<GuestRegionMmap>,
}

/// All regions of a session. Whatever uses them must have stopped before one is taken away.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    regions: Vec<Region>,
    guest: GuestMemory,
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

    /// Maps one region more. Those who use the memory see it when they ask for it again.
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
        self.regions.remove(index);
        self.collect()
    }

    /// The memory as queues want it.
    pub(crate) fn guest(&self) -> GuestMemory {
        Arc::clone(&self.guest)
    }

    /// The guest-physical address of what the frontend sees at `user`.
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
        let stat = rustix::fs::fstat(&file).map_err(|e| host("looking at its file", e.into()))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(layout.refuse("its descriptor is not a memfd or another file"));
        }
        let end = layout.offset.checked_add(layout.size).and_then(|end| i64::try_from(end).ok());
        if end.is_none_or(|end| end > stat.st_size) {
            let what =
                format!("its file of {} bytes ends before offset {:#x} and its size", stat.st_size, layout.offset);
            return Err(layout.refuse(what));
        }
        // Where it can be sealed the file keeps its size; the others are what the guard is for.
        let _ = rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK);
        let size = layout.size as usize;
        let mapping = MmapRegion::build(
            Some(FileOffset::new(file.into(), layout.offset)),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        );
        let mapping = mapping.map_err(|e| host("mapping it", io::Error::other(e)))?;
        let guard = sigbus::protect(mapping.as_ptr() as usize, size, alarm);
        let guard = guard.map_err(|e| host("guarding it", e))?;
        let mapping = GuestRegionMmap::new(mapping, GuestAddress(layout.guest));
        let mapping = Arc::new(mapping.ok_or_else(|| layout.refuse("it ends beyond the address space"))?);
        self.regions.push(Region { _guard: guard, layout, mapping });
        Ok(())
    }

    fn collect(&mut self) -> Result<(), MemoryError> {
        let mut regions: Vec<_> = self.regions.iter().collect();
        regions.sort_by_key(|region| region.layout.guest);
        let regions: Vec<_> = regions.into_iter().map(|region| Arc::clone(&region.mapping)).collect();
        self.guest = if regions.is_empty() {
            Arc::default()
        } else {
            let collected = GuestMemoryMmap::from_arc_regions(regions);
            Arc::new(collected.map_err(|e| MemoryError::Region { region: "table".into(), what: e.to_string() })?)
        };
        Ok(())
    }
}
