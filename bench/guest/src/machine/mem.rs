//! Memory as the devices see it: [`Region`], the only way that this crate touches a physical address, and the allocator.
//!
//! All of memory is mapped where it is (address == physical address), so DMA needs no translation. The allocator only
//! ever hands out: a guest lives for one command line.

#![allow(unsafe_code, reason = "raw memory, and the C names that the compiler emits calls to")]

use crate::machine::fail;

use core::alloc::{GlobalAlloc, Layout};
use core::arch::asm;
use core::sync::atomic::{AtomicUsize, Ordering};

/// A stretch of memory or of a device's registers. Accesses are volatile and bounds-checked, and never tear for words
/// that lie on their natural boundary.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    base: usize,
    len: usize,
}

/// What one access moves.
pub trait Word: Copy {}
impl Word for u8 {}
impl Word for u16 {}
impl Word for u32 {}
impl Word for u64 {}

impl Region {
    /// A region that holds nothing.
    pub const EMPTY: Self = Self { base: 0, len: 0 };

    /// Makes a region of `len` bytes at `base`.
    ///
    /// # Safety
    /// The range is mapped, and Rust objects live in it only if whoever reads through the region expects them to change.
    pub const unsafe fn new(base: usize, len: usize) -> Self {
        Self { base, len }
    }

    /// Physical address.
    pub const fn base(self) -> usize {
        self.base
    }

    /// Length in bytes.
    pub const fn len(self) -> usize {
        self.len
    }

    /// `len` bytes at `offset` in this region.
    #[track_caller]
    pub fn sub(self, offset: usize, len: usize) -> Self {
        self.check(offset, len);
        Self { base: self.base + offset, len }
    }

    #[track_caller]
    #[inline(always)]
    fn check(self, offset: usize, len: usize) {
        assert!(offset <= self.len && len <= self.len - offset, "access beyond a region");
    }

    /// Reads one word.
    #[track_caller]
    #[inline(always)]
    pub fn read<T: Word>(self, offset: usize) -> T {
        self.check(offset, size_of::<T>());
        // SAFETY: in bounds of a region whose maker promised that it is mapped; callers keep words aligned, and x86
        // takes the others too.
        unsafe { ((self.base + offset) as *const T).read_volatile() }
    }

    /// Writes one word.
    #[track_caller]
    #[inline(always)]
    pub fn write<T: Word>(self, offset: usize, value: T) {
        self.check(offset, size_of::<T>());
        // SAFETY: as for `read`.
        unsafe { ((self.base + offset) as *mut T).write_volatile(value) }
    }

    /// Reads one word that may lie anywhere, as in ACPI tables.
    #[track_caller]
    pub fn read_unaligned<T: Word>(self, offset: usize) -> T {
        self.check(offset, size_of::<T>());
        // SAFETY: in bounds; unaligned on purpose.
        unsafe { ((self.base + offset) as *const T).read_unaligned() }
    }

    /// Copies bytes into the region.
    #[track_caller]
    pub fn copy_in(self, offset: usize, data: &[u8]) {
        self.check(offset, data.len());
        // SAFETY: in bounds, and `data` is Rust's own memory, which no region that is written covers.
        unsafe { copy_bytes((self.base + offset) as *mut u8, data.as_ptr(), data.len()) }
    }

    /// Copies bytes out of the region.
    #[track_caller]
    pub fn copy_out(self, offset: usize, data: &mut [u8]) {
        self.check(offset, data.len());
        // SAFETY: as for `copy_in`.
        unsafe { copy_bytes(data.as_mut_ptr(), (self.base + offset) as *const u8, data.len()) }
    }

    /// Fills a part of the region.
    #[track_caller]
    pub fn fill(self, offset: usize, len: usize, value: u8) {
        self.check(offset, len);
        // SAFETY: in bounds.
        unsafe { fill_bytes((self.base + offset) as *mut u8, value, len) }
    }

    /// The offset of the first byte in `offset..offset + len` that is not `value`.
    #[track_caller]
    pub fn find_other(self, offset: usize, len: usize, value: u8) -> Option<usize> {
        self.check(offset, len);
        (offset..offset + len).find(|&at| self.read::<u8>(at) != value)
    }
}

static NEXT: AtomicUsize = AtomicUsize::new(0);
static END: AtomicUsize = AtomicUsize::new(0);

/// Gives the allocator the RAM at `start..end`.
pub fn init(start: usize, end: usize) {
    NEXT.store(start, Ordering::Relaxed);
    END.store(end, Ordering::Relaxed);
}

/// Bytes that the allocator still has.
pub fn left() -> usize {
    END.load(Ordering::Relaxed).saturating_sub(NEXT.load(Ordering::Relaxed))
}

fn take(len: usize, align: usize) -> Option<usize> {
    let mut start = 0;
    NEXT.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
        start = next.checked_next_multiple_of(align)?;
        start.checked_add(len).filter(|&end| end <= END.load(Ordering::Relaxed))
    })
    .ok()
    .map(|_| start)
}

/// The first address behind the RAM that the image and the allocator's memory lie in.
pub fn end() -> usize {
    END.load(Ordering::Relaxed)
}

/// Takes zeroed memory that devices may use, for good. The guest ends if there is none left.
pub fn dma(len: usize, align: usize) -> Region {
    let Some(base) = take(len, align) else {
        fail(format_args!("memory where=allocator expected={len} bytes got={} left", left()))
    };
    // SAFETY: taken from RAM that is mapped, and nobody else gets it.
    let region = unsafe { Region::new(base, len) };
    region.fill(0, len, 0);
    region
}

struct Bump;

#[global_allocator]
static HEAP: Bump = Bump;

// SAFETY: `take` hands out disjoint, aligned ranges of RAM, atomically.
unsafe impl GlobalAlloc for Bump {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size(), layout.align()).map_or(core::ptr::null_mut(), |start| start as *mut u8)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // The newest block can be given back, which serves the strings that are made and dropped in between.
        let start = block as usize;
        let _ = NEXT.compare_exchange(start + layout.size(), start, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// # Safety
/// As for `memcpy`.
#[inline(always)]
unsafe fn copy_bytes(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: the caller's ranges are valid and do not overlap; the direction flag is clear.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags))
    }
}

/// # Safety
/// As for `memset`.
#[inline(always)]
unsafe fn fill_bytes(to: *mut u8, value: u8, len: usize) {
    // SAFETY: the caller's range is valid; the direction flag is clear.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") value, options(nostack, preserves_flags))
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller keeps C's promises.
    unsafe { copy_bytes(to, from, len) }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: copying upwards reads each byte before it is overwritten.
        unsafe { copy_bytes(to, from, len) }
    } else {
        // SAFETY: `from` lies below an overlapping `to`: copying downwards is right; the flag is cleared again.
        unsafe {
            asm!("std", "rep movsb", "cld", inout("rcx") len => _, inout("rdi") to.add(len).sub(1) => _,
                inout("rsi") from.add(len).sub(1) => _, options(nostack));
        }
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller keeps C's promises.
    unsafe { fill_bytes(to, value as u8, len) }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    for at in 0..len {
        // SAFETY: the caller keeps C's promises. Volatile, or the compiler would make this loop a call to memcmp.
        let (a, b) = unsafe { (left.add(at).read_volatile(), right.add(at).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    // SAFETY: the caller keeps C's promises.
    unsafe { memcmp(left, right, len) }
}
