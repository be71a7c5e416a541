//! `ringvm-bench linux`: job files of fio and lines of iperf3 in a Linux guest with a stock kernel, as its users have it, under
//! every contestant, and on the host itself beside them. One boot of the guest is one run of all loads; runs take turns.
//!
//! The guest is made here: its initramfs holds a static busybox, the modules of its devices, fio, iperf3 and their libraries, all
//! of them this host's, and what it is to run ([`load`]). It tells on its serial console what came of each ([`mod@boot`]).
//!
//! What such a guest is made of ([`tree`], [`kernel`], [`initramfs`]) serves tests too.

pub mod boot;
mod elf;
mod error;
pub mod fio;
pub mod initramfs;
pub mod iperf3;
pub mod kernel;
pub mod load;
mod native;
mod shell;
pub(crate) mod table;
mod tools;
pub mod tree;

use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};

use self::boot::{Done, Guest, Limits};
pub use self::error::Error;
use self::kernel::Kernel;
use self::load::{Loads, Step};
pub use self::tools::{find, program, run as run_tool, tail};
use crate::cli::{Counting, LinuxOptions, Who};
use crate::document::{Document, Job, LinuxJob, Point, Program, Series};
use crate::host;
use crate::net::interface::Interface;
use crate::plan::{self, Contender, Deliver, Plan, Size, Turns};
use crate::run::Look;
use crate::sample::{Counted, Sample, VmSample};
use crate::scratch::{Scratch, Wanted};
use crate::steal::{self, Shares};
use crate::vmm::{Against, Contestant, Disk, Kind, Nic, Vm, found};

/// The name of the reference in tables and reports.
const HOST: &str = "host";
const QUEUE_SIZE: u16 = 256;
const TAP: &str = "bench0";
/// No smaller disk is one.
const LEAST_DISK: u64 = 1 << 20;
/// All messages of the kernel: if it does not come up, they are all that there is to go by.
const COMMAND_LINE: &str = "console=ttyS0 earlyprintk=ttyS0 loglevel=7 panic=-1";
/// Where the lab's tests have the kernel that they fetch, beside the folder of this program.
const LAB_KERNEL: &str = "lab/kernel";

/// What takes part without a VM.
#[derive(Clone, Copy, Debug)]
struct Native;

impl fmt::Display for Native {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HOST)
    }
}

/// What the options say is to be run.
///
/// # Errors
/// A file that can't be read or understood, in one line.
pub fn loads(options: &LinuxOptions) -> Result<Loads> {
    Loads::read(options)
}

/// Measures, and prints the table. With a NIC the calling thread must be in a network namespace of its own.
///
/// # Errors
/// A host, a kernel, a disk or a contestant that can't be used, or a load that fails, in one line.
pub fn run(options: &LinuxOptions, loads: Loads, deliver: Deliver) -> Result<()> {
    let contenders = contenders(options, &loads)?;
    let kernel = find_kernel(options)?;
    let tools = tools(&loads)?;
    let count = options.others.syscalls.map(|how| match how {
        // Of a guest that boots, strace could only count the boot as well.
        Counting::Strace => {
            bail!("system calls of a Linux guest are counted by tracepoints only: that takes root and tracefs")
        }
        Counting::Auto | Counting::Tracepoints => Ok(Counting::Tracepoints),
    });
    let plan = Plan::new(Size::of(options.runs, &contenders, 1), count.transpose()?)?;
    plan.progress.set_message("putting the guest together");
    let scratch = disk(options, &loads, &plan)?;
    let interface = if loads.has_network() { Some(Interface::create(TAP, options.pairs)?) } else { None };
    if let Some(interface) = &interface {
        native::set_up(&interface.name)?;
    }
    let initramfs = pack(&kernel, &loads, plan.dir.path())?;
    let elf = contenders.iter().any(|contender| matches!(contender, Contender::Vmm(vmm) if vmm.kind.needs_elf()));
    let elf = if elf { Some(kernel.elf(plan.dir.path())?) } else { None };

    let mut document = plan::document(Job::Linux(job(options, &loads, &kernel, scratch.as_ref())), &contenders);
    document.programs.extend(tools);
    let disks: Vec<_> = scratch
        .iter()
        .map(|scratch| Disk {
            path: scratch.path.as_deref(),
            size: scratch.size,
            direct: options.direct,
            queues: options.queues,
            queue_size: QUEUE_SIZE,
        })
        .collect();
    let nics: Vec<_> = interface
        .iter()
        .map(|interface| Nic { tap: &interface.name, pairs: interface.pairs, queue_size: QUEUE_SIZE })
        .collect();
    let vm = Vm {
        kernel: kernel.image(),
        elf: elf.as_deref(),
        initramfs: Some(&initramfs),
        command_line: COMMAND_LINE,
        cpus: options.cpus,
        memory: u32::try_from(options.memory >> 20).context("--memory is more than any VM has")?,
        prefault: options.others.prefault,
        disks: &disks,
        nics: &nics,
    };
    let measure = Measure { options, loads: &loads, scratch: scratch.as_ref(), plan: &plan, vm };
    plan.finish(document, (&options.output, deliver), |document| measure.all(&contenders, document))
}

fn contenders(options: &LinuxOptions, loads: &Loads) -> Result<Vec<Contender<Native>>> {
    if options.vmm == [Who::Host] {
        return Ok(vec![Contender::Host(Native)]);
    }
    let wanted = |who: Who| options.vmm.is_empty() || options.vmm.contains(&who);
    let mut others = options.others.clone();
    for who in &options.vmm {
        let Who::Vmm(kind) = *who else { continue };
        let named = |against: &Against| match against {
            Against::One(contestant) => contestant.kind == kind,
            Against::Found => false,
        };
        if matches!(kind, Kind::Ringvm | Kind::RingvmDaemon) || others.against.iter().any(named) {
            continue;
        }
        let contestant = found::one(kind);
        others.against.push(Against::One(contestant.ok_or_else(|| {
            let name = Contestant::new(kind, PathBuf::new()).name;
            anyhow!("--vmm {name}: there is none on the PATH: give --against {name}=PATH")
        })?));
    }
    let mut contenders = Vec::new();
    // Its disk alone is of another kind; it has no NIC, or the one that was measured already.
    let fit = |kind: Kind| match kind {
        Kind::StorageDaemon => !loads.has_network(),
        Kind::FirecrackerAsync => loads.has_disk(),
        _ => true,
    };
    plan::add_vmms(&mut contenders, &others, "those only that do without", fit)?;
    contenders.retain(|contender| match contender {
        Contender::Vmm(contestant) => wanted(Who::Vmm(contestant.kind)),
        Contender::Host(_) => true,
    });
    if !contenders.iter().any(Contender::is_ours) {
        // Who was asked for by name without ringvm is what the measurement is about.
        for contender in &mut contenders {
            if let Contender::Vmm(contestant) = contender {
                contestant.rival = false;
            }
        }
    }
    if contenders.is_empty() {
        let why = host::kvm_trouble().unwrap_or_else(|| "--vmm leaves nobody".to_owned());
        bail!("a Linux guest can't be measured without a VM: {why}");
    }
    if wanted(Who::Host) {
        contenders.insert(0, Contender::Host(Native));
    }
    Ok(contenders)
}

/// The kernel that the options name, that of this host, or the lab's; says which, if that was not named.
fn find_kernel(options: &LinuxOptions) -> Result<Kernel> {
    if let Some(image) = &options.kernel {
        return Ok(Kernel::given(image, options.modules.as_deref())?);
    }
    let running = Kernel::running();
    let target = env::current_exe().ok().and_then(|exe| Some(exe.parent()?.parent()?.join(LAB_KERNEL)));
    let found = match &running {
        Ok(kernel) => Some(kernel.clone()),
        Err(_) => target.and_then(|root| Kernel::unpacked(&root).ok()),
    };
    match (found, running) {
        (Some(kernel), _) => {
            eprintln!("ringvm-bench: the guest's kernel: {}", kernel.image().display());
            Ok(kernel)
        }
        (None, Err(error)) => bail!(
            "no kernel for the guest: {error}: give --kernel PATH, of a bzImage or an ELF image; Debian's are in the packages \
             linux-image-cloud-amd64 and linux-image-amd64"
        ),
        (None, Ok(_)) => unreachable!("what runs was found"),
    }
}

/// The programs that go into the guest, with their versions.
fn tools(loads: &Loads) -> Result<Vec<Program>> {
    let wanted = [("fio", loads.has_disk()), ("iperf3", loads.has_network())];
    let tool = |name: &str| -> Result<Program> {
        let path = find(name)?;
        Ok(Program { name: name.to_owned(), version: found::version(&path), path: path.display().to_string() })
    };
    wanted.into_iter().filter(|&(_, wanted)| wanted).map(|(name, _)| tool(name)).collect()
}

fn disk(options: &LinuxOptions, loads: &Loads, plan: &Plan) -> Result<Option<Scratch>> {
    if !loads.has_disk() {
        return Ok(None);
    }
    plan.progress.set_message("filling the scratch disk");
    let scratch = Scratch::obtain(&Wanted {
        file: options.file.as_deref(),
        size: options.size,
        least: LEAST_DISK,
        direct: options.direct,
        writer: loads.writer(),
        overwrite: options.overwrite,
    })?;
    if let (Some(path), Some(file_system)) = (&scratch.path, &scratch.file_system) {
        let (path, mib) = (path.display(), scratch.size >> 20);
        plan.progress.suspend(|| eprintln!("ringvm-bench: disk: {path} ({mib} MiB on {file_system})"));
    }
    Ok(Some(scratch))
}

/// Makes the guest's initramfs in `dir`.
fn pack(kernel: &Kernel, loads: &Loads, dir: &Path) -> Result<PathBuf> {
    let mut modules = vec!["virtio_pci"];
    modules.extend(loads.has_disk().then_some("virtio_blk"));
    modules.extend(loads.has_network().then_some("virtio_net"));
    let mut tree = initramfs::base(kernel, &modules, include_str!("linux/init.sh"), dir)?;
    if loads.has_disk() {
        tree.tool("fio")?;
        tree.text("bench/disk", "", 0o644);
    }
    if loads.has_network() {
        tree.tool("iperf3")?;
        tree.text("bench/address", native::GUEST, 0o644);
    }
    for (index, (_, file)) in loads.fio.iter().enumerate() {
        tree.text(&format!("bench/{index}.fio"), &file.for_guest(), 0o644);
    }
    for (index, step) in loads.steps().iter().enumerate() {
        tree.text(&format!("bench/steps/{index:04}"), &(step.command("/bench", native::HOST) + "\n"), 0o644);
    }
    let path = dir.join("guest.cpio");
    tree.write_cpio(&path)?;
    Ok(path)
}

fn job(options: &LinuxOptions, loads: &Loads, kernel: &Kernel, scratch: Option<&Scratch>) -> LinuxJob {
    LinuxJob {
        kernel: kernel.version().to_owned(),
        cpus: options.cpus,
        memory: options.memory,
        queues: options.queues,
        pairs: options.pairs,
        direct: options.direct,
        runs: options.runs,
        disk: scratch.and_then(|scratch| Some(scratch.path.as_ref()?.display().to_string())),
        disk_bytes: scratch.map_or(0, |scratch| scratch.size),
        disk_file_system: scratch.and_then(|scratch| scratch.file_system.clone()),
        fio: loads.fio.iter().map(|(_, file)| file.for_guest()).collect(),
        iperf3: loads.iperf3.clone(),
    }
}

/// A measurement under way.
struct Measure<'a> {
    options: &'a LinuxOptions,
    loads: &'a Loads,
    scratch: Option<&'a Scratch>,
    plan: &'a Plan,
    vm: Vm<'a>,
}

impl Measure<'_> {
    /// All runs, and if that is wanted one more of each VMM in which system calls are counted.
    fn all(&self, contenders: &[Contender<Native>], document: &mut Document) -> Result<()> {
        let turns = Turns { plan: self.plan, contenders, label: None };
        turns.take(
            document,
            |contender| {
                let shares = Shares::now();
                let guest = self.one(contender, Look::Plain)?;
                let others = steal::taken_since(shares);
                let mut figures = self.figures(contender, &guest)?;
                figures.iter_mut().for_each(|(_, sample)| sample.others = others);
                // A step that lost much is not made good by others that lost nothing.
                let lost = figures.iter().filter_map(|(_, sample)| sample.steal).max_by(f64::total_cmp);
                Ok((figures, lost))
            },
            |document, contender, figures| {
                for (point, sample) in figures {
                    self.series(contender, point, document)?.add(&sample);
                }
                Ok(())
            },
        )?;
        if self.plan.count.is_none() {
            return Ok(());
        }
        turns.count(
            document,
            |contender| self.counts(&self.one(contender, Look::Counted)?),
            |document, contender, counts| {
                for (point, counted) in counts {
                    self.series(contender, point, document)?.counted = Some(counted);
                }
                Ok(())
            },
        )
    }

    /// One run of all loads.
    fn one(&self, contender: &Contender<Native>, look: Look) -> Result<Guest> {
        if let Some(scratch) = self.scratch {
            scratch.settle()?;
        }
        let _server = if self.loads.has_network() { Some(native::Server::start(self.plan.dir.path())?) } else { None };
        match contender {
            Contender::Vmm(contestant) => {
                let limits = Limits { boot: self.options.boot_limit, step: self.options.limit };
                let names: Vec<_> = self.loads.steps().iter().map(Step::name).collect();
                boot::boot(contestant, &self.vm, self.plan.dir.path(), limits, look, &names)
            }
            Contender::Host(Native) => self.native(),
        }
    }

    fn native(&self) -> Result<Guest> {
        let dir = self.plan.dir.path();
        if let Some(disk) = self.scratch.and_then(|scratch| scratch.path.as_ref()) {
            for (index, (_, file)) in self.loads.fio.iter().enumerate() {
                let path = dir.join(format!("{index}.fio"));
                let text = file.for_host(disk, self.options.direct);
                fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            }
        }
        let folder = dir.display().to_string();
        let steps = self.loads.steps();
        let run = |step: &Step<'_>| native::step(&step.command(&folder, native::LOOPBACK), dir, self.options.limit);
        Ok(Guest { steps: steps.iter().map(run).collect::<Result<_>>()?, memory: None })
    }

    /// What a run has measured.
    fn figures(&self, contender: &Contender<Native>, guest: &Guest) -> Result<Vec<(Point, Sample)>> {
        let mut all = Vec::new();
        for (step, done) in self.loads.steps().iter().zip(&guest.steps) {
            let figures = step.figures(done)?;
            let ops: u64 = figures.iter().map(|(_, sample)| sample.ops).sum();
            for (point, mut sample) in figures {
                sample.steal = done.steal;
                if let Contender::Vmm(_) = contender {
                    // Of what ran at once, nobody can say which part cost how much: each operation is taken to cost the same.
                    let part =
                        |whole: u64| (u128::from(whole) * u128::from(sample.ops) / u128::from(ops.max(1))) as u64;
                    let time = |of: fn(&Done) -> Option<std::time::Duration>| {
                        of(done).map(|time| std::time::Duration::from_nanos(part(time.as_nanos() as u64)))
                    };
                    sample.cpu = time(|done| Some(done.cpu?.others));
                    sample.vm = Some(VmSample {
                        vcpu: time(|done| Some(done.cpu?.vcpus)),
                        to_first_instruction: None,
                        memory: guest.memory,
                        exits: done.exits.map(part),
                        line: step.command("/bench", native::HOST),
                    });
                }
                all.push((Point::Linux(point), sample));
            }
        }
        Ok(all)
    }

    /// What was counted in a run.
    fn counts(&self, guest: &Guest) -> Result<Vec<(Point, Counted)>> {
        let mut all = Vec::new();
        for (step, done) in self.loads.steps().iter().zip(&guest.steps) {
            let figures = step.figures(done)?;
            let ops = figures.iter().map(|(_, sample)| sample.ops).sum();
            for (point, _) in figures {
                let counted = Counted {
                    by: "tracepoints".to_owned(),
                    ops,
                    syscalls: done.counts.map(|counts| counts.syscalls),
                    exits: done.counts.and_then(|counts| counts.exits),
                    names: Vec::new(),
                };
                all.push((Point::Linux(point), counted));
            }
        }
        Ok(all)
    }

    /// The series of a contender at a point, which fio's results name first.
    fn series<'d>(
        &self,
        contender: &Contender<Native>,
        point: Point,
        document: &'d mut Document,
    ) -> Result<&'d mut Series> {
        let name = contender.name();
        let known = document.series.iter().position(|series| series.point == point && series.name == name);
        let at = match known {
            Some(at) => at,
            None => {
                let (command, daemon) = self.plan.commands(contender, &self.vm)?;
                let mut series = Series::new(&name, point, command, daemon);
                series.reference = matches!(contender, Contender::Host(_));
                document.series.push(series);
                document.series.len() - 1
            }
        };
        Ok(&mut document.series[at])
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command as Subcommand};

    fn options(words: &[&str]) -> LinuxOptions {
        let all = ["ringvm-bench", "linux"].iter().chain(words);
        let Some(Subcommand::Linux(options)) = Cli::try_parse_from(all).unwrap().command else { unreachable!() };
        *options
    }

    #[test]
    fn contestants_are_chosen_by_name() {
        let choose = |words: &[&str]| {
            let options = options(words);
            let loads = loads(&options).unwrap();
            let contenders = contenders(&options, &loads)?;
            Ok::<_, anyhow::Error>(contenders.iter().map(Contender::name).collect::<Vec<_>>())
        };
        assert_eq!(choose(&["--vmm", "host"]).unwrap(), ["host"]);
        let tcg = ["--vmm", "qemu-tcg,host", "--against", "qemu-tcg=/q", "--ringvm", "/bin/sh"];
        assert_eq!(choose(&tcg).unwrap(), ["host", "qemu-tcg"]);
        assert_eq!(
            choose(&["--vmm", "qemu-tcg", "--against", "qemu-tcg=/q", "--ringvm", "/bin/sh"]).unwrap(),
            ["qemu-tcg"]
        );
        if host::kvm_trouble().is_none() {
            assert_eq!(choose(&["--vmm", "daemon,host", "--ringvm", "/bin/sh"]).unwrap(), ["host", "ringvm, daemon"]);
        }
        assert!(Cli::try_parse_from(["ringvm-bench", "linux", "--vmm", "bochs"]).is_err());
    }

    #[test]
    fn who_is_asked_for_without_ringvm_is_no_rival() {
        let options = options(&["--vmm", "qemu-tcg,host", "--against", "qemu-tcg=/q", "--ringvm", "/bin/sh"]);
        let contenders = contenders(&options, &loads(&options).unwrap()).unwrap();
        assert!(!contenders.iter().any(Contender::is_rival), "{contenders:?}");
    }
}
