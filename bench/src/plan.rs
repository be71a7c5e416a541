//! What measurements have in common: who takes part, and that all of them take turns, run by run, so that whatever the
//! machine does meanwhile, it does to all of them. What was measured is kept if something ends it early.

mod turns;

use std::cell::RefCell;
use std::fmt::Display;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Error, Result, bail};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tempfile::TempDir;

pub(crate) use self::turns::Turns;
use crate::cli::{Counting, Others, Output};
use crate::counter::Counter;
use crate::document::{Document, Job, Point, Series};
use crate::sample::{Counted, Sample};
use crate::steal::{self, Shares, Ticks};
use crate::vmm::{Against, Contestant, Kind, Vm, found};
use crate::{guest, host, signals, strace};

/// Who takes part: something in this process, or a VMM.
#[derive(Clone, Debug)]
pub enum Contender<H> {
    /// Without a VM.
    Host(H),
    /// With one.
    Vmm(Contestant),
}

impl<H: Display> Contender<H> {
    /// Its name in tables and reports.
    pub fn name(&self) -> String {
        match self {
            Self::Host(host) => host.to_string(),
            Self::Vmm(contestant) => contestant.name.clone(),
        }
    }
}

impl<H> Contender<H> {
    /// Whether it is only compared with.
    pub fn is_rival(&self) -> bool {
        matches!(self, Self::Vmm(contestant) if contestant.rival)
    }

    /// Whether it is a VMM that is more than compared with.
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::Vmm(contestant) if !contestant.rival)
    }
}

/// Adds ringvm, with its devices in either place, and the others, but none that needs a /dev/kvm that can't be used: that is
/// said then, and what is measured `instead`. Those that were found, not named, take part only if they are `fit`.
///
/// # Errors
/// There is no ringvm.
pub fn add_vmms<H>(
    contenders: &mut Vec<Contender<H>>,
    others: &Others,
    instead: &str,
    fit: impl Fn(Kind) -> bool,
) -> Result<()> {
    let trouble = host::kvm_trouble();
    let mut all: Vec<Contestant> = Vec::new();
    match &trouble {
        Some(trouble) => {
            eprintln!("ringvm-bench: no VM can be run here: {trouble}");
            eprintln!("ringvm-bench: measuring {instead}");
        }
        None => {
            let ringvm = Contestant::ringvm(others.ringvm.as_deref())?;
            let daemon = ringvm.in_daemon();
            all.extend([ringvm, daemon]);
        }
    }
    let mut rivals = Vec::new();
    let frontend = all.first().map(|ringvm| ringvm.path.clone());
    for against in &others.against {
        match against {
            Against::One(contestant) => rivals.push(contestant.clone()),
            Against::Found => rivals.extend(find(&fit)),
        }
    }
    all.extend(rivals.into_iter().map(|contestant| Contestant { rival: true, ..contestant }));
    let mut names: Vec<String> = Vec::new();
    for mut contestant in all {
        if trouble.is_some() && contestant.kind.needs_kvm() {
            eprintln!("ringvm-bench: leaving out {}, which needs /dev/kvm", contestant.name);
            continue;
        }
        // Two of a kind are told apart.
        let same = names.iter().filter(|&name| *name == contestant.name).count();
        names.push(contestant.name.clone());
        if same != 0 {
            contestant.name += &format!(" #{}", same + 1);
        }
        contestant.frontend = frontend.clone();
        contenders.push(Contender::Vmm(contestant));
    }
    Ok(())
}

/// What is on the PATH and fit; says what is, and what is not.
fn find(fit: &impl Fn(Kind) -> bool) -> Vec<Contestant> {
    let found = found::all();
    if found.is_empty() {
        eprintln!("ringvm-bench: none of {} is on the PATH", found::looked_for());
    }
    let (fit, unfit): (Vec<_>, Vec<_>) = found.into_iter().partition(|contestant| fit(contestant.kind));
    for contestant in &fit {
        eprintln!("ringvm-bench: found {} at {}", contestant.name, contestant.path.display());
    }
    for contestant in &unfit {
        eprintln!("ringvm-bench: leaving out {}, which can't be measured so", contestant.name);
    }
    fit
}

/// How much there is to do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Size {
    /// Runs of each contender at each point.
    pub runs: u32,
    /// Contenders, over all points.
    pub series: usize,
    /// Of these, VMMs.
    pub vmms: usize,
}

impl Size {
    /// All of `contenders` at so many points.
    pub fn of<H>(runs: u32, contenders: &[Contender<H>], points: usize) -> Self {
        let vmms = contenders.iter().filter(|contender| matches!(contender, Contender::Vmm(_))).count();
        Self { runs, series: contenders.len() * points, vmms: vmms * points }
    }
}

/// How system calls are counted, if they are.
#[derive(Clone, Debug)]
pub enum Count {
    /// By tracepoints.
    Tracepoints,
    /// By this strace.
    Strace(PathBuf),
}

impl Count {
    /// What the options mean on this host; says so if that is nothing.
    ///
    /// # Errors
    /// One way was asked for by name and can't be had.
    pub fn choose(how: Option<Counting>) -> Result<Option<Self>> {
        let Some(how) = how else { return Ok(None) };
        if how != Counting::Strace {
            if Counter::is_possible() {
                return Ok(Some(Self::Tracepoints));
            }
            if how == Counting::Tracepoints {
                bail!(
                    "system calls can't be counted by tracepoints here: that takes root and a kernel with tracefs; try --syscalls=strace"
                );
            }
        }
        match strace::find() {
            Some(path) => Ok(Some(Self::Strace(path))),
            None if how == Counting::Strace => bail!("there is no strace on the PATH: install the package strace"),
            None => {
                eprintln!(
                    "ringvm-bench: system calls are not counted: that takes root and tracefs, or the package strace"
                );
                Ok(None)
            }
        }
    }
}

/// A measurement under way.
pub struct Plan {
    /// Where files for the VMMs lie.
    pub dir: TempDir,
    /// The guest's image.
    pub kernel: PathBuf,
    /// How far it is.
    pub progress: ProgressBar,
    /// How system calls are counted.
    pub count: Option<Count>,
    runs: u32,
    /// What ringvm, or what it is measured by, has failed with first.
    failure: RefCell<Option<Error>>,
}

/// How the members of a measurement are run.
pub trait Measure<H> {
    /// One run.
    ///
    /// # Errors
    /// It fails.
    fn run(&mut self, contender: &Contender<H>) -> Result<Sample>;

    /// One run in which system calls are counted.
    ///
    /// # Errors
    /// It fails.
    fn count(&mut self, contestant: &Contestant, how: &Count) -> Result<Counted>;
}

/// Writes and prints what was measured, as the options say.
pub type Deliver = fn(&Document, &Output) -> Result<()>;

impl Plan {
    /// For so many runs.
    ///
    /// # Errors
    /// No place for the guest's image, or no way to count.
    pub fn new(size: Size, counting: Option<Counting>) -> Result<Self> {
        let count = Count::choose(counting)?;
        let dir = tempfile::tempdir().context("making a temporary directory")?;
        signals::remove_on_signal(dir.path());
        let kernel = guest::write_to(dir.path()).context("writing the guest's image")?;
        let counted = if count.is_some() { size.vmms } else { 0 };
        let progress = progress(size.series as u64 * u64::from(size.runs) + counted as u64);
        Ok(Self { dir, kernel, progress, count, runs: size.runs, failure: RefCell::new(None) })
    }

    /// Runs a measurement, and delivers what it has put into the document, all that was planned or not.
    ///
    /// # Errors
    /// The measurement's own, unless the user has ended it.
    pub fn finish(
        &self,
        mut document: Document,
        (output, deliver): (&Output, Deliver),
        work: impl FnOnce(&mut Document) -> Result<()>,
    ) -> Result<()> {
        self.progress.reset_eta();
        let outcome = match (work(&mut document), self.failure.take()) {
            (_, Some(failure)) => Err(failure),
            (outcome, None) => outcome,
        };
        let (done, all) = (self.progress.position(), self.progress.length().unwrap_or(0));
        self.progress.finish_and_clear();
        document.series.retain(|series| !series.runs.is_empty());
        document.incomplete = match &outcome {
            Ok(()) => None,
            Err(_) if signals::interrupted().is_some() => Some(format!("interrupted after {done} of {all} runs")),
            Err(error) => {
                let why = format!("{error:#}");
                Some(format!("failed after {done} of {all} runs: {}", why.lines().next().unwrap_or_default()))
            }
        };
        if !document.series.is_empty() {
            deliver(&document, output)?;
        }
        match outcome {
            Err(_) if signals::interrupted().is_some() => Ok(()),
            outcome => outcome,
        }
    }

    /// The command lines of a contender and of its daemon, for the document.
    ///
    /// # Errors
    /// A VM that it can't run.
    pub fn commands<H>(&self, contender: &Contender<H>, vm: &Vm<'_>) -> Result<(Vec<String>, Vec<String>)> {
        let Contender::Vmm(contestant) = contender else { return Ok(Default::default()) };
        let text = |words: Vec<std::ffi::OsString>| -> Vec<String> {
            words.into_iter().map(|word| word.to_string_lossy().into_owned()).collect()
        };
        let launch = contestant.launch(vm, self.dir.path())?;
        Ok((text(launch.vmm), launch.daemon.map(|daemon| text(daemon.words)).unwrap_or_default()))
    }

    /// All runs at one point, which `label` names for people. What is measured goes into the document as it comes.
    ///
    /// # Errors
    /// As for `Turns::take`.
    pub fn interleave<H: Display>(
        &self,
        document: &mut Document,
        (point, label): (Point, &str),
        contenders: &[Contender<H>],
        vm: &Vm<'_>,
        measure: &mut impl Measure<H>,
    ) -> Result<()> {
        let turns = Turns { plan: self, contenders, label: Some(label) };
        for (index, contender) in contenders.iter().enumerate() {
            let name = contender.name();
            if document.is_removed(&name) {
                continue;
            }
            match self.commands(contender, vm) {
                Ok((command, daemon)) => {
                    let mut series = Series::new(&name, point.clone(), command, daemon);
                    // The first is what the others are measured by, where it runs without a VM.
                    series.reference = index == 0 && matches!(contender, Contender::Host(_));
                    document.series.push(series);
                }
                Err(error) => turns.take_out(document, contender, error, format!("measuring {name} at {label}"))?,
            }
        }
        let series = |document: &mut Document, contender: &Contender<H>, change: &dyn Fn(&mut Series)| {
            document.series_at(&contender.name(), &point).into_iter().for_each(change);
            Ok(())
        };
        turns.take(
            document,
            |contender| {
                let (before, shares) = (Ticks::now(), Shares::now());
                let sample = measure.run(contender)?;
                let (steal, others) = (steal::lost_since(before), steal::taken_since(shares));
                Ok((Sample { steal, others, ..sample }, steal))
            },
            |document, contender, sample| series(document, contender, &|series| series.add(&sample)),
        )?;
        let Some(how) = &self.count else { return Ok(()) };
        turns.count(
            document,
            |contender| match contender {
                Contender::Vmm(contestant) => measure.count(contestant, how),
                Contender::Host(_) => bail!("only VMMs are counted"),
            },
            |document, contender, counted| {
                series(document, contender, &|series| series.counted = Some(counted.clone()))
            },
        )
    }
}

/// The document that a measurement begins with.
pub fn document<H>(job: Job, contenders: &[Contender<H>]) -> Document {
    let programs = contenders.iter().filter_map(|contender| match contender {
        Contender::Vmm(contestant) => Some(contestant.program()),
        Contender::Host(_) => None,
    });
    Document::new(job, programs.collect())
}

/// A bar on stderr; without a terminal there, only what is printed through it.
fn progress(steps: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
    if std::io::stderr().is_terminal() {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}, {eta} left  {wide_msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(200));
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_of_a_kind_have_different_names() {
        if host::kvm_trouble().is_some() {
            return;
        }
        let ringvm = std::env::current_exe().unwrap();
        let other = |text: &str| Against::parse(text).unwrap();
        let others = Others {
            ringvm: Some(ringvm.clone()),
            against: vec![other("ringvm=/old/ringvm"), other("qemu-storage-daemon=/q")],
            prefault: false,
            syscalls: None,
        };
        let mut contenders: Vec<Contender<&str>> = Vec::new();
        add_vmms(&mut contenders, &others, "nothing", |_| true).unwrap();
        let names: Vec<_> = contenders.iter().map(Contender::name).collect();
        assert_eq!(names, ["ringvm", "ringvm, daemon", "ringvm #2", "qemu-storage-daemon"]);
        let Some(Contender::Vmm(daemon)) = contenders.last() else { unreachable!() };
        assert_eq!(daemon.frontend.as_deref(), Some(ringvm.as_path()));
        let ours: Vec<_> = contenders.iter().map(Contender::is_ours).collect();
        assert_eq!(ours, [true, true, false, false]);
    }

    #[test]
    fn nothing_is_counted_unasked() {
        assert!(Count::choose(None).unwrap().is_none());
    }
}
