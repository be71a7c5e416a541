//! Guest RAM: one sealed memfd, shared, so that other processes can map it and none of them can shrink it under us.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use ringvm_backends::device::GuestMemory;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{Advice, madvise};
use thiserror::Error;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::advice::advice;
use crate::config::{HugePages, MemoryConfig};

/// Name of the memfd; it tells guest RAM apart in /proc/PID/smaps.
pub const MEMFD_NAME: &str = "ringvm-memory";

/// Guest memory could not be had.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A call failed.
    #[error("guest memory: {what}: {source}{advice}")]
    Host {
        /// What was tried.
        what: String,
        /// What came back.
        source: io::Error,
        /// What to do, with its own punctuation in front.
        advice: &'static str,
    },
    /// The regions can't be put together.
    #[error("guest memory: {0}")]
    Regions(#[from] vm_memory::GuestRegionCollectionError),
}

const ASK_LESS: &str = "; ask for less with --memory, or free some on the host";
const ASK_FILES: &str = "; the limit of file sizes counts for memory too: raise it (ulimit -f, LimitFSIZE=)";
const ASK_HUGE: &str = "; reserve huge pages (sysctl vm.nr_hugepages, or hugepages= at boot), or leave the option out";

/// Allocates memory for the guest-physical ranges `ram`.
///
/// # Errors
/// When the host does not have it.
pub fn allocate(config: &MemoryConfig, ram: &[Range<u64>]) -> Result<GuestMemory, MemoryError> {
    let size: u64 = ram.iter().map(|range| range.end - range.start).sum();
    // Kernel same-page merging only looks at private memory, and then no other process can share it.
    let file = if config.ksm { None } else { Some(Arc::new(sealed_memfd(size, config.hugepages)?)) };
    let mut offset = 0;
    let mut regions = Vec::with_capacity(ram.len());
    for range in ram {
        let len = range.end - range.start;
        regions.push(map(range, file.as_ref().map(|file| FileOffset::from_arc(Arc::clone(file), offset)), config)?);
        offset += len;
    }
    Ok(Arc::new(GuestMemoryMmap::from_regions(regions)?))
}

fn sealed_memfd(size: u64, huge: Option<HugePages>) -> Result<File, MemoryError> {
    let page = match huge {
        None => MemfdFlags::empty(),
        Some(HugePages::TwoMib) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        Some(HugePages::OneGib) => MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB,
    };
    let host = |what: &str, error: rustix::io::Errno| failure(what.into(), error.into(), huge);
    let fd = memfd_create(MEMFD_NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | page)
        .map_err(|error| host("creating a memfd", error))?;
    ftruncate(&fd, size).map_err(|error| host(&format!("sizing a memfd to {size} bytes"), error))?;
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(|error| host("sealing a memfd", error))?;
    Ok(fd.into())
}

/// An error with what to do about it.
fn failure(what: String, source: io::Error, huge: Option<HugePages>) -> MemoryError {
    let advice = match (source.raw_os_error(), huge) {
        // MAP_POPULATE and its kin say EFAULT when memory runs out in the middle.
        (Some(libc::ENOMEM | libc::EFAULT | libc::EINVAL), Some(_)) => ASK_HUGE,
        (Some(libc::ENOMEM | libc::EFAULT), None) => ASK_LESS,
        (Some(libc::EFBIG), _) => ASK_FILES,
        _ => advice(&source),
    };
    MemoryError::Host { what, source, advice }
}

#[allow(unsafe_code, reason = "advice on a mapping is given by address")]
fn map(range: &Range<u64>, file: Option<FileOffset>, config: &MemoryConfig) -> Result<GuestRegionMmap, MemoryError> {
    let len = (range.end - range.start) as usize;
    let mut builder = MmapRegionBuilder::new(len).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
    builder = match file {
        // Huge pages are reserved at once: an unreserved one that is not there later is a SIGBUS.
        Some(file) if config.hugepages.is_some() => builder.with_file_offset(file).with_mmap_flags(libc::MAP_SHARED),
        Some(file) => builder.with_file_offset(file).with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE),
        None => builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
    };
    let region = builder.with_hugetlbfs(config.hugepages.is_some()).build().map_err(|error| {
        let source = match error {
            MmapRegionError::Mmap(source) => source,
            error => io::Error::other(error),
        };
        failure(format!("mapping {len} bytes"), source, config.hugepages)
    })?;
    let advise = |what: &str, kind: Advice| {
        // SAFETY: the range is exactly the mapping made above; none of these changes what it holds.
        unsafe { madvise(region.as_ptr().cast(), len, kind) }
            .map_err(|error| failure(format!("{what} {len} bytes"), error.into(), config.hugepages))
    };
    // A core dump is for debugging ringvm; the guest's memory does not belong in it.
    advise("keeping out of core dumps", Advice::LinuxDontDump)?;
    if config.ksm {
        advise("offering the kernel to merge", Advice::LinuxMergeable)?;
    }
    if config.prefault {
        advise("prefaulting", Advice::LinuxPopulateWrite)?;
    }
    Ok(GuestRegionMmap::new(region, GuestAddress(range.start)).expect("a range of the address map does not wrap"))
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryBackend;

    use super::*;

    /// The flags of the mapping around `address`, as /proc/self/smaps abbreviates them. Neighbours may be one mapping.
    fn flags(address: u64) -> String {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let is_there = |line: &&str| {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let [from, to] =
                range.map_or([0; 2], |(from, to)| [from, to].map(|n| u64::from_str_radix(n, 16).unwrap_or(0)));
            (from..to).contains(&address)
        };
        let mut mapping = smaps.lines().skip_while(|line| !is_there(line));
        mapping.find_map(|line| line.strip_prefix("VmFlags:")).expect("Linux tells the flags").to_owned()
    }

    #[test]
    fn guest_memory_stays_out_of_core_dumps() {
        for ksm in [false, true] {
            let config = MemoryConfig { size: 4 << 20, ksm, ..MemoryConfig::default() };
            let memory = match allocate(&config, &[0..1 << 20, 8 << 20..11 << 20]) {
                // A kernel without KSM.
                Err(MemoryError::Host { source, .. }) if ksm && source.raw_os_error() == Some(libc::EINVAL) => continue,
                memory => memory.unwrap(),
            };
            for region in memory.iter() {
                let flags = flags(region.as_ptr() as u64);
                assert!(flags.split_whitespace().any(|flag| flag == "dd"), "ksm={ksm}: {flags}");
            }
        }
    }
}
