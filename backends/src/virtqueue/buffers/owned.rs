//! Guest memory for async operations, which keep their buffers until they have ended: a part of a request's data that
//! outlives the request's own list.
#![allow(unsafe_code, reason = "buffers of a runtime are raw addresses, kept mapped by what is in them")]

use tokio_uring::buf::{IoBuf, IoBufMut};

use super::{GuestIo, MAX_BYTES, MAX_PIECES};
use crate::virtqueue::GuestMemory;

/// A piece of guest memory as the tokio-uring runtime takes it. It keeps the memory mapped.
///
/// A guest can change the bytes at any moment, so a program must leave looking at them to the kernel.
#[derive(Debug)]
pub(crate) struct GuestBuffer {
    piece: libc::iovec,
    /// Bytes with something in them, as the runtime counts: reads go behind them.
    filled: usize,
    _mem: Option<GuestMemory>,
}

// SAFETY: the address is fixed and stays mapped as long as the value lives.
unsafe impl IoBuf for GuestBuffer {
    fn stable_ptr(&self) -> *const u8 {
        self.piece.iov_base.cast()
    }

    fn bytes_init(&self) -> usize {
        self.filled
    }

    fn bytes_total(&self) -> usize {
        self.piece.iov_len
    }
}

// SAFETY: as above, and all of it may be written to.
unsafe impl IoBufMut for GuestBuffer {
    fn stable_mut_ptr(&mut self) -> *mut u8 {
        self.piece.iov_base.cast()
    }

    unsafe fn set_init(&mut self, filled: usize) {
        self.filled = self.filled.max(filled);
    }
}

impl GuestIo {
    /// Takes `len` bytes (at most all) off the front, as a list of their own. That list may be kept for as long as
    /// anybody likes, whatever becomes of this one.
    #[must_use]
    pub fn split_to(&mut self, len: u64) -> Self {
        let mut front = Self { mem: self.mem.clone(), ..Self::default() };
        let mut left = len.min(self.len);
        while left > 0 {
            let piece = self.iov[self.first];
            let count = left.min(piece.iov_len as u64);
            front.iov.push(libc::iovec { iov_len: count as usize, ..piece });
            front.len += count;
            self.advance(count);
            left -= count;
        }
        front
    }

    /// The buffers to write from in one operation: all bytes that are left, or as many of the first as one operation
    /// takes.
    pub(crate) fn next_filled(&self) -> Vec<GuestBuffer> {
        let mut buffers = self.next_empty();
        buffers.iter_mut().for_each(|buffer| buffer.filled = buffer.piece.iov_len);
        buffers
    }

    /// The same, to read into.
    pub(crate) fn next_empty(&self) -> Vec<GuestBuffer> {
        let mut room = MAX_BYTES as usize;
        let mut buffers = Vec::new();
        for piece in self.pieces().iter().take(MAX_PIECES) {
            let iov_len = piece.iov_len.min(room);
            room -= iov_len;
            buffers.push(GuestBuffer { piece: libc::iovec { iov_len, ..*piece }, filled: 0, _mem: self.mem.clone() });
            if room == 0 {
                break;
            }
        }
        buffers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn over(bytes: &mut [u8], cuts: &[usize]) -> GuestIo {
        let mut io = GuestIo::default();
        let mut rest = bytes;
        for &cut in cuts {
            let (head, tail) = rest.split_at_mut(cut);
            // SAFETY: the bytes outlive the list in these tests.
            unsafe { io.push(head.as_mut_ptr(), head.len()) };
            rest = tail;
        }
        io
    }

    #[test]
    fn a_list_is_cut_anywhere_and_both_parts_are_whole() {
        for cut in 0..=12 {
            let mut bytes: Vec<u8> = (0..12).collect();
            let mut rest = over(&mut bytes, &[3, 4, 5]);
            assert!(rest.take_last());
            let front = rest.split_to(cut);
            let read = |io: &GuestIo| {
                let mut bytes = vec![0; io.len() as usize];
                assert_eq!(io.copy_to(&mut bytes) as u64, io.len());
                bytes
            };
            assert_eq!(front.len(), cut.min(11));
            assert_eq!([read(&front), read(&rest)].concat(), (0..11).collect::<Vec<_>>());
            // The byte that was taken off belongs to the list that it was taken off from.
            rest.set_last(77);
            front.set_last(88);
            assert_eq!(bytes[11], 77);
        }
    }

    #[test]
    fn one_operation_has_no_more_buffers_than_it_may() {
        let mut bytes = vec![0u8; 3 << 20];
        let list = over(&mut bytes, &[1 << 20, 1 << 19, 1 << 20]);
        let lens: Vec<usize> = list.next_filled().iter().map(IoBuf::bytes_init).collect();
        assert_eq!(lens, [1 << 20, 1 << 19, 1 << 19]);
        let list = over(&mut bytes, &[1; 2 * MAX_PIECES]);
        assert_eq!(list.next_filled().len(), MAX_PIECES);
    }
}
