//! What the programs around the devices do alike, whichever of them has the guest: their log, and the signals they hear.

mod log_budget;

use std::env;
use std::io::{self, IsTerminal};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log_budget::LogBudget;
use ringvm_backends::trace;
use rustix::process::{Resource, Rlimit};
use signal_hook::consts::SIGHUP;
use signal_hook::iterator::{Handle, Signals};
use tracing::warn;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{fmt, registry};

const STACK: usize = 64 << 10;

/// Starts the log on standard error: warnings, and more for each `-v`. RUST_LOG overrides it. Lines that repeat without end are
/// held back, up to those of `-v`.
pub fn start_tracing(verbose: u8) {
    let targets = targets(env::var("RUST_LOG").ok().as_deref(), verbose);
    let lines = fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).with_target(false);
    registry().with(targets).with(LogBudget::default()).with(lines).init();
}

/// Levels by module only: the filter that also looks at fields brings an engine for regular expressions.
fn targets(wanted: Option<&str>, verbose: u8) -> Targets {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let wanted = wanted.filter(|directives| !directives.is_empty()).and_then(|directives| directives.parse().ok());
    // Whatever is asked for says what it is about.
    wanted.unwrap_or_else(|| Targets::new().with_default(level)).with_target(trace::TARGET, LevelFilter::ERROR)
}

/// Allows this process as many descriptors as it may have: clients, guests and peers bring several each.
pub fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    if let Err(error) = raised {
        warn!(%error, "raising the limit of open descriptors to its maximum");
    }
}

/// Listens to signals of the process on a thread of its own, until it is dropped.
#[derive(Debug)]
pub struct SignalThread {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl SignalThread {
    /// Calls `hear` with each of these signals that comes.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn start(wanted: &[i32], mut hear: impl FnMut(i32) + Send + 'static) -> io::Result<Self> {
        let mut signals = Signals::new(wanted)?;
        let handle = signals.handle();
        let thread = thread::Builder::new().name("signals".into()).stack_size(STACK);
        let thread = thread.spawn(move || signals.forever().for_each(&mut hear))?;
        Ok(Self { handle, thread: Some(thread) })
    }
}

impl Drop for SignalThread {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// Signals that come together are one: terminals, timeout(1) and service managers send two for one reason.
const TOGETHER: Duration = Duration::from_millis(50);

/// Tells the second signal that ends a program, which means now, from the first. SIGHUP is never the second: it often follows another.
#[derive(Debug, Default)]
pub struct Endings {
    first: Option<Instant>,
}

impl Endings {
    /// A signal that ends the program has come. Returns whether it means now.
    pub fn is_second(&mut self, signal: i32) -> bool {
        let first = *self.first.get_or_insert_with(Instant::now);
        signal != SIGHUP && first.elapsed() >= TOGETHER
    }
}

/// Has a write beyond RLIMIT_FSIZE fail with EFBIG, as one to a full disk fails, instead of ending the process (SIGXFSZ): a guest that
/// writes to its disk does not choose when its host ends. Programs that are started inherit this.
#[allow(unsafe_code, reason = "signals have no safe wrapper among our dependencies that can ignore one")]
pub fn ignore_file_size_signal() {
    // SAFETY: no handler is installed, and the number is that of a signal, so the call can't fail.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn signals_that_come_together_are_one_and_sighup_is_never_the_second() {
        use signal_hook::consts::{SIGINT, SIGTERM};
        let mut endings = Endings::default();
        assert!(!endings.is_second(SIGTERM));
        endings.first = endings.first.and_then(|first| first.checked_sub(TOGETHER));
        assert!(!endings.is_second(SIGHUP) && endings.is_second(SIGINT));
        let mut just_now = Endings { first: Some(Instant::now() + Duration::from_secs(3600)) };
        assert!(!just_now.is_second(SIGTERM));
    }

    #[test]
    fn the_log_is_as_loud_as_asked() {
        for (verbose, loudest) in [(0, Level::WARN), (1, Level::INFO), (2, Level::DEBUG), (9, Level::TRACE)] {
            for wanted in [None, Some(""), Some("ringvm=loud")] {
                let targets = targets(wanted, verbose);
                assert!(targets.would_enable("any", &loudest), "{wanted:?} {verbose}");
                let louder = [Level::INFO, Level::DEBUG, Level::TRACE].into_iter().find(|level| *level > loudest);
                assert!(louder.is_none_or(|level| !targets.would_enable("any", &level)), "{wanted:?} {verbose}");
            }
        }
    }

    #[test]
    fn rust_log_overrides_it_module_by_module() {
        let targets = targets(Some("error,ringvm::boot=debug"), 3);
        assert!(targets.would_enable("ringvm::boot::acpi", &Level::DEBUG));
        assert!(targets.would_enable("ringvm", &Level::ERROR) && !targets.would_enable("ringvm", &Level::WARN));
    }

    #[test]
    fn a_line_names_its_device_and_queue_whatever_lets_it_through() {
        use std::sync::{Arc, Mutex};

        struct Said(Arc<Mutex<Vec<u8>>>);
        impl io::Write for Said {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        for wanted in [None, Some("warn"), Some("ringvm_cli=warn")] {
            let said = Arc::<Mutex<Vec<u8>>>::default();
            let theirs = Arc::clone(&said);
            let lines = fmt::layer().with_writer(move || Said(Arc::clone(&theirs)));
            let lines = lines.with_ansi(false).with_target(false);
            let log = registry().with(targets(wanted, 0)).with(LogBudget::default()).with(lines);
            tracing::subscriber::with_default(log, || {
                let device = trace::device("disk7");
                // Of an operation nothing is said at this level.
                device.in_scope(|| tracing::debug_span!("reset").in_scope(|| tracing::warn!("first")));
                tracing::warn!(parent: &trace::queue(&device, 3), "second");
            });
            let said = String::from_utf8(said.lock().unwrap().clone()).unwrap();
            for line in ["WARN device{name=disk7}: first\n", "WARN device{name=disk7}:queue{index=3}: second\n"] {
                assert!(said.contains(line), "{line} in {said}");
            }
        }
    }
}
