//! A daemon of our own: started, watched and ended here.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::sentinel::{Sentinel, wait_for};

/// How long a program that has lost its connection may take to end.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long one that was killed may take.
const DEATH: Duration = Duration::from_secs(1);
/// The number under which the program finds its connection.
const CONNECTION: i32 = 3;
/// Beyond all numbers that a program is given.
const OUT_OF_THE_WAY: i32 = 128;
/// The first number under which it finds what else it inherits.
pub const INHERITED: i32 = 4;
/// The part of our environment that a program gets. It leaves out the variables that speak for us to a service
/// manager (NOTIFY_SOCKET, LISTEN_FDS).
const ENVIRONMENT: [&str; 4] = ["PATH", "LD_LIBRARY_PATH", "RUST_LOG", "RUST_BACKTRACE"];

/// A program that serves a device over an inherited connection.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    /// Its arguments but for the connection.
    arguments: Vec<OsString>,
    /// Other descriptors that it inherits, under numbers from [`INHERITED`] on.
    inherited: Vec<Arc<OwnedFd>>,
    running: Option<Running>,
    /// Tells when the process that was started last has nothing in flight in the kernel.
    sentinel: Option<Arc<Sentinel>>,
}

#[derive(Debug)]
struct Running {
    child: Child,
    process: Arc<OwnedFd>,
    /// When it is killed.
    until: Option<Instant>,
}

impl Program {
    /// The program at `path`, with `inherited` open under numbers from [`INHERITED`] on.
    #[must_use]
    pub fn new(path: PathBuf, arguments: Vec<OsString>, inherited: Vec<Arc<OwnedFd>>) -> Self {
        Self { path, arguments, inherited, running: None, sentinel: None }
    }

    pub(super) fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Tells when the process that was started last has nothing in flight.
    pub(super) fn sentinel(&self) -> Option<&Arc<Sentinel>> {
        self.sentinel.as_ref()
    }

    /// A handle to its process, while it was not waited for.
    pub(super) fn process(&self) -> Option<&Arc<OwnedFd>> {
        self.running.as_ref().map(|running| &running.process)
    }

    /// Starts it. Nothing of the one before is left ([`Self::has_predecessor`]).
    #[allow(unsafe_code, reason = "descriptors get their numbers between fork and exec")]
    pub(super) fn start(&mut self) -> io::Result<UnixStream> {
        self.end();
        let (ours, theirs) = UnixStream::pair()?;
        let (sentinel, kept) = Sentinel::pair()?;
        // The descriptors that the program finds, in the order of their numbers.
        let mut wanted: Vec<RawFd> = vec![theirs.as_raw_fd()];
        wanted.extend(self.inherited.iter().map(|fd| fd.as_raw_fd()));
        let last = INHERITED + self.inherited.len() as i32;
        wanted.push(kept.as_raw_fd());
        let mut command = Command::new(&self.path);
        command.args(&self.arguments).arg("--fd").arg(CONNECTION.to_string());
        command.arg("--sentinel-fd").arg(last.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let passed = ENVIRONMENT.iter().filter_map(|name| Some((name, std::env::var_os(name)?)));
        command.env_clear().envs(passed);
        // Signals of the terminal are for us; the program ends when its connection does.
        command.process_group(0);
        let parent = std::process::id();
        // SAFETY: only calls that are safe after fork; the descriptors are open in the parent, which waits in spawn().
        unsafe {
            command.pre_exec(move || {
                // It must not outlive us, whatever we die of.
                check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong))?;
                if libc::getppid().cast_unsigned() != parent {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
                // First move all out of the way, so that none is overwritten by the number of another.
                for fd in &mut wanted {
                    *fd = check(libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, OUT_OF_THE_WAY))?;
                }
                for (&fd, number) in wanted.iter().zip(CONNECTION..) {
                    check(libc::dup2(fd, number))?;
                }
                // Other descriptors may be open in this process, opened by any code: only the named ones are passed
                // on.
                let (first, flag) = (last.cast_unsigned() + 1, libc::CLOSE_RANGE_CLOEXEC);
                if libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, flag) < 0 {
                    return Err(io::Error::last_os_error());
                }
                // Threads of ours may have blocked signals that the program waits for.
                let mut none = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
                libc::sigemptyset(none.as_mut_ptr());
                check(libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut()))?;
                Ok(())
            });
        }
        let mut child = spawn(command).map_err(|error| {
            let hint = "; it is installed beside ringvm, or named by RINGVM_DAEMONS (a directory)";
            io::Error::new(error.kind(), format!("starting {}: {error}{hint}", self.path.display()))
        })?;
        let pid = Pid::from_raw(child.id().cast_signed()).expect("a process has a number");
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(process) => self.running = Some(Running { child, process: Arc::new(process), until: None }),
            Err(error) => {
                // Without a handle it could not be waited for.
                let _ = child.kill();
                let _ = child.wait();
                return Err(error.into());
            }
        }
        self.sentinel = Some(Arc::new(sentinel));
        Ok(ours)
    }

    /// It has lost its connection: one that hangs is killed at once, another if it takes too long.
    pub(super) fn lost(&mut self, hangs: bool) {
        if let Some(running) = &mut self.running {
            // It is on its way out, after a word of statistics perhaps.
            running.until = Some(Instant::now() + if hangs { Duration::ZERO } else { FAREWELL });
        }
    }

    /// Whether the next one has to wait: for the end of this process, or for that of what it has in flight.
    pub(super) fn has_predecessor(&mut self) -> bool {
        if let Some(running) = &mut self.running {
            if running.until.is_some_and(|until| until <= Instant::now()) {
                kill(running);
            }
            if matches!(running.child.try_wait(), Ok(None)) {
                return true;
            }
            self.running = None;
        }
        if self.sentinel.as_ref().is_some_and(|sentinel| sentinel.is_over(Some(Duration::ZERO))) {
            self.sentinel = None;
        }
        self.sentinel.is_some()
    }

    /// Kills it and waits for its end. A process that the kernel can't end now ends some time.
    pub(super) fn kill(&mut self) {
        let Some(running) = &mut self.running else { return };
        kill(running);
        if has_ended(running, DEATH) {
            let _ = running.child.wait();
            self.running = None;
        }
    }

    /// Lets it end by itself for a while.
    fn end(&mut self) {
        let Some(running) = &self.running else { return };
        let farewell = running.until.map_or(FAREWELL, |until| until.saturating_duration_since(Instant::now()));
        has_ended(running, farewell);
        self.kill();
    }
}

/// Waits for the end of a process.
fn has_ended(running: &Running, limit: Duration) -> bool {
    wait_for(running.process.as_fd(), PollFlags::IN, Some(limit))
}

/// Kills a process, stopped or not; of one that has ended this is an error.
fn kill(running: &Running) {
    let _ = pidfd_send_signal(&running.process, Signal::KILL);
}

/// Starts programs. The kernel kills them with the *thread* that has started them (PR_SET_PDEATHSIG), so all are started by one
/// that lives as long as the process.
fn spawn(command: Command) -> io::Result<Child> {
    type Order = (Command, Sender<io::Result<Child>>);
    static STARTER: Mutex<Option<Sender<Order>>> = Mutex::new(None);
    let starter = {
        let mut starter = STARTER.lock().unwrap_or_else(PoisonError::into_inner);
        match &*starter {
            Some(starter) => starter.clone(),
            None => {
                let (orders, ordered) = mpsc::channel::<Order>();
                thread::Builder::new().name("starter".into()).spawn(move || {
                    for (mut command, answer) in ordered {
                        // The thread that ordered it waits.
                        let _ = answer.send(command.spawn());
                    }
                })?;
                starter.insert(orders).clone()
            }
        }
    };
    let gone = |_| io::Error::other("the thread that starts programs has died");
    let (answer, started) = mpsc::channel();
    starter.send((command, answer)).map_err(|_| gone(()))?;
    started.recv().map_err(|_| gone(()))?
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// A shell script in the place of a daemon. `$2` is its connection, `$4` its sentinel.
    fn script(text: &str, inherited: Vec<Arc<OwnedFd>>) -> Program {
        let arguments = ["-c", text, "daemon"].map(OsString::from).to_vec();
        Program::new("/bin/sh".into(), arguments, inherited)
    }

    /// The output of a script over its connection until it ends.
    fn said(text: &str, inherited: Vec<Arc<OwnedFd>>) -> String {
        let mut program = script(text, inherited);
        let mut said = String::new();
        program.start().unwrap().read_to_string(&mut said).unwrap();
        said
    }

    #[test]
    fn a_program_inherits_what_is_named_and_nothing_else() {
        // Open without CLOEXEC, as what others have passed to us may be.
        let stray = File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&stray, rustix::io::FdFlags::empty()).unwrap();
        let named = Arc::new(OwnedFd::from(File::open("/proc/self/stat").unwrap()));
        let said = said("ls /proc/$$/fd >&3; true", vec![named]);
        let numbers: Vec<u32> = said.split_whitespace().map(|number| number.parse().unwrap()).collect();
        // The standard streams, the connection, what was named, and the sentinel. A shell keeps copies above 9 of what it redirects.
        let few: Vec<u32> = numbers.into_iter().filter(|&number| number < 10).collect();
        assert_eq!(few, [0, 1, 2, 3, 4, 5]);
        assert!(!said.contains(&stray.as_raw_fd().to_string()) || stray.as_raw_fd() < 6, "{said}");
    }

    #[test]
    fn a_program_does_not_speak_for_us() {
        let said = said("env >&3", Vec::new());
        let names: Vec<&str> = said.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
        assert!(names.contains(&"PATH"), "{said}");
        // A shell adds some of its own.
        let known = |name: &&str| ENVIRONMENT.contains(name) || ["PWD", "OLDPWD", "SHLVL", "_"].contains(name);
        assert!(names.iter().all(known), "{said}");
    }

    #[test]
    fn a_program_outlives_the_thread_that_wanted_it() {
        let mut program = script("echo up >&3; while :; do sleep 1; done", Vec::new());
        // Started by a thread that is gone by then.
        let (mut program, mut stream) =
            thread::spawn(move || program.start().map(|stream| (program, stream))).join().unwrap().unwrap();
        let mut up = [0; 3];
        stream.read_exact(&mut up).unwrap();
        let running = program.running.as_mut().unwrap();
        assert!(matches!(running.child.try_wait(), Ok(None)), "it lives");
        program.kill();
        assert!(program.process().is_none());
    }

    #[test]
    fn a_stopped_program_is_killed() {
        let mut program = script("kill -STOP $$", Vec::new());
        let _stream = program.start().unwrap();
        program.lost(true);
        let start = Instant::now();
        while program.has_predecessor() {
            assert!(start.elapsed() < LIMIT);
            thread::yield_now();
        }
    }

    #[test]
    fn the_next_one_waits_for_what_the_one_before_has_in_flight() {
        // A child process that lives on until a file is removed plays the requests in flight of a killed daemon.
        let folder = tempfile::tempdir().unwrap();
        let in_flight = folder.path().join("in-flight");
        std::fs::write(&in_flight, "").unwrap();
        let text = format!(
            "(trap '' HUP; exec 3>&-; while [ -e '{}' ]; do sleep 0.01; done) & echo up >&3; exec 4>&-; exec sleep 60",
            in_flight.display()
        );
        let mut program = script(&text, Vec::new());
        let mut stream = program.start().unwrap();
        stream.read_exact(&mut [0; 3]).unwrap();
        let sentinel = Arc::clone(program.sentinel().unwrap());
        program.kill();
        assert!(program.process().is_none(), "the process has ended");
        assert!(!sentinel.is_over(Some(Duration::from_millis(100))));
        assert!(program.has_predecessor(), "and there is something to wait for");
        std::fs::remove_file(&in_flight).unwrap();
        assert!(sentinel.is_over(Some(LIMIT)));
        assert!(!program.has_predecessor());
        program.start().unwrap();
    }
}
