//! The life of a daemon: devices opened, each with a control thread (`control`), until a signal ends them all
//! (`ending`).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::Duration;

use ringvm_backends::device::Device;
use ringvm_backends::io::reactor::{OnPanic, ReactorOptions, ReactorPool};
use ringvm_backends::stats::DeviceStats;
use ringvm_cli::program::{Endings, SignalThread, ignore_file_size_signal, raise_descriptor_limit, start_tracing};
use ringvm_cli::summary::summary;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};

use crate::control::{Control, Told};
use crate::ending::{Deadlines, Failure, exit_soon, finish};
use crate::exit::Exit;
use crate::notify::notify;
use crate::options::ServeOptions;

/// Longest time to wait for a device's statistics: it may be busy draining.
const STATS_PATIENCE: Duration = Duration::from_secs(2);

/// SIGUSR1 asks for statistics, the others end the daemon.
const SIGNALS: [i32; 5] = [SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGUSR1];

/// Opens a device of this name, whose queues run on threads of the pool.
pub type Open<T> = fn(&str, &T, &ReactorPool) -> Result<Box<dyn Device>, String>;

/// A daemon's kind of device, apart from how it is served.
#[derive(Clone, Copy, Debug)]
pub struct Program<T> {
    /// Its name, in front of its errors.
    pub name: &'static str,
    /// The name of its devices, which a number follows, e.g. `disk`.
    pub kind: &'static str,
    /// Reads one device's option string.
    pub read: fn(&str) -> Result<T, String>,
    /// How many queues a device will have.
    pub queues: fn(&T) -> usize,
    /// Opens a device.
    pub open: Open<T>,
}

/// Serves the devices that `texts` describe until a signal comes.
#[must_use]
pub fn serve<T>(program: &Program<T>, options: &ServeOptions, texts: &[String]) -> Exit {
    ignore_file_size_signal();
    start_tracing(options.verbose);
    match run(program, options, texts) {
        Ok(()) => Exit::Success,
        Err((message, exit)) => {
            message.lines().for_each(|line| eprintln!("{}: {line}", program.name));
            exit
        }
    }
}

fn run<T>(program: &Program<T>, options: &ServeOptions, texts: &[String]) -> Result<(), Failure> {
    let wrong = |message: String| (message, Exit::Configuration);
    let host = |what: &str, error: io::Error| (format!("{what}: {error}"), Exit::Host);
    if texts.is_empty() {
        return Err(wrong(format!("there is nothing to serve; describe a device with --{}", program.kind)));
    }
    if options.name.len() > texts.len() {
        return Err(wrong(format!("{} names for {} devices", options.name.len(), texts.len())));
    }
    let read =
        |text: &String| (program.read)(text).map_err(|error| wrong(format!("--{} {text}: {error}", program.kind)));
    let specs = texts.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    raise_descriptor_limit();
    let inherited = options.inherit(specs.len()).map_err(wrong)?;
    let sentinel = options.inherit_sentinel().map_err(wrong)?;
    let (tell, told) = mpsc::channel();
    let died = tell.clone();
    let on_panic = OnPanic::new(move |who| drop(died.send(Told::Died(who.to_owned()))));
    let reactors = options.reactor_options(specs.iter().map(program.queues).sum()).map_err(wrong)?;
    let reactors = ReactorOptions { on_panic, ..reactors };
    let pool = ReactorPool::new(&reactors).map_err(|error| host("starting the I/O threads", error))?;
    // On kernels before 5.19 it is held by the process itself.
    let _sentinel = sentinel.filter(|sentinel| !pool.keep(sentinel));
    let open = |(index, spec)| (program.open)(&options.device_name(program.kind, index), spec, &pool).map_err(wrong);
    let devices = specs.iter().enumerate().map(open).collect::<Result<Vec<_>, _>>()?;
    let sources = options.open_sources(inherited).map_err(wrong)?;

    let deadlines = Deadlines::within(options.stop_timeout());
    let over = Arc::<AtomicBool>::default();
    let (signal, theirs, mut endings) = (tell.clone(), Arc::clone(&over), Endings::default());
    let signals = SignalThread::start(&SIGNALS, move |number| {
        let at_once = number != SIGUSR1 && endings.is_second(number);
        let what = match number {
            SIGUSR1 => Told::Statistics,
            _ if at_once => Told::AtOnce,
            _ => Told::End,
        };
        drop(signal.send(what));
        if at_once {
            exit_soon(&theirs);
        }
    });
    let signals = signals.map_err(|error| host("listening to signals", error))?;
    let ready = devices.iter().zip(&sources);
    let ready: Vec<_> = ready.map(|(device, source)| format!("{} is ready at {source}", device.info().name)).collect();
    let mut threads = Vec::new();
    for (index, (device, source)) in devices.into_iter().zip(sources).enumerate() {
        let (tell, grace) = (tell.clone(), deadlines.session);
        let control = Control::start(device, source, move |report| drop(tell.send(Told::Ended(index, report))), grace);
        threads.push(control.map_err(|error| host("starting a thread", error))?);
    }
    ready.iter().for_each(|line| eprintln!("{}: {line}", program.name));
    notify("READY=1");
    let died = wait(&mut threads, &told);
    notify("STOPPING=1");
    let ended = finish(program.name, threads, (&tell, &told), &deadlines, options.stats, died);
    over.store(true, Ordering::Release);
    drop(signals);
    ended
}

/// Waits until there is no client left to serve, or a signal ends the daemon. Returns which thread has panicked, if one
/// has: its queues would never be served again, whichever device they belong to.
fn wait(threads: &mut [Control], told: &Receiver<Told>) -> Option<String> {
    while threads.iter().any(|control| control.report.is_none()) {
        match told.recv() {
            Ok(Told::Statistics) => eprint!("{}", summary(&statistics(threads))),
            Ok(Told::End | Told::AtOnce) | Err(_) => return None,
            Ok(Told::Died(who)) => return Some(who),
            Ok(Told::Ended(index, report)) => threads[index].report = Some(report),
            Ok(Told::Flushed(..)) => {}
        }
    }
    None
}

fn statistics(threads: &[Control]) -> Vec<DeviceStats> {
    let ask = |control: &Control| {
        let (answer, answers): (SyncSender<_>, _) = mpsc::sync_channel(1);
        control.mailbox.ask_stats(answer);
        answers
    };
    let asked: Vec<_> = threads.iter().map(ask).collect();
    asked.into_iter().filter_map(|answers| answers.recv_timeout(STATS_PATIENCE).ok()).collect()
}
