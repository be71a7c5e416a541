//! VMs on the host's own KVM: `ringvm`, and the daemons that serve it, as child processes.

use std::collections::hash_map::RandomState;
use std::ffi::OsStr;
use std::fs;
use std::hash::BuildHasher;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::error::tail;
use crate::{Error, Result, paths};

/// For a run that is not given a limit of its own.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Where a device is served. What holds in one place holds in the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// By `ringvm` itself.
    Process,
    /// By a daemon that `ringvm` starts.
    Daemon,
}

impl Place {
    /// Every place.
    pub const ALL: [Place; 2] = [Place::Process, Place::Daemon];

    /// As an option of `--disk` and `--net`.
    pub fn option(self) -> &'static str {
        match self {
            Place::Process => "place=process",
            Place::Daemon => "place=daemon",
        }
    }
}

/// A `ringvm`, or a daemon, to be started.
#[derive(Debug)]
pub struct RingVm {
    command: Command,
    text: String,
}

/// A running `ringvm`, or a daemon. Dropped, it is killed.
#[derive(Debug)]
pub struct Running {
    child: Child,
    /// Its stdin, which stays open until it is taken and dropped.
    pub stdin: Option<ChildStdin>,
    chunks: Receiver<Chunk>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    text: String,
}

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// Open file descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Mappings of memory.
    pub mappings: usize,
    /// Anonymous memory that is resident, in KiB.
    pub anonymous: u64,
}

/// What a finished run left.
#[derive(Debug)]
pub struct Ended {
    /// Its exit status.
    pub status: ExitStatus,
    /// Serial output, with `--serial stdio`.
    pub stdout: String,
    /// Errors and statistics.
    pub stderr: String,
}

impl Holdings {
    /// Checks that nothing has grown since `early` as something would that leaks each time.
    ///
    /// # Panics
    /// When it has.
    #[track_caller]
    pub fn assert_flat(&self, early: &Holdings) {
        // A machine or a connection may be caught half built.
        let flat = self.descriptors <= early.descriptors + 20
            && self.threads <= early.threads + 8
            && self.mappings <= early.mappings + 60
            && self.anonymous <= early.anonymous + 1024;
        assert!(flat, "{early:?} -> {self:?}");
    }
}

impl Ended {
    /// Checks that it ended with this exit code, one line on stderr that has all these words, and nothing on stdout.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn assert_refused(&self, code: i32, words: &[&str]) {
        let said = &self.stderr;
        assert_eq!(self.code(), code, "{said}");
        assert_eq!(said.trim_end().lines().count(), 1, "one line: {said}");
        for word in words {
            assert!(said.contains(word), "`{word}` in: {said}");
        }
        assert_eq!(self.stdout, "", "nothing on stdout");
        assert!(!said.contains("panicked"), "{said}");
    }

    /// The exit code, or 128 and the signal as a shell has it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }
}

#[derive(Debug)]
enum Chunk {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
}

/// How much memory the kernel holds for a process's I/O, in KiB.
pub fn pinned(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPin:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).unwrap_or(0)
}

/// Waits for a process that this one has started, other than `last`, and returns its number.
pub fn child_after(pid: u32, last: u32, limit: Duration) -> Result<u32> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(child) = children(pid).into_iter().find(|&child| child != last) {
            return Ok(child);
        }
        let alive = parent(pid).is_some();
        if !alive || Instant::now() > deadline {
            let what = format!("the start of a process by {pid} after {last}");
            let tail = if alive { String::new() } else { format!("{pid} has ended") };
            return Err(Error::TimedOut { what, limit, tail });
        }
        thread::sleep(Duration::from_micros(200));
    }
}

/// Sends a process that is not a child of ours a signal; it may have ended meanwhile.
pub fn send(pid: u32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid.cast_signed()) {
        let _ = kill_process(pid, signal);
    }
}

/// A time between nothing and `most`.
pub fn random(most: Duration) -> Duration {
    // Each state has keys of its own.
    let number = RandomState::new().hash_one(0);
    Duration::from_micros(number % (most.as_micros() as u64).max(1))
}

/// The `ringvm` under test with these arguments.
pub fn ringvm<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<RingVm> {
    Ok(program(paths::ringvm()?, arguments))
}

/// The daemon under test of this name with these arguments.
pub fn daemon<A: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = A>) -> Result<RingVm> {
    Ok(program(paths::daemon(name)?, arguments))
}

/// Another program, such as somebody else's daemon.
pub fn program<A: AsRef<OsStr>>(path: impl AsRef<OsStr>, arguments: impl IntoIterator<Item = A>) -> RingVm {
    let mut command = Command::new(path);
    // The tests' own log filter is none of its business.
    command.args(arguments).env_remove("RUST_LOG");
    let text = format!("{command:?}");
    RingVm { command, text }
}

/// The processes that this one has started and that run.
pub fn children(pid: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten();
    let numbers = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    numbers.filter(|&child| parent(child) == Some(pid)).collect()
}

/// Whether a process runs.
pub fn is_alive(pid: u32) -> bool {
    parent(pid).is_some()
}

/// The parent of a process that runs.
fn parent(pid: u32) -> Option<u32> {
    // The name in parentheses may hold anything; behind it come the state and the parent.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut words = stat.rsplit_once(')')?.1.split_whitespace();
    let state = words.next()?;
    words.next()?.parse().ok().filter(|_| state != "Z")
}

/// A shell script of setting up, then the `ringvm` under test with these arguments, alone in a network, with processes and
/// mounts that end with it. `wrapper` stands before `ringvm`, such as `setpriv`.
pub fn isolated<A: AsRef<OsStr>>(setup: &str, wrapper: &str, arguments: impl IntoIterator<Item = A>) -> Result<RingVm> {
    let path = paths::ringvm()?;
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec"]);
    command.arg(format!("PATH=$PATH:/usr/sbin:/sbin\n{setup}\nexec {wrapper} \"$0\" \"$@\""));
    command.arg(&path).args(arguments).env_remove("RUST_LOG");
    let text = format!("{command:?}");
    Ok(RingVm { command, text })
}

impl RingVm {
    /// Changes the command before its start: environment, working folder.
    pub fn with(mut self, change: impl FnOnce(&mut Command)) -> RingVm {
        change(&mut self.command);
        self
    }

    /// Starts it.
    pub fn start(mut self) -> Result<Running> {
        let spawned = self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.map_err(|e| Error::Tool { command: self.text.clone(), why: e.to_string() })?;
        let (sender, chunks) = mpsc::channel();
        if let Some(pipe) = child.stdout.take() {
            collect(pipe, sender.clone(), Chunk::Stdout);
        }
        if let Some(pipe) = child.stderr.take() {
            collect(pipe, sender, Chunk::Stderr);
        }
        let stdin = child.stdin.take();
        Ok(Running { child, stdin, chunks, stdout: Vec::new(), stderr: Vec::new(), text: self.text })
    }

    /// Starts it and waits for its end, up to [`LIMIT`].
    pub fn run(self) -> Result<Ended> {
        self.start()?.end(LIMIT)
    }
}

fn occurrences(bytes: &[u8], text: &str) -> usize {
    bytes.windows(text.len()).filter(|window| *window == text.as_bytes()).count()
}

fn collect(
    mut pipe: impl Read + Send + 'static,
    to: mpsc::Sender<Chunk>,
    chunk: impl Fn(Vec<u8>) -> Chunk + Send + 'static,
) {
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            if to.send(chunk(buffer[..count].to_vec())).is_err() {
                return;
            }
        }
    });
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        // Not reaped before `end`, so the id is its own.
        let sent = pid.map(|pid| kill_process(pid, signal));
        match sent {
            Some(Ok(())) => Ok(()),
            other => Err(Error::Check(format!("sending {signal:?} to `{}`: {other:?}", self.text))),
        }
    }

    /// Waits until its stdout has shown `text`.
    pub fn expect(&mut self, text: &str, limit: Duration) -> Result<()> {
        self.expect_count(text, 1, limit)
    }

    /// Waits until its stdout has shown `text` so many times.
    pub fn expect_count(&mut self, text: &str, count: usize, limit: Duration) -> Result<()> {
        self.await_text(text, limit, |running| occurrences(&running.stdout, text) >= count)
    }

    /// Waits until its stderr has shown `text` so many times.
    pub fn expect_said(&mut self, text: &str, count: usize, limit: Duration) -> Result<()> {
        self.await_text(text, limit, |running| occurrences(&running.stderr, text) >= count)
    }

    /// Waits until its stderr has shown any of `texts` so many times in all.
    pub fn expect_said_any(&mut self, texts: &[&str], count: usize, limit: Duration) -> Result<()> {
        let seen = |running: &Running| texts.iter().map(|text| occurrences(&running.stderr, text)).sum::<usize>();
        self.await_text(&texts.join("` or `"), limit, |running| seen(running) >= count)
    }

    /// Tells a guest with `until=told` that it is enough.
    pub fn tell_enough(&mut self) -> Result<()> {
        let told = self.stdin.as_mut().map(|stdin| stdin.write_all(b"\n"));
        match told {
            Some(Ok(())) => Ok(()),
            // Its end says more.
            Some(Err(e)) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
            other => Err(Error::Check(format!("writing to the stdin of `{}`: {other:?}", self.text))),
        }
    }

    /// What its stdout has shown so far.
    pub fn shown(&mut self) -> String {
        while let Ok(chunk) = self.chunks.try_recv() {
            self.take(chunk);
        }
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// What its stderr has shown so far.
    pub fn said(&mut self) -> String {
        while let Ok(chunk) = self.chunks.try_recv() {
            self.take(chunk);
        }
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// What it holds now.
    ///
    /// # Panics
    /// When it has ended.
    pub fn holdings(&self) -> Holdings {
        let pid = self.pid();
        let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, Iterator::count);
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default().lines().count();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let anonymous = anonymous.and_then(|rest| rest.split_whitespace().next()).and_then(|n| n.parse().ok());
        Holdings {
            descriptors: count("fd"),
            threads: count("task"),
            mappings: maps,
            anonymous: anonymous.expect("Linux says RssAnon"),
        }
    }

    fn await_text(&mut self, text: &str, limit: Duration, come: impl Fn(&Running) -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        while !come(self) {
            match self.chunks.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(chunk) => self.take(chunk),
                Err(RecvTimeoutError::Timeout) => {
                    let what = format!("`{text}` from `{}`", self.text);
                    return Err(Error::TimedOut { what, limit, tail: self.tail() });
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::Ended { what: self.text.clone(), tail: self.tail() });
                }
            }
        }
        Ok(())
    }

    /// Waits for its end; one that does not come within `limit` is an error, and the process is killed.
    pub fn end(mut self, limit: Duration) -> Result<Ended> {
        let deadline = Instant::now() + limit;
        loop {
            match self.chunks.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(chunk) => self.take(chunk),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => return Err(self.late(limit)),
            }
        }
        // Both pipes are closed, so its end is near; a process that closed them and lives on is late as well.
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
                Ok(None) => return Err(self.late(limit)),
                Err(e) => return Err(Error::Tool { command: self.text.clone(), why: e.to_string() }),
            }
        };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Ended { status, stdout: text(&self.stdout), stderr: text(&self.stderr) })
    }

    fn take(&mut self, chunk: Chunk) {
        match chunk {
            Chunk::Stdout(bytes) => self.stdout.extend(bytes),
            Chunk::Stderr(bytes) => self.stderr.extend(bytes),
        }
    }

    fn late(&self, limit: Duration) -> Error {
        Error::TimedOut { what: format!("the end of `{}`", self.text), limit, tail: self.tail() }
    }

    fn tail(&self) -> String {
        tail(&self.stdout, 1500) + &tail(&self.stderr, 1500)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail when it has ended and was waited for, which is well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
