//! What the tests of the daemons share: a daemon in a line, and what can be seen of it from outside.
#![allow(dead_code, reason = "each test file uses its part")]

pub(crate) mod client;
pub(crate) mod honest;
pub(crate) mod stuck;
#[path = "../../../tests/src/stuck_disk.rs"]
#[allow(unreachable_pub, reason = "it is part of a library elsewhere")]
pub(crate) mod stuck_disk;
pub(crate) mod target;

use std::cell::Cell;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

/// Longest time that anything here may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A directory on a disk: the usual one for such files may be a tmpfs, where io_uring behaves otherwise.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("d").tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory for files")
}

/// An image of so many bytes.
pub(crate) fn image(dir: &Path, size: u64) -> PathBuf {
    let path = dir.join("disk.img");
    std::fs::File::create(&path).and_then(|file| file.set_len(size)).expect("an image");
    path
}

/// A running daemon.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    /// How many of the lines were forgotten.
    forgotten: Cell<usize>,
    reader: Option<JoinHandle<()>>,
}

impl Daemon {
    /// Starts one and does not wait for it.
    pub(crate) fn spawn(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("the daemon starts");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (theirs, stderr) = (Arc::clone(&lines), child.stderr.take().expect("it is piped"));
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                theirs.lock().unwrap().push(line);
            }
        });
        Self { child, lines, forgotten: Cell::new(0), reader: Some(reader) }
    }

    /// `ringvm-blk` with one disk, ready.
    pub(crate) fn blk(socket: &Path, disk: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringvm-blk"));
        let daemon = Self::spawn(command.arg("--socket").arg(socket).args(["--disk", disk]));
        daemon.wait_for("is ready", 1);
        daemon
    }

    /// `ringvm-net` with one NIC, ready.
    pub(crate) fn net(socket: &Path, net: &str) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringvm-net"));
        let daemon = Self::spawn(command.arg("--socket").arg(socket).args(["--net", net]));
        daemon.wait_for("is ready", 1);
        daemon
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).expect("the daemon is there");
    }

    /// What it has said so far, but for what was forgotten.
    pub(crate) fn said(&self) -> Vec<String> {
        self.lines.lock().unwrap()[self.forgotten.get()..].to_vec()
    }

    /// Leaves what it has said so far out of what is looked at from here on.
    pub(crate) fn forget(&self) {
        self.forgotten.set(self.lines.lock().unwrap().len());
    }

    /// Lines with `text` in them.
    pub(crate) fn count(&self, text: &str) -> usize {
        self.said().iter().filter(|line| line.contains(text)).count()
    }

    /// Waits until it has said so often.
    pub(crate) fn wait_for(&self, text: &str, count: usize) {
        wait(&format!("{count} lines with {text:?} of\n{}", self.said().join("\n")), || self.count(text) >= count);
    }

    /// Its open descriptors.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("it runs").count()
    }

    /// Its mappings of shared memory.
    pub(crate) fn mappings(&self) -> usize {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.child.id())).expect("it runs");
        maps.lines().filter(|line| line.contains("memfd:")).count()
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> (ExitStatus, Vec<String>) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                self.reader.take().expect("taken once").join().expect("the reader ends with the daemon");
                return (status, self.said());
            }
            assert!(Instant::now() < deadline, "the daemon does not end; it said\n{}", self.said().join("\n"));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends it as an operator would.
    pub(crate) fn terminate(self) -> Vec<String> {
        self.signal(Signal::TERM);
        let (status, said) = self.end();
        assert_eq!(status.code(), Some(0), "{}", said.join("\n"));
        said
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.reader.is_some() {
            drop(self.child.kill());
            drop(self.child.wait());
            if std::thread::panicking() {
                eprintln!("the daemon said\n{}", self.said().join("\n"));
            }
        }
    }
}

/// Waits for a condition, not for ever.
pub(crate) fn wait(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Numbers that look random, the same each time.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
