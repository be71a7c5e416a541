//! The state of a device on its way over a descriptor of the frontend's, a pipe or a socket (vhost-user specification,
//! "Migrating back-end state").
//!
//! A thread of its own reads or writes, so that neither side waits for the other while it should answer messages; it ends
//! with the pipe, with its time, or with the session. How it went is asked for by CHECK_DEVICE_STATE.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ringvm_backends::device::{Device, DeviceError};
use ringvm_backends::host::pipe::ForeignPipe;
use ringvm_backends::state::MAX_STATE;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use thiserror::Error;
use vhost::vhost_user::message::{
    VhostTransferStateDirection as Direction, VhostTransferStatePhase, VhostUserTransferDeviceState,
};

use crate::mailbox::{Event, Wanted, poll};

/// Longest time that a state may be on its way.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often to look whether a transfer is still wanted.
const LOOK_PAUSE: Duration = Duration::from_millis(100);

/// Why a state is not moved.
#[derive(Debug, Error)]
pub(crate) enum StateError {
    #[error("a state without a descriptor")]
    NoPipe,
    #[error("it can only be moved while all rings are stopped")]
    RingsRun,
    #[error("there is no direction {0}")]
    Direction(u32),
    #[error("no state was moved, or not all of it")]
    NotMoved,
    #[error("moving the state of the device: {0}")]
    Host(#[from] io::Error),
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// The state of a session's device.
#[derive(Debug, Default)]
pub(crate) struct State {
    transfer: Option<Transfer>,
    /// Whether the last transfer went well.
    moved: bool,
    /// The state received, until rings run on it: features may be set once more before that.
    loaded: Option<Vec<u8>>,
}

impl State {
    /// Begins to read or write it.
    pub(crate) fn begin(
        &mut self,
        said: &VhostUserTransferDeviceState,
        pipe: Option<OwnedFd>,
        device: &dyn Device,
        rings_run: bool,
    ) -> Result<(), StateError> {
        // The one before is over, however far it came.
        (self.transfer, self.moved) = (None, false);
        let pipe = pipe.ok_or(StateError::NoPipe)?;
        let (direction, phase) = (said.direction, said.phase);
        if phase != VhostTransferStatePhase::STOPPED as u32 || rings_run {
            return Err(StateError::RingsRun);
        }
        let transfer = match Direction::try_from(direction) {
            Ok(Direction::SAVE) => Transfer::save(pipe, device.save_state()?),
            Ok(Direction::LOAD) => Transfer::load(pipe),
            Err(_) => return Err(StateError::Direction(direction)),
        };
        self.transfer = Some(transfer?);
        Ok(())
    }

    /// Waits until it was read or written, and says how that went; as often as it is asked.
    pub(crate) fn end(
        &mut self,
        device: &mut dyn Device,
        rings_run: bool,
        wanted: &Wanted<'_>,
    ) -> Result<(), StateError> {
        let Some(transfer) = self.transfer.take() else {
            return if self.moved { Ok(()) } else { Err(StateError::NotMoved) };
        };
        let direction = transfer.direction;
        let state = transfer.finish(|| wanted.still())?;
        if direction == Direction::LOAD {
            if rings_run {
                return Err(StateError::RingsRun);
            }
            device.load_state(&state)?;
            self.loaded = Some(state);
        }
        self.moved = true;
        Ok(())
    }

    /// Loads the received state once more, into a device that was reset.
    pub(crate) fn reload(&self, device: &mut dyn Device) -> Result<(), DeviceError> {
        self.loaded.as_ref().map_or(Ok(()), |state| device.load_state(state))
    }

    /// The received state belongs to the device now, or is void.
    pub(crate) fn forget(&mut self) {
        self.loaded = None;
    }
}

/// A transfer that was begun.
#[derive(Debug)]
struct Transfer {
    direction: Direction,
    thread: Option<JoinHandle<()>>,
    result: Receiver<io::Result<Vec<u8>>>,
    cancel: Arc<Event>,
}

impl Transfer {
    /// Writes `state` to a pipe, and closes it.
    fn save(pipe: OwnedFd, state: Vec<u8>) -> io::Result<Self> {
        Self::start(Direction::SAVE, pipe, move |channel| channel.write(&state).map(|()| Vec::new()))
    }

    /// Reads a pipe to its end.
    fn load(pipe: OwnedFd) -> io::Result<Self> {
        Self::start(Direction::LOAD, pipe, Channel::read)
    }

    fn start(
        direction: Direction,
        fd: OwnedFd,
        run: impl FnOnce(&Channel) -> io::Result<Vec<u8>> + Send + 'static,
    ) -> io::Result<Self> {
        let cancel = Arc::new(Event::new()?);
        let end = OtherEnd::of(fd, direction == Direction::SAVE)?;
        let channel = Channel { end, cancel: Arc::clone(&cancel), deadline: Instant::now() + PATIENCE };
        let (tell, result) = mpsc::channel();
        let thread = std::thread::Builder::new().name("device-state".into());
        let thread = thread.spawn(move || drop(tell.send(run(&channel))))?;
        Ok(Self { direction, thread: Some(thread), result, cancel })
    }

    /// Waits for the end of the transfer, as long as that is wanted: what was read, or nothing.
    fn finish(self, wanted: impl Fn() -> bool) -> io::Result<Vec<u8>> {
        loop {
            match self.result.recv_timeout(LOOK_PAUSE) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) if wanted() => {}
                Err(RecvTimeoutError::Timeout) => self.cancel.raise(),
                Err(RecvTimeoutError::Disconnected) => return Err(io::Error::other("its thread has ended")),
            }
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.cancel.raise();
            // The result does not matter any more.
            drop(thread.join());
        }
    }
}

/// Where the state goes or comes from. Reads and writes never wait, whatever flags the other side gives what it shares.
enum OtherEnd {
    Pipe(ForeignPipe),
    Socket(OwnedFd),
}

impl OtherEnd {
    fn of(fd: OwnedFd, writes: bool) -> io::Result<Self> {
        match FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) {
            FileType::Socket => Ok(Self::Socket(fd)),
            FileType::Fifo => Ok(Self::Pipe(ForeignPipe::new(fd.as_fd(), writes)?)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "its descriptor is neither a pipe nor a socket")),
        }
    }

    fn read(&self, room: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.read(room),
            Self::Socket(socket) => Ok(rustix::net::recv(socket, room, RecvFlags::DONTWAIT)?.0),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.write(bytes),
            Self::Socket(socket) => Ok(rustix::net::send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?),
        }
    }
}

impl AsFd for OtherEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Pipe(pipe) => pipe.as_fd(),
            Self::Socket(socket) => socket.as_fd(),
        }
    }
}

/// A way to an untrusted peer, which is waited for only within limits.
struct Channel {
    end: OtherEnd,
    cancel: Arc<Event>,
    deadline: Instant,
}

impl Channel {
    /// Does what would wait without waiting, as soon as it can be done.
    fn attempt(&self, flags: PollFlags, mut once: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
        loop {
            match once() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(Errno::AGAIN.raw_os_error()) => {
                    let mut fds = [PollFd::new(&self.end, flags), PollFd::new(&*self.cancel, PollFlags::IN)];
                    let late = poll(&mut fds, Some(self.deadline))? == 0;
                    if late || !fds[1].revents().is_empty() {
                        let what = format!("it was not through within {} s", PATIENCE.as_secs());
                        return Err(io::Error::new(io::ErrorKind::TimedOut, what));
                    }
                }
                result => return result,
            }
            if Instant::now() > self.deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it came too slowly"));
            }
        }
    }

    /// Writes a state, and tells the other side that this was all.
    fn write(&self, mut state: &[u8]) -> io::Result<()> {
        while !state.is_empty() {
            let count = self.attempt(PollFlags::OUT, || self.end.write(state))?;
            state = &state[count..];
        }
        if let OtherEnd::Socket(socket) = &self.end {
            // The other side may have gone with all it wanted. Others may have this end too, so closing it is not enough.
            let _ = rustix::net::shutdown(socket, Shutdown::Write);
        }
        Ok(())
    }

    /// Reads a state until the other side says that this was all.
    fn read(&self) -> io::Result<Vec<u8>> {
        let mut state = Vec::new();
        let mut room = vec![0; MAX_STATE];
        loop {
            let count = self.attempt(PollFlags::IN, || self.end.read(&mut room))?;
            if count == 0 {
                return Ok(state);
            }
            if state.len() + count > MAX_STATE {
                let what = format!("it is longer than {MAX_STATE} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            state.extend(&room[..count]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_state_goes_through_a_pipe_of_any_size_both_ways() {
        let state: Vec<u8> = (0..MAX_STATE as u32).map(|at| (at / 7) as u8).collect();
        for blocking in [true, false] {
            let (out, into) = std::io::pipe().unwrap();
            rustix::pipe::fcntl_setpipe_size(&into, 4096).unwrap();
            rustix::io::ioctl_fionbio(&into, !blocking).unwrap();
            let save = Transfer::save(into.into(), state.clone()).unwrap();
            let load = Transfer::load(out.into()).unwrap();
            assert!(save.finish(|| true).unwrap().is_empty());
            assert!(load.finish(|| true).unwrap() == state);
        }
    }

    #[test]
    fn pitfall_59_a_state_that_is_too_long_is_not_read_on() {
        let (out, mut into) = std::io::pipe().unwrap();
        let load = Transfer::load(out.into()).unwrap();
        let written = into.write_all(&vec![0; 4 * MAX_STATE]);
        assert_eq!(load.finish(|| true).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn pitfall_54_a_pipe_that_nobody_serves_is_not_waited_for_for_ever() {
        // The session ends.
        let begun = Instant::now();
        let (out, into) = std::io::pipe().unwrap();
        drop(Transfer::load(out.into()).unwrap());
        let (mut out, full) = std::io::pipe().unwrap();
        drop(Transfer::save(full.into(), vec![0; 4 << 20]).unwrap());
        assert!(begun.elapsed() < PATIENCE / 2);
        drop(into);
        assert!(out.read(&mut [0; 1]).unwrap() == 1);
        // The time ends.
        let (out, _into) = std::io::pipe().unwrap();
        let load = Transfer::load(out.into()).unwrap();
        let (_out, into) = std::io::pipe().unwrap();
        let save = Transfer::save(into.into(), vec![0; 4 << 20]).unwrap();
        assert_eq!(load.finish(|| true).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(save.finish(|| true).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() < PATIENCE * 2);
    }

    #[test]
    fn a_state_goes_through_a_socket_both_ways() {
        let state: Vec<u8> = (0..MAX_STATE as u32).map(|at| (at / 7) as u8).collect();
        for nonblocking in [true, false] {
            let (from, to) = UnixStream::pair().unwrap();
            [&from, &to].iter().for_each(|socket| socket.set_nonblocking(nonblocking).unwrap());
            // Another holder keeps the end that it is written to, as a frontend may.
            let _kept = from.try_clone().unwrap();
            let save = Transfer::save(from.into(), state.clone()).unwrap();
            let load = Transfer::load(to.into()).unwrap();
            assert!(save.finish(|| true).unwrap().is_empty());
            assert!(load.finish(|| true).unwrap() == state);
        }
        let (from, to) = UnixStream::pair().unwrap();
        drop(to);
        assert!(Transfer::save(from.into(), state).unwrap().finish(|| true).is_err(), "there is nobody");
    }

    #[test]
    fn what_is_neither_pipe_nor_socket_is_refused() {
        for path in ["/dev/zero", "/proc/self/exe"] {
            assert!(Transfer::load(File::open(path).unwrap().into()).is_err());
        }
        let (out, into) = std::io::pipe().unwrap();
        assert!(Transfer::load(into.into()).is_err(), "the wrong end");
        assert!(Transfer::save(out.into(), vec![1]).is_err(), "the wrong end");
    }

    #[test]
    fn a_transfer_that_nobody_wants_any_more_is_given_up() {
        let (out, _into) = std::io::pipe().unwrap();
        let begun = Instant::now();
        let load = Transfer::load(out.into()).unwrap();
        assert_eq!(load.finish(|| false).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() < PATIENCE);
    }
}
