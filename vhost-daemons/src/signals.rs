//! Signals of the process, turned into calls on a thread of their own.

use std::io;
use std::thread::{self, JoinHandle};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};
use signal_hook::iterator::{Handle, Signals};

const STACK: usize = 64 << 10;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Stop serving.
    End,
    /// Print statistics.
    Statistics,
}

/// Listens until it is dropped.
pub(crate) struct SignalThread {
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl SignalThread {
    /// Starts to listen: SIGTERM, SIGINT, SIGQUIT and SIGHUP end the daemon, SIGUSR1 asks for statistics.
    pub(crate) fn start(mut tell: impl FnMut(Request) + Send + 'static) -> io::Result<Self> {
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGUSR1])?;
        let handle = signals.handle();
        let thread = thread::Builder::new().name("signals".into()).stack_size(STACK).spawn(move || {
            for signal in signals.forever() {
                tell(if signal == SIGUSR1 { Request::Statistics } else { Request::End });
            }
        })?;
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
