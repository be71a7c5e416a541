//! `ringvm-bench block`: the plan of a measurement. All contestants take turns, run by run, so that whatever the machine
//! does meanwhile, it does to all of them.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::backend;
use crate::cli::BlockOptions;
use crate::guest;
use crate::host::{self, Machine};
use crate::limit;
use crate::report::{self, Series};
use crate::run::{self, Sample};
use crate::scratch::Scratch;
use crate::signals;
use crate::table;
use crate::vmm::{Contestant, Vm};

/// RAM of a VM in MiB: enough for the guest's buffers at any depth and block size that can be asked for.
const MEMORY: u32 = 256;
const WARM: Duration = Duration::from_millis(250);
const QUEUE_SIZE: u16 = 256;
/// The name of the reference in tables and reports.
pub const PLAIN_RING: &str = "plain ring";

/// Who takes part.
enum Contender {
    PlainRing,
    Backend,
    Vmm(Contestant),
}

impl Contender {
    fn name(&self) -> &str {
        match self {
            Self::PlainRing => PLAIN_RING,
            Self::Backend => backend::NAME,
            Self::Vmm(contestant) => &contestant.name,
        }
    }
}

/// Measures, and prints the table.
///
/// # Errors
/// A host, a disk or a contestant that can't be used, in one line.
pub fn run(options: &BlockOptions) -> Result<()> {
    let contenders = contenders(options)?;
    let dir = tempfile::tempdir().context("making a temporary directory")?;
    signals::remove_on_signal(dir.path());
    let kernel = guest::write_to(dir.path()).context("writing the guest's image")?;
    let progress = progress(options, contenders.len());
    progress.set_message("filling the scratch disk");
    let scratch = Scratch::prepare(options)?;
    let place = (scratch.path.display(), scratch.size >> 20, &scratch.file_system);
    progress.suspend(|| eprintln!("ringvm-bench: disk: {} ({} MiB on {})", place.0, place.1, place.2));
    let mut series = Vec::new();
    for &depth in &options.depth {
        series.extend(at_depth(options, depth, &contenders, &scratch, &kernel, dir.path(), &progress)?);
    }
    progress.finish_and_clear();
    let machine = Machine::look();
    // The file first: a reader of the table may be gone by now.
    if let Some(path) = &options.json {
        report::write(path, options, &scratch, &machine, &series)?;
    }
    let table = table::render(options, &scratch, &machine, &series);
    std::io::stdout().write_all(table.as_bytes()).context("writing the table to stdout")
}

/// The plain ring first, then ringvm, or where no VM can be run its backend alone, then the others.
fn contenders(options: &BlockOptions) -> Result<Vec<Contender>> {
    let mut contenders = vec![Contender::PlainRing];
    let trouble = host::kvm_trouble();
    if let Some(trouble) = &trouble {
        eprintln!("ringvm-bench: no VM can be run here: {trouble}");
        eprintln!("ringvm-bench: measuring the backend alone instead, driven from a process of the host");
    }
    if trouble.is_some() || options.backend {
        contenders.push(Contender::Backend);
    }
    if trouble.is_none() {
        contenders.push(Contender::Vmm(Contestant::ringvm(options.ringvm.as_deref())?));
    }
    for contestant in &options.against {
        if trouble.is_some() && contestant.kind.needs_kvm() {
            eprintln!("ringvm-bench: leaving out {}, which needs /dev/kvm", contestant.name);
        } else {
            contenders.push(Contender::Vmm(contestant.clone()));
        }
    }
    Ok(contenders)
}

fn at_depth(
    options: &BlockOptions,
    depth: u32,
    contenders: &[Contender],
    scratch: &Scratch,
    kernel: &Path,
    dir: &Path,
    progress: &ProgressBar,
) -> Result<Vec<Series>> {
    let command_line = format!(
        "job={} bs={} depth={depth} queues={} cpus={} irq={} warm={}ms time={}ms size={} seed=1",
        options.rw.job(),
        options.bs,
        options.queues,
        options.cpus,
        u8::from(options.irq),
        WARM.as_millis(),
        options.time.as_millis(),
        scratch.size
    );
    let vm = Vm {
        kernel,
        command_line: &command_line,
        cpus: options.cpus,
        memory: MEMORY,
        disk: &scratch.path,
        direct: options.direct,
        queues: options.queues,
        queue_size: QUEUE_SIZE,
    };
    let mut all = Vec::new();
    for contender in contenders {
        let command = match contender {
            Contender::Vmm(contestant) => contestant.command(&vm, dir)?,
            Contender::PlainRing | Contender::Backend => Vec::new(),
        };
        all.push(Series::new(contender.name(), depth, command));
    }
    for round in 1..=options.runs {
        for (contender, series) in contenders.iter().zip(&mut all) {
            progress.set_message(format!("depth {depth}, run {round} of {}: {}", options.runs, series.name));
            let sample = match contender {
                Contender::PlainRing => plain_ring(options, depth, scratch),
                Contender::Backend => backend::measure(options, depth, scratch, WARM),
                Contender::Vmm(contestant) => run::measure(contestant, &vm, dir, options.time + WARM),
            };
            series.samples.push(sample.with_context(|| format!("measuring {} at depth {depth}", series.name))?);
            progress.inc(1);
        }
    }
    Ok(all)
}

fn plain_ring(options: &BlockOptions, depth: u32, scratch: &Scratch) -> Result<Sample> {
    limit::measure(&limit::Job {
        path: &scratch.path,
        direct: options.direct,
        pattern: options.rw,
        bs: options.bs,
        size: scratch.size,
        // One thread carries what all queues of the guest carry.
        depth: depth * u32::from(options.queues),
        warm: WARM,
        time: options.time,
    })
}

/// A bar on stderr; without a terminal there, only what is printed through it.
fn progress(options: &BlockOptions, contenders: usize) -> ProgressBar {
    let steps = options.depth.len() as u64 * u64::from(options.runs) * contenders as u64;
    let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
    if std::io::stderr().is_terminal() {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(200));
    }
    bar
}
