//! Requests to a machine while it runs, each with a reply. Any thread may make one; the main thread serves them, and
//! never waits.
//!
//! A request that takes time is answered by the thread that does the work: a device's owner, the thread of a move, a
//! vCPU. So a device that drains delays only its own answer, and nothing delays the end of the machine.

use std::thread;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use ringvm_backends::device::Device;
use ringvm_backends::trace;
use thiserror::Error;
use tracing::debug_span;

use crate::kvm::VcpuState;
use crate::machine::{Asked, MachineError, Running};
use crate::owner::Taken;
use crate::pci::Bdf;
use crate::placement::{Moved, Mover, PlaceError};

/// Most requests that may wait to be served.
const REQUESTS: usize = 16;
/// A move needs little stack.
const STACK: usize = 256 << 10;

/// Requests to a running machine. A reply's sender is dropped when no more answers follow.
pub enum Request {
    /// The devices' statistics. Each device answers for itself.
    Statistics(Sender<Vec<Asked>>),
    /// Devices that can be served elsewhere move to where they are not; all of them, or the one of this name.
    Move(Option<String>, Sender<Result<Moved, PlaceError>>),
    /// A device is put on the bus.
    Attach(Box<dyn Device>, Sender<Result<Bdf, MachineError>>),
    /// The device of this name is taken off the bus, and comes when nothing of it is in flight any more.
    Detach(String, Sender<Result<Receiver<Taken>, MachineError>>),
    /// The vCPUs leave the guest. Each says its number once it has.
    Pause(Sender<u32>),
    /// Paused vCPUs continue.
    Resume,
    /// Paused vCPUs report their state.
    Save(Sender<Box<VcpuState>>),
}

/// A request can't be made.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum ControlError {
    /// Too many wait.
    #[error("{REQUESTS} requests wait already; ask again later")]
    Busy,
    /// There is no machine any more.
    #[error("the machine is at its end")]
    Ended,
}

/// Makes requests.
#[derive(Clone)]
pub struct Control(Sender<Request>);

impl Control {
    /// A channel to the thread that serves requests.
    #[must_use]
    pub fn channel() -> (Self, Receiver<Request>) {
        let (sender, receiver) = bounded(REQUESTS);
        (Self(sender), receiver)
    }

    /// Makes a request, without waiting for anything.
    ///
    /// # Errors
    /// When it can't be made; its reply's sender is dropped then.
    pub fn ask(&self, request: Request) -> Result<(), ControlError> {
        self.0.try_send(request).map_err(|error| match error {
            TrySendError::Full(_) => ControlError::Busy,
            TrySendError::Disconnected(_) => ControlError::Ended,
        })
    }
}

/// Serves one request, without waiting for anything.
pub fn serve(request: Request, running: &Running, movers: &[Mover]) {
    // The requester may have stopped waiting: its reply is dropped then.
    match request {
        Request::Statistics(reply) => drop(reply.send(running.ask_statistics())),
        Request::Move(name, reply) => {
            let named = |mover: &&Mover| name.as_ref().is_none_or(|name| *name == mover.name());
            movers.iter().filter(named).for_each(|mover| start_move(mover, reply.clone()));
        }
        Request::Attach(device, reply) => {
            let _device = trace::device(&device.info().name).entered();
            let _attaching = debug_span!("attach").entered();
            drop(reply.send(running.attach(device)));
        }
        Request::Detach(name, reply) => {
            let _device = trace::device(&name).entered();
            let _detaching = debug_span!("detach").entered();
            drop(reply.send(running.detach(&name)));
        }
        Request::Pause(paused) => running.vcpus().iter().for_each(|vcpu| vcpu.pause(paused.clone())),
        Request::Resume => running.vcpus().iter().for_each(|vcpu| vcpu.resume()),
        Request::Save(states) => running.vcpus().iter().for_each(|vcpu| vcpu.save(states.clone())),
    }
}

/// Moves a device on a thread of its own.
fn start_move(mover: &Mover, reply: Sender<Result<Moved, PlaceError>>) {
    let (name, moving) = (mover.name(), mover.clone());
    let failed = reply.clone();
    let thread = thread::Builder::new().name(format!("move-{name}")).stack_size(STACK);
    if let Err(source) = thread.spawn(move || drop(reply.send(moving.toggle()))) {
        let what = "starting a thread for its move";
        drop(failed.send(Err(PlaceError::Host { device: name, what, source })));
    }
}
