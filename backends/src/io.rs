//! The data ring as one request sees it.
#![allow(unsafe_code, reason = "passes the data ring's contract on to handlers")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use crate::guest_io::GuestIo;
use crate::ring::{MAX_PIECES, Ring, Token};

/// Pushes the operations of one request, at most one at a time.
pub struct Io<'a> {
    ring: &'a mut Ring,
    token: Token,
}

impl<'a> Io<'a> {
    pub(crate) fn new(ring: &'a mut Ring, token: Token) -> Self {
        Self { ring, token }
    }

    /// Reads into the pieces of `data` from `offset` on.
    ///
    /// # Safety
    /// `data` must not be changed or dropped before the request is resumed. What is kept in the request's chain or state
    /// is safe from being dropped: the worker keeps both until then.
    pub unsafe fn read(&mut self, fd: BorrowedFd<'_>, data: &GuestIo, offset: u64) {
        // SAFETY: promised by the caller, and guest memory lives as long as the queue, which outlives the ring's use of it.
        unsafe { self.ring.read(self.token, fd, data.pieces(), offset) }
    }

    /// Reads what is there now, from what has no offset: EAGAIN if there is nothing.
    ///
    /// # Safety
    /// As for [`Self::read`].
    pub unsafe fn read_now(&mut self, fd: BorrowedFd<'_>, data: &GuestIo) {
        // SAFETY: as in `read`.
        unsafe { self.ring.read_now(self.token, fd, data.pieces()) }
    }

    /// Writes the pieces of `data` at `offset`, through to stable storage if `durable`.
    ///
    /// # Safety
    /// As for [`Self::read`].
    pub unsafe fn write(&mut self, fd: BorrowedFd<'_>, data: &GuestIo, offset: u64, durable: bool) {
        // SAFETY: as in `read`.
        unsafe { self.ring.write(self.token, fd, data.pieces(), offset, durable) }
    }

    /// Writes the pieces of `data` at `offset` here and now, not by the ring; as many of them as one system call takes.
    ///
    /// # Errors
    /// As of pwritev(2).
    pub fn write_now(&mut self, fd: BorrowedFd<'_>, data: &GuestIo, offset: u64) -> io::Result<u64> {
        let pieces = data.pieces();
        let count = pieces.len().min(MAX_PIECES) as libc::c_int;
        // SAFETY: the pieces are mapped for as long as the queue lives, whose handler is calling.
        let written = unsafe { libc::pwritev(fd.as_raw_fd(), pieces.as_ptr(), count, offset as libc::off_t) };
        u64::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Reads into a buffer of the host's.
    ///
    /// # Safety
    /// The buffer must stay where it is until the request is resumed, and nothing else may touch it.
    pub unsafe fn read_buf(&mut self, fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) {
        let piece = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: promised by the caller; a single piece is passed by value.
        unsafe { self.ring.read(self.token, fd, &[piece], offset) }
    }

    /// Writes a buffer of the host's, through to stable storage if `durable`.
    ///
    /// # Safety
    /// The buffer must stay as it is until the request is resumed.
    pub unsafe fn write_buf(&mut self, fd: BorrowedFd<'_>, buf: &[u8], offset: u64, durable: bool) {
        let piece = libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() };
        // SAFETY: promised by the caller; a single piece is passed by value, and a write does not change it.
        unsafe { self.ring.write(self.token, fd, &[piece], offset, durable) }
    }

    /// Makes the file's data durable.
    pub fn sync_data(&mut self, fd: BorrowedFd<'_>) {
        self.ring.sync_data(self.token, fd);
    }

    /// Deallocates or zeroes a range, see fallocate(2).
    pub fn fallocate(&mut self, fd: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) {
        self.ring.fallocate(self.token, fd, mode, offset, len);
    }

    /// Resumes the request when the file can be read or has failed.
    pub fn wait_readable(&mut self, fd: BorrowedFd<'_>) {
        self.ring.poll(self.token, fd, libc::POLLIN as u32);
    }

    /// Resumes the request when the file can be written or has failed.
    pub fn wait_writable(&mut self, fd: BorrowedFd<'_>) {
        self.ring.poll(self.token, fd, libc::POLLOUT as u32);
    }

    /// Resumes the request after a pause.
    pub fn sleep(&mut self, pause: Duration) {
        self.ring.sleep(self.token, pause);
    }
}
