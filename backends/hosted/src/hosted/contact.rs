//! What a hosted backend's thread and its device share beside calls: fault lines, what is to be made up for, and panics.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use ringvm_backends::io::reactor::OnPanic;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use vmm_sys_util::eventfd::EventFd;

/// What is within reach while the thread is not.
pub(super) struct Contact {
    pub(super) wake: EventFd,
    pub(super) faults: Faults,
    /// Somebody has stopped waiting for the thread, which has not come back from the backend since.
    hung: AtomicBool,
    /// Queues to stop when it does, by their place on the thread.
    pub(super) unwanted: AtomicU64,
    /// The backend is to be reset then.
    reset: AtomicBool,
}

impl Contact {
    pub(super) fn new(wake: EventFd, queues: usize) -> Self {
        let (hung, reset) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { wake, faults: Faults::of(queues), hung, unwanted: AtomicU64::new(0), reset }
    }

    pub(super) fn wake(&self) {
        // Full: it was woken often enough.
        let _ = self.wake.write(1);
    }

    /// The thread does not come back in time. It is woken, and says that it is back when it has its next turn.
    pub(super) fn give_up(&self) {
        self.hung.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Whether nobody is to wait for the thread.
    pub(super) fn is_hung(&self) -> bool {
        self.hung.load(Ordering::SeqCst)
    }

    /// The thread is back from the backend.
    pub(super) fn is_back(&self) {
        self.hung.store(false, Ordering::SeqCst);
    }

    /// Has the backend reset when the thread is back: it could not be asked in time.
    pub(super) fn want_reset(&self) {
        self.reset.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Whether the backend is to be reset, which is asked once.
    pub(super) fn take_reset(&self) -> bool {
        self.reset.load(Ordering::SeqCst) && self.reset.swap(false, Ordering::SeqCst)
    }

    /// Takes the queues that were to stop while the thread was away: a bit for each place.
    pub(super) fn take_unwanted(&self) -> u64 {
        // Mostly there are none, and kicks need not write what another thread reads.
        if self.unwanted.load(Ordering::SeqCst) == 0 { 0 } else { self.unwanted.swap(0, Ordering::SeqCst) }
    }
}

/// The fault lines of the queues that a thread serves, within reach when the thread is not.
pub(super) struct Faults(Mutex<Vec<Interrupt>>);

impl Faults {
    pub(super) fn of(count: usize) -> Self {
        Self(Mutex::new(vec![Interrupt::None; count]))
    }

    pub(super) fn set(&self, place: usize, fault: Interrupt) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)[place] = fault;
    }

    /// Says of a queue that it is not served any more, once.
    pub(super) fn raise_of(&self, place: usize) {
        let fault = std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner)[place]);
        fault.raise();
    }

    /// Says so of every queue.
    pub(super) fn raise(&self) {
        let faults: Vec<_> = {
            let mut faults = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            faults.iter_mut().map(std::mem::take).collect()
        };
        faults.iter().for_each(Interrupt::raise);
    }
}

/// Whom to tell that a thread has panicked. The device is asked for it when its threads run already.
#[derive(Default)]
pub(super) struct Panics(Mutex<(OnPanic, usize)>);

impl Panics {
    /// Also tells of threads of the backend of `device` that have panicked before.
    pub(super) fn set(&self, device: &str, on_panic: OnPanic) {
        let before = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.0 = on_panic.clone();
            state.1
        };
        (0..before).for_each(|_| on_panic.tell(&backend_of(device)));
    }

    /// A thread of the backend of `device` has panicked.
    pub(super) fn tell(&self, device: &str) {
        let on_panic = {
            let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            state.1 += 1;
            state.0.clone()
        };
        on_panic.tell(&backend_of(device));
    }
}

fn backend_of(device: &str) -> String {
    format!("the backend of {device}")
}
