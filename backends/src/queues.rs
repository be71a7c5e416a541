//! The running queues of one device: where each is served, and what it has counted over all its lives.

use crate::device::{DeviceError, QueueParts, QueueState, Suspended};
use crate::queue::Queue;
use crate::reactor::{End, Leaving, Reactor, ReactorPool, Task};
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

/// The thread that serves a queue, and the queue's number there.
struct Place {
    reactor: usize,
    task: u32,
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
        if place.is_some() {
            return Err(refuse("runs already"));
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
        *place = Some(Place { reactor: reactor.index(), task });
        Ok(())
    }

    /// Stops a queue: drains it and publishes what it completed.
    pub(crate) fn stop(&mut self, index: u16) -> Option<QueueState> {
        Some(self.end(&[index], End::Drained).pop()??.state)
    }

    /// Stops queues without waiting for what can be cancelled.
    pub(crate) fn suspend(&mut self, indices: &[u16]) -> Vec<Option<Suspended>> {
        self.end(indices, End::Suspended)
    }

    /// Stops every queue, and forgets what it has in flight.
    pub(crate) fn stop_all(&mut self) {
        self.end(&(0..self.places.len() as u16).collect::<Vec<_>>(), End::Suspended);
    }

    /// Stops queues. All are told before one is waited for: what is in flight in each ends meanwhile.
    fn end(&mut self, indices: &[u16], end: End) -> Vec<Option<Suspended>> {
        let leaving: Vec<Option<Leaving>> = indices
            .iter()
            .map(|&index| {
                let place = self.places.get_mut(usize::from(index))?.take()?;
                Some(self.reactor(&place).detach(place.task, end))
            })
            .collect();
        let mut ends = Vec::with_capacity(leaving.len());
        for (&index, leaving) in indices.iter().zip(leaving) {
            let end = leaving.and_then(|leaving| {
                let left = self.pool.get(leaving.reactor)?.wait(leaving)?;
                match &mut self.ended[usize::from(index)] {
                    Some(ended) => ended.merge(&left.stats),
                    none => *none = Some(left.stats),
                }
                Some(left.queue)
            });
            ends.push(end);
        }
        ends
    }

    /// What the queues have counted.
    pub(crate) fn stats(&self) -> DeviceStats {
        let queues = (0..).zip(self.ended.iter().zip(&self.places)).filter_map(|(index, (ended, place))| {
            let running = place.as_ref().and_then(|place| self.reactor(place).stats(place.task));
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

    fn reactor(&self, place: &Place) -> &Reactor {
        self.pool.get(place.reactor).expect("a place names a thread of its pool")
    }
}

impl Drop for Queues {
    /// Nothing may be in flight once the device is gone.
    fn drop(&mut self) {
        self.stop_all();
    }
}
