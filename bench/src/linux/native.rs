//! The same loads on the host itself: fio on the file that is the guest's disk, iperf3 over the loopback interface; and the
//! server that iperf3's clients, in guests or here, talk to.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::boot::Done;
use super::tools::{find, run, tail};
use crate::child::end_with_parent;
use crate::signals;
use crate::steal::{self, Ticks};

/// The host's end of the tap, the guest's, and what tells that they are neighbours (TEST-NET-1, RFC 5737).
pub(super) const HOST: &str = "192.0.2.1";
/// The guest's address, as `ip addr add` takes it.
pub(super) const GUEST: &str = "192.0.2.2/24";
/// The host's own way to itself.
pub(super) const LOOPBACK: &str = "127.0.0.1";
/// As of the guest's NIC: with its own, of 64 KiB, loopback would be another measurement.
const MTU: &str = "1500";
/// How long the server may take to start.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(5);

/// Gives the tap an address, and has the loopback interface work. In the namespace of the calling thread.
///
/// # Errors
/// There is no ip(8), or it fails.
pub(super) fn set_up(tap: &str) -> Result<()> {
    let ip = find("ip")?;
    let run = |words: &str| run(Command::new(&ip).args(words.split_whitespace()));
    run(&format!("link set dev lo mtu {MTU}"))?;
    run("link set dev lo up")?;
    run(&format!("addr add {HOST}/24 dev {tap}"))?;
    run(&format!("link set dev {tap} up"))?;
    Ok(())
}

/// Runs a step's command to its end.
///
/// # Errors
/// It can't be started, or takes longer than it may.
pub(super) fn step(command: &str, dir: &Path, limit: Duration) -> Result<Done> {
    let files = ["step.out", "step.err"].map(|name| dir.join(name));
    let [out, err] = [create(&files[0])?, create(&files[1])?];
    let mut child = Command::new("sh");
    // So that what is waited for is the program itself.
    child.args(["-c", &format!("exec {command}")]).current_dir(dir).stdin(Stdio::null()).stdout(out).stderr(err);
    end_with_parent(&mut child);
    let before = Ticks::now();
    let mut child = Ending(child.spawn().context("starting a shell on the host")?);
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.0.try_wait().context("waiting for a program on the host")? {
            break status;
        }
        signals::check()?;
        if Instant::now() > deadline {
            bail!("the host did not finish `{command}` within {limit:?}");
        }
        thread::sleep(LOOK);
    };
    let steal = steal::lost_since(before);
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    Ok(Done {
        status: status.code().unwrap_or(-1),
        output: String::from_utf8_lossy(&read(&files[0])?).into_owned(),
        errors: tail(&read(&files[1])?, 400),
        steal,
        ..Done::default()
    })
}

fn create(path: &PathBuf) -> Result<File> {
    File::create(path).with_context(|| format!("making {}", path.display()))
}

/// A process that is killed when this is dropped.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// iperf3's server; it ends when this is dropped.
pub(super) struct Server {
    _child: Ending,
}

impl Server {
    /// Starts it, and waits until it listens.
    ///
    /// # Errors
    /// It does not.
    pub(super) fn start(dir: &Path) -> Result<Self> {
        let files = ["iperf3.out", "iperf3.err"].map(|name| dir.join(name));
        let [out, err] = [create(&files[0])?, create(&files[1])?];
        let mut command = Command::new(find("iperf3")?);
        command.args(["-s", "--forceflush"]).stdin(Stdio::null()).stdout(out).stderr(err);
        end_with_parent(&mut command);
        let mut child = Ending(command.spawn().context("starting iperf3's server")?);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = files.each_ref().map(|path| fs::read_to_string(path).unwrap_or_default());
            if said[0].contains("Server listening") {
                return Ok(Self { _child: child });
            }
            let ended = child.0.try_wait().context("waiting for iperf3's server")?.is_some();
            if ended || Instant::now() > deadline {
                let said = said.iter().rev().flat_map(|text| text.lines()).find(|line| !line.trim().is_empty());
                bail!("iperf3's server did not come up within {PATIENCE:?}: {}", said.unwrap_or("it said nothing"));
            }
            signals::check()?;
            thread::sleep(LOOK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_on_the_host_tells_how_it_ended_and_has_a_limit() {
        let dir = tempfile::tempdir().unwrap();
        let done = step("sh -c 'echo out; echo err >&2; exit 3'", dir.path(), Duration::from_secs(20)).unwrap();
        assert_eq!((done.status, done.output.as_str(), done.errors.as_str()), (3, "out\n", "err\n"));
        let error = step("sleep 60", dir.path(), Duration::from_millis(100)).unwrap_err().to_string();
        assert_eq!(error, "the host did not finish `sleep 60` within 100ms");
    }
}
