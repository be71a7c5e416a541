//! The pseudoterminal of a console with `pty`.
//!
//! Programs open its slave, read and write, and close it again. While it is closed, the kernel reports a hang-up of the
//! master without end, and nothing when the slave is opened. So the master is watched only while the slave is open, and
//! inotify tells of its opening.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_setfl, inotify};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// A pseudoterminal in raw mode.
#[derive(Debug)]
pub(super) struct Pty {
    master: OwnedFd,
    opened: OwnedFd,
    slave: PathBuf,
}

impl Pty {
    pub(super) fn open() -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let slave = PathBuf::from(name.into_string().map_err(io::Error::other)?);
        // The mode stays when the slave is closed. A slave that was never open would not count as hung up.
        let peer = ioctl_tiocgptpeer(&master, flags)?;
        let mut termios = tcgetattr(&peer)?;
        termios.make_raw();
        tcsetattr(&peer, OptionalActions::Now, &termios)?;
        let opened = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(&opened, &slave, inotify::WatchFlags::OPEN)?;
        Ok(Self { master, opened, slave })
    }

    /// The path that programs open.
    pub(super) fn slave(&self) -> &Path {
        &self.slave
    }

    /// The descriptor that is readable when the slave may have been opened.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.opened.try_clone()
    }

    /// Forgets what the descriptor told.
    pub(super) fn acknowledge(&self) {
        let mut buffer = [MaybeUninit::uninit(); 1024];
        let mut events = inotify::Reader::new(&self.opened, &mut buffer);
        while events.next().is_ok() {}
    }

    /// Whether a program has the slave open.
    pub(super) fn is_open(&self) -> bool {
        let mut fds = [PollFd::new(&self.master, PollFlags::empty())];
        poll(&mut fds, Some(&Timespec::default())).is_ok() && !fds[0].revents().contains(PollFlags::HUP)
    }

    /// The master, to read and write.
    pub(super) fn stream(&self) -> io::Result<File> {
        Ok(self.master.as_fd().try_clone_to_owned()?.into())
    }
}
