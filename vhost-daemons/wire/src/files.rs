//! Descriptors as they come with messages. A peer may pass any descriptor that it has open, and closing one may
//! wait for the other side: a file server (FUSE) is asked to flush, a TCP socket may linger. The kinds that a message
//! can need close at once; all others are closed here, by threads that no other thread waits for.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::net::AddressFamily;
use rustix::net::sockopt::socket_domain;
use thiserror::Error;

/// Most threads that close descriptors. While that many wait, the receiver has to wait for its peer's descriptors.
const MOST_CLOSING: usize = 8;
static CLOSING: AtomicUsize = AtomicUsize::new(0);

/// Why the descriptors of a message are closed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum WrongFiles {
    /// More than a message of its kind can bring.
    #[error("{count} descriptors came with it, at most {most} can")]
    TooMany {
        /// How many came.
        count: usize,
        /// How many can.
        most: usize,
    },
    /// No message needs one of this kind.
    #[error("its descriptor is neither shared memory nor an eventfd, a pipe or a Unix socket")]
    Strange,
}

/// The descriptors of one message.
#[derive(Debug, Default)]
pub(crate) struct Received {
    /// Those of kinds that some message can need.
    files: Vec<OwnedFd>,
    /// How many others came, which are closed.
    strange: usize,
}

impl Received {
    /// Takes the descriptors that came with a piece of the message.
    pub(crate) fn extend(&mut self, came: impl Iterator<Item = OwnedFd>) {
        let (known, strange): (Vec<_>, Vec<_>) = came.partition(is_known);
        self.files.extend(known);
        self.strange += strange.len();
        if !strange.is_empty() {
            close(strange);
        }
    }

    /// How many came.
    pub(crate) fn count(&self) -> usize {
        self.files.len() + self.strange
    }

    /// The descriptors of a message that can bring so many.
    pub(crate) fn at_most(self, most: usize) -> Result<Vec<OwnedFd>, WrongFiles> {
        match self.count() {
            count if count > most => Err(WrongFiles::TooMany { count, most }),
            _ if self.strange > 0 => Err(WrongFiles::Strange),
            _ => Ok(self.files),
        }
    }
}

/// Whether it is an eventfd. Without /proc there is no way to tell, and then it is taken for one.
#[must_use]
pub fn is_eventfd(fd: BorrowedFd<'_>) -> bool {
    target(fd).is_none_or(|target| target.as_os_str() == "anon_inode:[eventfd]")
}

/// Whether it is shared memory, an eventfd, a Unix socket or a pipe. The kernel answers all of these questions
/// without asking another process.
fn is_known(file: &OwnedFd) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok()
        || is_eventfd(file.as_fd())
        || socket_domain(file) == Ok(AddressFamily::UNIX)
        || is_pipe(file)
}

/// Whether it is a pipe without a name: a FIFO in a file system may have a server that answers nothing.
fn is_pipe(file: &OwnedFd) -> bool {
    rustix::pipe::fcntl_getpipe_size(file).is_ok()
        && target(file.as_fd()).is_some_and(|target| target.as_os_str().as_bytes().starts_with(b"pipe:["))
}

/// What the kernel says that a descriptor of this thread leads to.
fn target(fd: BorrowedFd<'_>) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/thread-self/fd/{}", fd.as_raw_fd())).ok()
}

fn close(files: Vec<OwnedFd>) {
    let begun =
        CLOSING.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| (count < MOST_CLOSING).then_some(count + 1));
    if begun.is_ok() {
        let closing = std::thread::Builder::new().name("close".into()).stack_size(64 << 10).spawn(move || {
            drop(files);
            CLOSING.fetch_sub(1, Ordering::Relaxed);
        });
        // Without a thread they were closed here.
        if closing.is_err() {
            CLOSING.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
