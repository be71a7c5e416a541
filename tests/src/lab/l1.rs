//! L1: the machine that QEMU's TCG emulates with AMD SVM, and processes in it through the agent.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::BufReader;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::payload::{Payload, ROOT_DISK};
use super::wire::{Exit, Frame, Start};
use crate::error::tail;
use crate::{Error, Result, host};

/// With two, the start of a guest hung more often than not on a busy machine, and no heartbeat helped (see `HEARTBEAT`).
/// ringvm's threads take turns on one; natively they run side by side.
const CPUS: &str = "1";
const MEMORY: &str = "3072";
/// TCG has no intercept for XSETBV: a guest would set L1's own XCR0 behind KVM's back, and complain of what CPUID then says.
const CPU: &str = "max,-xsave";
/// Measured: up in 2-5 s on an idle machine.
const START_LIMIT: Duration = Duration::from_secs(60);
const START_TRIES: u32 = 3;
const CONSOLE: &str = "l1-console.log";
const ERRORS: &str = "qemu.log";
/// A machine that lives answers within milliseconds, on a busy host within a second or two.
const PING_LIMIT: Duration = Duration::from_secs(15);
/// While it runs a guest for L1, QEMU 7.2 now and then loses an interrupt of L1's (its vCPU thread clears a bit of
/// `interrupt_request` without the lock under which others set theirs). When that was the timer's, L1 and the guest stood
/// still until something else interrupted L1. A message over the serial port does, so one is sent at this interval.
const HEARTBEAT: Duration = Duration::from_millis(200);
const HEARTBEAT_PING: u32 = u32::MAX;
/// A killed QEMU unmaps its memory and closes its disk.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// A running L1 machine. It ends when this is dropped, and when the test process ends in whatever way.
#[derive(Debug)]
pub(crate) struct L1 {
    /// The way to its processes.
    pub(crate) link: Arc<Link>,
    qemu: OwnedFd,
    /// Of its disk, the log of its serial console, and what QEMU itself says.
    pub(crate) folder: PathBuf,
}

/// What can happen to a process in L1.
#[derive(Debug)]
pub(crate) enum Event {
    Started(i32),
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    Exited(Exit),
}

/// The agent's link: frames go out through a thread, so that a hung machine holds nobody up, and come in through
/// another, which hands them to the process they belong to.
#[derive(Debug)]
pub(crate) struct Link {
    out: Sender<Frame>,
    next: AtomicU32,
    processes: Mutex<HashMap<u32, Sender<Event>>>,
    pings: Mutex<Receiver<u32>>,
}

impl L1 {
    /// Starts the machine; a start that stays silent is tried again, and said.
    pub(crate) fn start(payload: &Payload, folder: &Path) -> Result<L1> {
        let mut tries = 1;
        loop {
            let l1 = L1::launch(payload, folder)?;
            match l1.ping(START_LIMIT) {
                Ok(()) => return Ok(l1),
                Err(e) if tries == START_TRIES => {
                    let read = |path: &Path| fs::read(path).unwrap_or_default();
                    let log = [read(&folder.join(CONSOLE)), read(&folder.join(ERRORS))].concat();
                    return Err(Error::Ended {
                        what: format!("L1, started {tries} times: {e};"),
                        tail: tail(&log, 2000),
                    });
                }
                Err(e) => host::say(&format!("lab: start {tries} of L1 failed ({e}), trying again")),
            }
            l1.kill()?;
            tries += 1;
        }
    }

    /// Cuts its power, and waits until its disk is free for the next machine.
    pub(crate) fn kill(&self) -> Result<()> {
        // It may have ended by itself.
        let _ = pidfd_send_signal(&self.qemu, Signal::KILL);
        let mut ended = [PollFd::new(&self.qemu, PollFlags::IN)];
        let limit = Timespec { tv_sec: KILL_LIMIT.as_secs().cast_signed(), tv_nsec: 0 };
        match poll(&mut ended, Some(&limit)) {
            Ok(1..) => Ok(()),
            other => Err(Error::L1Silent(format!("QEMU did not end when killed: {other:?}"))),
        }
    }

    /// The log of its serial console.
    pub(crate) fn console(&self) -> PathBuf {
        self.folder.join(CONSOLE)
    }

    fn launch(payload: &Payload, folder: &Path) -> Result<L1> {
        // With TCG `cache=unsafe` changes nothing that a test can see: what L1 flushed or wrote is in the host's page cache,
        // which outlives QEMU; what L1 had only in its own page cache dies with it.
        let drive = format!("file={},format=raw,if=none,id=root,cache=unsafe", escape(&folder.join(ROOT_DISK)));
        let stderr = File::create(folder.join(ERRORS)).map_err(Error::file("creating", folder.join(ERRORS)))?;
        // setpriv has the kernel kill QEMU when the thread that started it ends, however the test process ends.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
            .args(["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", CPUS, "-m", MEMORY])
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-monitor", "none"])
            .args(["-serial", &format!("file:{}", folder.join(CONSOLE).display())])
            .args(["-chardev", "stdio,id=agent,signal=off", "-device", "virtio-serial-pci"])
            .args(["-device", "virtserialport,chardev=agent,name=ringvm.agent"])
            .args(["-drive", &drive, "-device", "virtio-blk-pci,drive=root"])
            .arg("-kernel")
            .arg(&payload.kernel)
            .arg("-initrd")
            .arg(&payload.initramfs)
            .args(["-append", "console=ttyS0 panic=-1 no_timer_check quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr);
        let text = format!("{command:?}");
        let failed = |why: String| Error::Tool { command: text.clone(), why };

        let (started, starts) = mpsc::channel();
        // This thread lives as long as QEMU does: it is the one whose death would kill QEMU.
        thread::Builder::new()
            .name("lab-qemu".into())
            .spawn(move || match command.spawn() {
                Ok(mut child) => {
                    let _ = started.send(take_pipes(&mut child));
                    // Reaped here; how it ended shows in the closed pipes.
                    let _ = child.wait();
                }
                Err(e) => drop(started.send(Err(e))),
            })
            .map_err(|e| failed(e.to_string()))?;
        let (qemu, stdin, stdout) = match starts.recv() {
            Ok(Ok(parts)) => parts,
            Ok(Err(e)) => return Err(failed(e.to_string())),
            Err(_) => return Err(failed("its thread ended".into())),
        };
        Ok(L1 { link: Link::start(stdin, stdout), qemu, folder: folder.to_path_buf() })
    }

    /// Whether the machine answers.
    pub(crate) fn answers(&self) -> bool {
        self.link.out.send(Frame::Ping(0)).is_ok() && self.ping(PING_LIMIT).is_ok()
    }

    fn ping(&self, limit: Duration) -> Result<()> {
        let pings = lock(&self.link.pings);
        match pings.recv_timeout(limit) {
            Ok(_) => {
                while pings.try_recv().is_ok() {}
                Ok(())
            }
            Err(RecvTimeoutError::Timeout) => Err(Error::L1Silent(format!("silent for {limit:?}"))),
            Err(RecvTimeoutError::Disconnected) => Err(Error::L1Silent("QEMU ended".into())),
        }
    }
}

impl Drop for L1 {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = pidfd_send_signal(&self.qemu, Signal::KILL);
    }
}

type Parts = (OwnedFd, ChildStdin, ChildStdout);

fn take_pipes(child: &mut Child) -> std::io::Result<Parts> {
    match (Pid::from_raw(child.id().cast_signed()), child.stdin.take(), child.stdout.take()) {
        (Some(pid), Some(stdin), Some(stdout)) => Ok((pidfd_open(pid, PidfdFlags::empty())?, stdin, stdout)),
        _ => Err(std::io::Error::other("it has no pipes")),
    }
}

/// In QEMU's options a comma within a value is written twice.
fn escape(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

impl Link {
    fn start(mut stdin: ChildStdin, stdout: ChildStdout) -> Arc<Link> {
        let (out, frames) = mpsc::channel::<Frame>();
        let up = Arc::new(AtomicBool::new(false));
        let is_up = Arc::clone(&up);
        thread::spawn(move || {
            loop {
                let frame = match frames.recv_timeout(HEARTBEAT) {
                    Ok(frame) => frame,
                    Err(RecvTimeoutError::Timeout) if is_up.load(Ordering::Relaxed) => Frame::Ping(HEARTBEAT_PING),
                    Err(RecvTimeoutError::Timeout) => continue,
                    Err(RecvTimeoutError::Disconnected) => return,
                };
                if frame.write(&mut stdin).is_err() {
                    return;
                }
            }
        });
        let (ping, pings) = mpsc::channel();
        let link =
            Arc::new(Link { out, next: AtomicU32::new(1), processes: Mutex::default(), pings: Mutex::new(pings) });
        // The reader must not keep the link alive, or a dropped machine's writer would never end.
        let weak = Arc::downgrade(&link);
        thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            while let Ok(frame) = Frame::read(&mut stdout) {
                let Some(link) = weak.upgrade() else { return };
                let (id, event) = match frame {
                    Frame::Ping(id) => {
                        up.store(true, Ordering::Relaxed);
                        if id != HEARTBEAT_PING {
                            let _ = ping.send(id);
                        }
                        continue;
                    }
                    Frame::Started(id, pid) => (id, Event::Started(pid)),
                    Frame::Stdout(id, bytes) => (id, Event::Stdout(bytes)),
                    Frame::Stderr(id, bytes) => (id, Event::Stderr(bytes)),
                    Frame::Exited(id, exit) => (id, Event::Exited(exit)),
                    _ => break,
                };
                if let Some(process) = lock(&link.processes).get(&id) {
                    // Nobody listens to a process that was dropped.
                    let _ = process.send(event);
                }
            }
            if let Some(link) = weak.upgrade() {
                // Whoever waits for a process learns that the machine is gone.
                lock(&link.processes).clear();
            }
        });
        link
    }

    /// Starts a process in L1.
    pub(crate) fn spawn(self: &Arc<Self>, argv: &[String]) -> Result<Process> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, events) = mpsc::channel();
        lock(&self.processes).insert(id, sender);
        let mut process = Process { id, pid: 0, ended: false, events, link: Arc::clone(self) };
        process.send(Frame::Start(id, Start { argv: argv.to_vec() }))?;
        match process.next(Instant::now() + PING_LIMIT)? {
            Some(Event::Started(pid)) => process.pid = pid,
            Some(Event::Exited(exit)) => {
                process.ended = true;
                return Err(Error::Command {
                    command: argv.join(" "),
                    place: "L1",
                    status: exit.to_string(),
                    output: String::new(),
                });
            }
            other => return Err(Error::L1Silent(format!("starting {argv:?}: {other:?}"))),
        }
        Ok(process)
    }

    /// Runs a shell command in L1 to its end.
    pub(crate) fn exec(self: &Arc<Self>, command: &str, limit: Duration) -> Result<Output> {
        let mut process = self.spawn(&["sh".into(), "-c".into(), command.into()])?;
        process.stdin(&[])?;
        let deadline = Instant::now() + limit;
        let mut output = Output { exit: Exit::Code(0), stdout: Vec::new(), stderr: Vec::new() };
        loop {
            match process.next(deadline)? {
                Some(Event::Started(_)) => {}
                Some(Event::Stdout(bytes)) => output.stdout.extend(bytes),
                Some(Event::Stderr(bytes)) => output.stderr.extend(bytes),
                Some(Event::Exited(exit)) => return Ok(Output { exit, ..output }),
                None => {
                    return Err(Error::TimedOut {
                        what: format!("the end of `{command}` in L1"),
                        limit,
                        tail: tail(&output.stdout, 2000) + &tail(&output.stderr, 2000),
                    });
                }
            }
        }
    }
}

/// A process in L1. Dropped, it is killed with its group.
#[derive(Debug)]
pub(crate) struct Process {
    id: u32,
    /// Its id in L1.
    pub(crate) pid: i32,
    ended: bool,
    events: Receiver<Event>,
    /// The machine it runs in.
    pub(crate) link: Arc<Link>,
}

/// What a finished command left.
#[derive(Debug)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// What it printed.
    pub stdout: Vec<u8>,
    /// What it complained of.
    pub stderr: Vec<u8>,
}

impl Process {
    fn send(&self, frame: Frame) -> Result<()> {
        self.link.out.send(frame).map_err(|_| Error::L1Silent("QEMU ended".into()))
    }

    /// The next event, or none by the deadline.
    pub(crate) fn next(&mut self, deadline: Instant) -> Result<Option<Event>> {
        match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(event) => {
                self.ended |= matches!(event, Event::Exited(_));
                Ok(Some(event))
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Error::L1Silent("QEMU ended".into())),
        }
    }

    /// Bytes for its stdin; none closes it.
    pub(crate) fn stdin(&self, bytes: &[u8]) -> Result<()> {
        self.send(Frame::Stdin(self.id, bytes.to_vec()))
    }

    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        self.send(Frame::Signal(self.id, signal.as_raw()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.link.out.send(Frame::Kill(self.id));
        }
        lock(&self.link.processes).remove(&self.id);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
