//! `ringvm-bench block`: the plan of a measurement. All contestants take turns, run by run, so that whatever the machine
//! does meanwhile, it does to all of them.

use std::io::IsTerminal;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::BlockOptions;
use crate::guest;
use crate::host::{self, Machine};
use crate::limit;
use crate::report::{self, Series};
use crate::run::{self, Sample};
use crate::scratch::Scratch;
use crate::table;
use crate::vmm::{Contestant, Vm};

/// RAM of a VM in MiB: enough for the guest's buffers at any depth and block size that can be asked for.
const MEMORY: u32 = 256;
const WARM: Duration = Duration::from_millis(250);
const QUEUE_SIZE: u16 = 256;
/// The name of the reference in tables and reports.
pub const PLAIN_RING: &str = "plain ring";

/// Measures, and prints the table.
///
/// # Errors
/// A host, a disk or a contestant that can't be used, in one line.
pub fn run(options: &BlockOptions) -> Result<()> {
    let mut contestants = options.against.clone();
    match host::kvm_trouble() {
        None => contestants.insert(0, Contestant::ringvm(options.ringvm.as_deref())?),
        Some(trouble) => {
            eprintln!("ringvm-bench: no VM can be run here: {trouble}");
            contestants.retain(|contestant| !contestant.kind.needs_kvm());
        }
    }
    let dir = tempfile::tempdir().context("making a temporary directory")?;
    let kernel = guest::write_to(dir.path()).context("writing the guest's image")?;
    let progress = progress(options, contestants.len());
    progress.set_message("filling the scratch disk");
    let scratch = Scratch::prepare(options)?;
    progress.println(format!(
        "disk: {} ({} MiB on {})",
        scratch.path.display(),
        scratch.size >> 20,
        scratch.file_system
    ));
    let mut series = Vec::new();
    for &depth in &options.depth {
        series.extend(at_depth(options, depth, &contestants, &scratch, &kernel, dir.path(), &progress)?);
    }
    progress.finish_and_clear();
    let machine = Machine::look();
    print!("{}", table::render(options, &scratch, &machine, &series));
    if let Some(path) = &options.json {
        report::write(path, options, &scratch, &machine, &series)?;
    }
    Ok(())
}

fn at_depth(
    options: &BlockOptions,
    depth: u32,
    contestants: &[Contestant],
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
    let mut all = vec![Series::new(PLAIN_RING, depth, Vec::new())];
    for contestant in contestants {
        all.push(Series::new(&contestant.name, depth, contestant.command(&vm, dir)?));
    }
    for round in 1..=options.runs {
        for (index, series) in all.iter_mut().enumerate() {
            progress.set_message(format!("depth {depth}, run {round} of {}: {}", options.runs, series.name));
            let sample = match index.checked_sub(1) {
                None => plain_ring(options, depth, scratch)?,
                Some(index) => run::measure(&contestants[index], &vm, dir, options.time + WARM)?,
            };
            series.samples.push(sample);
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
fn progress(options: &BlockOptions, contestants: usize) -> ProgressBar {
    let steps = options.depth.len() as u64 * u64::from(options.runs) * (contestants as u64 + 1);
    let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
    if std::io::stderr().is_terminal() {
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.enable_steady_tick(Duration::from_millis(200));
    }
    bar
}
