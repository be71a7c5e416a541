//! The host's end of the serial port: one thread between file descriptors and the UART.
//!
//! Output goes through a buffer of bounded size. If the reader stops reading, a vCPU waits a little, once, and from
//! then on bytes are dropped and counted until there is room again: a guest never hangs on its console for ever. The
//! console outlives the machine: a reboot attaches the next one.

pub mod keyboard;
pub mod serial_file;
pub mod stdio;
pub mod terminal;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing::{debug, warn};
use vmm_sys_util::eventfd::EventFd;

use crate::events::{Ending, Events};

/// Output that waits for its reader.
const CAPACITY: usize = 64 << 10;
/// How long a vCPU waits for room, once.
const STALL: Duration = Duration::from_millis(100);
/// A write of this size to a pipe that polls writable does not block (PIPE_BUF).
const CHUNK: usize = 4096;
/// How long the reader may take to accept the rest of the output at the end.
const FINISH_STALL: Duration = Duration::from_millis(500);
/// How long the whole end may take.
const FINISH_LIMIT: Duration = Duration::from_secs(3);
/// When to look again while the UART is busy.
const RETRY: Duration = Duration::from_millis(2);
/// Input read at once.
const INPUT: usize = 64;

/// Ctrl-A, the escape.
const ESCAPE: u8 = 1;
const STACK: usize = 128 << 10;

/// Where the console's bytes go and come from.
pub struct Streams {
    /// Takes the guest's output.
    pub output: File,
    /// Name of the output in messages.
    pub name: String,
    /// How many bytes it may take: a guest that writes without end must not fill a disk.
    pub limit: Option<u64>,
    /// Brings the guest's input, if any.
    pub input: Option<File>,
    /// Whether Ctrl-A in the input is the escape: it is when a person types.
    pub escape: bool,
}

/// The guest's end of the input.
pub trait InputPort: Send {
    /// Takes input for the guest, as much as there is room for, and says how much that was.
    fn receive(&mut self, input: &[u8]) -> usize;
}

/// The console thread.
pub struct Console {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    ended: Receiver<()>,
}

/// State shared by the vCPUs and the console thread.
pub(crate) struct Shared {
    state: Mutex<State>,
    room: Condvar,
    wake: EventFd,
    /// The console waits for the UART to take more input.
    hungry: AtomicBool,
}

#[derive(Default)]
struct State {
    pending: VecDeque<u8>,
    dropping: bool,
    dropped: u64,
    /// The output is gone or full, which was logged: everything is dropped, and not counted.
    closed: bool,
    stopping: bool,
    port: Option<Arc<Mutex<dyn InputPort>>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // EAGAIN means that it is awake already.
        drop(self.wake.write(1));
    }

    /// Takes one byte from the guest.
    pub(crate) fn put(&self, byte: u8) {
        let mut state = self.lock();
        if state.pending.len() >= CAPACITY && !state.dropping && !state.closed {
            let (after, timeout) = self
                .room
                .wait_timeout_while(state, STALL, |state| state.pending.len() >= CAPACITY && !state.closed)
                .unwrap_or_else(PoisonError::into_inner);
            state = after;
            state.dropping = timeout.timed_out();
        }
        if state.dropping && state.pending.len() <= CAPACITY / 2 {
            state.dropping = false;
        }
        if state.closed {
            return;
        }
        if state.dropping {
            state.dropped += 1;
            return;
        }
        let idle = state.pending.is_empty();
        state.pending.push_back(byte);
        drop(state);
        if idle {
            self.wake();
        }
    }

    /// The UART has room for input.
    pub(crate) fn input_wanted(&self) {
        if self.hungry.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }
}

impl Console {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn start(streams: Streams, events: Events) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            room: Condvar::new(),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            hungry: AtomicBool::new(false),
        });
        let (running, ended) = bounded::<()>(0);
        let mut worker = Worker { shared: Arc::clone(&shared), streams, events, escaped: false, input: Vec::new() };
        let thread = thread::Builder::new().name("console".into()).stack_size(STACK).spawn(move || {
            let _running = running;
            worker.run();
        })?;
        Ok(Self { shared, thread: Some(thread), ended })
    }

    /// The state that a UART writes to.
    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Gives input to `port` from now on.
    pub fn attach(&self, port: &Arc<Mutex<dyn InputPort>>) {
        self.shared.lock().port = Some(Arc::clone(port));
        self.shared.wake();
    }

    /// Writes the remaining output, as long as it is being read, and ends the thread.
    pub fn finish(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.shared.lock().stopping = true;
        self.shared.wake();
        // A disconnect is the thread's end. A thread that hangs in a write is abandoned: the process is about to
        // exit.
        if self.ended.recv_timeout(FINISH_LIMIT) == Err(crossbeam_channel::RecvTimeoutError::Disconnected) {
            drop(thread.join());
        }
        let dropped = self.shared.lock().dropped;
        if dropped > 0 {
            warn!(dropped, "serial console: bytes were dropped because nobody read them");
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Worker {
    shared: Arc<Shared>,
    streams: Streams,
    events: Events,
    /// The last byte of input was the escape.
    escaped: bool,
    /// Input the UART had no room for yet.
    input: Vec<u8>,
}

impl Worker {
    fn run(&mut self) {
        let mut deadline = None;
        loop {
            let (pending, stopping, port) = {
                let state = self.shared.lock();
                (!state.pending.is_empty() && !state.closed, state.stopping, state.port.clone())
            };
            if stopping {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + FINISH_STALL);
                if !pending || Instant::now() > deadline {
                    return;
                }
            }
            let delivery = if stopping { Delivery::Full } else { self.deliver(port.as_ref()) };
            let timeout = match delivery {
                _ if stopping => Some(FINISH_STALL),
                Delivery::Busy => Some(RETRY),
                Delivery::Done | Delivery::Full => None,
            };
            let read = matches!(delivery, Delivery::Done) && !stopping && port.is_some();
            let Some(ready) = self.wait(pending, read, timeout) else { continue };
            if ready.output && self.write() {
                deadline = None;
            }
            if ready.input {
                self.read();
            }
        }
    }

    /// Waits for something to do.
    fn wait(&self, output: bool, input: bool, timeout: Option<Duration>) -> Option<Ready> {
        // SAFETY: the descriptor is open for as long as `self.shared`.
        #[allow(unsafe_code, reason = "EventFd does not offer AsFd")]
        let wake = unsafe { BorrowedFd::borrow_raw(self.shared.wake.as_raw_fd()) };
        let mut fds = vec![PollFd::from_borrowed_fd(wake, PollFlags::IN)];
        let mut slot = |wanted: bool, fd: Option<BorrowedFd<'_>>, flags| {
            let fd = fd.filter(|_| wanted)?;
            // SAFETY: the streams are open for as long as `self`, which outlives `fds`.
            #[allow(unsafe_code, reason = "two closures can't borrow the list at once")]
            let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
            fds.push(PollFd::from_borrowed_fd(fd, flags));
            Some(fds.len() - 1)
        };
        let output = slot(output, Some(self.streams.output.as_fd()), PollFlags::OUT);
        let input = slot(input, self.streams.input.as_ref().map(File::as_fd), PollFlags::IN);
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        if let Err(error) = poll(&mut fds, timeout.as_ref()) {
            debug!(%error, "console: poll");
            return None;
        }
        if !fds[0].revents().is_empty() {
            drop(self.shared.wake.read());
        }
        let ready = |slot: Option<usize>| slot.is_some_and(|slot| !fds[slot].revents().is_empty());
        Some(Ready { output: ready(output), input: ready(input) })
    }

    /// Writes a piece of the output; returns whether some went out.
    fn write(&mut self) -> bool {
        let most = self.streams.limit.map_or(CHUNK, |limit| limit.min(CHUNK as u64) as usize);
        let chunk: Vec<u8> = self.shared.lock().pending.iter().take(most).copied().collect();
        if chunk.is_empty() {
            self.close();
            let name = &self.streams.name;
            warn!(
                "serial console: {name} has grown to its limit, what the guest writes from now on is dropped; max= sets it"
            );
            return false;
        }
        let result = self.streams.output.write(&chunk);
        let mut state = self.shared.lock();
        match result {
            Ok(count) => {
                state.pending.drain(..count);
                self.shared.room.notify_all();
                if let Some(limit) = &mut self.streams.limit {
                    *limit -= count as u64;
                }
                count > 0
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => false,
            Err(error) => {
                drop(state);
                self.close();
                let name = &self.streams.name;
                warn!("serial console: writing to {name}: {error}; the guest goes on without it");
                false
            }
        }
    }

    /// Drops waiting output, and all output to come.
    fn close(&self) {
        let mut state = self.shared.lock();
        state.closed = true;
        state.pending = VecDeque::new();
        self.shared.room.notify_all();
    }

    fn read(&mut self) {
        let mut buffer = [0; INPUT];
        let Some(input) = self.streams.input.as_mut() else { return };
        match input.read(&mut buffer) {
            Ok(0) => self.streams.input = None,
            Ok(count) => self.accept(&buffer[..count]),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => {
                debug!(%error, "serial console: reading input");
                self.streams.input = None;
            }
        }
    }

    /// Takes input in, looking for the escape.
    fn accept(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if !self.streams.escape {
                self.input.push(byte);
                continue;
            }
            match (std::mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x' | b'X') => self.events.end(Ending::ConsoleEscape),
                // Ctrl-A twice is one for the guest; before anything else it is swallowed.
                (_, byte) => self.input.push(byte),
            }
        }
    }

    /// Hands input to the UART.
    fn deliver(&mut self, port: Option<&Arc<Mutex<dyn InputPort>>>) -> Delivery {
        if self.input.is_empty() {
            return Delivery::Done;
        }
        let Some(port) = port else { return Delivery::Full };
        // Never waits for the lock: its holder may be a vCPU that waits for this thread to make room.
        let Ok(mut port) = port.try_lock() else { return Delivery::Busy };
        // Set before looking, so that a read that comes right after is not missed.
        self.shared.hungry.store(true, Ordering::SeqCst);
        let count = port.receive(&self.input);
        drop(port);
        self.input.drain(..count);
        if self.input.is_empty() { Delivery::Done } else { Delivery::Full }
    }
}

/// The outcome of a delivery of input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivery {
    /// All of it is in the UART.
    Done,
    /// The UART is full and will say when it is not.
    Full,
    /// The UART is in use.
    Busy,
}

struct Ready {
    output: bool,
    input: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::BusDevice;
    use crate::legacy::serial::SerialPort;
    use crate::platform::fake::FakePlatform;

    fn pipe() -> (File, File) {
        let (read, write) = rustix::pipe::pipe().unwrap();
        (read.into(), write.into())
    }

    fn console(output: File, input: Option<File>, escape: bool) -> (Console, Receiver<Ending>) {
        let (events, receiver) = Events::channel();
        let streams = Streams { output, name: "a pipe".into(), limit: None, input, escape };
        (Console::start(streams, events).unwrap(), receiver)
    }

    /// The output for some input, and the number of dropped bytes.
    fn through(text: &[u8]) -> (Vec<u8>, u64) {
        let (mut read, write) = pipe();
        let (console, _events) = console(write, None, false);
        let shared = console.shared();
        let reader = thread::spawn(move || {
            let mut all = Vec::new();
            read.read_to_end(&mut all).unwrap();
            all
        });
        text.iter().for_each(|&byte| shared.put(byte));
        console.finish();
        let dropped = shared.lock().dropped;
        (reader.join().unwrap(), dropped)
    }

    #[test]
    fn output_arrives_whole() {
        let text: Vec<u8> = (0..300_000_u32).map(|n| n as u8).collect();
        // On a busy machine the reader may be away for so long that some is dropped, as it is to be; not each time.
        let mut whole = (0..20).map(|_| through(&text)).filter(|(_, dropped)| *dropped == 0);
        assert!(whole.next().expect("a time when nothing is dropped").0 == text);
    }

    #[test]
    fn pitfall_56_output_without_a_reader_is_bounded_and_does_not_block() {
        let (read, write) = pipe();
        let (console, _events) = console(write, None, false);
        let shared = console.shared();
        let start = Instant::now();
        for _ in 0..2_000_000 {
            shared.put(b'x');
        }
        assert!(start.elapsed() < Duration::from_secs(30));
        assert!(shared.lock().pending.len() <= CAPACITY);
        assert!(shared.lock().dropped > 1_000_000);
        drop(read);
        console.finish();
    }

    #[test]
    fn a_closed_output_is_survived() {
        let (read, write) = pipe();
        drop(read);
        let (console, _events) = console(write, None, false);
        let shared = console.shared();
        for _ in 0..100_000 {
            shared.put(b'x');
        }
        console.finish();
        assert!(shared.lock().closed);
    }

    #[test]
    fn a_guest_that_writes_without_end_does_not_fill_the_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for limit in [10_000, 1, 4096] {
            file.as_file().set_len(0).unwrap();
            let output = file.reopen().unwrap();
            let streams = Streams { output, name: "a file".into(), limit: Some(limit), input: None, escape: false };
            let (events, _receiver) = Events::channel();
            let console = Console::start(streams, events).unwrap();
            let shared = console.shared();
            (0..200_000).for_each(|_| shared.put(b'x'));
            console.finish();
            assert_eq!(file.as_file().metadata().unwrap().len(), limit);
            assert!(shared.lock().closed);
        }
    }

    #[test]
    fn the_escape_ends_only_when_a_person_types() {
        for escape in [true, false] {
            let (_read, write) = pipe();
            let (input, mut keys) = pipe();
            let (console, events) = console(write, Some(input), escape);
            let port = SerialPort::new(Some(&console), &FakePlatform::default()).unwrap();
            keys.write_all(b"a\x01\x01b\x01x").unwrap();
            let ended = events.recv_timeout(Duration::from_millis(if escape { 5000 } else { 200 }));
            assert_eq!(ended.is_ok(), escape);
            if escape {
                assert_eq!(ended, Ok(Ending::ConsoleEscape));
            }
            let expected: &[u8] = if escape { b"a\x01b" } else { b"a\x01\x01b\x01x" };
            let mut received = Vec::new();
            let deadline = Instant::now() + Duration::from_secs(5);
            while received.len() < expected.len() && Instant::now() < deadline {
                let (mut status, mut data) = ([0], [0]);
                let mut port = port.lock().unwrap();
                port.read(0x3f8, 5, &mut status);
                if status[0] & 1 != 0 {
                    port.read(0x3f8, 0, &mut data);
                    received.push(data[0]);
                }
            }
            assert_eq!(received, expected);
            console.finish();
        }
    }
}
