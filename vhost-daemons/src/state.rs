//! The state of a device on its way over a pipe of the frontend's (vhost-user specification, "Migrating back-end state").
//!
//! A thread of its own reads or writes, so that neither side waits for the other while it should answer messages; it ends
//! with the pipe, with its time, or with the session. How it went is asked for by CHECK_DEVICE_STATE.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ringvm_backends::device::{Device, DeviceError};
use ringvm_backends::state::MAX_STATE;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::FileType;
use rustix::io::{Errno, ReadWriteFlags};
use thiserror::Error;
use vhost::vhost_user::message::{
    VhostTransferStateDirection as Direction, VhostTransferStatePhase, VhostUserTransferDeviceState,
};

use crate::mailbox::{Event, Wanted, poll};

/// Longest time that a state may be on its way.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often to look whether a transfer is still wanted.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// The position of what has none.
const NO_OFFSET: u64 = u64::MAX;

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
    /// What has come, until rings run on it: features may be set once more before that.
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
            Ok(Direction::SAVE) => Transfer::save(pipe, device.save_state()),
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

    /// Loads once more what has come, into a device that was reset.
    pub(crate) fn reload(&self, device: &mut dyn Device) -> Result<(), DeviceError> {
        self.loaded.as_ref().map_or(Ok(()), |state| device.load_state(state))
    }

    /// What has come is the device's own now, or nobody's.
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
        Self::start(Direction::SAVE, pipe, move |pipe| write(pipe, &state).map(|()| Vec::new()))
    }

    /// Reads a pipe to its end.
    fn load(pipe: OwnedFd) -> io::Result<Self> {
        Self::start(Direction::LOAD, pipe, read)
    }

    fn start(
        direction: Direction,
        fd: OwnedFd,
        run: impl FnOnce(&Pipe) -> io::Result<Vec<u8>> + Send + 'static,
    ) -> io::Result<Self> {
        let stat = rustix::fs::fstat(&fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "its descriptor is not a pipe"));
        }
        let cancel = Arc::new(Event::new()?);
        let pipe = Pipe { fd, cancel: Arc::clone(&cancel), deadline: Instant::now() + PATIENCE };
        let (tell, result) = mpsc::channel();
        let thread = std::thread::Builder::new().name("device-state".into());
        let thread = thread.spawn(move || drop(tell.send(run(&pipe))))?;
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
            // Whatever came of it, nobody wants to know.
            drop(thread.join());
        }
    }
}

/// A pipe whose other end nobody trusts: it is never waited for but within limits, whatever flags the other side gives it.
struct Pipe {
    fd: OwnedFd,
    cancel: Arc<Event>,
    deadline: Instant,
}

impl Pipe {
    /// Does what would block without blocking, as soon as it can be done.
    fn attempt(&self, flags: PollFlags, mut once: impl FnMut() -> Result<usize, Errno>) -> io::Result<usize> {
        loop {
            match once() {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let mut fds = [PollFd::new(&self.fd, flags), PollFd::new(&*self.cancel, PollFlags::IN)];
                    let late = poll(&mut fds, Some(self.deadline))? == 0;
                    if late || !fds[1].revents().is_empty() {
                        let what = format!("it was not through within {} s", PATIENCE.as_secs());
                        return Err(io::Error::new(io::ErrorKind::TimedOut, what));
                    }
                }
                result => return Ok(result?),
            }
            if Instant::now() > self.deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it came too slowly"));
            }
        }
    }
}

fn write(pipe: &Pipe, mut state: &[u8]) -> io::Result<()> {
    while !state.is_empty() {
        let count = pipe.attempt(PollFlags::OUT, || {
            rustix::io::pwritev2(&pipe.fd, &[IoSlice::new(state)], NO_OFFSET, ReadWriteFlags::NOWAIT)
        })?;
        state = &state[count..];
    }
    Ok(())
}

fn read(pipe: &Pipe) -> io::Result<Vec<u8>> {
    let mut state = Vec::new();
    let mut room = vec![0; MAX_STATE];
    loop {
        let count = pipe.attempt(PollFlags::IN, || {
            rustix::io::preadv2(&pipe.fd, &mut [IoSliceMut::new(&mut room)], NO_OFFSET, ReadWriteFlags::NOWAIT)
        })?;
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

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
    fn what_is_no_pipe_is_refused() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Transfer::load(socket.into()).is_err());
        assert!(Transfer::load(std::fs::File::open("/dev/zero").unwrap().into()).is_err());
    }

    #[test]
    fn the_wrong_end_of_a_pipe_is_an_error() {
        let (out, into) = std::io::pipe().unwrap();
        assert!(Transfer::load(into.into()).unwrap().finish(|| true).is_err());
        assert!(Transfer::save(out.into(), vec![1]).unwrap().finish(|| true).is_err());
    }
}
