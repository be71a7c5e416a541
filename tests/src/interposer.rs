//! Between `ringvm` and a daemon: passes vhost-user messages on, with their descriptors, until a test wants one to go wrong.
//! The protocol is part of QEMU's documentation.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// GET_FEATURES.
pub const GET_FEATURES: u32 = 1;
/// SET_FEATURES.
pub const SET_FEATURES: u32 = 2;
/// SET_OWNER.
pub const SET_OWNER: u32 = 3;
/// SET_MEM_TABLE.
pub const SET_MEM_TABLE: u32 = 5;
/// SET_VRING_NUM.
pub const SET_VRING_NUM: u32 = 8;
/// SET_VRING_ADDR.
pub const SET_VRING_ADDR: u32 = 9;
/// SET_VRING_BASE.
pub const SET_VRING_BASE: u32 = 10;
/// SET_VRING_KICK.
pub const SET_VRING_KICK: u32 = 12;
/// SET_VRING_CALL.
pub const SET_VRING_CALL: u32 = 13;
/// SET_VRING_ERR.
pub const SET_VRING_ERR: u32 = 14;
/// GET_PROTOCOL_FEATURES.
pub const GET_PROTOCOL_FEATURES: u32 = 15;
/// SET_PROTOCOL_FEATURES.
pub const SET_PROTOCOL_FEATURES: u32 = 16;
/// SET_VRING_ENABLE.
pub const SET_VRING_ENABLE: u32 = 18;
/// SET_BACKEND_REQ_FD.
pub const SET_BACKEND_REQ_FD: u32 = 21;
/// GET_CONFIG.
pub const GET_CONFIG: u32 = 24;
/// SET_CONFIG.
pub const SET_CONFIG: u32 = 25;
/// GET_INFLIGHT_FD.
pub const GET_INFLIGHT_FD: u32 = 31;
/// SET_INFLIGHT_FD.
pub const SET_INFLIGHT_FD: u32 = 32;
/// RESET_DEVICE.
pub const RESET_DEVICE: u32 = 34;
/// GET_VRING_BASE_SKIP_DRAIN.
pub const SKIP_DRAIN: u32 = 45;
/// Flags of an answer: version 1, and the bit of a reply.
pub const ANSWER: u32 = 1 | 1 << 2;

const HEADER: usize = 12;
/// No message of this protocol is longer.
const MOST: usize = 1 << 16;
/// More descriptors than any message may carry.
const MOST_FILES: usize = 64;
/// For the rest of a message whose header has come, and for a message that is sent.
const REST: Duration = Duration::from_secs(30);

/// A message of either side.
#[derive(Debug)]
pub struct Message {
    /// What it is about.
    pub request: u32,
    /// Version, reply, reply wanted.
    pub flags: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// The descriptors that came with it.
    pub files: Vec<OwnedFd>,
}

/// Who has sent a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// `ringvm`.
    Frontend,
    /// The daemon behind.
    Daemon,
}

/// Descriptors that `ringvm` has given away, by ring where there are several. Connections end, these stay.
#[derive(Debug, Default)]
pub struct Kept {
    /// Raised by the guest.
    pub kicks: BTreeMap<u8, OwnedFd>,
    /// Raise interrupts.
    pub calls: BTreeMap<u8, OwnedFd>,
    /// Say that a ring is broken.
    pub errs: BTreeMap<u8, OwnedFd>,
    /// The guest's memory.
    pub memory: Vec<OwnedFd>,
    /// The table of requests in flight.
    pub inflight: Option<OwnedFd>,
    /// Where the daemon may speak by itself.
    pub events: Option<OwnedFd>,
}

/// Listens for `ringvm`, and connects to the daemon behind.
#[derive(Debug)]
pub struct Interposer<'a> {
    listener: UnixListener,
    daemon: &'a Path,
}

/// One connection.
#[derive(Debug)]
pub struct Link<'a> {
    frontend: UnixStream,
    daemon: UnixStream,
    /// What was given away over this connection and those before.
    pub kept: &'a mut Kept,
    limit: Duration,
}

impl<'a> Interposer<'a> {
    /// Listens at `front` for the daemon at `daemon`.
    ///
    /// # Errors
    /// When the socket can't be made.
    pub fn new(front: &Path, daemon: &'a Path) -> io::Result<Self> {
        Ok(Self { listener: UnixListener::bind(front)?, daemon })
    }

    /// Waits for `ringvm` to connect. Whatever is waited for over the connection has the same limit.
    ///
    /// # Errors
    /// When it does not come in time, or the daemon is not there.
    pub fn accept<'k>(&self, kept: &'k mut Kept, limit: Duration) -> io::Result<Link<'k>> {
        let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
        if poll(&mut fds, Some(&timespec(limit)))? == 0 {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "ringvm does not connect"));
        }
        let (frontend, _) = self.listener.accept()?;
        let daemon = UnixStream::connect(self.daemon)?;
        for stream in [&frontend, &daemon] {
            stream.set_read_timeout(Some(REST))?;
            stream.set_write_timeout(Some(REST))?;
        }
        Ok(Link { frontend, daemon, kept, limit })
    }
}

impl Message {
    /// An answer to a message.
    pub fn answer(request: u32, body: Vec<u8>) -> Message {
        Message { request, flags: ANSWER, body, files: Vec::new() }
    }

    /// As it goes over a socket.
    pub fn bytes(&self) -> Vec<u8> {
        let header = [self.request, self.flags, self.body.len() as u32].map(u32::to_ne_bytes);
        [header.as_flattened(), &self.body].concat()
    }

    /// The number at an offset of the body.
    pub fn number(&self, at: usize) -> u64 {
        self.body.get(at..at + 8).map_or(0, |bytes| u64::from_ne_bytes(bytes.try_into().expect("eight bytes")))
    }

    /// Writes a number into the body.
    pub fn set(&mut self, at: usize, number: u64) {
        self.body[at..at + 8].copy_from_slice(&number.to_ne_bytes());
    }
}

impl Link<'_> {
    /// Passes messages on until `ringvm` sends this one, which stays here. `None` if the connection ends first, or it does not come.
    pub fn until(&mut self, request: u32) -> Option<Message> {
        self.until_from(Side::Frontend, request)
    }

    /// Passes messages on until the daemon answers this one. `None` as with [`Self::until`].
    pub fn until_answer(&mut self, request: u32) -> Option<Message> {
        self.until_from(Side::Daemon, request)
    }

    fn until_from(&mut self, from: Side, request: u32) -> Option<Message> {
        let deadline = Instant::now() + self.limit;
        loop {
            match self.next(deadline)?? {
                (side, message) if (side, message.request) == (from, request) => return Some(message),
                (side, message) => self.pass(side, &message)?,
            }
        }
    }

    /// Passes messages on until both rings of the device run that are started first.
    pub fn until_running(&mut self) -> Option<()> {
        let running = self.until_answer(SET_VRING_ENABLE)?;
        self.pass(Side::Daemon, &running)
    }

    /// Passes messages on for a while. `None` if the connection ends meanwhile.
    pub fn pass_for(&mut self, time: Duration) -> Option<()> {
        self.pass_while(time, Duration::MAX, |_| {})
    }

    /// Passes messages on for a while, and does something again and again meanwhile. `None` if the connection ends.
    pub fn pass_while(&mut self, time: Duration, pause: Duration, mut work: impl FnMut(&mut Kept)) -> Option<()> {
        let end = Instant::now() + time;
        loop {
            let now = Instant::now();
            if now >= end {
                return Some(());
            }
            work(self.kept);
            if let Some((side, message)) = self.next(end.min(now.checked_add(pause).unwrap_or(end)))? {
                self.pass(side, &message)?;
            }
        }
    }

    /// Takes the next message of either side. The inner `None` is that none came in time.
    fn next(&mut self, deadline: Instant) -> Option<Option<(Side, Message)>> {
        let mut fds = [PollFd::new(&self.frontend, PollFlags::IN), PollFd::new(&self.daemon, PollFlags::IN)];
        let left = deadline.saturating_duration_since(Instant::now());
        poll(&mut fds, Some(&timespec(left))).ok()?;
        let ready = fds.each_ref().map(|fd| !fd.revents().is_empty());
        match ready {
            [true, _] => {
                let message = receive(&self.frontend)?;
                self.kept.keep(&message);
                Some(Some((Side::Frontend, message)))
            }
            [_, true] => {
                let message = receive(&self.daemon)?;
                if message.request == GET_INFLIGHT_FD {
                    self.kept.inflight = message.files.first().and_then(|file| file.try_clone().ok());
                }
                Some(Some((Side::Daemon, message)))
            }
            _ => Some(None),
        }
    }

    /// Passes a message on to the side that it is for.
    pub fn pass(&self, from: Side, message: &Message) -> Option<()> {
        let to = if from == Side::Frontend { &self.daemon } else { &self.frontend };
        send(to, &message.bytes(), &message.files)
    }

    /// Answers `ringvm` in the daemon's place.
    pub fn answer(&self, message: &Message) -> Option<()> {
        self.say(&message.bytes(), &message.files)
    }

    /// Sends `ringvm` anything.
    pub fn say(&self, bytes: &[u8], files: &[OwnedFd]) -> Option<()> {
        send(&self.frontend, bytes, files)
    }

    /// Ends the connection.
    pub fn leave(&self) {
        // It may be ended already.
        let _ = self.frontend.shutdown(Shutdown::Both);
    }

    /// Passes nothing on, and waits until `ringvm` has had enough. `None` if it waits as well, for longer than it may.
    pub fn hang(&self) -> Option<()> {
        let mut fds = [PollFd::new(&self.frontend, PollFlags::RDHUP)];
        (poll(&mut fds, Some(&timespec(self.limit))) == Ok(1)).then_some(())
    }
}

impl Kept {
    fn keep(&mut self, message: &Message) {
        let Some(file) = message.files.first() else { return };
        let Ok(copy) = file.try_clone() else { return };
        let ring = message.body.first().copied().unwrap_or(0);
        match message.request {
            SET_VRING_KICK => drop(self.kicks.insert(ring, copy)),
            SET_VRING_CALL => drop(self.calls.insert(ring, copy)),
            SET_VRING_ERR => drop(self.errs.insert(ring, copy)),
            SET_MEM_TABLE => self.memory = message.files.iter().filter_map(|file| file.try_clone().ok()).collect(),
            SET_INFLIGHT_FD => self.inflight = Some(copy),
            SET_BACKEND_REQ_FD => self.events = Some(copy),
            _ => {}
        }
    }

    /// Sends `ringvm` what it has not asked for, if there is room.
    pub fn event(&self, bytes: &[u8], files: &[OwnedFd]) {
        if let Some(events) = &self.events {
            // It may have closed it, or not listen.
            let _ = send_with(events, bytes, files, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
        }
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs().cast_signed(), tv_nsec: i64::from(time.subsec_nanos()) }
}

fn send(stream: &UnixStream, bytes: &[u8], files: &[OwnedFd]) -> Option<()> {
    send_with(stream, bytes, files, SendFlags::NOSIGNAL).ok()
}

fn send_with(stream: impl AsFd, bytes: &[u8], files: &[OwnedFd], flags: SendFlags) -> rustix::io::Result<()> {
    let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(files.is_empty() || control.push(SendAncillaryMessage::ScmRights(&files)));
    sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags).map(drop)
}

fn receive(stream: &UnixStream) -> Option<Message> {
    let mut files = Vec::new();
    let header = receive_bytes(stream, HEADER, &mut files)?;
    let [request, flags, len] =
        [0, 4, 8].map(|at| u32::from_ne_bytes(header[at..at + 4].try_into().expect("four bytes")));
    let body = receive_bytes(stream, (len as usize).min(MOST), &mut files)?;
    Some(Message { request, flags, body, files })
}

fn receive_bytes(stream: &UnixStream, len: usize, files: &mut Vec<OwnedFd>) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut filled = 0;
    while filled < len {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut room = [IoSliceMut::new(&mut bytes[filled..])];
        let count = recvmsg(stream, &mut room, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?.bytes;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(came) = message {
                files.extend(came);
            }
        }
        filled += count;
        if count == 0 {
            return None;
        }
    }
    Some(bytes)
}
