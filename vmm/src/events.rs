//! The end of a machine, as vCPUs, devices, the console and signals tell it to the main thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, unbounded};

/// Why a machine stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest ran into a triple fault.
    TripleFault {
        /// The vCPU.
        vcpu: u32,
        /// Its registers. KVM on AMD has reset them by then.
        place: String,
    },
    /// KVM can't continue the guest.
    GuestCrash(String),
    /// The host failed the machine.
    HostFailure(String),
    /// A thread of ours panicked.
    Panic(String),
    /// A signal asked `ringvm` to end.
    Signal(&'static str),
    /// The console's escape (Ctrl-A x) asked `ringvm` to end.
    ConsoleEscape,
}

/// Where endings are sent. The first ending of a machine decides; of later ones only signals matter.
#[derive(Clone)]
pub struct Events {
    sender: Sender<Ending>,
    ended: Arc<AtomicBool>,
}

impl Events {
    /// A channel for the main thread.
    #[must_use]
    pub fn channel() -> (Self, Receiver<Ending>) {
        let (sender, receiver) = unbounded();
        (Self { sender, ended: Arc::default() }, receiver)
    }

    /// Reports the end of the machine.
    pub fn end(&self, ending: Ending) {
        self.ended.store(true, Ordering::SeqCst);
        // The receiver is gone only when the process is about to exit.
        drop(self.sender.send(ending));
    }

    /// Whether the machine is at its end: a vCPU must not continue then.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Makes the channel ready for the next machine of this process. No thread of the last one may be left.
    pub fn rearm(&self) {
        self.ended.store(false, Ordering::SeqCst);
    }
}
