//! Descriptors as they come with messages. A client may pass any descriptor that it has open, and closing one may
//! wait for the other side: a file server (FUSE) is asked to flush, a TCP socket may linger. The kinds that a message
//! can need close at once; all others are closed here, by threads that no other thread waits for.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::net::AddressFamily;
use rustix::net::sockopt::socket_domain;
use rustix::process::{Resource, Rlimit};
use tracing::warn;

use crate::descriptor;

/// Most threads that close something. With so many waiting, a client waits for its own descriptors itself.
const MOST_CLOSING: usize = 8;
static CLOSING: AtomicUsize = AtomicUsize::new(0);

/// The descriptors of one message.
#[derive(Debug, Default)]
pub(crate) struct Received {
    /// Those of kinds that some message can need.
    pub(crate) files: Vec<OwnedFd>,
    /// How many others came, which are closed.
    pub(crate) strange: usize,
}

impl Received {
    /// Takes what came with a piece of the message.
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
}

/// Allows this process as many descriptors as it may have: clients bring several for each ring.
pub(crate) fn raise_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    if let Err(error) = raised {
        warn!(%error, "raising the limit of open descriptors to its maximum");
    }
}

/// Whether it is shared memory, an eventfd, a Unix socket or a pipe. The kernel answers all of these questions
/// without asking another process.
fn is_known(file: &OwnedFd) -> bool {
    rustix::fs::fcntl_get_seals(file).is_ok()
        || descriptor::is_eventfd(file.as_fd())
        || socket_domain(file) == Ok(AddressFamily::UNIX)
        || is_pipe(file)
}

/// Whether it is a pipe without a name: a FIFO in a file system may have a server that answers nothing.
fn is_pipe(file: &OwnedFd) -> bool {
    rustix::pipe::fcntl_getpipe_size(file).is_ok()
        && std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .is_ok_and(|name| name.as_os_str().as_bytes().starts_with(b"pipe:["))
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
