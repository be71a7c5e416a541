//! The data ring as one request sees it.
#![allow(unsafe_code, reason = "passes the data ring's contract on to handlers")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::io::ring::{Ring, Token};
use crate::virtqueue::buffers::GuestIo;
#[cfg(doc)]
use crate::virtqueue::buffers::MAX_BYTES;
use crate::virtqueue::buffers::MAX_PIECES;

/// Pushes the operations of one request, at most one at a time.
pub struct Io<'a> {
    /// `None` if the request is left to another server rather than continued.
    ring: Option<&'a mut Ring>,
    token: Token,
}

/// Every operation outlasts the call that pushes it, so each asks its caller for the same: the descriptor stays open
/// until the request is resumed or abandoned.
impl<'a> Io<'a> {
    pub(crate) fn new(ring: &'a mut Ring, token: Token) -> Self {
        Self { ring: Some(ring), token }
    }

    /// Operations pushed here go nowhere: when the worker sees a request wait for one, it abandons the request.
    pub(crate) fn nowhere(token: Token) -> Self {
        Self { ring: None, token }
    }

    /// Whether operations go nowhere.
    pub(crate) fn leads_nowhere(&self) -> bool {
        self.ring.is_none()
    }

    /// The number of the request at its queue.
    pub(crate) fn slot(&self) -> u32 {
        self.token.slot
    }

    /// Reads into the pieces of `data` from `offset` on, at most [`MAX_BYTES`]: the rest is asked for once these are
    /// there.
    ///
    /// # Safety
    /// `data` must not be changed or dropped, nor `fd` closed, before the request is resumed. Values kept in the
    /// request's chain or state are safe from being dropped: the worker keeps both until then.
    #[inline]
    pub unsafe fn read(&mut self, fd: BorrowedFd<'_>, data: &GuestIo, offset: u64) {
        let Some(ring) = &mut self.ring else { return };
        // SAFETY: promised by the caller, and the list keeps guest memory mapped.
        unsafe { ring.read(self.token, fd, data.next_pieces(), offset) }
    }

    /// Reads the next bytes of a file without offsets, such as a tap, and waits for them.
    ///
    /// # Safety
    /// As for [`Self::read`].
    pub unsafe fn read_next(&mut self, fd: BorrowedFd<'_>, data: &GuestIo) {
        let Some(ring) = &mut self.ring else { return };
        // SAFETY: as in `read`.
        unsafe { ring.read(self.token, fd, data.pieces(), u64::MAX) }
    }

    /// Reads the bytes that are there now, from a file without offsets: EAGAIN if there are none.
    ///
    /// # Safety
    /// As for [`Self::read`].
    pub unsafe fn read_now(&mut self, fd: BorrowedFd<'_>, data: &GuestIo) {
        let Some(ring) = &mut self.ring else { return };
        // SAFETY: as in `read`.
        unsafe { ring.read_now(self.token, fd, data.pieces()) }
    }

    /// Writes the pieces of `data` at `offset`, through to stable storage if `durable`; at most [`MAX_BYTES`], as
    /// `read`.
    ///
    /// # Safety
    /// As for [`Self::read`].
    #[inline]
    pub unsafe fn write(&mut self, fd: BorrowedFd<'_>, data: &GuestIo, offset: u64, durable: bool) {
        let Some(ring) = &mut self.ring else { return };
        // SAFETY: as in `read`.
        unsafe { ring.write(self.token, fd, data.next_pieces(), offset, durable) }
    }

    /// Writes the pieces of `data` at `offset` here and now, not by the ring; as many of them as one system call takes.
    ///
    /// # Errors
    /// As of pwritev(2).
    pub fn write_now(&mut self, fd: BorrowedFd<'_>, data: &GuestIo, offset: u64) -> io::Result<u64> {
        let pieces = data.pieces();
        let count = pieces.len().min(MAX_PIECES) as libc::c_int;
        // SAFETY: the list keeps its pieces mapped, and is borrowed for the call.
        let written = unsafe { libc::pwritev(fd.as_raw_fd(), pieces.as_ptr(), count, offset as libc::off_t) };
        u64::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Reads into a buffer of the host's.
    ///
    /// # Safety
    /// The buffer must stay in place until the request is resumed, and nothing else may touch it; `fd` must stay
    /// open.
    pub unsafe fn read_buf(&mut self, fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) {
        let Some(ring) = &mut self.ring else { return };
        let piece = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: promised by the caller; a single piece is passed by value.
        unsafe { ring.read(self.token, fd, &[piece], offset) }
    }

    /// Writes a buffer of the host's, through to stable storage if `durable`.
    ///
    /// # Safety
    /// The buffer must stay as it is until the request is resumed; `fd` must stay open.
    pub unsafe fn write_buf(&mut self, fd: BorrowedFd<'_>, buf: &[u8], offset: u64, durable: bool) {
        let Some(ring) = &mut self.ring else { return };
        let piece = libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() };
        // SAFETY: promised by the caller; a single piece is passed by value, and a write does not change it.
        unsafe { ring.write(self.token, fd, &[piece], offset, durable) }
    }

    /// Makes the file's data durable.
    ///
    /// # Safety
    /// `fd` must stay open until the request is resumed.
    pub unsafe fn sync_data(&mut self, fd: BorrowedFd<'_>) {
        let Some(ring) = &mut self.ring else { return };
        // SAFETY: promised by the caller.
        unsafe { ring.sync_data(self.token, fd) }
    }

    /// Deallocates or zeroes a range, see fallocate(2).
    ///
    /// # Safety
    /// As for [`Self::sync_data`].
    pub unsafe fn fallocate(&mut self, fd: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) {
        let Some(ring) = &mut self.ring else { return };
        // SAFETY: promised by the caller.
        unsafe { ring.fallocate(self.token, fd, mode, offset, len) }
    }

    /// Resumes the request when the file can be read or has failed.
    ///
    /// # Safety
    /// As for [`Self::sync_data`].
    pub unsafe fn wait_readable(&mut self, fd: BorrowedFd<'_>) {
        let Some(ring) = &mut self.ring else { return };
        // SAFETY: promised by the caller.
        unsafe { ring.poll(self.token, fd, libc::POLLIN as u32) }
    }

    /// Resumes the request when the file can be written or has failed.
    ///
    /// # Safety
    /// As for [`Self::sync_data`].
    pub unsafe fn wait_writable(&mut self, fd: BorrowedFd<'_>) {
        let Some(ring) = &mut self.ring else { return };
        // SAFETY: promised by the caller.
        unsafe { ring.poll(self.token, fd, libc::POLLOUT as u32) }
    }
}
