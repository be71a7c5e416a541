//! One run of the Linux guest: it is booted under a VMM, its steps are waited for, and the process is looked at when each of
//! them starts and ends.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};

use crate::counter::{Counter, Counts};
use crate::exits::Exits;
use crate::host;
use crate::process::{CpuTime, memory_beyond_ram};
use crate::run::{Look, OUTPUT, Running};
use crate::steal::{self, Ticks};
use crate::vmm::{Contestant, Vm};

/// Lines of the console that errors quote.
const QUOTED: usize = 12;
/// For what takes no time: the lines that a step leaves behind, and the end of the VMM.
const SOON: Duration = Duration::from_secs(60);

/// How long a guest may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// To come up.
    pub boot: Duration,
    /// For one step.
    pub step: Duration,
}

/// What became of one step.
#[derive(Clone, Debug, Default)]
pub struct Done {
    /// The exit code.
    pub status: i32,
    /// stdout.
    pub output: String,
    /// The end of stderr.
    pub errors: String,
    /// CPU time meanwhile, where it could be seen.
    pub cpu: Option<CpuTime>,
    /// Exits meanwhile, by KVM's own count.
    pub exits: Option<u64>,
    /// What part of the CPU time that all of the machine wanted meanwhile its host took away, where that is known.
    pub steal: Option<f64>,
    /// What was counted meanwhile, if that was wanted and can be had.
    pub counts: Option<Counts>,
}

/// What became of a guest.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Its steps.
    pub steps: Vec<Done>,
    /// Resident bytes of the VMM besides the guest's RAM, after the last step.
    pub memory: Option<u64>,
}

/// Boots the guest and sees it through so many steps, whose names are for error messages.
///
/// # Errors
/// The VMM fails, or the guest does not come up, ends early, or takes too long; with what it said last.
pub fn boot(
    contestant: &Contestant,
    vm: &Vm<'_>,
    dir: &Path,
    limits: Limits,
    look: Look,
    names: &[String],
) -> Result<Guest> {
    let mut up = false;
    let guest = see_through(contestant, vm, dir, limits, look, names, &mut up);
    match host::kvm_oddity().filter(|_| !up && contestant.kind.needs_kvm()) {
        Some(oddity) => guest.map_err(|error| anyhow!("{error:#}\n  {oddity}")),
        None => guest,
    }
}

fn see_through(
    contestant: &Contestant,
    vm: &Vm<'_>,
    dir: &Path,
    limits: Limits,
    look: Look,
    names: &[String],
    up: &mut bool,
) -> Result<Guest> {
    let launch = contestant.launch(vm, dir)?;
    let mut running = Running::launch(&contestant.name, &launch, dir, limits.boot)?;
    running.await_for("come up", limits.boot, QUOTED);
    let pids = running.pids();
    let cpu_time = || CpuTime::of(&pids, contestant.kind).ok();
    let mut finished = false;
    let (mut steps, mut current, mut before) = (Vec::new(), Done::default(), None);
    while let Some(line) = running.next_line()? {
        let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
        let name = names.get(steps.len()).map_or("nothing", String::as_str);
        if let Some(text) = line.strip_prefix(OUTPUT) {
            current.output += text;
            current.output.push('\n');
        } else if let Some(text) = line.strip_prefix('!') {
            current.errors += text;
            current.errors.push('\n');
        } else if word == "up" {
            // VMMs that start a guest anew when it resets would do so for ever.
            if *up {
                bail!("the guest under {} has started again by itself{}", contestant.name, running.context());
            }
            *up = true;
        } else if word == "start" {
            running.await_for(&format!("finish `{name}`"), limits.step, QUOTED);
            let counter = if look == Look::Counted { Counter::open(&pids).ok() } else { None };
            before = Some((cpu_time(), Exits::of(running.pid()), counter, Ticks::now()));
        } else if word == "end" {
            let Some((cpu, exits, counter, ticks)) = before.take() else {
                bail!("the guest under {} ends what it has not begun{}", contestant.name, running.context());
            };
            current.cpu = cpu_time().zip(cpu).map(|(after, before)| after.since(before));
            current.exits = exits.and_then(|exits| exits.since());
            current.counts = counter.and_then(|counter| counter.read().ok());
            current.steal = steal::lost_since(ticks);
            current.status = rest.parse().unwrap_or(-1);
            running.await_for(&format!("tell of `{name}`"), SOON, QUOTED);
        } else if word == "close" {
            steps.push(std::mem::take(&mut current));
        } else if word == "done" {
            finished = true;
            break;
        }
    }
    if !finished || steps.len() != names.len() {
        let when = if *up { "before it had done its work" } else { "before its init ran" };
        bail!("the guest under {} ended {when}{}", contestant.name, running.context());
    }
    let ram = u64::from(vm.memory) << 20;
    let memory = pids.iter().map(|&pid| memory_beyond_ram(pid, contestant.kind, ram).ok()).sum();
    running.await_for("end", SOON, QUOTED);
    let status = running.wait()?;
    // Some VMMs have codes of their own for a guest that ends; a signal is no such code.
    if status.code().is_none() {
        bail!("{} was ended by a signal ({status}){}", contestant.name, running.context());
    }
    Ok(Guest { steps, memory })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use super::*;
    use crate::vmm::Kind;

    /// Plays a script as if it were a VMM.
    fn play(script: &str, limit: Duration) -> Result<Guest> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let kernel = PathBuf::from("/k");
        let vm = Vm {
            kernel: &kernel,
            elf: None,
            initramfs: Some(&kernel),
            command_line: "",
            cpus: 1,
            memory: 256,
            prefault: false,
            disks: &[],
            nics: &[],
        };
        let limits = Limits { boot: limit, step: limit };
        let names = ["one".to_owned(), "two".to_owned()];
        boot(&Contestant::new(Kind::Ringvm, path), &vm, dir.path(), limits, Look::Plain, &names)
    }

    fn error(script: &str) -> String {
        play(script, Duration::from_secs(3)).unwrap_err().to_string()
    }

    const SAY: &str = "say() { echo \"ringvm-guest: $*\"; }\n";

    #[test]
    fn steps_are_told_apart_with_their_output() {
        let script = "echo booting; say up Linux; say start; say end 0; say '|{'; say '|}'; say close; \
                      say start; say end 7; say '!oh no'; say close; say done";
        let guest = play(&format!("{SAY}{script}"), Duration::from_secs(20)).unwrap();
        let told: Vec<_> =
            guest.steps.iter().map(|step| (step.status, step.output.as_str(), step.errors.as_str())).collect();
        assert_eq!(told, [(0, "{\n}\n", ""), (7, "", "oh no\n")]);
        assert!(guest.steps.iter().all(|step| step.cpu.is_some() && step.steal.is_some()));
    }

    #[test]
    fn guests_that_fail_are_quoted() {
        let silent = error("echo '[ 0.1] booting'; sleep 60");
        assert!(silent.starts_with("the guest under ringvm did not come up within 3s"), "{silent}");
        assert!(silent.contains("[ 0.1] booting"), "{silent}");
        let slow = error(&format!("{SAY}say up; say start; sleep 60"));
        assert!(slow.contains("did not finish `one` within 3s"), "{slow}");
        let missing = error(&format!("{SAY}say FAILED: there is no disk; sleep 60"));
        assert!(missing.contains("says: FAILED: there is no disk"), "{missing}");
        let early = error("echo no such kernel >&2; exit 1");
        assert!(early.contains("ended before its init ran") && early.contains("no such kernel"), "{early}");
        let half = error(&format!("{SAY}say up; say start; say end 0; say close; say done"));
        assert!(half.contains("ended before it had done its work"), "{half}");
        let again = error(&format!("{SAY}say up; say start; say up; sleep 60"));
        assert!(again.contains("has started again"), "{again}");
        let nonsense = error(&format!("{SAY}say up; say end 0; sleep 60"));
        assert!(nonsense.contains("ends what it has not begun"), "{nonsense}");
        let panic = error("echo 'Kernel panic - not syncing: x'; sleep 60");
        assert!(panic.contains("has panicked"), "{panic}");
    }
}
