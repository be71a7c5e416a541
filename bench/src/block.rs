//! `ringvm-bench block`: disks. At each pattern, size and depth, the plain ring first, then ringvm, or where no VM can be run
//! its backend alone, then the others.

pub(crate) mod table;

use std::fmt;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::cli::BlockOptions;
use crate::document::{BlockJob, BlockPoint, Document, Job, Point};
use crate::host;
use crate::plan::{self, Contender, Count, Deliver, Measure, Plan, Size};
use crate::run::{self, Look, Observed};
use crate::sample::{Counted, Latency, Sample};
use crate::scratch::Scratch;
use crate::table::bytes;
use crate::vmm::{Contestant, Disk, Vm};
use crate::workload::Storage;
use crate::{backend, limit, strace};

/// RAM of a VM in MiB besides its buffers, and at least.
const MEMORY: u64 = 128;
const LEAST_MEMORY: u64 = 256;
const WARM: Duration = Duration::from_millis(250);
const QUEUE_SIZE: u16 = 256;
/// The name of the reference in tables and reports.
const PLAIN_RING: &str = "plain ring";
const REGISTERED_RING: &str = "plain ring, registered";

/// What takes part without a VM.
#[derive(Clone, Copy)]
enum Host {
    PlainRing,
    /// The same with registered buffers.
    RegisteredRing,
    Backend,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PlainRing => PLAIN_RING,
            Self::RegisteredRing => REGISTERED_RING,
            Self::Backend => backend::NAME,
        })
    }
}

/// Measures, and prints the table.
///
/// # Errors
/// A host, a disk or a contestant that can't be used, in one line.
pub fn run(options: &BlockOptions, deliver: Deliver) -> Result<()> {
    let contenders = contenders(options)?;
    let points = points(options);
    let plan = Plan::new(Size::of(options.runs, &contenders, points.len()), options.others.syscalls)?;
    plan.progress.set_message("filling the scratch disk");
    let scratch = Scratch::prepare(options)?;
    if let (Some(path), Some(file_system)) = (&scratch.path, &scratch.file_system) {
        let (path, mib) = (path.display(), scratch.size >> 20);
        plan.progress.suspend(|| eprintln!("ringvm-bench: disk: {path} ({mib} MiB on {file_system})"));
    }
    let document = plan::document(Job::Block(job(options, &scratch)), &contenders);
    plan.finish(document, (&options.output, deliver), |document| {
        points.iter().try_for_each(|&point| at(options, point, &contenders, &scratch, &plan, document))
    })
}

/// Patterns, sizes and depths, in this order; but those that only read first, since writes leave the page cache in another
/// state ([`Scratch::dirty`]), in which reads are slower.
fn points(options: &BlockOptions) -> Vec<BlockPoint> {
    let mut points = Vec::new();
    let mut patterns = options.rw.clone();
    patterns.sort_by_key(|rw| rw.writes());
    for rw in patterns {
        for &bs in &options.bs {
            points.extend(options.depth.iter().map(|&depth| BlockPoint { rw, bs, depth }));
        }
    }
    points
}

fn contenders(options: &BlockOptions) -> Result<Vec<Contender<Host>>> {
    let mut contenders = vec![Contender::Host(Host::PlainRing)];
    if options.others.prefault && options.storage == Storage::File {
        contenders.push(Contender::Host(Host::RegisteredRing));
    }
    if options.backend || host::kvm_trouble().is_some() {
        contenders.push(Contender::Host(Host::Backend));
    }
    let instead = "the backend alone instead, driven from a process of the host";
    let null = options.storage == Storage::Null;
    plan::add_vmms(&mut contenders, &options.others, instead, |kind| !null || kind.has_null_storage())?;
    Ok(contenders)
}

fn job(options: &BlockOptions, scratch: &Scratch) -> BlockJob {
    BlockJob {
        queues: options.queues,
        cpus: options.cpus,
        completions: if options.irq { "interrupts" } else { "polled" }.to_owned(),
        direct: options.direct,
        prefault: options.others.prefault,
        storage: options.storage,
        runs: options.runs,
        time_ms: options.time.as_millis() as u64,
        disk: scratch.path.as_ref().map(|path| path.display().to_string()),
        disk_bytes: scratch.size,
        disk_file_system: scratch.file_system.clone(),
    }
}

/// How the guest is told what to do: for a time, or with no operation at all.
fn command_line(options: &BlockOptions, point: BlockPoint, size: u64, amount: &str) -> String {
    format!(
        "job={} bs={} depth={} queues={} cpus={} irq={} size={size} seed=1 {amount}",
        point.rw.job(),
        point.bs,
        point.depth,
        options.queues,
        options.cpus,
        u8::from(options.irq),
    )
}

fn at(
    options: &BlockOptions,
    point: BlockPoint,
    contenders: &[Contender<Host>],
    scratch: &Scratch,
    plan: &Plan,
    document: &mut Document,
) -> Result<()> {
    plan.progress.set_message("preparing the disk");
    if point.rw.writes() && !options.direct {
        scratch.dirty()?;
    } else {
        scratch.settle()?;
    }
    let amount = |time: Duration| format!("warm={}ms time={}ms hist=1", WARM.as_millis(), time.as_millis());
    let line = command_line(options, point, scratch.size, &amount(options.time));
    let disk = [Disk {
        path: scratch.path.as_deref(),
        size: scratch.size,
        direct: options.direct,
        queues: options.queues,
        queue_size: QUEUE_SIZE,
    }];
    let buffers = point.bs * u64::from(point.depth) * u64::from(options.queues);
    let memory = (MEMORY + buffers.div_ceil(1 << 20)).max(LEAST_MEMORY) as u32;
    let vm = Vm {
        kernel: &plan.kernel,
        elf: None,
        initramfs: None,
        command_line: &line,
        cpus: options.cpus,
        memory,
        prefault: options.others.prefault,
        disks: &disk,
        nics: &[],
    };
    let label = format!("{} of {}, depth {}", point.rw.words(), bytes(point.bs), point.depth);
    let mut measure = At { options, point, scratch, plan, vm };
    plan.interleave(document, (Point::Block(point), &label), contenders, &vm, &mut measure)
}

/// One point.
struct At<'a> {
    options: &'a BlockOptions,
    point: BlockPoint,
    scratch: &'a Scratch,
    plan: &'a Plan,
    vm: Vm<'a>,
}

impl Measure<Host> for At<'_> {
    fn run(&mut self, contender: &Contender<Host>) -> Result<Sample> {
        match contender {
            Contender::Host(Host::PlainRing) => self.plain_ring(false),
            Contender::Host(Host::RegisteredRing) => self.plain_ring(true),
            Contender::Host(Host::Backend) => backend::measure(self.options, self.point, self.scratch, WARM),
            Contender::Vmm(contestant) => {
                let observed = self.observe(contestant, Look::Plain)?;
                let nanoseconds = |key| observed.vm.number(key).map(Duration::from_nanos);
                let (ops, time) = (observed.vm.number("ops")?, nanoseconds("time_ns")?);
                let latency =
                    Latency { p50: nanoseconds("p50_ns")?, p99: nanoseconds("p99_ns")?, steps: observed.steps };
                let (latency, cpu) = (Some(latency), observed.cpu);
                Ok(Sample { ops, time, latency, cpu, vm: Some(observed.vm), ..Sample::default() })
            }
        }
    }

    fn count(&mut self, contestant: &Contestant, how: &Count) -> Result<Counted> {
        match how {
            Count::Tracepoints => {
                let observed = self.observe(contestant, Look::Counted)?;
                Ok(observed.counted(observed.vm.number("ops")?))
            }
            Count::Strace(strace) => {
                let line = |amount: &str| command_line(self.options, self.point, self.scratch.size, amount);
                let loaded = line(&format!("time={}ms", self.options.time.as_millis()));
                let empty = line("ops=0");
                let vms = (&Vm { command_line: &loaded, ..self.vm }, &Vm { command_line: &empty, ..self.vm });
                strace::count(strace, contestant, vms, self.plan.dir.path(), self.options.time, "ops")
            }
        }
    }
}

impl At<'_> {
    fn plain_ring(&self, registered: bool) -> Result<Sample> {
        limit::measure(&limit::Job {
            path: self.scratch.path.as_deref(),
            direct: self.options.direct,
            registered,
            pattern: self.point.rw,
            bs: self.point.bs,
            size: self.scratch.size,
            // One thread carries what all queues of the guest carry.
            depth: self.point.depth * u32::from(self.options.queues),
            warm: WARM,
            time: self.options.time,
        })
    }

    fn observe(&self, contestant: &Contestant, look: Look) -> Result<Observed> {
        let time = self.options.time + WARM;
        let observed = run::observe(contestant, &self.vm, self.plan.dir.path(), time, look, |_| Ok(()))?;
        let errors = observed.vm.number("errors")?;
        if errors != 0 {
            bail!("the guest under {} had {errors} failed requests", contestant.name);
        }
        Ok(observed)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::workload::Pattern;

    #[test]
    fn all_patterns_have_all_sizes_and_all_depths() {
        let words = ["ringvm-bench", "block", "--rw", "write,rand-read", "--bs", "4k,128k", "--depth", "1,8"];
        let Some(Command::Block(options)) = Cli::try_parse_from(words).unwrap().command else { unreachable!() };
        let points = points(&options);
        assert_eq!(points.len(), 8);
        assert_eq!(points[1], BlockPoint { rw: Pattern::RandRead, bs: 4096, depth: 8 });
        assert_eq!(points[6], BlockPoint { rw: Pattern::Write, bs: 128 << 10, depth: 1 });
        let line = command_line(&options, points[6], 1 << 20, "ops=0");
        assert!(line.contains("job=write bs=131072 depth=1 ") && line.ends_with("size=1048576 seed=1 ops=0"), "{line}");
    }
}
