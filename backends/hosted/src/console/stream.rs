//! A descriptor of the host's end: registered with the console's epoll instance, and never waited for.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::termios::isatty;
use tracing::debug;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Bytes written at once. A pipe that polls writable takes them without blocking (PIPE_BUF). And a socket has room again when
/// its reader has read what one write brought: pieces much longer would hide that a slow reader reads.
const PIECE: usize = 4096;

/// The state of a descriptor in the epoll instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watch {
    /// Not in it: not even a hang-up is reported, which would be reported again and again.
    Off,
    /// In it. Errors and hang-ups are reported beside these events.
    On(EventSet),
    /// Can't be in it, as a regular file, which is always ready.
    Never,
}

/// A descriptor and its place in an epoll instance.
#[derive(Debug)]
pub(super) struct Stream {
    file: File,
    /// The open file description is shared with other processes, so O_NONBLOCK can't be set.
    may_block: bool,
    epoll: Arc<Epoll>,
    token: u64,
    watch: Watch,
}

impl Stream {
    /// A descriptor that only this process has, and that is non-blocking or a regular file.
    pub(super) fn own(file: File, epoll: &Arc<Epoll>, token: u64) -> Self {
        Self { file, may_block: false, epoll: Arc::clone(epoll), token, watch: Watch::Off }
    }

    /// A descriptor that other processes may have as well, such as standard output.
    pub(super) fn inherited(file: File, write: bool, epoll: &Arc<Epoll>, token: u64) -> Self {
        // A terminal can be opened once more, for a description of our own: one that polls writable may still block on
        // a write that does not fit.
        let again = isatty(&file).then(|| reopen(&file, write)).flatten();
        let may_block = again.is_none() && !fcntl_getfl(&file).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        let mut stream = Self::own(again.unwrap_or(file), epoll, token);
        stream.may_block = may_block;
        stream
    }

    /// Reads what is there. `WouldBlock` if nothing is.
    pub(super) fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.check(PollFlags::IN)?;
        self.file.read(data)
    }

    /// Writes what there is room for. `WouldBlock` if there is none.
    pub(super) fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.check(PollFlags::OUT)?;
        self.file.write(&data[..data.len().min(PIECE)])
    }

    fn check(&self, flags: PollFlags) -> io::Result<()> {
        if self.may_block && self.poll(flags, Some(&Timespec::default())).is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    }

    fn poll(&self, flags: PollFlags, timeout: Option<&Timespec>) -> PollFlags {
        let mut fds = [PollFd::new(&self.file, flags)];
        match poll(&mut fds, timeout) {
            Ok(_) => fds[0].revents(),
            Err(_) => PollFlags::empty(),
        }
    }

    /// Waits until it can be written to, for a limited time.
    pub(super) fn wait_writable(&self, timeout: Duration) -> bool {
        let timeout = Timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: i64::from(timeout.subsec_nanos()) };
        self.poll(PollFlags::OUT, Some(&timeout)).contains(PollFlags::OUT)
    }

    /// Whether nobody reads the other end.
    pub(super) fn has_hung_up(&self) -> bool {
        self.poll(PollFlags::empty(), Some(&Timespec::default())).intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// Whether it is a regular file: no event will ever tell that it is ready, it always is.
    pub(super) fn is_always_ready(&self) -> bool {
        self.watch == Watch::Never
    }

    /// Sets the events that wake the device, beside errors and hang-ups; `None` for nothing at all. Returns whether nothing
    /// was watched before.
    pub(super) fn watch(&mut self, events: Option<EventSet>) -> bool {
        let next = events.map_or(Watch::Off, Watch::On);
        let was_off = self.watch == Watch::Off;
        let operation = match (self.watch, next) {
            (Watch::Never, _) => return false,
            (old, new) if old == new => return false,
            (Watch::Off, _) => ControlOperation::Add,
            (_, Watch::Off) => ControlOperation::Delete,
            _ => ControlOperation::Modify,
        };
        let event = EpollEvent::new(events.unwrap_or(EventSet::empty()), self.token);
        match self.epoll.ctl(operation, self.file.as_raw_fd(), event) {
            Ok(()) => self.watch = next,
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => self.watch = Watch::Never,
            // Out of memory, or of watches of this user. The next turn tries again.
            Err(error) => debug!(%error, "console: epoll_ctl"),
        }
        was_off
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Stream {
    /// Closing is not enough: the entry of a description that is open elsewhere stays.
    fn drop(&mut self) {
        self.watch(None);
    }
}

/// Opens what a descriptor is open at once more, non-blocking.
fn reopen(file: &File, write: bool) -> Option<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().read(!write).write(write).custom_flags(flags).open(path).ok()
}
