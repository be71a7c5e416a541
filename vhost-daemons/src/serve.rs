//! The life of a daemon: devices opened, each with a control thread that serves one client after another, until a signal ends
//! them all.

use std::io;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::JoinHandle;
use std::time::Duration;

use ringvm_backends::device::Device;
use ringvm_backends::program::{SignalThread, ignore_file_size_signal, start_tracing};
use ringvm_backends::reactor::ReactorPool;
use ringvm_backends::stats::DeviceStats;
use ringvm_backends::summary::summary;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};
use tracing::{error, info, warn};

use crate::exit::Exit;
use crate::mailbox::Mailbox;
use crate::message::Connection;
use crate::notify::notify;
use crate::options::ServeOptions;
use crate::received;
use crate::session::{End, Session};
use crate::source::{Next, Source};

/// Longest time to wait for a device's statistics: it may be busy draining.
const STATS_PATIENCE: Duration = Duration::from_secs(2);
/// Between two attempts to accept, when the host has no descriptor left.
const HOST_PAUSE: Duration = Duration::from_millis(200);

/// SIGUSR1 asks for statistics, the others end the daemon.
const SIGNALS: [i32; 5] = [SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGUSR1];

/// Opens a device of this name, whose queues run on threads of the pool.
pub type Open<T> = fn(&str, &T, &ReactorPool) -> Result<Box<dyn Device>, String>;

/// What a daemon is, apart from how it is served.
#[derive(Clone, Copy, Debug)]
pub struct Program<T> {
    /// Its name, in front of its errors.
    pub name: &'static str,
    /// What its devices are called, with a number behind, e.g. `disk`.
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
            eprintln!("{}: {message}", program.name);
            exit
        }
    }
}

type Failure = (String, Exit);

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
    received::raise_limit();
    let inherited = options.inherit(specs.len()).map_err(wrong)?;
    let sentinel = options.inherit_sentinel().map_err(wrong)?;
    let reactors = options.reactor_options(specs.iter().map(program.queues).sum()).map_err(wrong)?;
    let pool = ReactorPool::new(&reactors).map_err(|error| host("starting the I/O threads", error))?;
    // On kernels before 5.19 it is held by the process itself.
    let _sentinel = sentinel.filter(|sentinel| !pool.keep(sentinel));
    let open = |(index, spec)| (program.open)(&options.device_name(program.kind, index), spec, &pool).map_err(wrong);
    let devices = specs.iter().enumerate().map(open).collect::<Result<Vec<_>, _>>()?;
    let sources = options.open_sources(inherited).map_err(wrong)?;

    let (tell, told) = mpsc::channel();
    let signal = tell.clone();
    let signals = SignalThread::start(&SIGNALS, move |number| drop(signal.send(Told::Signal(number))));
    let signals = signals.map_err(|error| host("listening to signals", error))?;
    let ready = devices.iter().zip(&sources);
    let ready: Vec<_> = ready.map(|(device, source)| format!("{} is ready at {source}", device.info().name)).collect();
    let mut threads = Vec::new();
    for (device, source) in devices.into_iter().zip(sources) {
        threads.push(Control::start(device, source, tell.clone()).map_err(|error| host("starting a thread", error))?);
    }
    drop(tell);
    ready.iter().for_each(|line| eprintln!("{}: {line}", program.name));
    notify("READY=1");
    wait(&threads, &told);
    notify("STOPPING=1");
    drop(signals);
    finish(threads, options.stats)
}

/// What the main thread is told.
enum Told {
    Signal(i32),
    /// A control thread has nobody to serve any more.
    Ended,
}

/// A device and the thread that controls it.
struct Control {
    mailbox: Arc<Mailbox>,
    thread: JoinHandle<Result<Box<dyn Device>, String>>,
}

impl Control {
    fn start(mut device: Box<dyn Device>, mut source: Source, tell: mpsc::Sender<Told>) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let theirs = Arc::clone(&mailbox);
        let thread = std::thread::Builder::new().name(device.info().name.clone()).spawn(move || {
            let name = device.info().name.clone();
            let served = catch_unwind(AssertUnwindSafe(|| serve_clients(device.as_mut(), &mut source, &theirs)));
            drop(source);
            drop(tell.send(Told::Ended));
            match served {
                Ok(()) => Ok(device),
                Err(_) => Err(format!("the control thread of {name} died; this is a bug")),
            }
        })?;
        Ok(Self { mailbox, thread })
    }
}

/// Serves one client after another.
fn serve_clients(device: &mut dyn Device, source: &mut Source, mailbox: &Mailbox) {
    while !mailbox.stopped() {
        match source.next(mailbox) {
            Ok(Next::Client(stream)) => serve_client(device, stream, mailbox),
            Ok(Next::Mail) => mailbox.serve(device),
            Ok(Next::End) => return,
            Err(error) => {
                error!(device = %device.info().name, %error, "accepting a client");
                std::thread::sleep(HOST_PAUSE);
            }
        }
    }
}

fn serve_client(device: &mut dyn Device, stream: UnixStream, mailbox: &Mailbox) {
    let name = device.info().name.clone();
    info!(device = %name, "a client has connected");
    let session = Session::new(device).map(|mut session| session.run(Connection::new(stream), mailbox));
    match session {
        Ok(Ok(End::Disconnected)) => info!(device = %name, "the client has gone"),
        Ok(Ok(End::Stopped)) => {}
        Ok(Err(error)) => warn!(device = %name, "dropping the client: {error}"),
        Err(error) => warn!(device = %name, "dropping the client: making an eventfd: {error}"),
    }
}

/// Waits until there is nobody left to serve, or a signal says that it is enough.
fn wait(threads: &[Control], told: &Receiver<Told>) {
    let mut left = threads.len();
    while left > 0 {
        match told.recv() {
            Ok(Told::Signal(SIGUSR1)) => eprint!("{}", summary(&statistics(threads))),
            Ok(Told::Signal(_)) | Err(_) => return,
            Ok(Told::Ended) => left -= 1,
        }
    }
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

/// Ends the threads, and makes what was written durable.
fn finish(threads: Vec<Control>, stats: bool) -> Result<(), Failure> {
    threads.iter().for_each(|control| control.mailbox.stop());
    let mut result = Ok(());
    let mut total = Vec::new();
    for control in threads {
        let ended = control.thread.join().unwrap_or_else(|_| Err("a control thread died; this is a bug".into()));
        let ended = ended.map_err(|message| (message, Exit::Internal)).and_then(|mut device| {
            total.push(device.stats());
            device
                .flush()
                .map_err(|error| (format!("at the end: {error}; what was written last may be lost"), Exit::Host))
        });
        result = result.and(ended);
    }
    if stats {
        eprint!("{}", summary(&total));
    }
    result
}
