//! Tells when a daemon has nothing in flight in the kernel any more.
//!
//! Direct I/O outlives the process that asked for it: the device still writes to the image, or to the guest's memory,
//! when the process has long been reaped. A daemon of ours registers one end of a pipe with each of its io_urings
//! (`--sentinel-fd`). The kernel lets go of it when the last ring is destroyed, after the last operation in it, and
//! the other end then reads as closed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

/// Our end of the pipe.
#[derive(Debug)]
pub(super) struct Sentinel(OwnedFd);

impl Sentinel {
    /// Makes one, and the end that the daemon is given.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        Ok((Self(ours), theirs))
    }

    /// Whether nothing is in flight any more, waiting for so long at most or for as long as it takes.
    pub(super) fn is_over(&self, limit: Option<Duration>) -> bool {
        // Bytes written to it do not matter, only its end.
        wait_for(self.0.as_fd(), PollFlags::empty(), limit)
    }
}

/// Waits until a descriptor is ready. Returns whether it is.
pub(super) fn wait_for(fd: BorrowedFd<'_>, what: PollFlags, limit: Option<Duration>) -> bool {
    let deadline = limit.map(|limit| Instant::now() + limit);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let mut fds = [PollFd::from_borrowed_fd(fd, what)];
        match poll(&mut fds, left.map(timespec).as_ref()) {
            Ok(0) => return false,
            Ok(_) => return true,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

pub(super) fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() }
}
