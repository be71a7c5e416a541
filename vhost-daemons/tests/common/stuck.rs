//! A daemon whose storage does not answer, each disk in its own way. It is the test's own program, started once more.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use ringvm_backends::block::storage::{Geometry, Progress, Storage};
use ringvm_backends::block::{BlockDevice, BlockOptions};
use ringvm_backends::io::ops::Io;
use ringvm_backends::virtqueue::buffers::GuestIo;
use ringvm_vhost_daemons::options::ServeOptions;
use ringvm_vhost_daemons::{Program, serve};

use super::Daemon;

/// Tells the program that it is a daemon: the directory of its sockets, and its disks.
const DIR: &str = "RINGVM_TEST_DIR";
const DISKS: &str = "RINGVM_TEST_DISKS";
/// Never raised.
static NEVER: LazyLock<OwnedFd> = LazyLock::new(super::client::eventfd);
const GEOMETRY: Geometry =
    Geometry { capacity: 1 << 20, logical_block: 512, physical_block: 512, readonly: false, discard: true };

/// What a disk does. Whatever it is, writes succeed at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Answers everything.
    Answers,
    /// Never answers reads, which can be cancelled.
    Sleeps,
    /// Never answers reads, which keep the I/O thread.
    Hangs,
    /// Has the I/O thread panic.
    Panics,
    /// Answers everything and is never flushed.
    FlushHangs,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Answers, Self::Sleeps, Self::Hangs, Self::Panics, Self::FlushHangs];
}

impl Storage for Kind {
    type Op = ();

    fn geometry(&self) -> &Geometry {
        &GEOMETRY
    }

    fn read(&mut self, (): &mut (), _: u64, _: &mut GuestIo, io: &mut Io<'_>) -> Progress {
        eprintln!("{self:?} reads");
        match self {
            Self::Answers | Self::FlushHangs => return Progress::Done(Ok(())),
            #[allow(unsafe_code, reason = "a test's own storage waits")]
            // SAFETY: a static is never closed.
            Self::Sleeps => unsafe { io.wait_readable(NEVER.as_fd()) },
            Self::Hangs => for_ever(),
            Self::Panics => panic!("a bug, as this test has it"),
        }
        Progress::Pending
    }

    fn write(&mut self, (): &mut (), _: u64, _: &mut GuestIo, _: bool, _: &mut Io<'_>) -> Progress {
        Progress::Done(Ok(()))
    }

    fn flush(&mut self, (): &mut (), _: &mut Io<'_>) -> Progress {
        Progress::Done(Ok(()))
    }

    fn discard(&mut self, (): &mut (), _: u64, _: u64, _: bool, _: &mut Io<'_>) -> Progress {
        Progress::Done(Ok(()))
    }

    fn write_zeroes(&mut self, (): &mut (), _: u64, _: u64, _: bool, _: bool, _: &mut Io<'_>) -> Progress {
        Progress::Done(Ok(()))
    }

    fn resume(&mut self, (): &mut (), _: &mut GuestIo, _: i32, _: &mut Io<'_>) -> Progress {
        Progress::Done(Err(io::Error::other("nobody waits so long")))
    }

    fn sync(&self) -> io::Result<()> {
        if *self == Self::FlushHangs {
            for_ever();
        }
        eprintln!("{self:?} is flushed");
        Ok(())
    }
}

fn for_ever() -> ! {
    loop {
        std::thread::park();
    }
}

/// Starts a daemon with these disks, an I/O thread for each; the nth one's socket is `nth.sock`.
pub(crate) fn daemon(dir: &Path, disks: &[Kind]) -> Daemon {
    let kinds: Vec<_> = disks.iter().map(|kind| format!("{kind:?}")).collect();
    let mut command = Command::new(std::env::current_exe().expect("Linux knows"));
    command.args(["--exact", "is_the_daemon_if_told_so", "--nocapture"]).stdout(Stdio::null());
    let daemon = Daemon::spawn(command.env(DIR, dir).env(DISKS, kinds.join(" ")));
    daemon.wait_for("is ready", disks.len());
    daemon
}

/// What a test of the name above calls: does nothing in the tests themselves, and does not return in a daemon.
pub(crate) fn serve_if_told() {
    let (Ok(dir), Ok(disks)) = (std::env::var(DIR), std::env::var(DISKS)) else { return };
    let disks: Vec<String> = disks.split(' ').map(str::to_owned).collect();
    let options = ServeOptions {
        socket: (0..disks.len()).map(|n| Path::new(&dir).join(format!("{n}.sock"))).collect(),
        io_threads: Some(disks.len()),
        ..ServeOptions::default()
    };
    let program = Program {
        name: "stuck",
        kind: "disk",
        read: |text| Kind::ALL.into_iter().find(|kind| format!("{kind:?}") == text).ok_or("no such kind".to_owned()),
        queues: |_| 1,
        open: |name, kind, pool| Ok(Box::new(BlockDevice::over(name, *kind, &BlockOptions::default(), pool))),
    };
    std::process::exit(serve(&program, &options, &disks) as i32);
}
