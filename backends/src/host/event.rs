//! Events that other processes hold too: raised, taken and looked at without ever waiting for those processes.
//!
//! All holders of an open file description share its flags. A peer may clear O_NONBLOCK and fill the counter of an
//! eventfd at any moment, and write(2) then sleeps until the peer reads it. So the kernel raises an eventfd for us:
//! it is registered with a small io_uring of its own, and each completion of a no-op signals it. That signal
//! saturates the counter and never waits (`eventfd_signal()`). A pipe is opened once more, to get our own flags; a
//! socket takes flags with each call.
#![allow(unsafe_code, reason = "borrows and reads descriptors whose type has no safe wrapper")]

use std::fmt;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, OnceLock, PoisonError};

use io_uring::{IoUring, opcode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FileType;
use rustix::io::ReadWriteFlags;
use rustix::net::sockopt::socket_domain;
use rustix::net::{AddressFamily, SendFlags};
use vmm_sys_util::eventfd::EventFd;

use crate::host::pipe::{ForeignPipe, NO_OFFSET};

/// The bytes written to pipes and sockets: the same that an eventfd takes.
const ONE: [u8; 8] = 1u64.to_ne_bytes();

/// An event that another process holds as well, and may have put into any state.
pub struct SharedEvent {
    way: OnceLock<Way>,
    /// The descriptor to make the way from, if that was put off until it is needed.
    later: Option<OwnedFd>,
}

/// How it is raised.
enum Way {
    /// An eventfd: by a completion of this ring.
    Eventfd(Box<Mutex<IoUring>>),
    Pipe(ForeignPipe),
    Socket(OwnedFd),
}

impl Way {
    fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let mut builder = IoUring::<io_uring::squeue::Entry, io_uring::cqueue::Entry>::builder();
        let ring = builder.dontfork().build(1)?;
        match ring.submitter().register_eventfd(fd.as_raw_fd()) {
            Ok(()) => return Ok(Self::Eventfd(Box::new(Mutex::new(ring)))),
            Err(error) if error.raw_os_error() != Some(libc::EINVAL) => return Err(error),
            // The kernel's word for: it is no eventfd.
            Err(_) => {}
        }
        match FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) {
            FileType::Fifo => Ok(Self::Pipe(ForeignPipe::new(fd, true)?)),
            // Closing one of the network may wait for its peer.
            FileType::Socket if socket_domain(fd)? == AddressFamily::UNIX => Ok(Self::Socket(fd.try_clone_to_owned()?)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not an eventfd, a pipe or a Unix socket")),
        }
    }
}

impl SharedEvent {
    /// An eventfd, a pipe or a Unix socket that another process sent, ready to be raised.
    ///
    /// # Errors
    /// `InvalidInput` if it is none of these; otherwise the host's error.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let way = Way::of(fd.as_fd())?;
        Ok(Self { way: way.into(), later: None })
    }

    /// Another handle to our own eventfd, which another process holds too. The resources for raising it are made when
    /// it is first raised.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn of(event: &EventFd) -> io::Result<Self> {
        Ok(Self { way: OnceLock::new(), later: Some(borrow(event).try_clone_to_owned()?) })
    }

    /// Raises it, and never waits: what is full is raised already.
    pub fn raise(&self) {
        let made = match (self.way.get(), &self.later) {
            (None, Some(fd)) => Way::of(fd.as_fd()).map(|way| drop(self.way.set(way))),
            _ => Ok(()),
        };
        let raised = made.and_then(|()| match self.way.get() {
            Some(Way::Eventfd(ring)) => signal(&mut ring.lock().unwrap_or_else(PoisonError::into_inner)),
            Some(Way::Pipe(pipe)) => pipe.write(&ONE).map(drop),
            Some(Way::Socket(socket)) => {
                Ok(rustix::net::send(socket, &ONE, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map(drop)?)
            }
            None => Ok(()),
        });
        match raised {
            Ok(()) => {}
            // The event is full, or its reader is gone.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EAGAIN | libc::EPIPE | libc::ECONNRESET | libc::ECONNREFUSED | libc::ENOTCONN)
                ) => {}
            Err(error) => tracing::warn!(%error, "raising an event that is shared with another process"),
        }
    }
}

/// Has the kernel signal the eventfd that is registered with `ring`.
fn signal(ring: &mut IoUring) -> io::Result<()> {
    // SAFETY: the operation points to nothing. With no room, one that was not taken before is still there, and serves.
    let _ = unsafe { ring.submission().push(&opcode::Nop::new().build()) };
    let submitted = loop {
        match ring.submit() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other.map(drop),
        }
    };
    ring.completion().for_each(drop);
    submitted
}

impl fmt::Debug for SharedEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedEvent")
    }
}

/// The descriptor of an eventfd, whose type shows it as a number only.
#[must_use]
pub fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns its descriptor, and is borrowed for as long.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Whether an event was raised and not taken. Looks without taking it.
#[must_use]
pub fn is_raised(event: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(event, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1))
}

/// Takes what was raised of an eventfd, without waiting for more. Returns whether there was any.
pub fn take(event: BorrowedFd<'_>) -> bool {
    let mut count = [0; 8];
    // Not read(2): whether that waits is up to a flag that the other side may change.
    let read = rustix::io::preadv2(event, &mut [IoSliceMut::new(&mut count)], NO_OFFSET, ReadWriteFlags::NOWAIT);
    matches!(read, Ok(8))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::{UnixDatagram, UnixStream};
    use std::sync::Arc;
    use std::sync::mpsc;
    use std::time::Duration;

    use rustix::fs::OFlags;

    use super::*;

    /// Longer than any machine takes for what does not wait.
    const LIMIT: Duration = Duration::from_secs(60);

    /// Does `work` on a thread of its own, which a test must not wait for if it never ends.
    fn within_limit(work: impl FnOnce() + Send + 'static) {
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || {
            work();
            let _ = done.send(());
        });
        ended.recv_timeout(LIMIT).expect("it waits for the other side");
    }

    fn eventfd() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).unwrap()
    }

    /// Makes reads and writes of `event` wait, as a peer that shares it can.
    fn make_blocking(event: &EventFd) {
        rustix::io::ioctl_fionbio(borrow(event), false).unwrap();
    }

    #[test]
    fn an_event_is_raised_though_its_peer_fills_it_and_makes_it_blocking() {
        let theirs = eventfd();
        for lazily in [false, true] {
            let fd = borrow(&theirs).try_clone_to_owned().unwrap();
            let ours = if lazily { SharedEvent::of(&theirs) } else { SharedEvent::new(fd) };
            let ours = Arc::new(ours.unwrap());
            ours.raise();
            assert!(is_raised(borrow(&theirs)));
            assert_eq!(theirs.read().unwrap(), 1);
            theirs.write(u64::MAX - 1).unwrap();
            make_blocking(&theirs);
            let raiser = Arc::clone(&ours);
            within_limit(move || (0..100).for_each(|_| raiser.raise()));
            assert!(take(borrow(&theirs)), "it is raised");
            rustix::io::ioctl_fionbio(borrow(&theirs), true).unwrap();
        }
    }

    #[test]
    fn an_empty_event_is_taken_though_its_peer_makes_it_blocking() {
        let event = eventfd();
        event.write(3).unwrap();
        make_blocking(&event);
        within_limit(move || {
            assert!(take(borrow(&event)));
            assert!(!take(borrow(&event)));
            assert!(!is_raised(borrow(&event)));
        });
    }

    #[test]
    fn a_pipe_is_raised_though_it_is_full_and_blocking() {
        let (reader, writer) = std::io::pipe().unwrap();
        let ours = Arc::new(SharedEvent::new(writer.try_clone().unwrap().into()).unwrap());
        within_limit({
            let ours = Arc::clone(&ours);
            move || (0..100_000).for_each(|_| ours.raise())
        });
        let mut word = [0; 8];
        rustix::io::read(&reader, &mut word).unwrap();
        assert_eq!(word, ONE);
        SharedEvent::new(reader.try_clone().unwrap().into()).unwrap_err();
        // The reader is gone.
        drop(reader);
        ours.raise();
        assert!(!rustix::fs::fcntl_getfl(&writer).unwrap().contains(OFlags::NONBLOCK), "its flags are its own");
    }

    #[test]
    fn a_socket_is_raised_though_nobody_reads_it() {
        let (stream, theirs) = UnixStream::pair().unwrap();
        let (datagrams, other) = UnixDatagram::pair().unwrap();
        let events = [OwnedFd::from(stream), datagrams.into()].map(|fd| SharedEvent::new(fd).unwrap());
        within_limit(move || {
            for event in &events {
                (0..100_000).for_each(|_| event.raise());
            }
        });
        drop((theirs, other));
    }

    #[test]
    fn what_could_wait_for_a_file_system_or_a_peer_is_no_event() {
        let wrong = ["/dev/null", "/proc/self/exe"].map(|path| OwnedFd::from(File::open(path).unwrap()));
        let network = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        for fd in wrong.into_iter().chain([network.into()]) {
            assert_eq!(SharedEvent::new(fd).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
    }
}
