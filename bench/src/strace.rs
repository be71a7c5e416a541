//! System calls of a VMM counted by strace(1), where the kernel's tracepoints are out of reach: whole runs, since strace tells
//! at the end only. A run without operations is subtracted from one with operations, so that what starting and ending take is
//! not counted. Slow: every call stops its thread twice.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::process;
use crate::run::Running;
use crate::sample::{Counted, fields};
use crate::vmm::{Contestant, Vm};

/// How long starting under strace may take more than without it.
const SLOWER: Duration = Duration::from_secs(60);
/// How long what it follows may take to end when asked to.
const PATIENCE: Duration = Duration::from_secs(3);

/// Counts by name.
type Calls = BTreeMap<String, u64>;

/// Counts the system calls of a contestant: `loaded` is the VM with a job, `empty` the same with a job of no operations. The
/// guest's result has the number of operations as `ops_key`.
///
/// # Errors
/// strace or the VMM fails.
pub fn count(
    strace: &Path,
    contestant: &Contestant,
    (loaded, empty): (&Vm<'_>, &Vm<'_>),
    dir: &Path,
    time: Duration,
    ops_key: &str,
) -> Result<Counted> {
    let (_, nothing) = run(strace, contestant, empty, dir, time)?;
    let (line, all) = run(strace, contestant, loaded, dir, time)?;
    let mut names: Vec<_> = all
        .into_iter()
        .map(|(name, calls)| (calls.saturating_sub(nothing.get(&name).copied().unwrap_or(0)), name))
        .filter(|&(calls, _)| calls != 0)
        .map(|(calls, name)| (name, calls))
        .collect();
    names.sort_by_key(|&(_, calls)| std::cmp::Reverse(calls));
    let syscalls = Some(names.iter().map(|(_, calls)| calls).sum());
    let ops = fields(&line).get(ops_key).and_then(|value| value.parse().ok());
    let ops = ops.with_context(|| format!("the guest's result has no {ops_key}: {line}"))?;
    Ok(Counted { by: "strace".to_owned(), ops, syscalls, exits: None, names })
}

/// One run; returns the guest's result and the calls.
fn run(strace: &Path, contestant: &Contestant, vm: &Vm<'_>, dir: &Path, time: Duration) -> Result<(String, Calls)> {
    let mut launch = contestant.launch(vm, dir)?;
    let mut outputs = vec![dir.join("strace")];
    launch.vmm = under(strace, &outputs[0], launch.vmm);
    if let Some(daemon) = &mut launch.daemon {
        let output = dir.join("strace-daemon");
        daemon.words = under(strace, &output, std::mem::take(&mut daemon.words));
        outputs.push(output);
    }
    let mut result = None;
    {
        let mut running = Running::launch(&contestant.name, &launch, dir, time + SLOWER)?;
        // strace passes a signal that ends it on, but not that of a parent that is gone.
        let _end = EndTracees(running.pids());
        while let Some(line) = running.next_line()? {
            if let Some(text) = line.strip_prefix("result ") {
                result = Some(text.to_owned());
            }
        }
        running.wait()?;
    }
    let Some(line) = result else { bail!("the guest under {} and strace ended without a result", contestant.name) };
    let mut calls = Calls::new();
    for output in outputs {
        let text =
            fs::read_to_string(&output).with_context(|| format!("reading what strace says in {}", output.display()))?;
        for (name, count) in parse(&text) {
            *calls.entry(name).or_default() += count;
        }
    }
    Ok((line, calls))
}

/// Ends what strace follows: strace itself ends with it.
struct EndTracees(Vec<u32>);

impl Drop for EndTracees {
    fn drop(&mut self) {
        let followed = || self.0.iter().flat_map(|&strace| process::children(strace)).collect::<Vec<_>>();
        let deadline = Instant::now() + PATIENCE;
        let mut signal = Signal::TERM;
        loop {
            let pids = followed();
            if pids.is_empty() || Instant::now() > deadline + PATIENCE {
                return;
            }
            if Instant::now() > deadline {
                signal = Signal::KILL;
            }
            for pid in pids.into_iter().filter_map(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
                let _ = kill_process(pid, signal);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn under(strace: &Path, output: &Path, words: Vec<OsString>) -> Vec<OsString> {
    let mut all: Vec<OsString> = vec![strace.into(), "-f".into(), "-c".into(), "-o".into(), output.into(), "--".into()];
    all.extend(words);
    all
}

/// Reads the table of `strace -c`: per cent, seconds, microseconds per call, calls, errors (or nothing), name.
fn parse(table: &str) -> Calls {
    let row = |line: &str| {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        let name = *words.last()?;
        let calls = words.get(3)?.parse().ok()?;
        (words.len() >= 5 && name != "total").then(|| (name.to_owned(), calls))
    };
    table.lines().filter_map(row).collect()
}

/// strace, if it is there.
pub fn find() -> Option<PathBuf> {
    crate::vmm::found::on_path("strace")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_read() {
        let table = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 61.54    0.000016           2         8         1 read
 38.46    0.000010          10         1           io_uring_enter
------ ----------- ----------- --------- --------- ----------------
100.00    0.000026           2         9         1 total
";
        let calls: Vec<_> = parse(table).into_iter().collect();
        assert_eq!(calls, [("io_uring_enter".to_owned(), 1), ("read".to_owned(), 8)]);
    }

    #[test]
    fn a_command_is_followed_with_its_children() {
        let words = under(Path::new("/s"), Path::new("/o"), vec!["vmm".into(), "-x".into()]);
        assert_eq!(words, ["/s", "-f", "-c", "-o", "/o", "--", "vmm", "-x"].map(OsString::from));
    }
}
