//! L2: a guest that ringvm runs in L1, driven over its serial console.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::l1::{Event, Process};
use super::vm::quote;
use super::wire::Exit;
use crate::error::tail;
use crate::{Error, Result};

/// What the guest's init prints when its shell reads commands.
const READY: &str = "ringvm-lab: guest ready\n";
/// From the start of ringvm to that: 5-8 s were measured on an idle machine.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(75);
/// For commands that are not given a limit of their own.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// For a guest that is told to end, and for a VMM that was signalled.
const EXIT_LIMIT: Duration = Duration::from_secs(45);
/// A line in canonical mode is cut at 4,096 bytes, and the receive buffer of the guest's tty holds no more.
const LONGEST_COMMAND: usize = 3500;

/// Shown of a VMM that does not answer: its threads, L1's interrupts, and half a second of what KVM does for it.
const EXAMINE: &str = "for t in /proc/PID/task/*; do cat $t/comm; cat $t/wchan $t/stat $t/stack; echo; done; \
    cat /proc/stat /proc/interrupts; mount -t tracefs t /sys/kernel/tracing 2>/dev/null; cd /sys/kernel/tracing; \
    echo 1 > events/kvm/enable; sleep 0.5; echo 0 > events/kvm/enable; tail -n 2000 trace; echo > trace";

/// A guest that was started. Dropped, its VMM is killed.
#[derive(Debug)]
pub struct Guest {
    process: Process,
    console: Vec<u8>,
    stderr: Vec<u8>,
    exit: Option<Exit>,
    /// Up to where the console was looked at.
    seen: usize,
    commands: u32,
    console_log: File,
    stderr_log: File,
    state_log: PathBuf,
}

impl Guest {
    pub(crate) fn new(process: Process, logs: &Path, name: &str) -> Result<Guest> {
        let create = |suffix: &str| {
            let path = logs.join(format!("{name}-{suffix}.log"));
            File::create(&path).map_err(Error::file("creating", path))
        };
        let (console_log, stderr_log) = (create("console")?, create("stderr")?);
        Ok(Guest {
            process,
            console: Vec::new(),
            stderr: Vec::new(),
            exit: None,
            seen: 0,
            commands: 0,
            console_log,
            stderr_log,
            state_log: logs.join(format!("{name}-state.log")),
        })
    }

    /// Waits until the guest's shell reads commands: after the start, or after a reboot.
    pub fn ready(&mut self) -> Result<()> {
        self.expect_for(START_LIMIT, READY).map(drop)
    }

    /// Runs a shell command in the guest; its output without the last line's end. An exit other than 0 is an error.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.run_for(COMMAND_LIMIT, command)
    }

    /// [`Guest::run`] with a time limit of its own.
    pub fn run_for(&mut self, limit: Duration, command: &str) -> Result<String> {
        match self.status_for(limit, command)? {
            (0, output) => Ok(output),
            (code, output) => {
                let status = format!("code {code}");
                Err(Error::Command { command: command.into(), place: "the guest", status, output })
            }
        }
    }

    /// Runs a shell command in the guest: its exit code and output.
    pub fn status(&mut self, command: &str) -> Result<(i32, String)> {
        self.status_for(COMMAND_LIMIT, command)
    }

    fn status_for(&mut self, limit: Duration, command: &str) -> Result<(i32, String)> {
        self.commands += 1;
        // In the line that is sent the mark stands in two pieces, so that an echo of it would not be taken for it.
        let (mark, number) = ("ringvm-lab-end", self.commands);
        self.send_line(&format!(
            "sh -c {} </dev/null 2>&1; printf '\\n%s-%s:%d:\\n' {mark} {number} $?",
            quote(command)
        ))?;
        let start = self.seen;
        let found = self.expect_for(limit, &format!("\n{mark}-{number}:"));
        let before = found.map_err(|e| Error::Check(format!("running `{command}` in the guest: {e}")))?;
        let code = self.expect_for(limit, ":\n")?;
        let code = code.parse().map_err(|_| Error::Check(format!("`{command}`: its code came as `{code}`")))?;
        debug_assert!(self.seen > start);
        Ok((code, before.trim_end_matches('\n').to_owned()))
    }

    /// Starts a command and does not wait for its end; [`Guest::expect`] waits for what it prints.
    pub fn start(&mut self, command: &str) -> Result<()> {
        self.send_line(&format!("sh -c {} </dev/null 2>&1", quote(command)))
    }

    fn send_line(&mut self, line: &str) -> Result<()> {
        if line.len() > LONGEST_COMMAND || line.contains('\n') {
            return Err(Error::Check(format!(
                "a command for the guest is one line of up to {LONGEST_COMMAND} bytes: {line}"
            )));
        }
        self.process.stdin(format!("{line}\n").as_bytes())
    }

    /// Waits until the console shows `text` beyond what was seen before; gives what stood before it.
    pub fn expect(&mut self, text: &str) -> Result<String> {
        self.expect_for(COMMAND_LIMIT, text)
    }

    /// [`Guest::expect`] with a time limit of its own.
    pub fn expect_for(&mut self, limit: Duration, text: &str) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let unseen = &self.console[self.seen..];
            if let Some(at) = find(unseen, text.as_bytes()) {
                let before = String::from_utf8_lossy(&unseen[..at]).into_owned();
                self.seen += at + text.len();
                return Ok(before);
            }
            if self.exit.is_some() {
                return Err(Error::Ended {
                    what: format!("ringvm ({}), awaiting `{text}`,", self.ending()),
                    tail: self.tail(),
                });
            }
            if !self.pump(deadline)? {
                self.examine();
                let what = format!("`{}` on the guest's console", text.trim());
                return Err(Error::TimedOut { what, limit, tail: self.tail() });
            }
        }
    }

    /// Takes what the guest and ringvm say during this time.
    pub fn listen(&mut self, time: Duration) -> Result<()> {
        let deadline = Instant::now() + time;
        while self.exit.is_none() && self.pump(deadline)? {}
        Ok(())
    }

    /// Waits for ringvm's end and says how it ended.
    pub fn exit(&mut self) -> Result<Exit> {
        let deadline = Instant::now() + EXIT_LIMIT;
        loop {
            if let Some(exit) = &self.exit {
                return Ok(exit.clone());
            }
            if !self.pump(deadline)? {
                self.examine();
                return Err(Error::TimedOut { what: "the end of ringvm".into(), limit: EXIT_LIMIT, tail: self.tail() });
            }
        }
    }

    /// Switches the guest off from within and waits for ringvm's end.
    pub fn power_off(&mut self) -> Result<Exit> {
        self.start("poweroff -f")?;
        self.exit()
    }

    /// Reboots the guest from within and waits until it is ready again.
    pub fn reboot(&mut self) -> Result<()> {
        self.start("reboot -f")?;
        self.ready()
    }

    /// Sends ringvm a signal.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// SIGUSR1, and what ringvm then says on stderr, up to the first line that has `text`.
    pub fn statistics(&mut self, text: &str) -> Result<String> {
        let start = self.stderr.len();
        self.signal(Signal::USR1)?;
        let limit = Duration::from_secs(15);
        let deadline = Instant::now() + limit;
        loop {
            let said = String::from_utf8_lossy(&self.stderr[start..]).into_owned();
            if said.contains(text) && said.ends_with('\n') {
                return Ok(said);
            }
            if self.exit.is_some() || !self.pump(deadline)? {
                return Err(Error::TimedOut { what: format!("`{text}` in ringvm's statistics"), limit, tail: said });
            }
        }
    }

    /// What ringvm has said on stderr so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// All that the guest has said so far.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.console).into_owned()
    }

    /// ringvm's process id in L1.
    pub fn pid(&self) -> i32 {
        self.process.pid
    }

    fn pump(&mut self, deadline: Instant) -> Result<bool> {
        match self.process.next(deadline)? {
            None => return Ok(false),
            Some(Event::Started(_)) => {}
            Some(Event::Stdout(bytes)) => {
                let _ = self.console_log.write_all(&bytes);
                self.console.extend(bytes);
            }
            Some(Event::Stderr(bytes)) => {
                let _ = self.stderr_log.write_all(&bytes);
                self.stderr.extend(bytes);
            }
            Some(Event::Exited(exit)) => self.exit = Some(exit),
        }
        Ok(true)
    }

    /// What ringvm's threads and its vCPUs are doing, for the logs of a guest that did not answer in time.
    fn examine(&mut self) {
        let command = EXAMINE.replace("PID", &self.pid().to_string());
        // An L1 that hangs as well has nothing to say.
        if let Ok(output) = self.process.link.exec(&command, Duration::from_secs(20)) {
            let _ = std::fs::write(&self.state_log, output.stdout);
        }
        // The statistics go to the log of its stderr.
        let _ = self.signal(Signal::USR1).and_then(|()| self.listen(Duration::from_secs(2)));
    }

    fn ending(&self) -> String {
        self.exit.as_ref().map_or("running".into(), ToString::to_string)
    }

    fn tail(&self) -> String {
        let (console, stderr) = (tail(&self.console, 1500), tail(&self.stderr, 1500));
        format!("--- console\n{console}\n--- ringvm's stderr\n{stderr}")
    }
}

fn find(text: &[u8], pattern: &[u8]) -> Option<usize> {
    text.windows(pattern.len()).position(|window| window == pattern)
}
