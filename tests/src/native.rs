//! VMs on the host's own KVM: `ringvm` as a child process.

use std::ffi::OsStr;
use std::io::Read;
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

/// A `ringvm` to be started.
#[derive(Debug)]
pub struct RingVm {
    command: Command,
    text: String,
}

/// A running `ringvm`. Dropped, it is killed.
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

/// The `ringvm` under test with these arguments.
pub fn ringvm<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Result<RingVm> {
    let path = paths::ringvm()?;
    let mut command = Command::new(&path);
    // The tests' own log filter is none of its business.
    command.args(arguments).env_remove("RUST_LOG");
    let text = format!("{command:?}");
    Ok(RingVm { command, text })
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
        let deadline = Instant::now() + limit;
        while self.stdout.windows(text.len()).filter(|window| *window == text.as_bytes()).count() < count {
            match self.chunks.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(chunk) => self.take(chunk),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(Error::TimedOut { what: format!("`{text}` on stdout"), limit, tail: self.tail() });
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
