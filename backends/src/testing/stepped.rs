//! A reactor without its thread: the caller runs every turn. Nothing polls, parks or is kicked in between, so the
//! same requests take the same instructions in every run. For measuring the cost of a request, and nothing else.

use std::io;
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::io::reactor::{Command, Core, ReactorPool};

/// How long to wait between looks for commands to the reactor.
const PAUSE: Duration = Duration::from_micros(50);

/// A reactor in the hands of its caller, and the device whose queues it serves.
pub struct Stepped<D: Send> {
    device: Option<D>,
    core: Core,
    inbox: mpsc::UnboundedReceiver<Command>,
    runtime: tokio_uring::Runtime,
}

impl<D: Send> Stepped<D> {
    /// Makes one. `start` makes the device and starts its queues; they run on the pool that it is given, and nothing
    /// else may.
    ///
    /// # Errors
    /// When the host refuses an io_uring.
    pub fn new(start: impl FnOnce(&ReactorPool) -> D + Send) -> io::Result<Self> {
        let (pool, core, inbox) = ReactorPool::unthreaded()?;
        let runtime = tokio_uring::Runtime::new(tokio_uring::builder().entries(8))?;
        let mut stepped = Self { device: None, core, inbox, runtime };
        stepped.device = Some(stepped.obeying(move || start(&pool)));
        Ok(stepped)
    }

    /// One round over everything, as the thread does it. Returns whether there was anything to do.
    pub fn turn(&mut self) -> bool {
        self.core.turn()
    }

    /// Executes the commands that `call` sends to the reactor. `call` waits for the answers and so has to be on
    /// another thread.
    fn obeying<T: Send>(&mut self, call: impl FnOnce() -> T + Send) -> T {
        let (core, inbox) = (&mut self.core, &mut self.inbox);
        // Kicks are registered with the runtime that is entered.
        self.runtime.block_on(async {
            thread::scope(|scope| {
                let call = scope.spawn(call);
                while !call.is_finished() {
                    while let Ok(command) = inbox.try_recv() {
                        core.obey(command);
                    }
                    core.turn();
                    core.let_go();
                    thread::sleep(PAUSE);
                }
                call.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })
    }
}

impl<D: Send> Drop for Stepped<D> {
    /// A device stops its queues when it goes, and waits for that.
    fn drop(&mut self) {
        let device = self.device.take();
        self.obeying(move || drop(device));
    }
}
