//! A daemon that serves a VM's disk: started before the VMM, waited for until its socket is there, ended after the VMM.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::child::end_with_parent;
use crate::vmm::Daemon;

/// How long it may take to make its socket, and to end.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(2);

/// A daemon at work; ended when dropped.
pub(crate) struct Companion {
    child: Child,
    socket: PathBuf,
}

impl Companion {
    /// Starts it.
    pub(crate) fn start(name: &str, daemon: &Daemon, dir: &Path) -> Result<Self> {
        // One of an earlier run would be taken for the one that is waited for.
        let _ = fs::remove_file(&daemon.socket);
        let errors = dir.join("daemon-stderr");
        let stderr = File::create(&errors).with_context(|| format!("making {}", errors.display()))?;
        let (program, arguments) = daemon.words.split_first().context("an empty command line")?;
        let mut command = Command::new::<&OsString>(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        end_with_parent(&mut command);
        let child = command.spawn().with_context(|| format!("starting {}", Path::new(program).display()))?;
        let mut companion = Self { child, socket: daemon.socket.clone() };
        let deadline = Instant::now() + PATIENCE;
        while !companion.socket.exists() {
            let said = || fs::read_to_string(&errors).unwrap_or_default().trim().replace('\n', "; ");
            if let Some(status) = companion.child.try_wait().with_context(|| format!("waiting for {name}"))? {
                bail!("{name} ended ({status}) before it had made its socket: {}", said());
            }
            if Instant::now() > deadline {
                bail!(
                    "{name} has made no socket at {} in {} s: {}",
                    companion.socket.display(),
                    PATIENCE.as_secs(),
                    said()
                );
            }
            thread::sleep(LOOK);
        }
        Ok(companion)
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        // Asked first, so that it closes its image in order; nothing is lost if it must be forced.
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + PATIENCE;
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
            thread::sleep(LOOK);
        }
        let _ = fs::remove_file(&self.socket);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(script: &str, dir: &Path) -> Result<Companion> {
        let words = ["sh", "-c", script].map(OsString::from).to_vec();
        Companion::start("a daemon", &Daemon { words, socket: dir.join("s") }, dir)
    }

    #[test]
    fn it_is_waited_for_and_ended() {
        let dir = tempfile::tempdir().unwrap();
        let script = format!("sleep 0.1; : > {}; exec sleep 60", dir.path().join("s").display());
        let companion = start(&script, dir.path()).unwrap();
        let pid = companion.pid();
        drop(companion);
        assert!(!Path::new(&format!("/proc/{pid}")).exists() && !dir.path().join("s").exists());
    }

    #[test]
    fn one_that_ends_early_is_quoted() {
        let dir = tempfile::tempdir().unwrap();
        let error = start("echo no such image >&2; exit 3", dir.path()).err().unwrap().to_string();
        assert!(error.contains("no such image") && error.contains('3'), "{error}");
    }
}
