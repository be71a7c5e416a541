//! Where the other side is, and how a connection to it is had.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A daemon to connect to, or one of our own.
#[derive(Debug)]
pub enum Peer {
    /// Somebody listens, or will, at this socket.
    Socket(PathBuf),
    /// A program that is started, again and again if need be, and serves what it inherits.
    Program(Program),
}

impl Peer {
    /// For people.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Socket(path) => path.display().to_string(),
            Self::Program(program) => program.path.display().to_string(),
        }
    }

    /// Connects, without waiting for somebody to come.
    ///
    /// # Errors
    /// When nobody is there, or the program can't be started.
    pub fn connect(&mut self) -> io::Result<UnixStream> {
        match self {
            Self::Socket(path) => UnixStream::connect(path),
            Self::Program(program) => program.start(),
        }
    }
}

/// A program that serves a device over an inherited connection.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    /// Its arguments but for the connection.
    arguments: Vec<OsString>,
    /// What else it inherits, under numbers from [`INHERITED`] on.
    inherited: Vec<Arc<OwnedFd>>,
    child: Option<Child>,
}

/// How long a program may take to end.
const FAREWELL: Duration = Duration::from_secs(3);
/// The number under which the program finds its connection.
const CONNECTION: i32 = 3;
/// Beyond all numbers that a program is given.
const OUT_OF_THE_WAY: i32 = 128;
/// The first number under which it finds what else it inherits.
pub const INHERITED: i32 = 4;

impl Program {
    /// The program at `path`, with `inherited` open under numbers from [`INHERITED`] on.
    #[must_use]
    pub fn new(path: PathBuf, arguments: Vec<OsString>, inherited: Vec<Arc<OwnedFd>>) -> Self {
        Self { path, arguments, inherited, child: None }
    }

    #[allow(unsafe_code, reason = "descriptors get their numbers between fork and exec")]
    fn start(&mut self) -> io::Result<UnixStream> {
        self.end();
        let (ours, theirs) = UnixStream::pair()?;
        let mut command = Command::new(&self.path);
        command.args(&self.arguments).arg("--fd").arg(CONNECTION.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        // What the program finds, in the order of the numbers.
        let mut wanted: Vec<RawFd> = vec![theirs.as_raw_fd()];
        wanted.extend(self.inherited.iter().map(|fd| fd.as_raw_fd()));
        // Signals of the terminal are for us; the program ends when its connection does.
        command.process_group(0);
        // SAFETY: only calls that are safe after fork; the descriptors are open in the parent, which waits in spawn().
        unsafe {
            command.pre_exec(move || {
                // First out of the way, so that none is overwritten by the number of another.
                for fd in &mut wanted {
                    *fd = check(libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, OUT_OF_THE_WAY))?;
                }
                for (&fd, number) in wanted.iter().zip(CONNECTION..) {
                    check(libc::dup2(fd, number))?;
                }
                // Threads of ours may have blocked signals that the program waits for.
                let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
                libc::sigemptyset(none.as_mut_ptr());
                check(libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut()))?;
                Ok(())
            });
        }
        let child = command.spawn().map_err(|error| {
            let hint = "; it is installed beside ringvm, or named by RINGVM_DAEMONS (a directory)";
            io::Error::new(error.kind(), format!("starting {}: {error}{hint}", self.path.display()))
        })?;
        self.child = Some(child);
        Ok(ours)
    }

    /// Its process, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    fn end(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        // It has lost its connection, so it is on its way out, after a word of statistics perhaps.
        let start = Instant::now();
        while matches!(child.try_wait(), Ok(None)) && start.elapsed() < FAREWELL {
            std::thread::sleep(Duration::from_millis(2));
        }
        // One that hangs; of one that has ended this is an error.
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.end();
    }
}
