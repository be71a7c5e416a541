//! The nested lab: QEMU's TCG emulates AMD SVM for a stock Debian kernel (L1), in which ringvm boots a stock Debian kernel
//! (L2). A warm L1 serves one test after another, and there are as many as the host has CPUs and memory for:
//!
//! ```no_run
//! use ringvm_tests::lab::{disk, lab, vm};
//!
//! lab(|lab| {
//!     let image = lab.image("256M")?;
//!     let mut guest = lab.boot(&vm().cpus(2).disk(disk(&image).queues(2)))?;
//!     assert_eq!(guest.run("nproc")?, "2");
//!     Ok(())
//! });
//! ```
//!
//! The start of L1 or of a guest that stays silent is tried again, which is said; a check never is. A failed test's logs
//! (L1's console, the guests' consoles, ringvm's stderr) stay in target/lab/logs.

mod l1;
mod l2;
mod machines;
mod payload;
mod vm;

pub mod wire;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;

pub use l1::Output;
pub use l2::Guest;
pub use payload::guest_initramfs;
pub use vm::{Disk, Image, Kernel, Vm, disk, vm};
pub use wire::Exit;

use crate::host::{self, Need};
use crate::{Error, Result, paths};
use l1::L1;
use payload::Payload;
use vm::quote;

const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Starts of a guest: a silent one is tried this often in all.
const GUEST_TRIES: u32 = 3;

/// Runs a test in the lab.
///
/// # Panics
/// When the test fails, or the host lacks the lab and that was not allowed by name.
pub fn lab(test: impl FnOnce(&mut Lab) -> Result<()>) {
    if !host::need(Need::Lab) {
        return;
    }
    let mut lab = machines::take().unwrap_or_else(|why| panic!("the lab could not be started: {why}"));
    let name = host::current_test();
    let begun = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| lab.begin(&name).and_then(|()| test(&mut lab))));
    let failed = !matches!(outcome, Ok(Ok(())));
    let kept = lab.end(failed);
    drop(lab);
    host::say(&format!("lab: {name}: {:.1} s", begun.elapsed().as_secs_f32()));
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(e)) => panic!("{e}\n(logs: {})", kept.display()),
        Err(panic) => {
            host::say(&format!("lab: the logs of {name} are in {}", kept.display()));
            resume_unwind(panic);
        }
    }
}

/// The lab, as a test sees it.
#[derive(Debug)]
pub struct Lab {
    payload: Arc<Payload>,
    l1: L1,
    logs: PathBuf,
    scratch: String,
    images: u32,
    guests: u32,
}

impl Lab {
    /// Starts a machine that has its disk and its logs in `folder`.
    fn start(payload: Arc<Payload>, folder: &Path) -> Result<Lab> {
        payload.machine(folder)?;
        let l1 = L1::start(&payload, folder)?;
        let (logs, scratch) = (paths::lab().join("logs"), String::new());
        let lab = Lab { payload, l1, logs, scratch, images: 0, guests: 0 };
        let kvm = lab.l1.link.exec("test -c /dev/kvm", COMMAND_LIMIT)?;
        if kvm.exit != Exit::Code(0) {
            return Err(Error::Missing("L1 has no /dev/kvm: QEMU's `-cpu max` must offer SVM".into()));
        }
        Ok(lab)
    }

    fn begin(&mut self, test: &str) -> Result<()> {
        let name = test.replace("::", "-");
        self.logs = paths::lab().join("logs").join(&name);
        self.scratch = format!("/scratch/{name}");
        (self.images, self.guests) = (0, 0);
        if self.logs.exists() {
            fs::remove_dir_all(&self.logs).map_err(Error::file("removing", &self.logs))?;
        }
        fs::create_dir_all(&self.logs).map_err(Error::file("creating", &self.logs))?;
        if !self.l1.answers() {
            self.restart_l1("it did not answer at the start of a test")?;
        }
        self.run(&format!("mkdir -p {}", self.scratch)).map(drop)
    }

    fn end(&mut self, failed: bool) -> PathBuf {
        if failed {
            // The logs tell of a failure; their own failures are not worth hiding it.
            let _ = fs::copy(self.l1.console(), self.logs.join("l1-console.log"));
            if let Ok(kernel) = self.l1.link.exec("dmesg | tail -n 200", COMMAND_LIMIT) {
                let _ = fs::write(self.logs.join("l1-dmesg.log"), kernel.stdout);
            }
        } else {
            let _ = fs::remove_dir_all(&self.logs);
        }
        // A machine that is gone by now is started anew by the next test.
        let _ = self.l1.link.exec(&format!("rm -rf {}", self.scratch), COMMAND_LIMIT);
        self.logs.clone()
    }

    /// Runs a shell command in L1, up to a minute; its stdout without the last line's end.
    pub fn run(&self, command: &str) -> Result<String> {
        self.run_for(COMMAND_LIMIT, command)
    }

    /// [`Lab::run`] with a time limit of its own.
    pub fn run_for(&self, limit: Duration, command: &str) -> Result<String> {
        let output = self.l1.link.exec(command, limit)?;
        if output.exit != Exit::Code(0) {
            let both = [output.stdout, output.stderr].concat();
            return Err(Error::Command {
                command: command.into(),
                place: "L1",
                status: output.exit.to_string(),
                output: String::from_utf8_lossy(&both).into_owned(),
            });
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
    }

    /// Runs a shell command in L1, up to a minute, whatever its end.
    pub fn output(&self, command: &str) -> Result<Output> {
        self.l1.link.exec(command, COMMAND_LIMIT)
    }

    /// A new, empty, sparse image on L1's disk (ext4, which has O_DIRECT and holes).
    pub fn image(&mut self, size: &str) -> Result<Image> {
        self.images += 1;
        let path = format!("{}/image{}.img", self.scratch, self.images);
        self.run(&format!("truncate -s {size} {path}"))?;
        Ok(Image { path })
    }

    /// A path for a file of this test on L1's disk.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.scratch)
    }

    /// Boots a guest and waits until its shell reads commands.
    pub fn boot(&mut self, vm: &Vm) -> Result<Guest> {
        // Images that an earlier guest wrote survive if L1 must be started again.
        self.run("sync")?;
        self.guests += 1;
        let mut vm = vm.clone();
        let mut tries = 1;
        loop {
            let name = format!("guest{}-try{tries}", self.guests);
            let mut guest = self.launch(&vm, &name)?;
            let silent = match guest.ready() {
                Ok(()) => return Ok(guest),
                Err(e @ (Error::TimedOut { .. } | Error::L1Silent(_))) => e,
                Err(e) => return Err(e),
            };
            // Its disks are free for the next try once it has ended; in a hung L1 it won't.
            let _ = guest.signal(Signal::KILL).and_then(|()| guest.exit());
            drop(guest);
            if tries == GUEST_TRIES {
                return Err(silent);
            }
            if self.l1.answers() {
                host::say(&format!("lab: {name} stayed silent while L1 answers; trying again. {silent}"));
            } else {
                self.restart_l1("a guest stayed silent and so does L1")?;
            }
            vm.verbose = true;
            tries += 1;
        }
    }

    /// Starts ringvm for this guest and waits for nothing.
    pub fn launch(&mut self, vm: &Vm, name: &str) -> Result<Guest> {
        let arguments = if vm.config_file {
            let path = self.path("vm.toml");
            self.run(&format!("printf %s {} > {path}", quote(&vm.toml())))?;
            vec!["run".to_owned(), "--config".to_owned(), path]
        } else {
            vm.args()
        };
        self.ringvm(&arguments, name)
    }

    /// Starts ringvm with these arguments; `name` is that of its logs.
    pub fn ringvm(&mut self, arguments: &[String], name: &str) -> Result<Guest> {
        let argv: Vec<_> = ["ringvm".to_owned()].into_iter().chain(arguments.iter().cloned()).collect();
        Guest::new(self.l1.link.spawn(&argv)?, &self.logs, name)
    }

    /// Cuts L1's power: what its page cache alone held is lost. Then starts it anew.
    pub fn power_cut(&mut self) -> Result<()> {
        self.l1.kill()?;
        self.l1 = L1::start(&self.payload, &self.l1.folder)?;
        Ok(())
    }

    fn restart_l1(&mut self, why: &str) -> Result<()> {
        host::say(&format!("lab: starting L1 again: {why}"));
        let _ = fs::copy(self.l1.console(), self.logs.join("l1-console-before-restart.log"));
        self.power_cut()?;
        self.run(&format!("mkdir -p {}", self.scratch)).map(drop)
    }
}
