//! The life of a daemon: devices opened, each with a control thread that serves one client after another, until a signal ends
//! them all (`ending`).

use std::io;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::time::Duration;

use ringvm_backends::device::{Device, DeviceError, Flusher};
use ringvm_backends::reactor::{OnPanic, ReactorOptions, ReactorPool};
use ringvm_backends::stats::DeviceStats;
use ringvm_cli::program::{Endings, SignalThread, ignore_file_size_signal, start_tracing};
use ringvm_cli::summary::summary;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};
use tracing::{error, info, warn};

use crate::ending::{Deadlines, exit_soon, finish};
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
            message.lines().for_each(|line| eprintln!("{}: {line}", program.name));
            exit
        }
    }
}

pub(crate) type Failure = (String, Exit);

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
    let (tell, told) = mpsc::channel();
    let died = tell.clone();
    let on_panic = OnPanic::new(move |thread| drop(died.send(Told::Died(thread))));
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

/// What the main thread is told.
pub(crate) enum Told {
    /// A signal asks for statistics.
    Statistics,
    /// A signal asks for the end.
    End,
    /// A second one does not wait for what the end takes.
    AtOnce,
    /// The I/O thread of this number has panicked.
    Died(usize),
    /// The control thread of this number has nobody to serve any more.
    Ended(usize, Report),
    /// The device of this number was flushed without its control thread.
    Flushed(usize, Result<(), DeviceError>),
}

/// What a control thread leaves behind.
pub(crate) struct Report {
    /// The device, unless the thread has died.
    pub(crate) device: Option<Box<dyn Device>>,
    /// Whether nothing is in flight.
    pub(crate) idle: bool,
    pub(crate) flushed: Result<(), DeviceError>,
}

/// A device and the thread that controls it.
pub(crate) struct Control {
    pub(crate) name: String,
    pub(crate) mailbox: Arc<Mailbox>,
    /// For when the thread does not come to its end.
    pub(crate) flusher: Option<Flusher>,
    pub(crate) report: Option<Report>,
}

impl Control {
    fn start(
        mut device: Box<dyn Device>,
        mut source: Source,
        tell: impl FnOnce(Report) + Send + 'static,
        grace: Duration,
    ) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let (name, flusher) = (device.info().name.clone(), Some(device.flusher()));
        let theirs = Arc::clone(&mailbox);
        std::thread::Builder::new().name(name.clone()).spawn(move || {
            let served = catch_unwind(AssertUnwindSafe(|| serve_clients(device.as_mut(), &mut source, &theirs, grace)));
            // Nobody may connect to what is not served any more.
            drop(source);
            let flushed = device.flush();
            let (idle, device) = match served {
                Ok(idle) => (idle, Some(device)),
                Err(_) => {
                    // Waits for what is in flight.
                    drop(device);
                    (true, None)
                }
            };
            tell(Report { device, idle, flushed });
        })?;
        Ok(Self { name, mailbox, flusher, report: None })
    }
}

/// Serves one client after another. Returns whether nothing is in flight in the end.
fn serve_clients(device: &mut dyn Device, source: &mut Source, mailbox: &Mailbox, grace: Duration) -> bool {
    let mut idle = true;
    while !mailbox.stopped() {
        match source.next(mailbox) {
            Ok(Next::Client(stream)) => idle = serve_client(device, stream, mailbox, grace),
            Ok(Next::Mail) => mailbox.serve(device),
            Ok(Next::End) => break,
            Err(error) => {
                error!(device = %device.info().name, %error, "accepting a client");
                std::thread::sleep(HOST_PAUSE);
            }
        }
    }
    idle
}

/// Serves a client until it has gone, and all that it asked for has ended. Returns whether it has.
fn serve_client(device: &mut dyn Device, stream: UnixStream, mailbox: &Mailbox, grace: Duration) -> bool {
    let name = device.info().name.clone();
    info!(device = %name, "a client has connected");
    let session = stream.try_clone().and_then(|peer| {
        mailbox.serves(Some(peer));
        Session::new(device, Connection::new(stream), mailbox)
    });
    let mut session = match session {
        Ok(session) => session,
        Err(error) => {
            mailbox.serves(None);
            warn!(device = %name, "dropping the client: making a descriptor: {error}");
            return true;
        }
    };
    let result = session.run();
    mailbox.serves(None);
    match result {
        // What the end of the daemon does to the connection is not the client's fault.
        _ if mailbox.stopped() => {}
        Ok(End::Disconnected) => info!(device = %name, "the client has gone"),
        Ok(End::Stopped) => {}
        Err(error) => warn!(device = %name, "dropping the client: {error}"),
    }
    session.end(grace)
}

/// Waits until there is nobody left to serve, or a signal says that it is enough. Returns the number of an I/O thread that has
/// died: its queues would never be served again, whoever they belong to.
fn wait(threads: &mut [Control], told: &Receiver<Told>) -> Option<usize> {
    while threads.iter().any(|control| control.report.is_none()) {
        match told.recv() {
            Ok(Told::Statistics) => eprint!("{}", summary(&statistics(threads))),
            Ok(Told::End | Told::AtOnce) | Err(_) => return None,
            Ok(Told::Died(thread)) => return Some(thread),
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
