//! `ringvm-bench net`: NICs on a tap that nobody else uses, in a network namespace of this process's own. At each size and
//! direction, a plain process on the same tap first, then ringvm, then the others.
//!
//! A driver is not told what became of a frame that it sent: what counts is what arrived by the tap's own count, and a run
//! that lost frames is no result.

pub mod busy;
mod cpus;
pub mod generator;
pub mod interface;
pub mod namespace;
pub mod plain;
pub(crate) mod table;

use std::fmt;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use self::cpus::Apart;
use self::generator::Generator;
use self::interface::Interface;
use crate::cli::NetOptions;
use crate::document::{Document, Job, NetJob, NetPoint, Point};
use crate::plan::{self, Contender, Count, Deliver, Measure, Plan, Size};
use crate::run::{self, Look, Moment, Observed};
use crate::sample::{Counted, Sample};
use crate::strace;
use crate::vmm::{Contestant, Kind, Nic, Vm};
use crate::workload::Direction;

const WARM: Duration = Duration::from_millis(100);
/// What a run lasts that is to do nothing: one that sends can't be told to send nothing.
const SHORTEST: Duration = Duration::from_millis(1);
const QUEUE_SIZE: u16 = 256;
/// Where the guest sleeps, frames have to find buffers while it wakes up, and one interrupt is to bring many.
const SLEEPER_QUEUE_SIZE: u16 = 2048;
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
type Flow = NetPoint;

impl Flow {
    fn new(direction: Direction, size: usize, irq: bool) -> Self {
        let queue_size = if irq { SLEEPER_QUEUE_SIZE } else { QUEUE_SIZE };
        Self { direction, size, tso: size > ETHERNET_LONGEST, irq, queue_size }
    }

    /// How the guest is told, for a time or a number of frames.
    fn job(self, options: &NetOptions, amount: &str) -> String {
        let transmits = self.direction == Direction::Out;
        format!(
            "job={} size={} tso={} irq={} {}depth={} pairs={} cpus={} {amount}",
            if transmits { "net-tx" } else { "net-rx" },
            self.size,
            u8::from(self.tso),
            u8::from(self.irq),
            if transmits { String::new() } else { format!("bs={RECEIVE_BUFFER} ") },
            options.depth,
            options.pairs,
            options.cpus,
        )
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (tso, irq) = (if self.tso { " TSO" } else { "" }, if self.irq { ", irq" } else { "" });
        write!(f, "{} {}{tso}{irq}", self.direction.words(), self.size)
    }
}

/// Measures, and prints the table. The calling thread must be in a namespace of its own: [`namespace::enter`].
///
/// # Errors
/// A host, a tap or a contestant that can't be used, or frames that got lost, in one line.
pub fn run(options: &NetOptions, deliver: Deliver) -> Result<()> {
    let contenders = contenders(options)?;
    let interface = Interface::create(TAP, options.pairs)?;
    let flows: Vec<_> = flows(options).into_iter().map(|flow| (flow, at(flow, &contenders))).collect();
    let mut size = Size { runs: options.runs, ..Size::default() };
    for (_, contenders) in &flows {
        let one = Size::of(options.runs, contenders, 1);
        (size.series, size.vmms) = (size.series + one.series, size.vmms + one.vmms);
    }
    let plan = Plan::new(size, options.others.syscalls)?;
    let document = plan::document(Job::Net(job(options)), &contenders);
    plan.finish(document, (&options.output, deliver), |document| {
        flows.iter().try_for_each(|(flow, contenders)| at_flow(options, *flow, contenders, &interface, &plan, document))
    })
}

fn contenders(options: &NetOptions) -> Result<Vec<Contender<Host>>> {
    let mut contenders = vec![Contender::Host(Host::Plain)];
    if !options.plain {
        contenders.push(Contender::Host(Host::PlainBeside));
        // Those with one queue pair can't be measured with more.
        let pairs = |kind| options.pairs == 1 || kind != Kind::Firecracker;
        let fit = |kind: Kind| kind.has_nics() && pairs(kind);
        plan::add_vmms(&mut contenders, &options.others, "the plain process only", fit)?;
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
        sizes.iter().map(|&size| Flow::new(direction, size as usize, irq)).collect()
    };
    [all(Direction::Out, &options.size), all(Direction::In, &options.receive_size)].concat()
}

fn job(options: &NetOptions) -> NetJob {
    NetJob {
        depth: options.depth,
        pairs: options.pairs,
        cpus: options.cpus,
        prefault: options.others.prefault,
        runs: options.runs,
        time_ms: options.time.as_millis() as u64,
    }
}

fn at_flow(
    options: &NetOptions,
    flow: Flow,
    contenders: &[Contender<Host>],
    interface: &Interface,
    plan: &Plan,
    document: &mut Document,
) -> Result<()> {
    let command_line = flow.job(options, &format!("time={}ms", options.time.as_millis()));
    let nics = [Nic { tap: TAP, pairs: options.pairs, queue_size: flow.queue_size }];
    let vm = Vm {
        kernel: &plan.kernel,
        elf: None,
        initramfs: None,
        command_line: &command_line,
        cpus: options.cpus,
        // Room for the longest frames in all buffers of both directions.
        memory: 192 + 64 * u32::from(options.pairs),
        prefault: options.others.prefault,
        disks: &[],
        nics: &nics,
    };
    // A vCPU that polls needs a CPU to itself, and would be worse off with one less to choose from.
    let apart = if flow.direction == Direction::In && flow.irq {
        Apart::new().context("keeping off the CPU of the source of frames")?
    } else {
        None
    };
    let mut measure = At { options, flow, interface, plan, vm, apart };
    plan.interleave(document, (Point::Net(flow), &flow.to_string()), contenders, &vm, &mut measure)
}

/// One flow.
struct At<'a> {
    options: &'a NetOptions,
    flow: Flow,
    interface: &'a Interface,
    plan: &'a Plan,
    vm: Vm<'a>,
    apart: Option<Apart>,
}

impl Measure<Host> for At<'_> {
    fn run(&mut self, contender: &Contender<Host>) -> Result<Sample> {
        let before = self.interface.counters()?;
        let mut sample = match contender {
            Contender::Host(Host::Plain) => self.plain()?,
            Contender::Host(Host::PlainBeside) => busy::beside(self.options.cpus, || self.plain())?,
            Contender::Vmm(contestant) => {
                let observed = self.guest(contestant, Look::Plain)?;
                let (ops, time) = (observed.vm.number("frames")?, Duration::from_nanos(observed.vm.number("time_ns")?));
                Sample { ops, time, cpu: observed.cpu, vm: Some(observed.vm), ..Sample::default() }
            }
        };
        let carried = self.interface.counters()?.since(before);
        sample.carried = Some(match self.flow.direction {
            Direction::Out => arrived(sample.ops, carried.from_user)?,
            Direction::In => taken(sample.ops, carried.to_user)?,
        });
        Ok(sample)
    }

    fn count(&mut self, contestant: &Contestant, how: &Count) -> Result<Counted> {
        let Count::Strace(strace) = how else {
            let observed = self.guest(contestant, Look::Counted)?;
            return Ok(observed.counted(observed.vm.number("frames")?));
        };
        let line = |time: Duration| self.flow.job(self.options, &format!("time={}ms", time.as_millis()));
        let (loaded, empty) = (line(self.options.time), line(SHORTEST));
        let vms = (&Vm { command_line: &loaded, ..self.vm }, &Vm { command_line: &empty, ..self.vm });
        let generator = match self.flow.direction {
            Direction::In => Some(self.source()?),
            Direction::Out => None,
        };
        let counted = strace::count(strace, contestant, vms, self.plan.dir.path(), self.options.time, "frames");
        generator.map_or(Ok(()), Generator::stop)?;
        counted
    }
}

impl At<'_> {
    fn source(&self) -> Result<Generator> {
        Generator::start(self.interface, self.flow.size, self.apart.as_ref().map(Apart::source))
    }

    fn plain(&self) -> Result<Sample> {
        let transmits = self.flow.direction == Direction::Out;
        let generator = if transmits { None } else { Some(self.source()?) };
        let sample = plain::measure(&plain::Job {
            interface: self.interface,
            transmits,
            size: self.flow.size,
            segments: self.flow.tso,
            // One thread carries what all pairs of the guest carry.
            burst: self.options.depth * u32::from(self.options.pairs),
            warm: WARM,
            time: self.options.time,
        })?;
        generator.map_or(Ok(()), Generator::stop)?;
        Ok(sample)
    }

    fn guest(&self, contestant: &Contestant, look: Look) -> Result<Observed> {
        let mut generator = None;
        let (dir, time) = (self.plan.dir.path(), self.options.time);
        let observed = run::observe(contestant, &self.vm, dir, time, look, |moment| {
            match moment {
                Moment::Start if self.flow.direction == Direction::In => {
                    generator = Some(self.source()?);
                }
                Moment::Start => {}
                Moment::End => generator.take().map_or(Ok(()), Generator::stop)?,
            }
            Ok(())
        })?;
        let (frames, bytes) = (observed.vm.number("frames")?, observed.vm.number("bytes")?);
        if bytes != frames * self.flow.size as u64 {
            bail!(
                "the guest under {} met {bytes} bytes in {frames} frames, not {} in each",
                contestant.name,
                self.flow.size
            );
        }
        Ok(observed)
    }
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
