//! One run: a VMM is started, its guest's lines are read and stamped, and the process is looked at when the guest says
//! that a measurement starts and ends.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::child::end_with_parent;
use crate::companion::Companion;
use crate::counter::{Counter, Counts};
use crate::exits::Exits;
use crate::process::{CpuTime, memory_beyond_ram};
use crate::sample::{Counted, VmSample};
use crate::signals;
use crate::vmm::{Contestant, Launch, Vm};

/// What every line of the guest starts with.
pub const PREFIX: &str = "ringvm-guest: ";
/// What a line of a program's output in the guest starts with, behind that: it is no news.
pub const OUTPUT: char = '|';
/// What Linux says of its own end.
const PANIC: &str = "Kernel panic - not syncing";
/// How long starting and ending may take, apart from the measurement.
const PATIENCE: Duration = Duration::from_secs(40);
/// Lines of the guest that are kept to be quoted.
const KEPT: usize = 12;
/// Bytes of the VMM's stderr that are looked at for that.
const STDERR_KEPT: u64 = 16 << 10;
/// Lines that wait to be read: a VMM that prints without end waits too.
const WAITING: usize = 1024;
/// How often is looked whether the user has lost patience.
const LOOK: Duration = Duration::from_millis(100);

/// A VMM that runs, and is killed when dropped.
pub struct Running {
    child: Child,
    started: Instant,
    lines: Receiver<(Instant, Event)>,
    deadline: Instant,
    first: Option<Instant>,
    /// What the guest has printed last, for error messages.
    heard: VecDeque<String>,
    errors: PathBuf,
    name: String,
    /// Serves the VM's disk; ends after it.
    companion: Option<Companion>,
    /// What the guest is to do, and how long it may take, where more is known than that it was silent.
    awaited: Option<(String, Duration)>,
    /// How many of the last lines are quoted in error messages.
    quoted: usize,
}

enum Event {
    FirstByte,
    Line(String),
}

impl Running {
    /// Starts a VMM. `time` is how long its guest is going to work.
    ///
    /// # Errors
    /// It can't be started.
    pub fn start(name: &str, words: &[OsString], dir: &Path, time: Duration) -> Result<Self> {
        let errors = dir.join("stderr");
        let stderr = File::create(&errors).with_context(|| format!("making {}", errors.display()))?;
        let (program, arguments) = words.split_first().context("an empty command line")?;
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        end_with_parent(&mut command);
        let started = Instant::now();
        let mut child = command.spawn().with_context(|| format!("starting {}", Path::new(program).display()))?;
        let stdout = child.stdout.take().context("a child without an output")?;
        let lines = listen(stdout);
        Ok(Self {
            child,
            started,
            lines,
            deadline: started + PATIENCE + time,
            first: None,
            heard: VecDeque::with_capacity(KEPT),
            errors,
            name: name.to_owned(),
            companion: None,
            awaited: None,
            quoted: 4,
        })
    }

    /// Says what the guest is to do from here on, and how long it may take; and that errors quote that many lines.
    pub fn await_for(&mut self, what: &str, limit: Duration, quoted: usize) {
        self.deadline = Instant::now() + limit;
        self.awaited = Some((what.to_owned(), limit));
        self.quoted = quoted;
    }

    /// Starts a contestant with a VM, and before it the daemon that serves its disk, if it has one.
    ///
    /// # Errors
    /// Either can't be started.
    pub fn launch(name: &str, launch: &Launch, dir: &Path, time: Duration) -> Result<Self> {
        let companion = launch.daemon.as_ref().map(|daemon| Companion::start(name, daemon, dir)).transpose()?;
        let mut running = Self::start(name, &launch.vmm, dir, time)?;
        running.companion = companion;
        Ok(running)
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The processes that serve the VM: this one, and the daemon of its disk.
    pub fn pids(&self) -> Vec<u32> {
        std::iter::once(self.pid()).chain(self.companion.as_ref().map(Companion::pid)).collect()
    }

    /// From before the start to the guest's first instruction.
    pub fn to_first_instruction(&self) -> Option<Duration> {
        self.first.map(|first| first.duration_since(self.started))
    }

    /// The next line of the guest, without what all of them start with; `None` at the end.
    ///
    /// # Errors
    /// The guest failed, or said nothing for too long.
    pub fn next_line(&mut self) -> Result<Option<String>> {
        loop {
            signals::check()?;
            let left = self.deadline.saturating_duration_since(Instant::now());
            // Lines that say nothing may come without end.
            if left.is_zero() {
                return Err(self.too_late());
            }
            match self.lines.recv_timeout(left.min(LOOK)) {
                Ok((at, Event::FirstByte)) => self.first = Some(at),
                Ok((_, Event::Line(line))) => {
                    if !line.strip_prefix(PREFIX).is_some_and(|text| text.starts_with(OUTPUT)) {
                        if self.heard.len() == KEPT {
                            self.heard.pop_front();
                        }
                        self.heard.push_back(line.clone());
                    }
                    let Some(text) = line.strip_prefix(PREFIX) else {
                        if line.contains(PANIC) {
                            bail!("the guest's kernel under {} has panicked{}", self.name, self.context());
                        }
                        continue;
                    };
                    if text.starts_with("FAILED") {
                        bail!("the guest under {} says: {text}{}", self.name, self.context());
                    }
                    return Ok(Some(text.to_owned()));
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn too_late(&self) -> anyhow::Error {
        match &self.awaited {
            Some((what, limit)) => anyhow!(
                "the guest under {} did not {what} within {limit:?}, and was ended{}",
                self.name,
                self.context()
            ),
            None => anyhow!("{} did not finish in time and was ended{}", self.name, self.context()),
        }
    }

    /// Waits for the process to end by itself.
    ///
    /// # Errors
    /// It does not.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        loop {
            if let Some(status) = self.child.try_wait().with_context(|| format!("waiting for {}", self.name))? {
                return Ok(status);
            }
            signals::check()?;
            if Instant::now() >= self.deadline {
                bail!("{} did not end after its guest had powered off{}", self.name, self.context());
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// What was heard last, and what the VMM has complained about: the end of an error message.
    pub fn context(&self) -> String {
        let mut text = String::new();
        let errors = end_of(&self.errors, STDERR_KEPT).unwrap_or_default();
        let last = |lines: Vec<&str>| {
            let from = lines.len().saturating_sub(self.quoted);
            lines[from..].iter().map(|line| format!("\n    {line}")).collect::<String>()
        };
        if !errors.trim().is_empty() {
            text += &format!("\n  its stderr ends with:{}", last(errors.lines().collect()));
        }
        if self.heard.is_empty() && self.awaited.is_some() {
            text += "\n  its guest has printed nothing";
        }
        if !self.heard.is_empty() {
            text +=
                &format!("\n  its guest's output ends with:{}", last(self.heard.iter().map(String::as_str).collect()));
        }
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Reads and stamps lines on a thread of its own, which ends with the output.
fn listen(mut stdout: impl Read + Send + 'static) -> Receiver<(Instant, Event)> {
    let (sender, receiver) = mpsc::sync_channel(WAITING);
    thread::spawn(move || {
        let mut pending = Vec::new();
        let mut chunk = [0; 4096];
        let mut first = true;
        while let Ok(got @ 1..) = stdout.read(&mut chunk) {
            let now = Instant::now();
            if first {
                first = false;
                let _ = sender.send((now, Event::FirstByte));
            }
            for &byte in &chunk[..got] {
                match byte {
                    b'\n' => {
                        let line = String::from_utf8_lossy(&pending).trim_end().to_owned();
                        pending.clear();
                        if sender.send((now, Event::Line(line))).is_err() {
                            return;
                        }
                    }
                    // No line of the guest is that long: whatever it is, it is not kept.
                    byte if pending.len() < 1 << 16 => pending.push(byte),
                    _ => {}
                }
            }
        }
    });
    receiver
}

/// The last bytes of a file, which may be none of UTF-8.
fn end_of(path: &Path, limit: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(limit)))?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What the guest's job is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// It begins to measure.
    Start,
    /// It has measured.
    End,
}

/// What a run is to look at besides, where that costs something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Nothing.
    Plain,
    /// System calls and exits, by tracepoints.
    Counted,
}

/// What was seen of a VMM.
#[derive(Clone, Debug)]
pub struct Observed {
    /// CPU time of threads other than vCPUs, from the one moment to the other.
    pub cpu: Option<Duration>,
    /// The rest.
    pub vm: VmSample,
    /// How operations were distributed over nanoseconds, if the guest has said so.
    pub steps: Vec<(u64, u64)>,
    /// What was counted, if that was wanted and can be had.
    pub counts: Option<Counts>,
}

impl Observed {
    /// What was counted, over so many operations.
    pub fn counted(&self, ops: u64) -> Counted {
        Counted {
            by: "tracepoints".to_owned(),
            ops,
            syscalls: self.counts.map(|counts| counts.syscalls),
            exits: self.counts.and_then(|counts| counts.exits),
            names: Vec::new(),
        }
    }
}

/// What is looked at when the guest begins, to be compared with when it ends.
struct Before {
    cpu: Option<CpuTime>,
    exits: Option<Exits>,
    counter: Option<Counter>,
}

/// Boots the guest under a VMM, with a job that prints `start`, `end` and `result`. `at` is called at both moments.
///
/// # Errors
/// The VMM or its guest fails, or `at` does.
pub fn observe(
    contestant: &Contestant,
    vm: &Vm<'_>,
    dir: &Path,
    time: Duration,
    look: Look,
    mut at: impl FnMut(Moment) -> Result<()>,
) -> Result<Observed> {
    let launch = contestant.launch(vm, dir)?;
    let mut running = Running::launch(&contestant.name, &launch, dir, time)?;
    let pids = running.pids();
    let cpu_time = || CpuTime::of(&pids, contestant.kind).ok();
    let (mut before, mut after, mut result, mut steps) = (None, None, None, Vec::new());
    while let Some(line) = running.next_line()? {
        if line.starts_with("start ") {
            let counter = if look == Look::Counted { Counter::open(&pids).ok() } else { None };
            before = Some(Before { cpu: cpu_time(), exits: Exits::of(running.pid()), counter });
            at(Moment::Start)?;
        } else if line == "end" {
            let cpu = cpu_time().zip(before.as_ref().and_then(|before| before.cpu));
            let cpu = cpu.map(|(after, before)| after.since(before));
            let exits = before.as_ref().and_then(|before| before.exits.as_ref()?.since());
            let counts = before.as_ref().and_then(|before| before.counter.as_ref()?.read().ok());
            at(Moment::End)?;
            after = Some((cpu, exits, counts));
        } else if let Some(text) = line.strip_prefix("result ") {
            let ram = u64::from(vm.memory) << 20;
            let memory: Option<u64> = pids.iter().map(|&pid| memory_beyond_ram(pid, contestant.kind, ram).ok()).sum();
            result = Some((text.to_owned(), memory));
        } else if let Some(text) = line.strip_prefix("hist ns=") {
            steps.extend(pairs(text));
        } else if line == "done" {
            break;
        }
    }
    let (Some((line, memory)), Some((cpu, exits, counts))) = (result, after) else {
        bail!("the guest under {} ended without a result{}", contestant.name, running.context());
    };
    let status = running.wait()?;
    // Firecracker and others have codes of their own for a guest that ends; a signal is no such code.
    if status.code().is_none() {
        bail!("{} was ended by a signal ({status}){}", contestant.name, running.context());
    }
    let to_first_instruction = running.to_first_instruction();
    let vm = VmSample { vcpu: cpu.map(|cpu| cpu.vcpus), to_first_instruction, memory, exits, line };
    Ok(Observed { cpu: cpu.map(|cpu| cpu.others), vm, steps, counts })
}

/// Reads `END:COUNT,END:COUNT`.
fn pairs(text: &str) -> impl Iterator<Item = (u64, u64)> + '_ {
    text.split(',').filter_map(|pair| {
        let (end, count) = pair.split_once(':')?;
        Some((end.parse().ok()?, count.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::fields;

    fn play(script: &str) -> Result<Vec<String>> {
        play_for(Duration::from_secs(20), script)
    }

    fn play_for(limit: Duration, script: &str) -> Result<Vec<String>> {
        let dir = tempfile::tempdir()?;
        let words = ["sh", "-c", script].map(OsString::from);
        let mut running = Running::start("a script", &words, dir.path(), Duration::ZERO)?;
        running.deadline = Instant::now() + limit;
        let mut lines = Vec::new();
        while let Some(line) = running.next_line()? {
            lines.push(line);
        }
        assert!(running.to_first_instruction().is_some());
        running.wait()?;
        Ok(lines)
    }

    #[test]
    fn lines_of_the_guest_are_told_from_others() {
        let lines = play("printf 'noise\\r\\nringvm-guest: start job=x\\nringvm-guest: done\\n'").unwrap();
        assert_eq!(lines, ["start job=x", "done"]);
        assert_eq!(fields("result job=x ops=5")["ops"], "5");
    }

    #[test]
    fn a_guest_that_fails_is_quoted_with_what_the_vmm_said() {
        let error = play("echo oh no >&2; echo ringvm-guest: FAILED it").unwrap_err().to_string();
        assert!(error.contains("FAILED it") && error.contains("oh no"), "{error}");
    }

    #[test]
    fn silence_and_lingering_have_a_limit() {
        let silent = play_for(Duration::from_millis(500), "sleep 60").unwrap_err().to_string();
        assert!(silent.contains("did not finish in time"), "{silent}");
        let limit = Duration::from_secs(3);
        let lingering = play_for(limit, "echo ringvm-guest: done; exec >&-; sleep 60").unwrap_err().to_string();
        assert!(lingering.contains("did not end"), "{lingering}");
    }

    #[test]
    fn a_vmm_that_prints_without_end_has_a_limit_too() {
        let script = "head -c 4096 /dev/urandom >&2; exec yes garbage";
        let error = play_for(Duration::from_secs(1), script).unwrap_err().to_string();
        assert!(error.contains("did not finish in time") && error.contains("    garbage"), "{error}");
        assert_eq!(error.matches("    garbage").count(), 4, "{error}");
    }

    #[test]
    fn a_linux_guest_that_panics_or_does_not_come_up_is_quoted() {
        let error = play("echo '[    1.0] Kernel panic - not syncing: no init'; sleep 60").unwrap_err().to_string();
        assert!(error.contains("has panicked") && error.contains("not syncing: no init"), "{error}");
        let dir = tempfile::tempdir().unwrap();
        let words = ["sh", "-c", "seq 20; sleep 60"].map(OsString::from);
        let mut running = Running::start("it", &words, dir.path(), Duration::ZERO).unwrap();
        running.await_for("come up", Duration::from_secs(3), 12);
        let error = running.next_line().unwrap_err().to_string();
        assert!(error.starts_with("the guest under it did not come up within 3s"), "{error}");
        assert!(error.contains("\n    9\n") && !error.contains("\n    8\n") && error.ends_with("\n    20"), "{error}");
    }

    #[test]
    fn steps_are_read_and_nonsense_is_passed_over() {
        assert_eq!(pairs("10:2,20:5").collect::<Vec<_>>(), [(10, 2), (20, 5)]);
        assert_eq!(pairs("x,7:1,9:").collect::<Vec<_>>(), [(7, 1)]);
    }

    #[test]
    fn a_program_that_is_missing_is_named() {
        let words = [OsString::from("/nowhere/vmm")];
        let dir = tempfile::tempdir().unwrap();
        let error = Running::start("it", &words, dir.path(), Duration::ZERO).err().unwrap();
        assert!(format!("{error:#}").contains("/nowhere/vmm"));
    }
}
