//! `ringvm-bench net`: NICs on a tap that nobody else uses, in a network namespace of this process's own. At each size and
//! direction, a plain process on the same tap first, then ringvm, then the others.
//!
//! A driver is not told what became of a frame that it sent: what counts is what arrived by the tap's own count, and a run
//! that lost frames is no result.

pub mod busy;
pub mod generator;
pub mod interface;
pub mod namespace;
pub mod plain;
mod table;

use std::fmt;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use self::generator::Generator;
use self::interface::Interface;
use crate::cli::{Direction, NetOptions};
use crate::host::Machine;
use crate::plan::{self, Contender, Plan};
use crate::report::{self, Series};
use crate::run::{self, Moment, Sample};
use crate::vmm::{Contestant, Nic, Vm};

const WARM: Duration = Duration::from_millis(100);
const QUEUE_SIZE: u16 = 256;
/// Where the guest sleeps, frames have to find buffers while it wakes up, and one interrupt is to bring many.
const SLEEPER_QUEUE_SIZE: u16 = 1024;
/// Bytes of a receive buffer: a frame of the usual MTU and its header, as Linux drivers size theirs.
const RECEIVE_BUFFER: u32 = 1_536;
/// Longer frames are sent as TCP, for the host to cut into segments.
const ETHERNET_LONGEST: usize = 1_514;
const TAP: &str = "bench0";
/// The name of the reference in tables and reports.
const PLAIN: &str = "plain process";

/// The same, while other threads keep as many CPUs busy as the guest's vCPUs do, which poll.
const PLAIN_BESIDE: &str = "plain, CPU shared";

/// What takes part without a VM.
#[derive(Clone, Copy)]
enum Host {
    Plain,
    PlainBeside,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => PLAIN,
            Self::PlainBeside => PLAIN_BESIDE,
        })
    }
}

/// What is measured at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Flow {
    direction: Direction,
    /// Bytes of a frame, from its addresses to the end of its payload.
    size: usize,
    /// Whether the guest sleeps until an interrupt comes.
    irq: bool,
}

impl Flow {
    fn segments(self) -> bool {
        self.size > ETHERNET_LONGEST
    }

    fn queue_size(self) -> u16 {
        if self.irq { SLEEPER_QUEUE_SIZE } else { QUEUE_SIZE }
    }

    fn job(self, options: &NetOptions) -> String {
        let transmits = self.direction == Direction::Out;
        format!(
            "job={} size={} tso={} irq={} {}depth={} pairs={} cpus={} time={}ms",
            if transmits { "net-tx" } else { "net-rx" },
            self.size,
            u8::from(self.segments()),
            u8::from(self.irq),
            if transmits { String::new() } else { format!("bs={RECEIVE_BUFFER} ") },
            options.depth,
            options.pairs,
            options.cpus,
            options.time.as_millis()
        )
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (tso, irq) = (if self.segments() { " TSO" } else { "" }, if self.irq { ", irq" } else { "" });
        write!(f, "{} {}{tso}{irq}", self.direction.words(), self.size)
    }
}

/// Measures, and prints the table. The calling thread must be in a namespace of its own: [`namespace::enter`].
///
/// # Errors
/// A host, a tap or a contestant that can't be used, or frames that got lost, in one line.
pub fn run(options: &NetOptions) -> Result<()> {
    let contenders = contenders(options)?;
    let interface = Interface::create(TAP, options.pairs)?;
    let flows: Vec<_> = flows(options).into_iter().map(|flow| (flow, at(flow, &contenders))).collect();
    let plan = Plan::new(options.runs, flows.iter().map(|(_, contenders)| contenders.len()).sum())?;
    let mut series = Vec::new();
    for (flow, contenders) in &flows {
        series.extend(at_flow(options, *flow, contenders, &interface, &plan)?);
    }
    plan.progress.finish_and_clear();
    let machine = Machine::look();
    // The file first: a reader of the table may be gone by now.
    if let Some(path) = &options.json {
        let point = |flow: Flow| {
            json!({
                "direction": flow.direction.words(),
                "size": flow.size,
                "tso": flow.segments(),
                "irq": flow.irq,
                "queue_size": flow.queue_size(),
            })
        };
        let series = series.iter().map(|line| report::describe(line, point(line.point), "fps")).collect();
        report::write(path, job(options), &machine, series)?;
    }
    let table = table::render(options, &machine, &series);
    std::io::stdout().write_all(table.as_bytes()).context("printing the table")
}

fn contenders(options: &NetOptions) -> Result<Vec<Contender<Host>>> {
    let mut contenders = vec![Contender::Host(Host::Plain)];
    if !options.plain {
        contenders.push(Contender::Host(Host::PlainBeside));
        plan::add_vmms(&mut contenders, options.ringvm.as_deref(), &options.against, "the plain process only")?;
    }
    Ok(contenders)
}

/// Who is measured there. Only what comes has three takers of CPU time: its sender, its receiver, and the guest that polls.
fn at(flow: Flow, contenders: &[Contender<Host>]) -> Vec<Contender<Host>> {
    let shares = |contender: &Contender<Host>| matches!(contender, Contender::Host(Host::PlainBeside));
    let three = flow.direction == Direction::In && !flow.irq;
    contenders.iter().filter(|&contender| three || !shares(contender)).cloned().collect()
}

fn flows(options: &NetOptions) -> Vec<Flow> {
    let wanted = |direction| options.only.is_none_or(|only| only == direction);
    let all = |direction, sizes: &[u32]| -> Vec<Flow> {
        let sizes = if wanted(direction) { sizes } else { &[] };
        let irq = options.irq.is_in(direction);
        sizes.iter().map(|&size| Flow { direction, size: size as usize, irq }).collect()
    };
    [all(Direction::Out, &options.size), all(Direction::In, &options.receive_size)].concat()
}

fn job(options: &NetOptions) -> serde_json::Value {
    json!({
        "depth": options.depth,
        "pairs": options.pairs,
        "cpus": options.cpus,
        "time_ms": options.time.as_millis() as u64,
    })
}

fn at_flow(
    options: &NetOptions,
    flow: Flow,
    contenders: &[Contender<Host>],
    interface: &Interface,
    plan: &Plan,
) -> Result<Vec<Series<Flow>>> {
    let command_line = flow.job(options);
    let vm = Vm {
        kernel: &plan.kernel,
        command_line: &command_line,
        cpus: options.cpus,
        // Room for the longest frames in all buffers of both directions.
        memory: 192 + 64 * u32::from(options.pairs),
        disk: None,
        nic: Some(Nic { tap: TAP, pairs: options.pairs, queue_size: flow.queue_size() }),
    };
    plan.interleave(flow, &flow.to_string(), contenders, &vm, |contender| {
        let before = interface.counters()?;
        let mut sample = match contender {
            Contender::Host(Host::Plain) => plain(options, flow, interface)?,
            Contender::Host(Host::PlainBeside) => busy::beside(options.cpus, || plain(options, flow, interface))?,
            Contender::Vmm(contestant) => guest(contestant, &vm, flow, interface, plan, options.time)?,
        };
        let carried = interface.counters()?.since(before);
        sample.carried = Some(match flow.direction {
            Direction::Out => arrived(sample.ops, carried.from_user)?,
            Direction::In => taken(sample.ops, carried.to_user)?,
        });
        Ok(sample)
    })
}

/// What is counted is a part of what the tap sees: it sees what goes before and after the measurement too.
fn arrived(returned: u64, arrived: u64) -> Result<u64> {
    if arrived < returned {
        bail!(
            "{} of {returned} frames got lost: the driver had all of them back, the tap's count says that {arrived} arrived",
            returned - arrived
        );
    }
    Ok(arrived)
}

fn taken(counted: u64, taken: u64) -> Result<u64> {
    if taken < counted {
        bail!("{counted} frames came, but the tap's count says that only {taken} were taken from it");
    }
    Ok(taken)
}

fn plain(options: &NetOptions, flow: Flow, interface: &Interface) -> Result<Sample> {
    let transmits = flow.direction == Direction::Out;
    let generator = if transmits { None } else { Some(Generator::start(interface, flow.size)?) };
    let sample = plain::measure(&plain::Job {
        interface,
        transmits,
        size: flow.size,
        segments: flow.segments(),
        // One thread carries what all pairs of the guest carry.
        burst: options.depth * u32::from(options.pairs),
        warm: WARM,
        time: options.time,
    })?;
    generator.map_or(Ok(()), Generator::stop)?;
    Ok(sample)
}

fn guest(
    contestant: &Contestant,
    vm: &Vm<'_>,
    flow: Flow,
    interface: &Interface,
    plan: &Plan,
    time: Duration,
) -> Result<Sample> {
    let mut generator = None;
    let (cpu, vm) = run::observe(contestant, vm, plan.dir.path(), time, |moment| {
        match moment {
            Moment::Start if flow.direction == Direction::In => {
                generator = Some(Generator::start(interface, flow.size)?);
            }
            Moment::Start => {}
            Moment::End => generator.take().map_or(Ok(()), Generator::stop)?,
        }
        Ok(())
    })?;
    let (frames, bytes) = (vm.number("frames")?, vm.number("bytes")?);
    if bytes != frames * flow.size as u64 {
        bail!("the guest under {} met {bytes} bytes in {frames} frames, not {} in each", contestant.name, flow.size);
    }
    let time = Duration::from_nanos(vm.number("time_ns")?);
    Ok(Sample { ops: frames, time, latency: None, cpu, carried: None, vm: Some(vm) })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn flows_of(words: &[&str]) -> Vec<String> {
        let all = ["ringvm-bench", "net"].iter().chain(words);
        let Some(Command::Net(options)) = Cli::try_parse_from(all).unwrap().command else { unreachable!() };
        flows(&options).iter().map(Flow::to_string).collect()
    }

    #[test]
    fn sizes_and_directions_are_chosen() {
        assert_eq!(flows_of(&[]), ["out 64", "out 1500", "out 65000 TSO", "in 1500, irq"]);
        assert_eq!(flows_of(&["--only", "in", "--receive-size", "60,1514"]), ["in 60, irq", "in 1514, irq"]);
        assert_eq!(flows_of(&["--irq=none", "--size", "64"]), ["out 64", "in 1500"]);
        assert_eq!(flows_of(&["--irq", "--size", "64"]), ["out 64, irq", "in 1500, irq"]);
        assert_eq!(flows_of(&["--only", "out", "--size", "1514,1515"]), ["out 1514", "out 1515 TSO"]);
    }

    #[test]
    fn a_run_that_lost_frames_is_no_result() {
        assert_eq!((arrived(100, 100).unwrap(), arrived(100, 356).unwrap()), (100, 356));
        let error = arrived(100, 97).unwrap_err().to_string();
        assert!(error.starts_with("3 of 100 frames got lost"), "{error}");
        assert!(taken(100, 101).is_ok() && taken(100, 99).is_err());
    }
}
