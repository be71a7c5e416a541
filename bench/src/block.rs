//! `ringvm-bench block`: disks. At each depth, the plain ring first, then ringvm, or where no VM can be run its backend
//! alone, then the others.

mod table;

use std::fmt;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::cli::BlockOptions;
use crate::host::{self, Machine};
use crate::plan::{self, Contender, Plan};
use crate::report::{self, Series};
use crate::run::{self, Latency, Sample};
use crate::scratch::Scratch;
use crate::vmm::{Contestant, Disk, Vm};
use crate::{backend, limit};

/// RAM of a VM in MiB: enough for the guest's buffers at any depth and block size that can be asked for.
const MEMORY: u32 = 256;
const WARM: Duration = Duration::from_millis(250);
const QUEUE_SIZE: u16 = 256;
/// The name of the reference in tables and reports.
const PLAIN_RING: &str = "plain ring";

/// What takes part without a VM.
#[derive(Clone, Copy)]
enum Host {
    PlainRing,
    Backend,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PlainRing => PLAIN_RING,
            Self::Backend => backend::NAME,
        })
    }
}

/// Measures, and prints the table.
///
/// # Errors
/// A host, a disk or a contestant that can't be used, in one line.
pub fn run(options: &BlockOptions) -> Result<()> {
    let contenders = contenders(options)?;
    let plan = Plan::new(options.runs, options.depth.len() * contenders.len())?;
    plan.progress.set_message("filling the scratch disk");
    let scratch = Scratch::prepare(options)?;
    let place = (scratch.path.display(), scratch.size >> 20, &scratch.file_system);
    plan.progress.suspend(|| eprintln!("ringvm-bench: disk: {} ({} MiB on {})", place.0, place.1, place.2));
    let mut series = Vec::new();
    for &depth in &options.depth {
        series.extend(at_depth(options, depth, &contenders, &scratch, &plan)?);
    }
    plan.progress.finish_and_clear();
    let machine = Machine::look();
    // The file first: a reader of the table may be gone by now.
    if let Some(path) = &options.json {
        let series = series.iter().map(|line| report::describe(line, json!({ "depth": line.point }), "iops")).collect();
        report::write(path, job(options, &scratch), &machine, series)?;
    }
    let table = table::render(options, &scratch, &machine, &series);
    std::io::stdout().write_all(table.as_bytes()).context("printing the table")
}

fn contenders(options: &BlockOptions) -> Result<Vec<Contender<Host>>> {
    let mut contenders = vec![Contender::Host(Host::PlainRing)];
    if options.backend || host::kvm_trouble().is_some() {
        contenders.push(Contender::Host(Host::Backend));
    }
    let instead = "the backend alone instead, driven from a process of the host";
    plan::add_vmms(&mut contenders, options.ringvm.as_deref(), &options.against, instead)?;
    Ok(contenders)
}

fn job(options: &BlockOptions, scratch: &Scratch) -> serde_json::Value {
    json!({
        "rw": options.rw.job(),
        "bs": options.bs,
        "queues": options.queues,
        "cpus": options.cpus,
        "completions": if options.irq { "interrupts" } else { "polled" },
        "direct": options.direct,
        "time_ms": options.time.as_millis() as u64,
        "disk": scratch.path,
        "disk_bytes": scratch.size,
        "disk_file_system": scratch.file_system,
    })
}

fn at_depth(
    options: &BlockOptions,
    depth: u32,
    contenders: &[Contender<Host>],
    scratch: &Scratch,
    plan: &Plan,
) -> Result<Vec<Series<u32>>> {
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
    let disk = Disk { path: &scratch.path, direct: options.direct, queues: options.queues, queue_size: QUEUE_SIZE };
    let vm = Vm {
        kernel: &plan.kernel,
        command_line: &command_line,
        cpus: options.cpus,
        memory: MEMORY,
        disk: Some(disk),
        nic: None,
    };
    plan.interleave(depth, &format!("depth {depth}"), contenders, &vm, |contender| match contender {
        Contender::Host(Host::PlainRing) => plain_ring(options, depth, scratch),
        Contender::Host(Host::Backend) => backend::measure(options, depth, scratch, WARM),
        Contender::Vmm(contestant) => guest(contestant, &vm, plan, options.time + WARM),
    })
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

fn guest(contestant: &Contestant, vm: &Vm<'_>, plan: &Plan, time: Duration) -> Result<Sample> {
    let (cpu, vm) = run::observe(contestant, vm, plan.dir.path(), time, |_| Ok(()))?;
    let errors = vm.number("errors")?;
    if errors != 0 {
        bail!("the guest under {} had {errors} failed requests", contestant.name);
    }
    let nanoseconds = |key| vm.number(key).map(Duration::from_nanos);
    let latency = Latency { p50: nanoseconds("p50_ns")?, p99: nanoseconds("p99_ns")? };
    let (ops, time) = (vm.number("ops")?, nanoseconds("time_ns")?);
    Ok(Sample { ops, time, latency: Some(latency), cpu, carried: None, vm: Some(vm) })
}
