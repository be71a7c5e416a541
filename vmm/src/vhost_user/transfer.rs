//! The state of a device on its way to a daemon or from it, over a pipe of ours (vhost-user specification, "Migrating back-end
//! state"). The daemon may be anybody's: it is waited for within a limit, and no more than a state is read.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use ringvm_backends::state::MAX_STATE;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use super::sentinel::wait_for;

/// Longest time that a state may be on its way: less than the whole connection is given for it.
const PATIENCE: Duration = Duration::from_secs(8);

/// A pipe that no program inherits.
pub(super) fn state_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe_with(PipeFlags::CLOEXEC)?)
}

/// Our end of a pipe.
pub(super) struct Transfer {
    end: OwnedFd,
    deadline: Instant,
}

impl Transfer {
    pub(super) fn new(end: OwnedFd) -> Self {
        Self { end, deadline: Instant::now() + PATIENCE }
    }

    /// Does what would wait, as soon as it need not.
    fn attempt(&self, flags: PollFlags, mut once: impl FnMut() -> rustix::io::Result<usize>) -> io::Result<usize> {
        loop {
            // The open file description is ours alone, so no other process can make these calls block.
            rustix::io::ioctl_fionbio(&self.end, true)?;
            match once() {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let left = self.deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() || !wait_for(self.end.as_fd(), flags, Some(left)) {
                        let what = format!("its daemon was not through within {} s", PATIENCE.as_secs());
                        return Err(io::Error::new(io::ErrorKind::TimedOut, what));
                    }
                }
                result => return Ok(result?),
            }
        }
    }

    /// Reads to the end.
    pub(super) fn read(self) -> io::Result<Vec<u8>> {
        let (mut state, mut room) = (Vec::new(), vec![0; MAX_STATE]);
        loop {
            let count = self.attempt(PollFlags::IN, || rustix::io::read(&self.end, &mut room))?;
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

    /// Writes all of a state, and closes the pipe.
    pub(super) fn write(self, mut state: &[u8]) -> io::Result<()> {
        while !state.is_empty() {
            let count = self.attempt(PollFlags::OUT, || rustix::io::write(&self.end, state))?;
            state = &state[count..];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::thread;

    use super::*;

    #[test]
    fn a_state_goes_through_a_pipe() {
        for state in [Vec::new(), vec![7; 100], vec![1; MAX_STATE]] {
            let (out, into) = state_pipe().unwrap();
            let sent = state.clone();
            let writer = thread::spawn(move || Transfer::new(into).write(&sent));
            assert!(Transfer::new(out).read().unwrap() == state);
            writer.join().unwrap().unwrap();
        }
    }

    #[test]
    fn pitfall_59_no_more_than_a_state_is_read() {
        let (out, into) = state_pipe().unwrap();
        let writer = thread::spawn(move || std::fs::File::from(into).write_all(&vec![0; 4 * MAX_STATE]));
        assert_eq!(Transfer::new(out).read().unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(writer.join().unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn pitfall_54_a_daemon_that_keeps_the_pipe_is_not_waited_for_for_ever() {
        let (out, _into) = state_pipe().unwrap();
        let transfer = Transfer { deadline: Instant::now() + Duration::from_millis(20), ..Transfer::new(out) };
        assert_eq!(transfer.read().unwrap_err().kind(), io::ErrorKind::TimedOut);
        let (_out, into) = state_pipe().unwrap();
        let transfer = Transfer { deadline: Instant::now() + Duration::from_millis(20), ..Transfer::new(into) };
        assert_eq!(transfer.write(&vec![0; 4 << 20]).unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
