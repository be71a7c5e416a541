//! What the programs around the devices do alike, whichever of them has the guest: their log, and the signals they hear.

use std::io::{self, IsTerminal};
use std::thread::{self, JoinHandle};

use signal_hook::iterator::{Handle, Signals};
use tracing_subscriber::EnvFilter;

const STACK: usize = 64 << 10;

/// Starts the log on standard error: warnings, and more for each `-v`. RUST_LOG overrides it.
pub fn start_tracing(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let colours = io::stderr().is_terminal();
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    subscriber.with_ansi(colours).with_target(false).init();
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
