//! The running queues of one device: where each is served, and what it has counted over all its lives.

use std::sync::mpsc::RecvTimeoutError;
use std::time::Instant;

use crate::device::{DeviceError, QueueParts, QueueState, Suspended};
use crate::queue::Queue;
use crate::reactor::{End, Leaving, ReactorPool, Task};
use crate::receiver::{Receiver, Source};
use crate::service::Service;
use crate::stats::{DeviceStats, QueueStats};
use crate::worker::{Handler, Worker};

/// The queues of a device.
pub(crate) struct Queues {
    name: String,
    pool: ReactorPool,
    places: Vec<Option<Place>>,
    /// What earlier runs of each queue counted.
    ended: Vec<Option<QueueStats>>,
}

/// Where a queue is.
enum Place {
    /// Served by a thread, as the task of this number.
    Runs { reactor: usize, task: u32 },
    /// Told to stop. Something of it may be in flight.
    Leaves(Leaving),
    /// Stopped, while another that was told with it has something in flight.
    Ended(Suspended),
}

impl Queues {
    /// `count` queues, none running.
    pub(crate) fn new(name: &str, count: usize, pool: ReactorPool) -> Self {
        let name = name.to_owned();
        Self { name, pool, places: (0..count).map(|_| None).collect(), ended: (0..count).map(|_| None).collect() }
    }

    /// Starts a queue whose chains are requests. The handler is built on the thread that serves it, and may be bound to it.
    pub(crate) fn start<H: Handler + 'static>(
        &mut self,
        index: u16,
        parts: QueueParts,
        features: u64,
        handler: impl FnOnce() -> H + Send + 'static,
    ) -> Result<(), DeviceError> {
        self.attach(index, parts, features, H::OPS, move |service| Box::new(Worker::new(service, handler())))
    }

    /// Starts a queue whose chains wait for frames. The source is built on the thread that serves it.
    pub(crate) fn start_receiver<S: Source + 'static>(
        &mut self,
        index: u16,
        parts: QueueParts,
        features: u64,
        source: impl FnOnce() -> S + Send + 'static,
    ) -> Result<(), DeviceError> {
        self.attach(index, parts, features, S::OPS, move |service| Box::new(Receiver::new(service, source())))
    }

    /// Starts a queue on the thread with the least to do.
    fn attach(
        &mut self,
        index: u16,
        parts: QueueParts,
        features: u64,
        ops: &'static [&'static str],
        build: impl FnOnce(Service) -> Box<dyn Task> + Send + 'static,
    ) -> Result<(), DeviceError> {
        let refuse = |reason| DeviceError::Queue { device: self.name.clone(), index, reason };
        let place = self.places.get_mut(usize::from(index)).ok_or_else(|| refuse("does not exist"))?;
        match place {
            Some(Place::Runs { .. }) => return Err(refuse("runs already")),
            Some(Place::Leaves(_)) => return Err(refuse("was stopped, but has requests in flight still")),
            Some(Place::Ended(_)) | None => {}
        }
        let QueueParts { ring, mem, kick, call, fault, from, left, inflight, log, in_order } = parts;
        let broken = |source| DeviceError::Ring { device: self.name.clone(), index, source };
        let mut queue = Queue::new(mem, &ring, features, from, call).map_err(broken)?;
        queue.in_order = in_order;
        if let Some(table) = inflight {
            queue.take_over(table).map_err(broken)?;
        }
        queue.take_left(&left).map_err(broken)?;
        if let Some(log) = log {
            queue.log_writes(log);
        }
        let name = format!("{}.{index}", self.name);
        let reactor = self.pool.least_loaded();
        let task = reactor
            .attach(kick, move |task| build(Service::new(name, queue, fault, task, ops)))
            .map_err(|source| DeviceError::Host { device: self.name.clone(), what: "starting a queue", source })?;
        *place = Some(Place::Runs { reactor: reactor.index(), task });
        Ok(())
    }

    /// Stops a queue: drains it and publishes what it completed.
    pub(crate) fn stop(&mut self, index: u16) -> Option<QueueState> {
        Some(self.end(&[index], End::Drained, None)?.pop()??.state)
    }

    /// Stops queues without waiting for what can be cancelled.
    pub(crate) fn suspend(&mut self, indices: &[u16]) -> Vec<Option<Suspended>> {
        self.end(indices, End::Suspended, None).unwrap_or_default()
    }

    /// Stops queues as [`Device::stop_by`](crate::device::Device::stop_by) does.
    pub(crate) fn stop_by(&mut self, indices: &[u16], end: End, deadline: Instant) -> Option<Vec<Option<Suspended>>> {
        self.end(indices, end, Some(deadline))
    }

    /// Stops every queue, and forgets what it has in flight.
    pub(crate) fn stop_all(&mut self) {
        self.end(&self.indices(), End::Suspended, None);
    }

    fn indices(&self) -> Vec<u16> {
        (0..self.places.len() as u16).collect()
    }

    /// Stops queues. All are told before one is waited for: what is in flight in each ends meanwhile. `None` if the time is over
    /// before all have ended.
    fn end(&mut self, indices: &[u16], end: End, deadline: Option<Instant>) -> Option<Vec<Option<Suspended>>> {
        indices.iter().for_each(|&index| self.tell(index, end));
        let mut all = true;
        for &index in indices {
            all &= self.has_ended(index, deadline);
        }
        let take = |&index: &u16| match self.places.get_mut(usize::from(index))?.take()? {
            Place::Ended(end) => Some(end),
            Place::Runs { .. } | Place::Leaves(_) => None,
        };
        all.then(|| indices.iter().map(take).collect())
    }

    /// Tells a queue to stop, if it was not told already.
    fn tell(&mut self, index: u16, end: End) {
        let Some(Some(place)) = self.places.get_mut(usize::from(index)) else { return };
        let thread = |reactor| self.pool.get(reactor).expect("a place names a thread of its pool");
        match place {
            Place::Runs { reactor, task } => *place = Place::Leaves(thread(*reactor).detach(*task, end)),
            Place::Leaves(leaving) if end == End::Suspended => thread(leaving.reactor).hurry(leaving),
            Place::Leaves(_) | Place::Ended(_) => {}
        }
    }

    /// Waits for the end of a queue that was told to stop. Returns whether it has come.
    fn has_ended(&mut self, index: u16, deadline: Option<Instant>) -> bool {
        let Some(place) = self.places.get_mut(usize::from(index)) else { return true };
        if let Some(Place::Leaves(leaving)) = place {
            let reactor = self.pool.get(leaving.reactor).expect("a place names a thread of its pool");
            match reactor.wait(leaving, deadline) {
                Ok(left) => {
                    match &mut self.ended[usize::from(index)] {
                        Some(ended) => ended.merge(&left.stats),
                        none => *none = Some(left.stats),
                    }
                    *place = Some(Place::Ended(left.queue));
                }
                Err(RecvTimeoutError::Timeout) => return false,
                // Its thread has died, and with it all that was in flight.
                Err(RecvTimeoutError::Disconnected) => *place = None,
            }
        }
        true
    }

    /// Whether any queue runs, or has something in flight still.
    pub(crate) fn any_run(&self) -> bool {
        self.places.iter().any(|place| matches!(place, Some(Place::Runs { .. } | Place::Leaves(_))))
    }

    /// What the queues have counted.
    pub(crate) fn stats(&self) -> DeviceStats {
        let queues = (0..).zip(self.ended.iter().zip(&self.places)).filter_map(|(index, (ended, place))| {
            // Of one that stops, the last word comes with its end.
            let running = match place {
                Some(Place::Runs { reactor, task }) => self.pool.get(*reactor).and_then(|thread| thread.stats(*task)),
                Some(Place::Leaves(_) | Place::Ended(_)) | None => None,
            };
            let total = match (ended.clone(), running) {
                (Some(mut total), Some(running)) => {
                    total.merge(&running);
                    Some(total)
                }
                (ended, running) => ended.or(running),
            };
            Some((index, total?))
        });
        DeviceStats { name: self.name.clone(), queues: queues.collect() }
    }
}

impl Drop for Queues {
    /// Nothing may be in flight once the device is gone, and nobody waits for what can be cancelled.
    fn drop(&mut self) {
        self.suspend(&self.indices());
    }
}
