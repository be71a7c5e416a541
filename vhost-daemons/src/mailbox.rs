//! The process's requests to a device's control thread, and how that thread waits: for its client, for mail, and
//! never longer than it was told.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use ringvm_backends::device::Device;
use ringvm_backends::stats::DeviceStats;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;

/// An event that is raised by one side and awaited by the other.
#[derive(Debug)]
pub(crate) struct Event(OwnedFd);

impl Event {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(crate) fn raise(&self) {
        // EAGAIN: it is raised already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    fn clear(&self) {
        // EAGAIN: another thread was faster.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A control thread's letter box.
#[derive(Debug)]
pub(crate) struct Mailbox {
    mail: Event,
    stop: AtomicBool,
    /// Whom the thread may be waiting for in the middle of a message.
    peer: Mutex<Option<UnixStream>>,
    asked: Mutex<Vec<SyncSender<DeviceStats>>>,
}

/// Why a wait has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// The awaited event has come.
    Ready,
    /// Something is in the letter box.
    Mail,
    /// The alarm was raised.
    Alarm,
    /// The time is over.
    Late,
}

impl Mailbox {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { mail: Event::new()?, stop: AtomicBool::new(false), peer: Mutex::default(), asked: Mutex::default() })
    }

    /// Asks the thread to end, and has it wait for its client no longer.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.mail.raise();
        if let Some(peer) = &*self.peer.lock().unwrap_or_else(PoisonError::into_inner) {
            // It fails for a client that has gone.
            drop(peer.shutdown(Shutdown::Both));
        }
    }

    /// Says who is served from now on.
    pub(crate) fn serves(&self, peer: Option<UnixStream>) {
        *self.peer.lock().unwrap_or_else(PoisonError::into_inner) = peer;
    }

    /// Whether the thread is to end.
    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Asks for the device's statistics.
    pub(crate) fn ask_stats(&self, answer: SyncSender<DeviceStats>) {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(answer);
        self.mail.raise();
    }

    /// Answers what was asked.
    pub(crate) fn serve(&self, device: &dyn Device) {
        self.mail.clear();
        for answer in self.asked.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // The requester may have given up.
            drop(answer.try_send(device.stats()));
        }
    }

    /// Waits for `fd`, if there is one, for mail, and for the alarm of a session.
    pub(crate) fn wait(
        &self,
        fd: Option<(BorrowedFd<'_>, PollFlags)>,
        alarm: Option<&Event>,
        deadline: Option<Instant>,
    ) -> io::Result<Woken> {
        let mut fds = vec![PollFd::new(&self.mail, PollFlags::IN)];
        let alarm_at = alarm.map(|alarm| {
            fds.push(PollFd::new(alarm, PollFlags::IN));
            fds.len() - 1
        });
        let fd_at = fd.map(|(fd, flags)| {
            fds.push(PollFd::from_borrowed_fd(fd, flags));
            fds.len() - 1
        });
        poll(&mut fds, deadline)?;
        let ready = |at: Option<usize>| at.is_some_and(|at| !fds[at].revents().is_empty());
        Ok(match () {
            () if ready(alarm_at) => Woken::Alarm,
            () if ready(Some(0)) => Woken::Mail,
            () if ready(fd_at) => Woken::Ready,
            () => Woken::Late,
        })
    }
}

/// Tells whether a result is still wanted: not once the client has gone or the daemon is to end.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    mailbox: &'a Mailbox,
    peer: OwnedFd,
}

impl<'a> Wanted<'a> {
    /// Wanted by the client at the other end of a connection.
    pub(crate) fn by(peer: BorrowedFd<'_>, mailbox: &'a Mailbox) -> io::Result<Self> {
        Ok(Self { mailbox, peer: peer.try_clone_to_owned()? })
    }

    pub(crate) fn still(&self) -> bool {
        let mut fds = [PollFd::new(&self.peer, PollFlags::empty())];
        let gone = matches!(rustix::event::poll(&mut fds, Some(&Timespec::default())), Ok(1));
        !gone && !self.mailbox.stopped()
    }
}

/// Waits until one of the descriptors is ready or the time is over, also across signals.
pub(crate) fn poll(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<usize> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
        match rustix::event::poll(fds, left.as_ref()) {
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}
