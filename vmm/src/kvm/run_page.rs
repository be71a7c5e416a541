//! The page that a vCPU shares with the kernel (`struct kvm_run` and the data after it), in a mapping of our own.
//!
//! kvm-ioctls lends its mapping as `&mut kvm_run`. The data after the structure can't be reached through that, and
//! the reference must not be alive while a signal handler writes to the structure. Here only pointers made from the
//! mapping refer to it.
#![allow(unsafe_code, reason = "a mapping that the kernel and a signal handler write to")]

use std::io;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU8;

use kvm_bindings::kvm_run;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Port I/O that a vCPU waits for. A string instruction comes as one exit: every element of it goes to the same port.
pub(super) struct PortIo<'a> {
    /// Whether the guest reads.
    pub(super) is_in: bool,
    /// Bytes per element.
    pub(super) size: usize,
    /// All elements.
    pub(super) data: &'a mut [u8],
}

/// The mapping.
pub(super) struct RunPage {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread, and the owner of the value has it alone.
unsafe impl Send for RunPage {}

impl RunPage {
    /// Maps the first `len` bytes of a vCPU (KVM_GET_VCPU_MMAP_SIZE).
    ///
    /// # Errors
    /// When the host has no memory for it, or `len` is less than there must be.
    pub(super) fn new(vcpu: impl AsFd, len: usize) -> io::Result<Self> {
        if len < size_of::<kvm_run>() {
            return Err(io::Error::other(format!("a vCPU shares {len} bytes, less than struct kvm_run has")));
        }
        // SAFETY: a new mapping, where the kernel finds a place.
        let base =
            unsafe { mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, vcpu, 0) }?;
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("a mapping at address 0"))?;
        Ok(Self { base, len })
    }

    /// `immediate_exit`, which a signal handler sets. Good for as long as the mapping.
    pub(super) fn immediate_exit(&self) -> *const AtomicU8 {
        self.base.as_ptr().wrapping_add(offset_of!(kvm_run, immediate_exit)).cast_const().cast()
    }

    /// The access to carry out after KVM_EXIT_IO; `None` if the kernel's values are impossible.
    pub(super) fn port_io(&mut self) -> Option<PortIo<'_>> {
        let run = self.base.cast::<kvm_run>().as_ptr();
        // SAFETY: the structure is mapped, and `io`, like every member of the union, is plain numbers. The kernel writes to it in
        // KVM_RUN only, which this thread is not in.
        let io = unsafe { (&raw const (*run).__bindgen_anon_1.io).read() };
        let size = usize::from(io.size);
        let len = size * io.count as usize;
        let start = usize::try_from(io.data_offset).ok().filter(|&start| start >= size_of::<kvm_run>())?;
        if size == 0 || start.checked_add(len)? > self.len {
            return None;
        }
        // SAFETY: the range is inside the mapping and after the structure; `self` is borrowed for as long, and the
        // kernel is not in KVM_RUN.
        let data = unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(start), len) };
        Some(PortIo { is_in: u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_IN, size, data })
    }

    /// The suberror after KVM_EXIT_INTERNAL_ERROR.
    pub(super) fn internal_error(&self) -> u32 {
        let run = self.base.cast::<kvm_run>().as_ptr();
        // SAFETY: as above.
        unsafe { (&raw const (*run).__bindgen_anon_1.internal.suberror).read() }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: exactly what was mapped, and nothing refers to it any more.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    use super::*;

    const LEN: usize = 3 * 4096;

    /// A page as the kernel would leave it after port I/O.
    fn page(size: u8, count: u32, data_offset: u64) -> RunPage {
        let file = memfd_create("kvm_run", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, LEN as u64).unwrap();
        let page = RunPage::new(file, LEN).unwrap();
        let run = page.base.cast::<kvm_run>().as_ptr();
        // SAFETY: the structure is mapped, and nothing else refers to it.
        unsafe {
            let io = &raw mut (*run).__bindgen_anon_1.io;
            (*io).size = size;
            (*io).count = count;
            (*io).data_offset = data_offset;
        }
        page
    }

    #[test]
    fn string_io_behind_the_structure_is_reached() {
        let mut page = page(2, 2048, 4096);
        let io = page.port_io().unwrap();
        assert_eq!((io.is_in, io.size, io.data.len()), (true, 2, 4096));
        io.data.fill(7);
        assert!(page.port_io().unwrap().data.iter().all(|&byte| byte == 7));
    }

    #[test]
    fn io_beyond_the_mapping_is_none() {
        for (size, count, data_offset) in
            [(1, 4097, 8192), (4, u32::MAX, 4096), (1, 1, u64::MAX), (1, 1, LEN as u64), (0, 1, 4096), (1, 1, 0)]
        {
            assert!(page(size, count, data_offset).port_io().is_none(), "{size} {count} {data_offset}");
        }
    }

    #[test]
    fn immediate_exit_is_where_the_kernel_looks() {
        let page = page(1, 1, 4096);
        // SAFETY: the mapping is there.
        unsafe { &*page.immediate_exit() }.store(1, Ordering::SeqCst);
        // SAFETY: likewise.
        assert_eq!(unsafe { (&raw const (*page.base.cast::<kvm_run>().as_ptr()).immediate_exit).read() }, 1);
    }
}
