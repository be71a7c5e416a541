//! `ringvm-bench idle`: what a VM costs whose guest does nothing, with disks and NICs that have worked once and wait.

pub(crate) mod table;

use std::convert::Infallible;
use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cli::IdleOptions;
use crate::document::{IdleJob, IdlePoint, Job, Point};
use crate::host;
use crate::net::interface::Interface;
use crate::plan::{self, Contender, Count, Deliver, Measure, Plan, Size};
use crate::run::{self, Look};
use crate::sample::{Counted, Sample};
use crate::vmm::{Contestant, Disk, Kind, Nic, Vm};

/// RAM of the VM in MiB.
const MEMORY: u32 = 256;
const DISK: u64 = 64 << 20;
const QUEUE_SIZE: u16 = 256;

/// Measures, and prints the table. With NICs the calling thread must be in a network namespace of its own.
///
/// # Errors
/// A host or a contestant that can't be used, in one line.
pub fn run(options: &IdleOptions, deliver: Deliver) -> Result<()> {
    if let Some(trouble) = host::kvm_trouble() {
        bail!("an idle VM can't be measured without a VM: {trouble}");
    }
    let mut contenders: Vec<Contender<Infallible>> = Vec::new();
    let fit = |kind| kind != Kind::StorageDaemon || (options.disks == 1 && options.nics == 0);
    plan::add_vmms(&mut contenders, &options.others, "nothing", fit)?;
    let plan = Plan::new(Size::of(options.runs, &contenders, 1), options.others.syscalls)?;
    if let Some(Count::Strace(_)) = plan.count {
        bail!("system calls of an idle VM are counted by tracepoints only: that takes root and tracefs");
    }
    let interfaces =
        (0..options.nics).map(|index| Interface::create(&format!("bench{index}"), 1)).collect::<Result<Vec<_>>>()?;
    let images = (0..options.disks).map(|index| image(&plan, index)).collect::<Result<Vec<_>>>()?;
    let disks: Vec<_> = images
        .iter()
        .map(|path| Disk { path: Some(path), size: DISK, direct: false, queues: 1, queue_size: QUEUE_SIZE })
        .collect();
    let nics: Vec<_> =
        interfaces.iter().map(|interface| Nic { tap: &interface.name, pairs: 1, queue_size: QUEUE_SIZE }).collect();
    let time = options.time.as_millis() as u64;
    let command_line = format!("job=idle disks={} nics={} time={time}ms", options.disks, options.nics);
    let vm = Vm {
        kernel: &plan.kernel,
        elf: None,
        initramfs: None,
        command_line: &command_line,
        cpus: options.cpus,
        memory: MEMORY,
        prefault: options.others.prefault,
        disks: &disks,
        nics: &nics,
    };
    let job = IdleJob { cpus: options.cpus, runs: options.runs, time_ms: time };
    let point = Point::Idle(IdlePoint { disks: options.disks, nics: options.nics });
    plan.finish(plan::document(Job::Idle(job), &contenders), (&options.output, deliver), |document| {
        let mut measure = Idle { plan: &plan, vm, time: options.time };
        plan.interleave(document, (point, "an idle guest"), &contenders, &vm, &mut measure)
    })
}

fn image(plan: &Plan, index: u16) -> Result<PathBuf> {
    let path = plan.dir.path().join(format!("idle{index}.img"));
    let make = || File::create_new(&path)?.set_len(DISK);
    make().with_context(|| format!("making {}", path.display()))?;
    Ok(path)
}

struct Idle<'a> {
    plan: &'a Plan,
    vm: Vm<'a>,
    time: Duration,
}

impl Measure<Infallible> for Idle<'_> {
    fn run(&mut self, contender: &Contender<Infallible>) -> Result<Sample> {
        let Contender::Vmm(contestant) = contender else { bail!("only VMs can be idle") };
        let observed = run::observe(contestant, &self.vm, self.plan.dir.path(), self.time, Look::Plain, |_| Ok(()))?;
        let time = Duration::from_nanos(observed.vm.number("time_ns")?);
        Ok(Sample { time, cpu: observed.cpu, vm: Some(observed.vm), ..Sample::default() })
    }

    /// Here operations are seconds.
    fn count(&mut self, contestant: &Contestant, how: &Count) -> Result<Counted> {
        let Count::Tracepoints = how else { bail!("strace counts whole runs only") };
        let observed = run::observe(contestant, &self.vm, self.plan.dir.path(), self.time, Look::Counted, |_| Ok(()))?;
        Ok(observed.counted(self.time.as_secs().max(1)))
    }
}
