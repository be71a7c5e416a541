//! The host's end of a console: descriptors, which come and go, and the bytes between them and the queues.
//!
//! All descriptors are in one epoll instance, which the device's thread listens to. A descriptor is in it only for what
//! the console can use at the moment: one that is readable while the guest has no buffers, or hung up, would wake the
//! thread without end.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::termios::tcgetwinsize;
use tracing::{debug, info, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::backlog::{Backlog, CAPACITY};
use super::end::{Door, End};
use super::stall::Stall;
use super::stream::Stream;
use crate::hosted::PATIENCE;

/// Bytes of input read at once.
const CHUNK: usize = 4096;
/// How long the reader may take to accept more of the rest of the output, and all of it. The thread of a hosted device
/// does this when it ends, and is not waited for longer than [`PATIENCE`].
const FINISH_STALL: Duration = Duration::from_millis(500);
const FINISH_LIMIT: Duration = Duration::from_millis(800);
const _: () = assert!(FINISH_LIMIT.as_millis() < PATIENCE.as_millis());
/// Clients accepted or refused in a turn.
const CLIENTS: usize = 16;

const INPUT: u64 = 0;
const OUTPUT: u64 = 1;
const DOOR: u64 = 2;
const WAKE: u64 = 3;
const STALL: u64 = 4;

/// Where output goes.
#[derive(Debug)]
enum Output {
    /// To whoever reads this. While `stalled`, output is dropped: the reader has not read for too long.
    Reader { stream: Stream, stalled: bool },
    /// To the reader that comes next.
    Next,
    /// Nowhere, for ever.
    Nowhere,
}

impl Output {
    fn reader(stream: Stream) -> Self {
        Self::Reader { stream, stalled: false }
    }
}

/// How much output the host's end takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// So many bytes. There will be more room.
    Bytes(usize),
    /// Any number: older bytes make room.
    Newest,
    /// Any number: they are counted and dropped.
    Stalled,
    /// Any number: nobody will read them.
    Nowhere,
}

/// The outcome of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// There are bytes.
    Some,
    /// There are none now.
    None,
}

/// The host's end, open.
#[derive(Debug)]
pub(super) struct Host {
    name: String,
    epoll: Arc<Epoll>,
    wake: EventFd,
    door: Door,
    /// What tells that somebody is at the door.
    bell: Option<Stream>,
    input: Option<Stream>,
    output: Output,
    /// Bytes that may still be written, if they stay somewhere.
    limit: Option<u64>,
    backlog: Backlog,
    pub(super) stall: Stall,
    /// Input that the guest has had no buffers for.
    pub(super) pending: VecDeque<u8>,
}

impl Host {
    pub(super) fn new(name: &str, end: End) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new()?);
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE))?;
        let bell = match &end.door {
            Door::None => None,
            Door::Socket(listener) => Some(listener.descriptor()?),
            Door::Pty(pty) => Some(pty.descriptor()?),
        };
        let stall = Stall::new(&epoll, STALL)?;
        let mut bell = bell.map(|bell| Stream::own(bell.into(), &epoll, DOOR));
        if let Some(bell) = &mut bell {
            bell.watch(Some(EventSet::IN));
        }
        let inherited = |file, write, token| Stream::inherited(file, write, &epoll, token);
        let output = match (end.output, &end.door) {
            (Some(output), _) => Output::reader(inherited(output, true, OUTPUT)),
            (None, Door::None) => Output::Nowhere,
            (None, _) => Output::Next,
        };
        Ok(Self {
            name: name.to_owned(),
            input: end.input.map(|input| inherited(input, false, INPUT)),
            wake,
            door: end.door,
            bell,
            output,
            limit: end.limit,
            backlog: Backlog::default(),
            stall,
            pending: VecDeque::new(),
            epoll,
        })
    }

    /// The descriptor that is readable when there is something to do.
    pub(super) fn descriptor(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Has the device called once more.
    pub(super) fn call_again(&self) {
        // EAGAIN means that it will be called already.
        drop(self.wake.write(1));
    }

    /// Size of the terminal in columns and rows, if the output is one that knows it.
    pub(super) fn terminal_size(&self) -> Option<(u16, u16)> {
        let Output::Reader { stream, .. } = &self.output else { return None };
        let size = tcgetwinsize(stream).ok()?;
        (size.ws_col != 0 && size.ws_row != 0).then_some((size.ws_col, size.ws_row))
    }

    /// Takes note of what has happened: readers that are gone, and clients that come.
    pub(super) fn look(&mut self) {
        let mut events = [EpollEvent::default(); 8];
        // Interrupted by a signal, it is called again.
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..count] {
            match event.data() {
                WAKE => drop(self.wake.read()),
                STALL => self.stall.acknowledge(),
                // The event may be older than the reader.
                OUTPUT if self.output_is_dead() => self.lose_output(None),
                _ => {}
            }
        }
        let rings = |event: &EpollEvent| event.data() == DOOR;
        let was_off = self.bell.as_mut().is_some_and(|bell| bell.watch(Some(EventSet::IN)));
        if was_off || events[..count].iter().any(rings) {
            self.open_door();
        }
    }

    fn output_is_dead(&self) -> bool {
        matches!(&self.output, Output::Reader { stream, .. } if stream.has_hung_up())
    }

    fn open_door(&mut self) {
        let result = match &self.door {
            Door::None => Ok(()),
            Door::Pty(_) => self.take_slave(),
            Door::Socket(_) => self.take_clients(),
        };
        if let Err(error) = result {
            // Out of descriptors or memory. The door would ring on: it is looked at in the next turn.
            warn!("{}: its console can't be connected: {error}", self.name);
            if let Some(bell) = &mut self.bell {
                bell.watch(None);
            }
        }
    }

    /// A program may have opened the slave of the pseudoterminal.
    fn take_slave(&mut self) -> io::Result<()> {
        let Door::Pty(pty) = &self.door else { return Ok(()) };
        // Before looking: an opening after the look rings again.
        pty.acknowledge();
        if !pty.is_open() {
            return Ok(());
        }
        if self.input.is_none() {
            self.input = Some(Stream::own(pty.stream()?, &self.epoll, INPUT));
        }
        if matches!(self.output, Output::Next) {
            self.output = Output::reader(Stream::own(pty.stream()?, &self.epoll, OUTPUT));
            self.tell_dropped();
        }
        Ok(())
    }

    fn take_clients(&mut self) -> io::Result<()> {
        for _ in 0..CLIENTS {
            let Door::Socket(listener) = &self.door else { return Ok(()) };
            let client = match listener.accept() {
                Ok(Some(client)) => client,
                Ok(None) => return Ok(()),
                Err(error) if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => continue,
                Err(error) => return Err(error),
            };
            if matches!(self.output, Output::Reader { .. }) && !self.output_is_dead() {
                info!("{}: a client of its console is refused, another one is connected", self.name);
                continue;
            }
            self.connect(client)?;
        }
        Ok(())
    }

    fn connect(&mut self, client: UnixStream) -> io::Result<()> {
        let input = File::from(std::os::fd::OwnedFd::from(client.try_clone()?));
        let output = File::from(std::os::fd::OwnedFd::from(client));
        // What the last client has sent before it went is still for the guest.
        while self.pending.len() < CAPACITY && self.read() == Input::Some {}
        self.input = Some(Stream::own(input, &self.epoll, INPUT));
        self.output = Output::reader(Stream::own(output, &self.epoll, OUTPUT));
        self.tell_dropped();
        Ok(())
    }

    fn tell_dropped(&mut self) {
        let dropped = self.backlog.take_dropped();
        if dropped > 0 {
            warn!("{}: {dropped} bytes of its console's output were dropped, nobody read them", self.name);
        }
    }

    /// How much output may be pushed.
    pub(super) fn room(&self) -> Room {
        match self.output {
            Output::Reader { stalled: true, .. } => Room::Stalled,
            Output::Reader { .. } => Room::Bytes(self.backlog.room()),
            Output::Next => Room::Newest,
            Output::Nowhere => Room::Nowhere,
        }
    }

    /// Notes output that was not even read from the guest.
    pub(super) fn note_dropped(&mut self, count: u64) {
        self.backlog.note_dropped(count);
    }

    /// The guest's output waits for the reader, who has just read nothing. Returns whether it goes on without the reader.
    pub(super) fn gives_up(&mut self) -> bool {
        let Output::Reader { stalled, .. } = &mut self.output else { return false };
        if !self.stall.waits() {
            return false;
        }
        *stalled = true;
        warn!("{}: the reader of its console does not read; output is dropped until it does", self.name);
        true
    }

    /// The guest's output does not wait for the reader.
    pub(super) fn goes_on(&mut self) {
        self.stall.ends();
    }

    /// Takes output, and notes that `dropped` bytes before it were not even read from the guest.
    pub(super) fn push(&mut self, bytes: &[u8], dropped: u64) {
        if matches!(self.output, Output::Nowhere) {
            return;
        }
        let had_dropped = self.backlog.has_dropped();
        self.backlog.note_dropped(dropped);
        self.backlog.push(bytes);
        if self.backlog.has_dropped() && !had_dropped {
            warn!("{}: nobody reads its console, the last {} KiB of output are kept", self.name, CAPACITY >> 10);
        }
    }

    /// Writes what the reader accepts now; returns whether that was something.
    pub(super) fn write(&mut self) -> bool {
        let before = self.backlog.room();
        while let Output::Reader { stream, .. } = &mut self.output {
            let front = self.backlog.front();
            let most = self.limit.map_or(usize::MAX, |limit| limit.try_into().unwrap_or(usize::MAX));
            let front = &front[..front.len().min(most)];
            if front.is_empty() {
                if !self.backlog.is_empty() {
                    warn!(
                        "{}: its console's file has grown to its limit, later output is dropped; max= sets it",
                        self.name
                    );
                    self.output = Output::Nowhere;
                    self.backlog.clear();
                }
                break;
            }
            match stream.write(front) {
                Ok(0) => break,
                Ok(count) => {
                    self.backlog.consume(count);
                    self.limit = self.limit.map(|limit| limit - count as u64);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => self.lose_output(Some(&error)),
            }
        }
        let progress = self.backlog.room() > before;
        if progress {
            self.stall.progresses();
        }
        if let Output::Reader { stalled, .. } = &mut self.output
            && *stalled
            && self.backlog.room() >= CAPACITY / 2
        {
            *stalled = false;
            self.tell_dropped();
        }
        progress
    }

    fn lose_output(&mut self, error: Option<&io::Error>) {
        if !matches!(self.door, Door::None) {
            debug!(?error, "{}: the reader of its console is gone", self.name);
            self.output = Output::Next;
            return;
        }
        let reason = error.map_or("nobody reads it any more".to_owned(), ToString::to_string);
        warn!("{}: its console can't be written to: {reason}; the guest goes on without it", self.name);
        self.output = Output::Nowhere;
        self.backlog.clear();
    }

    /// Reads a piece of input, if there is any.
    pub(super) fn read(&mut self) -> Input {
        let mut chunk = [0; CHUNK];
        loop {
            let Some(input) = &mut self.input else { return Input::None };
            match input.read(&mut chunk) {
                Ok(count) if count > 0 => {
                    self.pending.extend(&chunk[..count]);
                    return Input::Some;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Input::None,
                // A pseudoterminal whose slave is closed ends with EIO.
                ended => {
                    debug!(?ended, "{}: its console's input has ended", self.name);
                    self.input = None;
                }
            }
        }
    }

    /// Sets what is waited for: input, if the guest has buffers; room for output, if there is some.
    pub(super) fn listen(&mut self, wants_input: bool) {
        let mut ready = false;
        if let Some(input) = &mut self.input {
            input.watch(wants_input.then_some(EventSet::IN));
            ready |= wants_input && input.is_always_ready();
        }
        if let Output::Reader { stream, .. } = &mut self.output {
            // Without output, too, for the hang-up.
            stream.watch(Some(if self.backlog.is_empty() { EventSet::empty() } else { EventSet::OUT }));
            ready |= !self.backlog.is_empty() && stream.is_always_ready();
        }
        if ready {
            self.call_again();
        }
    }

    /// Writes the rest of the output for as long as it is being read.
    fn finish(&mut self) {
        let deadline = Instant::now() + FINISH_LIMIT;
        loop {
            self.write();
            let Output::Reader { stream, .. } = &self.output else { break };
            if self.backlog.is_empty() {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || !stream.wait_writable(left.min(FINISH_STALL)) {
                warn!("{}: the end of its console's output is dropped, nobody reads it", self.name);
                break;
            }
        }
        self.tell_dropped();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.finish();
    }
}
