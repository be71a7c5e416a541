//! A pipe that another process made: read and written without ever waiting, whatever flags its other holders set.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::OFlags;
use rustix::io::ReadWriteFlags;

/// The position of what has none.
pub(crate) const NO_OFFSET: u64 = u64::MAX;

/// One end of such a pipe.
#[derive(Debug)]
pub struct ForeignPipe(Kind);

#[derive(Debug)]
enum Kind {
    /// By an open file description that only this process has, and so its flags.
    Own(File),
    /// A pipe that can't be reopened because another user made it: each call says that it must not wait.
    Shared(OwnedFd),
}

impl ForeignPipe {
    /// The end for writing, or the one for reading.
    ///
    /// # Errors
    /// `InvalidInput` for the other end; the error of reopening it, where the kernel can't do without (before Linux
    /// 6.4).
    pub fn new(fd: BorrowedFd<'_>, writes: bool) -> io::Result<Self> {
        let (wrong, name) = if writes { (OFlags::RDONLY, "reading") } else { (OFlags::WRONLY, "writing") };
        if rustix::fs::fcntl_getfl(fd)? & OFlags::RWMODE == wrong {
            let what = format!("it is the {name} end of a pipe");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let mut options = OpenOptions::new();
        options.read(!writes).write(writes).custom_flags(libc::O_NONBLOCK);
        match options.open(format!("/proc/self/fd/{}", fd.as_raw_fd())) {
            Ok(own) => Ok(Self(Kind::Own(own))),
            Err(_) if pipes_take_nowait() => Ok(Self(Kind::Shared(fd.try_clone_to_owned()?))),
            Err(error) => Err(error),
        }
    }

    /// Reads what there is.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing, or what the host says.
    pub fn read(&self, room: &mut [u8]) -> io::Result<usize> {
        match &self.0 {
            Kind::Own(pipe) => (&*pipe).read(room),
            Kind::Shared(pipe) => {
                Ok(rustix::io::preadv2(pipe, &mut [IoSliceMut::new(room)], NO_OFFSET, ReadWriteFlags::NOWAIT)?)
            }
        }
    }

    /// Writes as much as there is room for.
    ///
    /// # Errors
    /// `WouldBlock` if there is none, or what the host says.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match &self.0 {
            Kind::Own(pipe) => (&*pipe).write(bytes),
            Kind::Shared(pipe) => {
                Ok(rustix::io::pwritev2(pipe, &[IoSlice::new(bytes)], NO_OFFSET, ReadWriteFlags::NOWAIT)?)
            }
        }
    }
}

impl AsFd for ForeignPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Kind::Own(pipe) => pipe.as_fd(),
            Kind::Shared(pipe) => pipe.as_fd(),
        }
    }
}

/// Whether reads and writes of pipes may say that they must not wait (RWF_NOWAIT): since Linux 6.4.
fn pipes_take_nowait() -> bool {
    let system = rustix::system::uname();
    let mut numbers =
        system.release().to_str().unwrap_or_default().split(['.', '-']).map_while(|part| part.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6_u32, 4_u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_that_may_not_be_opened_again_is_used_as_it_is_and_never_waited_for() {
        if !pipes_take_nowait() {
            return;
        }
        let (reading, writing) = rustix::pipe::pipe().unwrap();
        let shared = |fd: &OwnedFd| ForeignPipe(Kind::Shared(fd.try_clone().unwrap()));
        let (reading, writing) = (shared(&reading), shared(&writing));
        let blocks = |result: io::Result<usize>| result.unwrap_err().kind() == io::ErrorKind::WouldBlock;
        assert!(blocks(reading.read(&mut [0; 8])));
        assert_eq!(writing.write(b"pipe").unwrap(), 4);
        let mut room = [0; 8];
        assert_eq!((reading.read(&mut room).unwrap(), &room[..4]), (4, &b"pipe"[..]));
        while writing.write(&[0; 4096]).is_ok() {}
        assert!(blocks(writing.write(&[0; 4096])));
    }

    #[test]
    fn the_wrong_end_is_refused() {
        let (reading, writing) = rustix::pipe::pipe().unwrap();
        assert_eq!(ForeignPipe::new(reading.as_fd(), true).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(ForeignPipe::new(writing.as_fd(), false).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
