//! `ringvm run`: the life of the process, from a configuration to an exit code.
//!
//! All checks run before the guest starts, the cheapest first.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use crossbeam_channel::{Receiver, select};
use ringvm_backends::block::OpenError;
use ringvm_backends::device::Device;
use ringvm_backends::io::reactor::{OnPanic, ReactorOptions, ReactorPool};
use ringvm_backends::net;
use ringvm_backends::rng::RngDevice;
use ringvm_cli::summary::summary;
use ringvm_hosted::console::End;
use rustix::stdio::{stdin, stdout};
use rustix::termios::isatty;
use rustix::thread::CpuSet;
use thiserror::Error;
use tracing::{debug_span, info};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_FS, VIRTIO_ID_NET};

use crate::advice::advice;
use crate::boot::{BootError, BootSource, Initramfs, Kernel};
use crate::config::{Backend, Config, RNG, Serial, TripleFault};
use crate::console::keyboard::keyboard;
use crate::console::serial_file::SerialFile;
use crate::console::terminal::{RawMode, Resized, is_interactive};
use crate::console::{Console, Streams};
use crate::control::{self, Control, Request};
use crate::events::{Ending, Events};
use crate::exit::Exit;
use crate::kvm::{Kvm, KvmError};
use crate::machine::ending::{Limits, Stopped, flush, let_go};
use crate::machine::{Blueprint, Machine, MachineError, Running};
use crate::operator::Operator;
use crate::placement::{Mover, PlaceError, open_console, open_disk, open_nic, open_vsock};
use crate::vhost_user::peer::Peer;
use crate::vhost_user::{ConnectError, VhostUserDevice, Wanted};
use crate::{bus_error, signals};

/// Why a machine did not run, or did not end well.
#[derive(Debug, Error)]
pub enum RunError {
    /// More memory than there is.
    #[error("--memory: {wanted} MiB are more than this host has, {available} MiB; ask for less")]
    Memory {
        /// Memory asked for, in MiB.
        wanted: u64,
        /// Memory available, in MiB.
        available: u64,
    },
    /// A CPU that this process may not use.
    #[error("--io-affinity: CPU {cpu} is not one of those this process may use, {allowed:?}; choose among them")]
    Affinity {
        /// The CPU asked for.
        cpu: usize,
        /// Those there are.
        allowed: Vec<usize>,
    },
    /// The kernel or initramfs is not usable.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk can't be opened.
    #[error(transparent)]
    Disk(#[from] OpenError),
    /// A NIC's port can't be opened.
    #[error(transparent)]
    Net(#[from] net::OpenError),
    /// A device can't be served where it should be.
    #[error(transparent)]
    Place(PlaceError),
    /// KVM can't be used.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The I/O threads can't be started.
    #[error("starting the I/O threads: {source}{}; see `ringvm check`", advice(.source))]
    Reactor {
        /// The error that it returned.
        source: io::Error,
    },
    /// A console has no other end.
    #[error("{what}: {source}; {advice}")]
    Console {
        /// The option with its value.
        what: String,
        /// The error that it returned.
        source: io::Error,
        /// Advice.
        advice: &'static str,
    },
    /// The host ran out of something.
    #[error("{what}: {source}{}", advice(.source))]
    Host {
        /// The operation that failed.
        what: &'static str,
        /// The error that it returned.
        source: io::Error,
    },
    /// The machine can't be built or stopped.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Something did not end in time, or could not be flushed.
    #[error("at the end: {0}")]
    Unfinished(String),
    /// The guest crashed.
    #[error("{0}")]
    GuestCrash(String),
    /// The host failed while the guest ran.
    #[error("{0}")]
    HostFailure(String),
    /// We did.
    #[error("{0}; this is a bug of ringvm")]
    Internal(String),
}

impl RunError {
    /// The exit code it means.
    #[must_use]
    pub fn exit(&self) -> Exit {
        match self {
            Self::Memory { .. }
            | Self::Affinity { .. }
            | Self::Boot(_)
            | Self::Disk(_)
            | Self::Net(_)
            | Self::Place(_)
            | Self::Console { .. } => Exit::Configuration,
            Self::Kvm(KvmError::Cpus { .. }) => Exit::Configuration,
            Self::Machine(MachineError::Layout(_) | MachineError::Boot(_) | MachineError::Pci(_)) => {
                Exit::Configuration
            }
            Self::Machine(MachineError::Kvm(KvmError::Cpus { .. })) => Exit::Configuration,
            Self::Machine(MachineError::Bus(_)) | Self::Internal(_) => Exit::Internal,
            Self::Reactor { .. } | Self::Kvm(_) | Self::Machine(_) | Self::Host { .. } => Exit::Host,
            Self::Unfinished(_) | Self::HostFailure(_) => Exit::Host,
            Self::GuestCrash(_) => Exit::GuestCrash,
        }
    }
}

impl From<PlaceError> for RunError {
    fn from(error: PlaceError) -> Self {
        match error {
            PlaceError::Disk(error) => Self::Disk(error),
            PlaceError::Net(error) => Self::Net(error),
            error => Self::Place(error),
        }
    }
}

impl From<ConnectError> for RunError {
    fn from(error: ConnectError) -> Self {
        Self::Place(error.into())
    }
}

/// Runs a machine until it ends.
///
/// # Errors
/// See [`RunError`]; each knows its exit code.
pub fn run(config: &Config) -> Result<Exit, RunError> {
    check_memory(config)?;
    check_affinity(config)?;
    let kernel =
        config.kernel.as_deref().ok_or_else(|| RunError::Internal("a configuration without a kernel".into()))?;
    let kernel = Kernel::open(kernel, config.boot)?;
    let initramfs = config.initramfs.as_deref().map(Initramfs::open).transpose()?;
    let kvm = Kvm::open()?;
    check_cpus(config, &kvm)?;
    let (events, endings) = Events::channel();
    let (terminal, keyboard) = open_terminal(config, &events)?;
    let Opened { mut devices, movers, resized } = open_devices(config, &events, terminal)?;
    let console = open_serial(config, &events)?;
    let blueprint = Blueprint {
        kvm: &kvm,
        cpus: config.cpus,
        memory: &config.memory,
        boot: BootSource { kernel: &kernel, initramfs: initramfs.as_ref(), cmdline: config.effective_cmdline() },
        console: console.as_ref(),
        events: &events,
    };
    let machine = Machine::build(&blueprint, &mut devices)?;
    bus_error::watch(events.clone()).map_err(|source| RunError::Host { what: "listening to SIGBUS", source })?;
    let (control, requests) = Control::channel();
    let operator = Operator::start(control.clone())
        .map_err(|source| RunError::Host { what: "starting the operator's thread", source })?;
    let signals = signals::listen(events.clone(), operator.wishes(), resized)
        .map_err(|source| RunError::Host { what: "listening to signals", source })?;
    let raw = if config.serial == Serial::Stdio || has_terminal(config) {
        RawMode::enter().map_err(|source| RunError::Host { what: "putting the terminal into raw mode", source })?
    } else {
        None
    };
    let result = run_machines(config, &blueprint, machine, &endings, &requests, movers);
    drop(signals);
    operator.finish();
    // Held until here: without anyone who could make requests, waiting for them would not wait.
    drop(control);
    console.into_iter().chain(keyboard).for_each(Console::finish);
    drop(raw);
    result
}

/// Runs machine after machine, until one ends otherwise than by a reboot.
fn run_machines(
    config: &Config,
    blueprint: &Blueprint<'_>,
    mut machine: Machine,
    endings: &Receiver<Ending>,
    requests: &Receiver<Request>,
    movers: Vec<Mover>,
) -> Result<Exit, RunError> {
    loop {
        let running = machine.start()?;
        let mut ending = Ok(wait(&running, endings, requests, &movers));
        info!(?ending, "the machine stops");
        let limits = Limits::within(Duration::from_secs(config.stop_timeout));
        let Stopped { mut devices, stats, mut abandoned } = debug_span!("stop").in_scope(|| running.stop(limits));
        if abandoned.is_empty() && ending.as_ref().is_ok_and(|ending| restarts(config, ending)) {
            // Another ending may have come in the meantime. One that ends more than this machine must not be lost.
            if let Some(other) = endings.try_iter().find(is_more_than_a_reset) {
                ending = Ok(other);
            } else {
                blueprint.events.rearm();
                match Machine::build(blueprint, &mut devices) {
                    Ok(next) => {
                        machine = next;
                        continue;
                    }
                    Err(error) => ending = Err(error.into()),
                }
            }
        }
        if config.stats {
            eprint!("{}", summary(&stats));
        }
        // They hold on to the devices.
        drop(movers);
        let (devices, failures) = flush(devices, limits);
        abandoned.extend(failures);
        let_go(devices, limits);
        let exit = ending.and_then(|ending| conclude(config, ending));
        if abandoned.is_empty() {
            return exit;
        }
        let unfinished = RunError::Unfinished(abandoned.join("; "));
        return match exit {
            Ok(_) => Err(unfinished),
            Err(first) => {
                eprintln!("ringvm: {unfinished}");
                Err(first)
            }
        };
    }
}

/// An ending that a reboot does not make up for.
fn is_more_than_a_reset(ending: &Ending) -> bool {
    matches!(ending, Ending::Signal(_) | Ending::ConsoleEscape | Ending::Panic(_) | Ending::HostFailure(_))
}

/// Serves requests until the machine ends.
fn wait(running: &Running, endings: &Receiver<Ending>, requests: &Receiver<Request>, movers: &[Mover]) -> Ending {
    loop {
        select! {
            recv(endings) -> ending => {
                return ending.unwrap_or_else(|_| Ending::Panic("nobody is left to report the end of the machine".into()));
            }
            recv(requests) -> request => request.into_iter().for_each(|request| control::serve(request, running, movers)),
        }
    }
}

fn restarts(config: &Config, ending: &Ending) -> bool {
    match ending {
        Ending::Reset => !config.no_reboot,
        Ending::TripleFault { .. } => config.on_triple_fault == TripleFault::Reset && !config.no_reboot,
        _ => false,
    }
}

/// Translates an ending for the process that started ringvm.
fn conclude(config: &Config, ending: Ending) -> Result<Exit, RunError> {
    match ending {
        Ending::PowerOff | Ending::Signal(_) | Ending::ConsoleEscape => Ok(Exit::Success),
        // A signal came in the middle of a reboot.
        Ending::Reset => Ok(if config.no_reboot { Exit::Reboot } else { Exit::Success }),
        Ending::TripleFault { .. } if config.on_triple_fault == TripleFault::Reset => {
            Ok(if config.no_reboot { Exit::Reboot } else { Exit::Success })
        }
        Ending::TripleFault { vcpu, place } => Err(RunError::GuestCrash(format!(
            "vCPU {vcpu}: the guest crashed with a triple fault at {place} (--on-triple-fault reset would reboot it)"
        ))),
        Ending::GuestCrash(what) => Err(RunError::GuestCrash(what)),
        Ending::HostFailure(what) => Err(RunError::HostFailure(what)),
        Ending::Panic(what) => Err(RunError::Internal(what)),
    }
}

fn check_memory(config: &Config) -> Result<(), RunError> {
    let system = rustix::system::sysinfo();
    let total = (system.totalram as u64).saturating_mul(u64::from(system.mem_unit));
    if config.memory.size > total {
        return Err(RunError::Memory { wanted: config.memory.size >> 20, available: total >> 20 });
    }
    Ok(())
}

fn check_affinity(config: &Config) -> Result<(), RunError> {
    if config.io.io_affinity.is_empty() {
        return Ok(());
    }
    let set = rustix::thread::sched_getaffinity(None)
        .map_err(|error| RunError::Host { what: "asking for the CPUs of this process", source: error.into() })?;
    let may_use = |cpu: usize| cpu < CpuSet::MAX_CPU && set.is_set(cpu);
    match config.io.io_affinity.iter().find(|&&cpu| !may_use(cpu)) {
        Some(&cpu) => {
            Err(RunError::Affinity { cpu, allowed: (0..CpuSet::MAX_CPU).filter(|&cpu| may_use(cpu)).collect() })
        }
        None => Ok(()),
    }
}

fn check_cpus(config: &Config, kvm: &Kvm) -> Result<(), KvmError> {
    let limit = kvm.max_vcpus();
    let wanted = config.cpus.count;
    if wanted > limit { Err(KvmError::Cpus { wanted, limit }) } else { Ok(()) }
}

/// The devices of a machine.
struct Opened {
    devices: Vec<Box<dyn Device>>,
    movers: Vec<Mover>,
    resized: Option<Resized>,
}

fn open_devices(config: &Config, events: &Events, mut terminal: Option<End>) -> Result<Opened, RunError> {
    let events = events.clone();
    let on_panic = OnPanic::new(move |who| {
        events.end(Ending::Panic(format!("{who} panicked, the devices it served are lost")));
    });
    let reactors = ReactorOptions { on_panic, ..config.reactor_options() };
    let pool = (config.queues_here() > 0).then(|| ReactorPool::new(&reactors)).transpose();
    let pool = pool.map_err(|source| RunError::Reactor { source })?;
    let here = || pool.as_ref().ok_or_else(|| RunError::Internal("there are no I/O threads".into()));
    let daemon = |name: &str, socket: &Path, wanted| {
        VhostUserDevice::connect(name, Peer::at(socket.to_owned()), &wanted).map(Box::new)
    };
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    let (mut movers, mut resized) = (Vec::new(), None);
    for (index, disk) in config.disk.iter().enumerate() {
        let name = disk.name(index);
        match &disk.backend {
            Backend::Socket { path, queues, queue_size } => {
                let wanted = Wanted::new(VIRTIO_ID_BLOCK, Some(*queues), *queue_size);
                devices.push(daemon(&name, path, wanted)?);
            }
            Backend::Own { place, options } => {
                let (disk, mover) = open_disk(&name, *place, options, &reactors, pool.as_ref(), config.stats)?;
                devices.push(Box::new(disk));
                movers.push(mover);
            }
        }
    }
    for (index, net) in config.net.iter().enumerate() {
        let name = net.name(index);
        match &net.backend {
            Backend::Socket { path, queue_size, .. } => {
                let wanted = Wanted::new(VIRTIO_ID_NET, None, *queue_size);
                devices.push(daemon(&name, path, wanted)?);
            }
            Backend::Own { place, options } => {
                let (nic, mover) = open_nic(&name, *place, options, &reactors, pool.as_ref(), config.stats)?;
                devices.push(Box::new(nic));
                movers.push(mover);
            }
        }
    }
    for (index, fs) in config.fs.iter().enumerate() {
        // The first queue is for requests that overtake others.
        let wanted = Wanted::new(VIRTIO_ID_FS, Some(fs.queues + 1), fs.queue_size);
        let wanted = Wanted { config: Some(fs.config_space()), ..wanted };
        devices.push(daemon(&fs.name(index), &fs.socket, wanted)?);
    }
    for (index, options) in config.console.iter().enumerate() {
        let end = if options.is_stdio() { terminal.take() } else { None };
        let (console, its_resized) = open_console(&options.name(index), options, end, config.stats)?;
        devices.push(console);
        resized = resized.or(its_resized);
    }
    if let Some(options) = &config.vsock {
        devices.push(open_vsock(&options.name(), options, config.stats)?);
    }
    for (index, options) in config.vhost_user.iter().enumerate() {
        let name = options.name(index);
        let wanted = Wanted::new(options.r#type.0, options.queues, options.queue_size);
        devices.push(daemon(&name, &options.socket, wanted)?);
    }
    if config.rng {
        devices.push(Box::new(RngDevice::new(RNG, here()?)));
    }
    Ok(Opened { devices, movers, resized })
}

/// The standard input and output as the end of a virtio console, if there is one; and the thread that looks for the
/// escape, if a person types.
fn open_terminal(config: &Config, events: &Events) -> Result<(Option<End>, Option<Console>), RunError> {
    if !has_terminal(config) {
        return Ok((None, None));
    }
    let host = |what| move |source| RunError::Host { what, source };
    let console = |source| RunError::Console {
        what: "--console stdio".into(),
        source,
        advice: "open standard output, or use --console file=PATH",
    };
    crate::console::stdio::check_output().map_err(console)?;
    let output = stdout().try_clone_to_owned().map_err(console)?;
    let nothing = || File::options().read(true).write(true).open("/dev/null").map_err(host("opening /dev/null"));
    let (input, escape) = terminal_input();
    if !escape {
        // Nobody types: the guest reads at its own pace, and nothing is lost.
        let input = input.map_or_else(nothing, Ok)?;
        return Ok((Some(End::descriptors(input.into(), output)), None));
    }
    let (port, keys) = keyboard().map_err(host("making the keyboard's pipe"))?;
    let streams = Streams { output: nothing()?, name: "nothing".into(), limit: None, input, escape };
    let keyboard = Console::start(streams, events.clone()).map_err(host("starting the console thread"))?;
    keyboard.attach(&port);
    Ok((Some(End::descriptors(keys, output)), Some(keyboard)))
}

/// Whether a virtio console is at the terminal.
fn has_terminal(config: &Config) -> bool {
    config.console.iter().any(|console| console.is_stdio())
}

/// The standard input, and whether a person types there. Without one, or in the background of a terminal, there is
/// just no input.
fn terminal_input() -> (Option<File>, bool) {
    let interactive = is_interactive();
    let dup = || stdin().try_clone_to_owned().ok().map(File::from);
    ((interactive || !isatty(stdin())).then(dup).flatten(), interactive)
}

fn open_serial(config: &Config, events: &Events) -> Result<Option<Console>, RunError> {
    let streams = match &config.serial {
        Serial::Null => return Ok(None),
        Serial::File { path, max } => {
            let SerialFile { output, limit } = SerialFile::open(path, *max).map_err(|(source, advice)| {
                RunError::Console { what: format!("--serial file={}", path.display()), source, advice }
            })?;
            Streams { output, name: path.display().to_string(), limit, input: None, escape: false }
        }
        Serial::Stdio => {
            let dup = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned();
            let serial = |source| RunError::Console {
                what: "--serial stdio".into(),
                source,
                advice: "open standard output, or use --serial file=PATH or --serial null",
            };
            crate::console::stdio::check_output().map_err(serial)?;
            let output: OwnedFd = dup(&stdout()).map_err(serial)?;
            let (input, escape) = terminal_input();
            Streams { output: output.into(), name: "standard output".into(), limit: None, input, escape }
        }
    };
    let console = Console::start(streams, events.clone());
    Ok(Some(console.map_err(|source| RunError::Host { what: "starting the console thread", source })?))
}
