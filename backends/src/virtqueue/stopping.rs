//! Queues that are stopping: the handle that [`Device::stop`](crate::device::Device::stop) returns, and the I/O
//! threads' side of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::Suspended;

/// Waiting needs little stack.
const STACK: usize = 64 << 10;

/// The positions of queues that were stopped together: `None` for a queue that was not running, or whose thread died.
pub type Ends = Vec<Option<Suspended>>;

/// Queues that were told to stop. They take no new chains; the memory that they use must stay until they have
/// stopped.
///
/// Dropping it changes nothing: the queues stop all the same, and another
/// [`Device::stop`](crate::device::Device::stop) waits for them again.
pub struct Stopping {
    ends: Pending,
    count: usize,
}

enum Pending {
    /// The ends come over a channel.
    Told(Receiver<Ends>),
    /// The ends come from a call that waits for them.
    Call(Box<dyn FnOnce() -> Ends + Send>),
}

impl Stopping {
    /// Queues that have stopped already.
    #[must_use]
    pub fn done(ends: Ends) -> Self {
        let (end, stopping) = Self::pending(ends.len());
        // The receiver is held, and has room.
        let _ = end.send(ends);
        stopping
    }

    /// `count` queues that have stopped when the sender is given their ends, or dropped.
    #[must_use]
    pub fn pending(count: usize) -> (Sender<Ends>, Self) {
        let (end, ends) = bounded(1);
        (end, Self { ends: Pending::Told(ends), count })
    }

    /// `count` queues whose end `wait` waits for. It is called on the thread that waits, or on one of its own for a thread that
    /// waits for other things too.
    #[must_use]
    pub fn by(count: usize, wait: impl FnOnce() -> Ends + Send + 'static) -> Self {
        Self { ends: Pending::Call(Box::new(wait)), count }
    }

    /// Waits until nothing of the queues is in flight and every completion is published.
    #[must_use]
    pub fn wait(self) -> Ends {
        match self.ends {
            Pending::Told(ends) => ends.recv().unwrap_or_else(|_| vec![None; self.count]),
            Pending::Call(wait) => wait(),
        }
    }

    /// Waits until `deadline` at most.
    ///
    /// # Errors
    /// This again, if something of the queues is in flight still.
    pub fn wait_until(self, deadline: Instant) -> Result<Ends, Self> {
        let count = self.count;
        let ends = self.into_receiver();
        match ends.recv_deadline(deadline) {
            Ok(ends) => Ok(ends),
            Err(RecvTimeoutError::Timeout) => Err(Self { ends: Pending::Told(ends), count }),
            Err(RecvTimeoutError::Disconnected) => Ok(vec![None; count]),
        }
    }

    /// A channel that becomes ready when the queues have stopped, for a thread that waits for other things as well: receiving
    /// takes the ends; a disconnect means that none of the queues runs any more.
    #[must_use]
    pub fn into_receiver(self) -> Receiver<Ends> {
        let wait = match self.ends {
            Pending::Told(ends) => return ends,
            Pending::Call(wait) => wait,
        };
        let (end, ends) = bounded(1);
        let (work, given) = bounded::<Box<dyn FnOnce() -> Ends + Send>>(1);
        let waiter = end.clone();
        let thread = thread::Builder::new().name("stop".into()).stack_size(STACK).spawn(move || {
            if let Ok(wait) = given.recv() {
                // The receiver may be gone.
                let _ = waiter.send(wait());
            }
        });
        if thread.is_ok() {
            // The thread holds the other end, and there is room.
            let _ = work.send(wait);
        } else {
            // The host has no thread left: this one waits.
            let _ = end.send(wait());
        }
        ends
    }
}

/// Collects the ends of queues that were stopped together, and sends them when the last has come.
#[derive(Debug)]
pub(crate) struct Gathering {
    ends: Mutex<Ends>,
    reply: Sender<Ends>,
}

impl Gathering {
    /// For `count` queues. Every queue that is waited for holds a clone.
    pub(crate) fn new(count: usize) -> (Arc<Self>, Stopping) {
        let (reply, stopping) = Stopping::pending(count);
        (Arc::new(Self { ends: Mutex::new(vec![None; count]), reply }), stopping)
    }

    /// The queue at this position has ended.
    pub(crate) fn put(&self, position: usize, end: Suspended) {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)[position] = Some(end);
    }
}

impl Drop for Gathering {
    fn drop(&mut self) {
        let ends = std::mem::take(&mut *self.ends.lock().unwrap_or_else(PoisonError::into_inner));
        // The receiver may be gone.
        let _ = self.reply.send(ends);
    }
}

/// One queue on its way out, shared between its device and the thread that serves it.
#[derive(Debug, Default)]
pub(crate) struct Departure {
    hurry: AtomicBool,
    state: Mutex<Departing>,
}

#[derive(Debug, Default)]
struct Departing {
    /// Set once nothing of the queue is in flight; empty if its thread died.
    left: Option<Option<Suspended>>,
    waiting: Vec<(Arc<Gathering>, usize)>,
}

impl Departure {
    fn lock(&self) -> MutexGuard<'_, Departing> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the queue suspended, even if it was to be drained. Returns whether that is news.
    pub(crate) fn hurry(&self) -> bool {
        !self.hurry.swap(true, Ordering::AcqRel)
    }

    /// Whether it is to be suspended.
    pub(crate) fn hurries(&self) -> bool {
        self.hurry.load(Ordering::Acquire)
    }

    /// Whether nothing of the queue is in flight any more.
    pub(crate) fn has_ended(&self) -> bool {
        self.lock().left.is_some()
    }

    /// Has the queue's end put into `gathering`, at this position.
    pub(crate) fn tell(&self, gathering: &Arc<Gathering>, position: usize) {
        let mut state = self.lock();
        match &state.left {
            Some(Some(end)) => gathering.put(position, end.clone()),
            Some(None) => {}
            None => state.waiting.push((Arc::clone(gathering), position)),
        }
    }

    /// Nothing of the queue is in flight. `None` if its thread has died.
    pub(crate) fn end(&self, left: Option<Suspended>) {
        let waiting = {
            let mut state = self.lock();
            if state.left.is_some() {
                return;
            }
            state.left = Some(left.clone());
            std::mem::take(&mut state.waiting)
        };
        for (gathering, position) in waiting {
            if let Some(end) = &left {
                gathering.put(position, end.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(next_avail: u16) -> Suspended {
        Suspended { state: crate::virtqueue::QueueState { next_avail, next_used: 0 }, left: Vec::new() }
    }

    #[test]
    fn queues_have_stopped_with_the_last_of_them() {
        let queues = [Departure::default(), Departure::default()];
        let (gathering, stopping) = Gathering::new(3);
        queues.iter().zip([0, 2]).for_each(|(queue, position)| queue.tell(&gathering, position));
        drop(gathering);
        queues[1].end(Some(at(7)));
        let Err(stopping) = stopping.wait_until(Instant::now() + Duration::from_millis(20)) else {
            panic!("one of them has not stopped")
        };
        queues[0].end(None);
        assert_eq!(stopping.wait(), [None, None, Some(at(7))]);
    }

    #[test]
    fn a_call_that_waits_is_made_by_whoever_waits() {
        let here = thread::current().id();
        let stopping = Stopping::by(1, move || vec![(thread::current().id() == here).then(|| at(3))]);
        assert_eq!(stopping.wait(), [Some(at(3))], "on the same thread");
        let (go, wait) = bounded::<()>(0);
        let stopping = Stopping::by(1, move || {
            let _ = wait.recv();
            vec![Some(at(4))]
        });
        let Err(stopping) = stopping.wait_until(Instant::now() + Duration::from_millis(20)) else {
            panic!("it waits for the test")
        };
        drop(go);
        assert_eq!(stopping.into_receiver().recv(), Ok(vec![Some(at(4))]));
    }

    #[test]
    fn an_end_can_be_waited_for_again() {
        let queue = Departure::default();
        let (first, abandoned) = Gathering::new(1);
        queue.tell(&first, 0);
        drop((first, abandoned));
        queue.end(Some(at(1)));
        let (second, stopping) = Gathering::new(1);
        queue.tell(&second, 0);
        drop(second);
        assert_eq!(stopping.wait(), [Some(at(1))]);
        assert!(queue.has_ended());
    }
}
