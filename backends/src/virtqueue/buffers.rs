//! I/O vectors over guest memory, in host addresses.
//!
//! The queue fills a [`GuestIo`] and hands it to the kernel as it is. It keeps the guest memory of its addresses
//! mapped, so it may be moved and kept at will; only an operation in flight asks for more (see [`crate::io::ring`]).
//!
//! The model: guest memory is no memory of this program. The guest's CPUs, the kernel and other I/O threads write to
//! it at any moment, in any size, and a guest may lay buffers and rings of several queues over each other. So no
//! reference to its bytes is ever made and no value in it is read twice. Bytes are copied out and in, by volatile
//! accesses or by calls that the compiler does not look through; ring indices, which order other accesses, are
//! atomics. Rust has no name for mixed accesses of this kind; like every other VMM, this program relies on the
//! compiler treating them as it treats memory of a device.
#![allow(unsafe_code, reason = "host pointers into guest memory, checked when they are made by the queue")]

mod owned;

use std::ptr;
use std::sync::Arc;

use vm_memory::{GuestMemoryMmap, VolatileSlice};

use crate::virtqueue::GuestMemory;

/// Most pieces of one vector that the kernel takes (IOV_MAX).
pub const MAX_PIECES: usize = 1024;

/// Most bytes of one operation. A read that finds all of them in the page cache copies them within the system call,
/// and this many delay the call by some tenths of a millisecond. Storage needs no more at a time, and a request of a
/// megabyte is still one operation.
pub const MAX_BYTES: u64 = 2 << 20;

/// Pieces that a list keeps room for from one request to the next: as many as requests of a queue of the usual size
/// have.
const KEPT: usize = 256;

/// A list of host-mapped pieces of guest memory, consumed from either end as a request is parsed and served.
#[derive(Debug)]
pub struct GuestIo {
    iov: Vec<libc::iovec>,
    /// Pieces before this index are used up.
    first: usize,
    /// Bytes left in all pieces.
    len: u64,
    /// The byte that was taken off the end last, or null.
    last: *mut u8,
    /// The memory that holds the pieces.
    mem: Option<GuestMemory>,
}

impl Default for GuestIo {
    fn default() -> Self {
        Self { iov: Vec::new(), first: 0, len: 0, last: ptr::null_mut(), mem: None }
    }
}

impl GuestIo {
    /// Empties the list, for pieces of this memory. The allocation is kept.
    #[inline]
    pub(crate) fn reset(&mut self, mem: &GuestMemory) {
        self.clear();
        if self.memory() != Arc::as_ptr(mem) {
            self.change_memory(mem);
        }
    }

    /// The address of the memory that is kept, or null: compared at once, where an `Option` is looked into first.
    #[inline(always)]
    fn memory(&self) -> *const GuestMemoryMmap {
        self.mem.as_ref().map_or(ptr::null(), Arc::as_ptr)
    }

    #[cold]
    fn change_memory(&mut self, mem: &GuestMemory) {
        self.mem = Some(Arc::clone(mem));
    }

    /// Empties the list and keeps its allocation.
    #[inline]
    pub(crate) fn clear(&mut self) {
        self.iov.clear();
        self.first = 0;
        self.len = 0;
        self.last = ptr::null_mut();
    }

    /// Frees the memory that only an unusually long list has needed. Its contents are lost.
    #[inline]
    pub(crate) fn trim(&mut self) {
        if self.iov.capacity() > KEPT {
            self.shrink();
        }
    }

    #[cold]
    fn shrink(&mut self) {
        self.clear();
        self.iov = Vec::new();
    }

    /// Appends a piece. Empty ones are left out.
    ///
    /// # Safety
    /// `base..base + len` must be mapped, and stay so for as long as the memory of the last [`Self::reset`] does or,
    /// without one, for as long as this list is used.
    pub(crate) unsafe fn push(&mut self, base: *mut u8, len: usize) {
        if len > 0 {
            self.iov.push(libc::iovec { iov_base: base.cast(), iov_len: len });
            self.len += len as u64;
        }
    }

    /// Appends the rest of another list, all of which lies in one guest's memory.
    pub(crate) fn append(&mut self, other: &Self) {
        if let Some(mem) = &other.mem
            && self.memory() != Arc::as_ptr(mem)
        {
            self.change_memory(mem);
        }
        self.iov.extend_from_slice(other.pieces());
        self.len += other.len;
    }

    /// Has the CPU fetch the bytes that will be read first, while it does something else.
    #[inline]
    pub(crate) fn fetch_front(&self) {
        #[cfg(target_arch = "x86_64")]
        if let Some(piece) = self.iov.get(self.first) {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a hint, of an address that is mapped.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(piece.iov_base.cast()) };
        }
    }

    /// Has the CPU fetch where the last byte will be written, while it does something else.
    #[inline]
    pub(crate) fn fetch_back(&self) {
        #[cfg(target_arch = "x86_64")]
        if let Some(piece) = self.iov.last().filter(|_| self.first < self.iov.len()) {
            use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
            // SAFETY: a hint, of an address that is mapped: no piece is empty.
            unsafe { _mm_prefetch::<_MM_HINT_ET0>(piece.iov_base.cast::<i8>().add(piece.iov_len - 1)) };
        }
    }

    /// Bytes left.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether no byte is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The pieces left, for the kernel.
    #[must_use]
    pub fn pieces(&self) -> &[libc::iovec] {
        &self.iov[self.first..]
    }

    /// The pieces of one operation: all that are left or, if these have too many bytes, as many from the front as
    /// fit. At least one piece is returned, of which the ring takes as much as it may.
    #[inline]
    pub(crate) fn next_pieces(&self) -> &[libc::iovec] {
        if self.len <= MAX_BYTES { self.pieces() } else { self.first_pieces() }
    }

    #[cold]
    fn first_pieces(&self) -> &[libc::iovec] {
        let pieces = self.pieces();
        let mut room = MAX_BYTES;
        let fit = pieces.iter().take_while(|piece| {
            let left = room.checked_sub(piece.iov_len as u64);
            room = left.unwrap_or(0);
            left.is_some()
        });
        let count = fit.count();
        &pieces[..count.max(1)]
    }

    /// Whether every piece starts at a multiple of `base` and has a multiple of `len` bytes, both powers of two.
    #[must_use]
    pub fn is_aligned(&self, base: usize, len: usize) -> bool {
        self.pieces().iter().all(|piece| piece.iov_base as usize & (base - 1) == 0 && piece.iov_len & (len - 1) == 0)
    }

    /// Drops `count` bytes (at most all) from the front.
    pub fn advance(&mut self, count: u64) {
        let mut left = count.min(self.len);
        self.len -= left;
        while left > 0 {
            let piece = &mut self.iov[self.first];
            if (piece.iov_len as u64) <= left {
                left -= piece.iov_len as u64;
                self.first += 1;
            } else {
                // SAFETY: `left` is below the piece's length, so the result stays inside it.
                piece.iov_base = unsafe { piece.iov_base.add(left as usize) };
                piece.iov_len -= left as usize;
                left = 0;
            }
        }
    }

    /// Takes the last byte off, for [`Self::set_last`] once its value is known. Returns whether there was one.
    #[inline]
    pub fn take_last(&mut self) -> bool {
        if self.first >= self.iov.len() {
            return false;
        }
        let piece = self.iov.last_mut().expect("a piece is left");
        self.len -= 1;
        piece.iov_len -= 1;
        // SAFETY: no piece is empty, so this was the last byte of its.
        self.last = unsafe { piece.iov_base.cast::<u8>().add(piece.iov_len) };
        if piece.iov_len == 0 {
            self.iov.pop();
        }
        true
    }

    /// Writes the byte that [`Self::take_last`] took off last, if it took one.
    #[inline]
    pub fn set_last(&self, value: u8) {
        if !self.last.is_null() {
            // SAFETY: it was the end of a piece, which is mapped for as long as the list is.
            unsafe { self.last.write_volatile(value) }
        }
    }

    /// Copies bytes from the front out of guest memory without consuming them; returns how many there were.
    pub fn copy_to(&self, buf: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.pieces() {
            if done == buf.len() {
                break;
            }
            done += slice(piece).copy_to(&mut buf[done..]);
        }
        done
    }

    /// Copies bytes into guest memory from the front without consuming room; returns how many fitted.
    #[inline]
    pub fn copy_from(&self, buf: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.pieces() {
            if done == buf.len() {
                break;
            }
            let part = slice(piece);
            let count = part.len().min(buf.len() - done);
            part.copy_from(&buf[done..done + count]);
            done += count;
        }
        done
    }

    /// Copies bytes into guest memory, starting `offset` bytes after the front; returns how many fitted.
    pub fn copy_from_at(&self, mut offset: u64, buf: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.pieces() {
            let part = slice(piece);
            let skip = offset.min(part.len() as u64) as usize;
            offset -= skip as u64;
            let count = (part.len() - skip).min(buf.len() - done);
            if count > 0 {
                // The offset is within the piece, so this is a part of it.
                part.offset(skip).expect("within the piece").copy_from(&buf[done..done + count]);
                done += count;
            }
        }
        done
    }

    /// Copies exactly `N` bytes from the front and consumes them, or returns `None` and consumes nothing.
    #[inline(always)]
    pub fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let Some(piece) = self.iov.get_mut(self.first).filter(|piece| piece.iov_len >= N) else {
            return self.take_from_several();
        };
        let (base, left) = (piece.iov_base, piece.iov_len - N);
        if left == 0 {
            self.first += 1;
        } else {
            // SAFETY: the piece continues after these bytes.
            piece.iov_base = unsafe { base.add(N) };
            piece.iov_len = left;
        }
        self.len -= N as u64;
        // SAFETY: the piece is mapped, and had as many bytes.
        Some(unsafe { read_once(base.cast()) })
    }

    #[cold]
    #[inline(never)]
    fn take_from_several<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = self.peek_at_several()?;
        self.advance(N as u64);
        Some(bytes)
    }

    /// Copies exactly `N` bytes from the front, or returns `None` if there are fewer.
    #[inline(always)]
    pub fn peek<const N: usize>(&self) -> Option<[u8; N]> {
        match self.pieces() {
            // SAFETY: the piece is mapped, and has as many bytes.
            [piece, ..] if piece.iov_len >= N => Some(unsafe { read_once(piece.iov_base.cast()) }),
            _ => self.peek_at_several(),
        }
    }

    /// Not inlined: the compiler must not discover that it can read guest memory again instead of the copy.
    #[cold]
    #[inline(never)]
    fn peek_at_several<const N: usize>(&self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.copy_to(&mut bytes) == N).then_some(bytes)
    }
}

/// Reads bytes that may lie at any address and change at any moment, each once.
///
/// # Safety
/// `from` must be mapped for `N` bytes.
#[inline(always)]
pub(crate) unsafe fn read_once<const N: usize>(from: *const u8) -> [u8; N] {
    let mut bytes = [0; N];
    if N.is_multiple_of(8) && from.cast::<u64>().is_aligned() {
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            // SAFETY: promised by the caller, and aligned.
            let value = unsafe { from.cast::<u64>().add(index).read_volatile() };
            word.copy_from_slice(&value.to_ne_bytes());
        }
    } else if N % 8 == 4 && from.cast::<u32>().is_aligned() {
        for (index, word) in bytes.chunks_exact_mut(4).enumerate() {
            // SAFETY: as above.
            let value = unsafe { from.cast::<u32>().add(index).read_volatile() };
            word.copy_from_slice(&value.to_ne_bytes());
        }
    } else {
        // SAFETY: promised by the caller.
        bytes = unsafe { read_bytes_once(from) };
    }
    bytes
}

/// The same, byte by byte: drivers align what they share.
///
/// # Safety
/// As for [`read_once`].
#[cold]
#[inline(never)]
unsafe fn read_bytes_once<const N: usize>(from: *const u8) -> [u8; N] {
    // SAFETY: promised by the caller, and a byte may lie anywhere.
    std::array::from_fn(|at| unsafe { from.add(at).read_volatile() })
}

fn slice(piece: &libc::iovec) -> VolatileSlice<'_> {
    // SAFETY: `push` was promised that the piece is mapped for as long as the list, which is borrowed; no reference
    // to its bytes exists.
    unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) }
}

/// One descriptor chain in host addresses. Reused from request to request, so that popping does not allocate.
#[derive(Debug, Default)]
pub struct Chain {
    /// Index of the first descriptor, which `complete` expects.
    pub head: u16,
    /// Device-readable bytes.
    pub readable: GuestIo,
    /// Device-writable bytes.
    pub writable: GuestIo,
    /// A buffer was not (entirely) in guest memory, or in far too many regions of it. The lists hold only the buffers
    /// before it and, if it is valid, the last one.
    pub unmapped: bool,
}

impl Chain {
    /// Has the CPU fetch the bytes that a device reads first and writes last: the header and the status of a request.
    #[inline]
    pub(crate) fn fetch(&self) {
        self.readable.fetch_front();
        self.writable.fetch_back();
    }

    /// Gives back memory that only an unusual chain has needed, once the chain is done with.
    #[inline]
    pub(crate) fn trim(&mut self) {
        self.readable.trim();
        self.writable.trim();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(buffers: &mut [Vec<u8>]) -> GuestIo {
        let mut io = GuestIo::default();
        for buffer in buffers {
            // SAFETY: the buffers outlive the list in every test below.
            unsafe { io.push(buffer.as_mut_ptr(), buffer.len()) };
        }
        io
    }

    #[test]
    fn both_ends_are_consumed_across_pieces() {
        let mut buffers = [vec![1, 2, 3], vec![], vec![4, 5], vec![6, 7, 8]];
        let mut io = over(&mut buffers);
        assert_eq!(io.len(), 8);
        io.set_last(99);
        for value in 10..14 {
            assert!(io.take_last());
            io.set_last(value);
        }
        assert_eq!(io.take::<3>(), Some([1, 2, 3]));
        assert_eq!(io.take::<2>(), None, "one byte is left and stays");
        assert_eq!(io.take::<1>(), Some([4]));
        assert!(io.is_empty());
        assert!(!io.take_last());
        assert_eq!(io.take::<1>(), None);
        assert_eq!(io.take::<0>(), Some([]));
        drop(io);
        assert_eq!(buffers, [vec![1, 2, 3], vec![], vec![4, 13], vec![12, 11, 10]]);
    }

    #[test]
    fn bytes_are_taken_from_one_piece_or_several_at_any_address() {
        let whole: Vec<u8> = (0..64).collect();
        for start in 0..9 {
            for cut in 0..=40 {
                let mut buffers = [whole[start..start + cut].to_vec(), whole[start + cut..].to_vec()];
                let mut moved = whole.clone();
                for mut io in [over(&mut buffers), over(&mut [moved.split_off(start)])] {
                    assert_eq!(io.peek::<12>().unwrap()[..], whole[start..start + 12]);
                    let (sixteen, twelve) = (io.take::<16>().unwrap(), io.take::<12>().unwrap());
                    assert_eq!([&sixteen[..], &twelve].concat(), whole[start..start + 28]);
                    assert_eq!(io.len(), (64 - start - 28) as u64);
                }
            }
        }
    }

    #[test]
    fn copies_stop_at_the_end() {
        let mut buffers = [vec![0; 3], vec![0; 2]];
        let io = over(&mut buffers);
        assert_eq!(io.copy_from(&[9; 7]), 5);
        assert_eq!(io.copy_from_at(2, &[7; 2]), 2);
        assert_eq!(io.copy_from_at(4, &[8; 2]), 1);
        assert_eq!(io.copy_from_at(5, &[1]), 0);
        drop(io);
        assert_eq!(buffers, [vec![9, 9, 7], vec![7, 8]]);
    }

    #[test]
    fn one_operation_has_no_more_than_it_may() {
        let most = MAX_BYTES as usize;
        let pieces = |lens: &[usize]| {
            // Nothing looks at the bytes.
            let mut io = GuestIo::default();
            // SAFETY: as above.
            lens.iter().for_each(|&len| unsafe { io.push(ptr::dangling_mut(), len) });
            io.next_pieces().len()
        };
        assert_eq!(pieces(&[]), 0);
        assert_eq!(pieces(&[most]), 1);
        assert_eq!(pieces(&[512, most - 512]), 2);
        assert_eq!(pieces(&[512, most - 512, 1, 1]), 2);
        assert_eq!(pieces(&[512, most, 512]), 1);
        assert_eq!(pieces(&[usize::MAX >> 8, 1]), 1);
    }

    #[test]
    fn alignment_looks_at_every_piece() {
        let mut memory = vec![0u8; 4096 * 3];
        let start = memory.as_mut_ptr() as usize;
        let base = (start + 4095) & !4095;
        let at = |offset: usize| memory.as_ptr().cast_mut().wrapping_add(base - start + offset);
        let mut io = GuestIo::default();
        // SAFETY: both pieces lie in `memory`.
        unsafe {
            io.push(at(0), 512);
            io.push(at(1024), 512);
        }
        assert!(io.is_aligned(512, 512));
        assert!(!io.is_aligned(4096, 512));
        io.advance(1);
        assert!(!io.is_aligned(512, 512));
    }
}
