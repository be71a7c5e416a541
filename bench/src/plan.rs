//! What measurements have in common: who takes part, and that all of them take turns, run by run, so that whatever the
//! machine does meanwhile, it does to all of them.

use std::fmt::Display;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tempfile::TempDir;

use crate::host;
use crate::report::Series;
use crate::run::Sample;
use crate::vmm::{Contestant, Vm};
use crate::{guest, signals};

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

/// Adds ringvm, with its devices in either place, and the others, but none that needs a /dev/kvm that can't be used: that is said then, and what is measured
/// `instead`.
///
/// # Errors
/// There is no ringvm.
pub fn add_vmms<H>(
    contenders: &mut Vec<Contender<H>>,
    ringvm: Option<&Path>,
    against: &[Contestant],
    instead: &str,
) -> Result<()> {
    let trouble = host::kvm_trouble();
    match &trouble {
        Some(trouble) => {
            eprintln!("ringvm-bench: no VM can be run here: {trouble}");
            eprintln!("ringvm-bench: measuring {instead}");
        }
        None => {
            let ringvm = Contestant::ringvm(ringvm)?;
            let daemon = ringvm.in_daemon();
            contenders.extend([ringvm, daemon].map(Contender::Vmm));
        }
    }
    for contestant in against {
        if trouble.is_some() && contestant.kind.needs_kvm() {
            eprintln!("ringvm-bench: leaving out {}, which needs /dev/kvm", contestant.name);
        } else {
            contenders.push(Contender::Vmm(contestant.clone()));
        }
    }
    Ok(())
}

/// A measurement under way.
pub struct Plan {
    /// Where files for the VMMs lie.
    pub dir: TempDir,
    /// The guest's image.
    pub kernel: PathBuf,
    /// How far it is.
    pub progress: ProgressBar,
    /// Runs of each contender at each point.
    pub runs: u32,
}

impl Plan {
    /// For so many series of runs.
    ///
    /// # Errors
    /// No place for the guest's image.
    pub fn new(runs: u32, series: usize) -> Result<Self> {
        let dir = tempfile::tempdir().context("making a temporary directory")?;
        signals::remove_on_signal(dir.path());
        let kernel = guest::write_to(dir.path()).context("writing the guest's image")?;
        let progress = progress(series as u64 * u64::from(runs));
        Ok(Self { dir, kernel, progress, runs })
    }

    /// All runs at one point, which `label` names for people.
    ///
    /// # Errors
    /// A run that fails, with its contender and the point.
    pub fn interleave<P: Copy, H: Display>(
        &self,
        point: P,
        label: &str,
        contenders: &[Contender<H>],
        vm: &Vm<'_>,
        mut measure: impl FnMut(&Contender<H>) -> Result<Sample>,
    ) -> Result<Vec<Series<P>>> {
        let mut all = Vec::new();
        for contender in contenders {
            let command = match contender {
                Contender::Vmm(contestant) => contestant.command(vm, self.dir.path())?,
                Contender::Host(_) => Vec::new(),
            };
            all.push(Series::new(&contender.name(), point, command));
        }
        for round in 1..=self.runs {
            for (contender, series) in contenders.iter().zip(&mut all) {
                self.progress.set_message(format!("{label}, run {round} of {}: {}", self.runs, series.name));
                let sample = measure(contender);
                series.samples.push(sample.with_context(|| format!("measuring {} at {label}", series.name))?);
                self.progress.inc(1);
            }
        }
        Ok(all)
    }
}

/// A bar on stderr; without a terminal there, only what is printed through it.
fn progress(steps: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
    if std::io::stderr().is_terminal() {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(200));
    }
    bar
}
