//! Queues on their way out: what [`Device::stop`](crate::device::Device::stop) returns, and what the I/O threads do to end it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::Suspended;

/// Where each of the queues stands that were stopped together: `None` for one that was not running, or whose thread died.
pub type Ends = Vec<Option<Suspended>>;

/// Queues that were told to stop. They take nothing new; memory that they use must stay until this has ended.
///
/// Dropping it changes nothing: the queues stop all the same, and another [`Device::stop`](crate::device::Device::stop) waits for
/// them again.
#[derive(Debug)]
pub struct Stopping {
    ends: Receiver<Ends>,
    count: usize,
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
        (end, Self { ends, count })
    }

    /// Waits until nothing of the queues is in flight and every completion is published.
    #[must_use]
    pub fn wait(self) -> Ends {
        self.ends.recv().unwrap_or_else(|_| vec![None; self.count])
    }

    /// Waits until `deadline` at most.
    ///
    /// # Errors
    /// This again, if something of the queues is in flight still.
    pub fn wait_until(self, deadline: Instant) -> Result<Ends, Self> {
        match self.ends.recv_deadline(deadline) {
            Ok(ends) => Ok(ends),
            Err(RecvTimeoutError::Timeout) => Err(self),
            Err(RecvTimeoutError::Disconnected) => Ok(vec![None; self.count]),
        }
    }

    /// Becomes ready when the queues have stopped, for a thread that waits for other things as well: receiving takes
    /// the ends; a disconnect means that none of the queues runs any more.
    #[must_use]
    pub fn receiver(&self) -> &Receiver<Ends> {
        &self.ends
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
        let stopping = stopping.wait_until(Instant::now() + Duration::from_millis(20)).unwrap_err();
        queues[0].end(None);
        assert_eq!(stopping.wait(), [None, None, Some(at(7))]);
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
