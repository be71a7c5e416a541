//! The running queues of one device: where each is served, and its counters over all its lives.

use std::sync::{Arc, Mutex, PoisonError};

use tracing::Span;

use crate::device::DeviceError;
use crate::io::reactor::{Leaving, ReactorPool, Task};
use crate::io::receiver::{Receiver, Source};
use crate::io::service::Service;
use crate::io::worker::{Handler, Worker};
use crate::stats::{DeviceStats, QueueStats};
use crate::trace;
use crate::virtqueue::split::Queue;
use crate::virtqueue::stopping::{Gathering, Stopping};
use crate::virtqueue::{End, QueueParts};

/// The queues of a device.
pub struct Queues {
    name: String,
    pool: ReactorPool,
    places: Vec<Option<Place>>,
    /// Counters of each queue's earlier runs.
    ended: Vec<Arc<Mutex<Option<QueueStats>>>>,
    /// What lines of the log about each queue are part of.
    spans: Vec<Span>,
}

/// Where a queue is.
enum Place {
    /// Served by a thread, as the task of this number.
    Runs { reactor: usize, task: u32 },
    /// Told to stop. Requests of it may be in flight.
    Leaves(Leaving),
}

impl Queues {
    /// `count` queues, none running. Threads of `pool` serve them.
    #[must_use]
    pub fn new(name: &str, count: usize, pool: ReactorPool) -> Self {
        let device = trace::device(name);
        Self {
            name: name.to_owned(),
            pool,
            places: (0..count).map(|_| None).collect(),
            ended: (0..count).map(|_| Arc::default()).collect(),
            spans: (0..count).map(|index| trace::queue(&device, index as u16)).collect(),
        }
    }

    /// The span that log lines about a queue belong to.
    pub(crate) fn span(&self, index: u16) -> Span {
        self.spans.get(usize::from(index)).cloned().unwrap_or_else(Span::none)
    }

    /// Starts a queue whose chains are requests. The handler is built on the I/O thread that serves it, and may be
    /// bound to it.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] for a queue that does not exist or runs already, [`DeviceError::Ring`] for a ring that can't be
    /// served, [`DeviceError::Host`] when the thread can't take it.
    pub fn start<H: Handler + 'static>(
        &mut self,
        index: u16,
        parts: QueueParts,
        features: u64,
        handler: impl FnOnce() -> H + Send + 'static,
    ) -> Result<(), DeviceError> {
        self.attach(index, parts, features, H::OPS, move |service| Box::new(Worker::new(service, handler())))
    }

    /// Starts a queue whose chains wait for frames. The source is built on the I/O thread that serves it.
    ///
    /// # Errors
    /// [`DeviceError::Queue`] for a queue that does not exist or runs already, [`DeviceError::Ring`] for a ring that can't be
    /// served, [`DeviceError::Host`] when the thread can't take it.
    pub fn start_receiver<S: Source + 'static>(
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
            Some(Place::Leaves(leaving)) if !leaving.departure.has_ended() => {
                return Err(refuse("was stopped, but has requests in flight still"));
            }
            Some(Place::Leaves(_)) | None => {}
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
        let span = self.spans[usize::from(index)].clone();
        let reactor = self.pool.least_loaded();
        let task = reactor
            .attach(kick, move |handle| build(Service::new(span, queue, fault, handle, ops)))
            .map_err(|source| DeviceError::Host { device: self.name.clone(), what: "starting a queue", source })?;
        *place = Some(Place::Runs { reactor: reactor.index(), task });
        Ok(())
    }

    /// Stops queues as [`Device::stop`](crate::device::Device::stop) does. All are told before the first is waited
    /// for, so their requests in flight end in parallel.
    pub fn stop(&mut self, indices: &[u16], end: End) -> Stopping {
        let (gathering, stopping) = Gathering::new(indices.len());
        for (position, &index) in indices.iter().enumerate() {
            let Some(Some(place)) = self.places.get_mut(usize::from(index)) else { continue };
            let thread = |reactor| self.pool.get(reactor).expect("a place names a thread of its pool");
            match place {
                Place::Runs { reactor, task } => {
                    let counted = Arc::clone(&self.ended[usize::from(index)]);
                    *place = Place::Leaves(thread(*reactor).detach(*task, end, counted));
                }
                Place::Leaves(leaving) if end == End::Suspended => thread(leaving.reactor).hurry(leaving),
                Place::Leaves(_) => {}
            }
            if let Place::Leaves(leaving) = place {
                leaving.departure.tell(&gathering, position);
            }
        }
        stopping
    }

    /// Suspends every queue, and forgets where each stood.
    pub fn reset(&mut self) {
        let indices: Vec<u16> = (0..self.places.len() as u16).collect();
        drop(self.stop(&indices, End::Suspended).wait());
        self.places.fill_with(|| None);
    }

    /// Whether any queue runs, or has something in flight still.
    pub(crate) fn any_run(&self) -> bool {
        self.places.iter().flatten().any(|place| match place {
            Place::Runs { .. } => true,
            Place::Leaves(leaving) => !leaving.departure.has_ended(),
        })
    }

    /// Counters of the queues.
    #[must_use]
    pub fn stats(&self) -> DeviceStats {
        let queues = (0..).zip(self.ended.iter().zip(&self.places)).filter_map(|(index, (ended, place))| {
            // Of one that stops, the last word comes with its end.
            let running = match place {
                Some(Place::Runs { reactor, task }) => self.pool.get(*reactor).and_then(|thread| thread.stats(*task)),
                Some(Place::Leaves(_)) | None => None,
            };
            let ended = ended.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let total = match (ended, running) {
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
    /// No request may be in flight once the device is gone, and requests that can be cancelled are not waited for.
    fn drop(&mut self) {
        self.reset();
    }
}
