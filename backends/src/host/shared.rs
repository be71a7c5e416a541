//! Memory that another process shares by a descriptor: guest memory, tables, logs. It is mapped only if the kernel
//! alone serves files of its kind, and unmapped exactly as the kernel has mapped it.
//!
//! The other side can still truncate such a file, or punch holes into one of huge pages. An access to a missing page
//! raises SIGBUS. Any code may map a file that can't be truncated ([`SharedFile::is_steady`]); other files only code
//! that can bear that signal.
#![allow(unsafe_code, reason = "maps memory of other processes")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU8;

use rustix::fs::{FileType, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// A file of shared memory: a memfd, or a file of tmpfs or hugetlbfs.
#[derive(Debug)]
pub struct SharedFile {
    file: File,
    len: u64,
    page: u64,
    sealed: bool,
}

impl SharedFile {
    /// Looks at a file, and seals it against shrinking where that can be done.
    ///
    /// # Errors
    /// When it is no shared memory, or the host can't say.
    pub fn new(file: OwnedFd) -> io::Result<Self> {
        // Check this first: the kernel answers it without help, and only for memory. Other calls may ask the process
        // that serves the file (FUSE), which need not answer.
        if rustix::fs::fcntl_get_seals(&file).is_err() {
            return Err(invalid("it is not shared memory; pass a memfd, or a file on tmpfs or hugetlbfs".into()));
        }
        // Before its length is read, which is final then.
        let _ = rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK);
        let sealed = rustix::fs::fcntl_get_seals(&file)?.contains(SealFlags::SHRINK);
        let stat = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(invalid("it is not a regular file".into()));
        }
        let system = rustix::fs::fstatfs(&file)?;
        let huge = system.f_type == libc::HUGETLBFS_MAGIC;
        let page = if huge { system.f_bsize as u64 } else { rustix::param::page_size() as u64 };
        Ok(Self { file: file.into(), len: stat.st_size as u64, page, sealed })
    }

    /// The file itself.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of the pages that it is made of.
    #[must_use]
    pub fn page(&self) -> u64 {
        self.page
    }

    /// Whether it is made of huge pages.
    #[must_use]
    pub fn is_huge(&self) -> bool {
        self.page != rustix::param::page_size() as u64
    }

    /// Whether all of it stays there: it can't shrink, and the kernel fills its holes.
    #[must_use]
    pub fn is_steady(&self) -> bool {
        self.sealed && !self.is_huge()
    }

    /// Checks that `len` bytes at `offset` are in the file.
    ///
    /// # Errors
    /// When they are not, or there are none.
    pub fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len).filter(|&end| len > 0 && end <= self.len);
        end.map(drop)
            .ok_or_else(|| invalid(format!("a part of {len} bytes at {offset} is not in a file of {}", self.len)))
    }

    /// Maps `len` bytes at `offset`, and whatever else is in their pages.
    ///
    /// # Errors
    /// When these are not all there, or the kernel refuses.
    pub fn map(&self, offset: u64, len: u64) -> io::Result<Mapping> {
        self.check(offset, len)?;
        let within = offset % self.page;
        // The sum is at most a page beyond the end of the file. An unmapping of less than all of a huge page would fail.
        let mapped = usize::try_from((within + len).next_multiple_of(self.page)).map_err(io::Error::other)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping, which no other code knows.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), mapped, protection, flags, self.file.as_fd(), offset - within)?
        };
        let mapping = Mapping { start: start.cast(), mapped, at: within as usize };
        // Memory of a guest is not for core dumps of this process.
        // SAFETY: it is mapped like this, and its contents stay what they are.
        unsafe { rustix::mm::madvise(start, mapped, Advice::LinuxDontDump)? };
        Ok(mapping)
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

/// A part of a shared file in the memory of this process.
#[derive(Debug)]
pub struct Mapping {
    start: *mut u8,
    /// A whole number of pages of the file.
    mapped: usize,
    /// Where in the mapping the part begins.
    at: usize,
}

// SAFETY: it is memory. The code that accesses it answers for how.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Where the part that was asked for begins.
    #[must_use]
    pub fn base(&self) -> *mut u8 {
        // SAFETY: it lies in the first page of what is mapped.
        unsafe { self.start.add(self.at) }
    }

    /// The byte at `at` of that part; `None` for one that is not mapped.
    #[must_use]
    pub fn byte(&self, at: usize) -> Option<&AtomicU8> {
        let within = self.at.checked_add(at).filter(|&within| within < self.mapped)?;
        // SAFETY: it is mapped for as long as it is borrowed here, and a byte is aligned anywhere.
        Some(unsafe { &*self.start.add(within).cast() })
    }

    /// Everything that is mapped, whole pages: an address and a length.
    #[must_use]
    pub fn extent(&self) -> (usize, usize) {
        (self.start.addr(), self.mapped)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it was mapped like this, and every pointer into it belongs to code that borrows it or holds a share
        // of it.
        let unmapped = unsafe { rustix::mm::munmap(self.start.cast(), self.mapped) };
        debug_assert!(unmapped.is_ok(), "unmapping what was mapped: {unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;

    use super::*;

    const HUGE: u64 = 2 << 20;

    fn memfd(len: u64, flags: MemfdFlags) -> OwnedFd {
        let file = rustix::fs::memfd_create("shared", flags | MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, len).unwrap();
        file
    }

    /// Lines of the memory map in which this file stands.
    fn lines(file: &SharedFile) -> usize {
        let inode = format!(" {} ", rustix::fs::fstat(file.file()).unwrap().st_ino);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines().filter(|line| line.contains("memfd:shared") && line.contains(&inode)).count()
    }

    #[test]
    fn what_is_not_memory_is_refused() {
        let (pipe, _other) = rustix::pipe::pipe().unwrap();
        let disk = tempfile::tempfile_in(crate::scratch_dir()).unwrap();
        disk.set_len(4096).unwrap();
        let directory = File::open("/").unwrap();
        let device = File::open("/dev/zero").unwrap();
        for file in [pipe, disk.into(), directory.into(), device.into()] {
            let error = SharedFile::new(file).unwrap_err();
            assert!(error.to_string().contains("memfd"), "{error}");
        }
    }

    #[test]
    fn a_file_is_sealed_where_that_can_be_done() {
        for (flags, steady) in [(MemfdFlags::empty(), false), (MemfdFlags::ALLOW_SEALING, true)] {
            let file = SharedFile::new(memfd(8192, flags)).unwrap();
            assert_eq!((file.is_steady(), rustix::fs::ftruncate(file.file(), 0).is_err()), (steady, steady));
        }
        let huge = SharedFile::new(memfd(HUGE, MemfdFlags::HUGETLB | MemfdFlags::ALLOW_SEALING)).unwrap();
        assert!(!huge.is_steady(), "nobody fills its holes");
    }

    #[test]
    fn parts_of_pages_are_mapped_and_unmapped_whole() {
        for flags in [MemfdFlags::empty(), MemfdFlags::HUGETLB] {
            let file = SharedFile::new(memfd(2 * HUGE, flags)).unwrap();
            assert_eq!(file.is_huge(), flags == MemfdFlags::HUGETLB);
            for (offset, len) in [(0, 4096), (HUGE - 8, 16), (4104, 1), (0, 2 * HUGE)] {
                let mapping = file.map(offset, len).unwrap();
                let (start, mapped) = mapping.extent();
                assert_eq!((start % file.page() as usize, mapped % file.page() as usize), (0, 0));
                assert!(mapping.base().addr() + len as usize <= start + mapped);
                assert_eq!(lines(&file), 1);
                drop(mapping);
                assert_eq!(lines(&file), 0, "{len} bytes at {offset} with {flags:?}");
            }
            for (offset, len) in [(0, 0), (2 * HUGE, 1), (1, 2 * HUGE), (u64::MAX, 2), (1 << 63, 1 << 63)] {
                assert!(file.map(offset, len).is_err(), "{len} bytes at {offset}");
            }
        }
    }
}
