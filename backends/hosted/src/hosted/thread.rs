//! A thread of a hosted backend as its device sees it: calls with a limit, and what becomes of those beyond it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use ringvm_backends::device::Suspended;
use vhost_user_backend::VhostUserBackend;

use super::contact::Contact;
use super::event_loop::{Call, EventLoop};
use crate::listeners::Listeners;

/// Longest time that the backend may take for a call that a driver or a transport waits for. Less than the 2 s that a
/// frontend gives a daemon: the reason is to reach it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

/// Why there is no answer.
#[derive(Clone, Copy, Debug)]
pub(super) enum NoAnswer {
    /// Not in time.
    Late,
    /// The thread has yet to come back from a call that was given up.
    Hung,
    /// The thread has ended.
    Dead,
}

/// A queue on its way out.
pub(super) struct Ending {
    contact: Arc<Contact>,
    told: Receiver<Suspended>,
}

impl Ending {
    /// Waits for the queue's end. There is none if it did not run, was given up, or its thread has died.
    pub(super) fn wait(self, deadline: Instant) -> Result<Option<Suspended>, NoAnswer> {
        match self.told.recv_deadline(deadline) {
            Ok(end) => Ok(Some(end)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => {
                self.contact.give_up();
                self.contact.faults.raise();
                Err(NoAnswer::Late)
            }
        }
    }
}

/// How far a call is.
enum Progress<F> {
    Asked(F),
    Begun,
    Ended,
    GivenUp,
}

/// One thread of the backend.
pub(super) struct Thread<B: VhostUserBackend> {
    /// Closed to end the thread.
    pub(super) calls: Option<Sender<Call<B>>>,
    pub(super) contact: Arc<Contact>,
    pub(super) listeners: Arc<dyn Listeners>,
    pub(super) handle: Option<JoinHandle<()>>,
}

impl<B: VhostUserBackend> Thread<B> {
    /// Whether nobody is to wait for the thread. One that has ended gives calls back at once.
    fn is_hung(&self) -> bool {
        self.contact.is_hung() && !self.handle.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// Has the thread make a call, and waits for its end. A call that is given up is not made any more; one that was
    /// being made already is undone when it ends.
    pub(super) fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut EventLoop<B>) -> T + Send + 'static,
        undo: impl FnOnce(&mut EventLoop<B>, T) + Send + 'static,
    ) -> Result<T, NoAnswer> {
        if self.is_hung() {
            return Err(NoAnswer::Hung);
        }
        let (tell, told) = bounded(1);
        let progress = Arc::new(Mutex::new(Progress::Asked(call)));
        let theirs = Arc::clone(&progress);
        self.send(Box::new(move |event_loop| {
            let Progress::Asked(call) = advance(&theirs, Progress::Begun) else { return };
            let answer = call(event_loop);
            if let Progress::GivenUp = advance(&theirs, Progress::Ended) {
                undo(event_loop, answer);
            } else {
                // There is room, and the asker waits.
                let _ = tell.send(answer);
            }
        }));
        match told.recv_timeout(PATIENCE) {
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Disconnected) => Err(NoAnswer::Dead),
            Err(RecvTimeoutError::Timeout) => match advance(&progress, Progress::GivenUp) {
                // Just in time: the answer is on its way.
                Progress::Ended => told.recv().map_err(|_| NoAnswer::Dead),
                // What the call owns is dropped here, and not when the thread comes back.
                Progress::Asked(_) | Progress::Begun | Progress::GivenUp => {
                    self.contact.give_up();
                    Err(NoAnswer::Late)
                }
            },
        }
    }

    /// Has the thread stop a queue. Nobody waits for the end if the thread hangs. The queue stops all the same, when the
    /// thread comes back.
    pub(super) fn stop(&self, place: usize, deadline: Instant) -> Ending {
        let (tell, told) = bounded(1);
        if self.is_hung() {
            self.contact.unwanted.fetch_or(1 << place, Ordering::SeqCst);
            self.contact.wake();
        } else {
            self.send(Box::new(move |event_loop| event_loop.stop(place, deadline, Some(tell))));
        }
        Ending { contact: Arc::clone(&self.contact), told }
    }

    fn send(&self, call: Call<B>) {
        if let Some(calls) = &self.calls {
            // A thread that has died drops the call, and its asker sees that.
            let _ = calls.send(call);
            self.contact.wake();
        }
    }

    /// Has the thread end once it is back from the backend.
    pub(super) fn end(&mut self) {
        self.calls = None;
        self.contact.wake();
    }
}

impl<B: VhostUserBackend> Drop for Thread<B> {
    /// Ends it, and does not wait: a device that fails to start has nobody who would.
    fn drop(&mut self) {
        self.end();
    }
}

/// Says how far a call is, and returns how far it was.
fn advance<F>(progress: &Mutex<Progress<F>>, to: Progress<F>) -> Progress<F> {
    std::mem::replace(&mut *progress.lock().unwrap_or_else(PoisonError::into_inner), to)
}
