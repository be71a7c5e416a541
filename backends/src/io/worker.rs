//! A queue whose chains are requests: the worker looks at each as it comes, turns it into operations of the data
//! ring, and gives it back when they have ended.
//!
//! A device brings a [`Handler`], which turns a chain into operations and says when it is done. The worker owns the
//! request slots, and [`Service`] the part that every queue has. A queue whose chains wait for input from outside is
//! served by a [`crate::io::receiver::Receiver`] instead.

use std::os::fd::BorrowedFd;
use std::task::Waker;
use std::time::{Duration, Instant};

use crate::io::ops::Io;
use crate::io::reactor::Task;
use crate::io::ring::{Ring, Token};
use crate::io::service::{BATCH, Service};
use crate::virtqueue::RingError;
use crate::virtqueue::buffers::Chain;

/// A device's way of processing the chains of one queue. Lives on one thread.
pub trait Handler {
    /// The state of a request in flight. Reused, so that a request costs no allocation.
    type Request: Default;

    /// Names of the kinds of request, for statistics; [`Outcome::op`] is an index into it.
    const OPS: &'static [&'static str];

    /// Most chains taken in one turn. A larger batch suits operations that end at once, because they share the system
    /// call; a smaller one lets the driver continue with finished requests while the next are in flight.
    const BATCH: usize = BATCH;

    /// Whether requests may wait for another side, such as room at a port.
    const MAY_WAIT: bool = false;

    /// The queue is served from now on. Whoever has [`Self::next_woken`] name a request uses the waker, whose clones any
    /// thread may keep.
    fn attached(&mut self, _waker: &Waker) {}

    /// Looks at a new chain, and pushes its first operation if it needs one.
    fn start(&mut self, chain: &mut Chain, request: &mut Self::Request, io: &mut Io<'_>) -> Step;

    /// Continues after the operation pushed last has ended with `result` (as of io_uring: a count or a negated
    /// errno).
    fn resume(&mut self, chain: &mut Chain, request: &mut Self::Request, result: i32, io: &mut Io<'_>) -> Step;

    /// Forgets a request that has come as far as [`Step::Pending`], with no operation under way for it. Another
    /// server starts it again.
    fn abandon(&mut self, _request: &mut Self::Request) {}

    /// Whether a pending request waits for others instead of an operation. It is resumed with 0 when
    /// [`Self::next_woken`] has named it.
    fn is_waiting(&self, _request: &Self::Request) -> bool {
        false
    }

    /// The next request that need not wait any more, by its number ([`Token::slot`]). Asked when the waker was used.
    fn next_woken(&mut self) -> Option<u32> {
        None
    }

    /// Calls `with` for every file that its operations name again and again.
    fn files(&self, _with: &mut dyn FnMut(BorrowedFd<'_>)) {}

    /// How many requests may be in flight at once. One keeps them in order where an operation may have to be repeated.
    fn window(&self) -> usize {
        usize::MAX
    }
}

/// How far a request has come.
#[derive(Debug)]
pub enum Step {
    /// One operation was pushed, and its result comes to [`Handler::resume`]; or it waits for others, see
    /// [`Handler::is_waiting`].
    Pending,
    /// The chain can be given back.
    Done(Outcome),
    /// The chain can't be answered, so the driver must reset the device.
    Fault(&'static str),
}

/// A request that ended.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Its kind, an index into [`Handler::OPS`].
    pub op: usize,
    /// Bytes written to the chain, for the used ring.
    pub written: u32,
    /// Payload bytes, for statistics.
    pub bytes: u64,
    /// Whether it succeeded.
    pub ok: bool,
}

struct Slot<R> {
    chain: Chain,
    request: R,
    seen: Instant,
}

/// A queue and the handler that serves it.
pub struct Worker<H: Handler> {
    service: Service,
    handler: H,
    slots: Vec<Slot<H::Request>>,
    free: Vec<u32>,
    /// Taken in this turn and not begun.
    taken: Vec<u32>,
    /// When to look for requests that the host has not ended for long.
    next_look: Option<Instant>,
    /// Times in a row that there were some.
    late_looks: u32,
}

/// Longest time that a request takes of which nobody hears. Each time that it has passed, the next is twice as long.
const LATE: Duration = Duration::from_secs(10);

impl<H: Handler> Worker<H> {
    /// A worker for the queue of `service`.
    pub(crate) fn new(service: Service, mut handler: H) -> Self {
        handler.attached(service.waker());
        Self {
            service,
            handler,
            slots: Vec::new(),
            free: Vec::new(),
            taken: Vec::new(),
            next_look: None,
            late_looks: 0,
        }
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The slots of all requests in flight.
    fn busy(&self) -> Vec<u32> {
        let mut busy = vec![true; self.slots.len()];
        self.free.iter().for_each(|&index| busy[index as usize] = false);
        (0..).zip(busy).filter_map(|(index, busy)| busy.then_some(index)).collect()
    }

    /// Writes a line when the oldest request in flight has been there for long.
    #[cold]
    fn look_for_late(&mut self, now: Instant) {
        let seen = self.busy().into_iter().map(|index| &self.slots[index as usize]).min_by_key(|slot| slot.seen);
        let Some(oldest) = seen else {
            self.next_look = None;
            self.late_looks = 0;
            return;
        };
        let (age, head) = (now - oldest.seen, oldest.chain.head);
        if age < LATE {
            self.next_look = Some(oldest.seen + LATE);
            self.late_looks = 0;
            return;
        }
        self.next_look = Some(now + LATE * 2u32.saturating_pow(self.late_looks.min(10)));
        self.late_looks += 1;
        let (seconds, in_flight) = (age.as_secs(), self.in_flight());
        tracing::warn!(parent: self.service.span(), head, seconds, in_flight, "the host has not completed a request");
    }

    fn free_slot(&mut self, now: Instant) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { chain: Chain::default(), request: H::Request::default(), seen: now });
            self.slots.len() as u32 - 1
        })
    }

    /// Requests end without help, except those that may wait for another side that never acts: cancel these. A
    /// suspending queue waits for no request if it can avoid it, so it leaves or cancels all of them.
    fn end_waiting(&mut self, index: u32, ring: &mut Ring) {
        if self.service.is_suspending() && self.handler.is_waiting(&self.slots[index as usize].request) {
            self.leave(index);
        } else if H::MAY_WAIT || self.service.is_suspending() {
            ring.cancel(Token { task: self.service.task(), slot: index });
        }
    }

    /// Releases a request of a suspended queue, with no operation in progress: its head is among those left.
    fn leave(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        self.handler.abandon(&mut slot.request);
        slot.chain.trim();
        self.free.push(index);
    }

    /// An operation of a suspended queue has ended. If that ends the request, the request is answered. If the request
    /// needs another step, it is left to the next server instead.
    #[cold]
    fn completed_last(&mut self, index: u32, result: i32, now: Instant) {
        if matches!(-result, libc::ECANCELED | libc::EINTR) {
            return self.leave(index);
        }
        let slot = &mut self.slots[index as usize];
        let mut io = Io::nowhere(Token { task: self.service.task(), slot: index });
        match self.handler.resume(&mut slot.chain, &mut slot.request, result, &mut io) {
            Step::Pending => self.leave(index),
            step => self.settle(index, step, now),
        }
    }

    #[inline(always)]
    fn resume(&mut self, index: u32, result: i32, now: Instant, ring: &mut Ring) {
        if self.service.is_suspending() {
            return self.completed_last(index, result, now);
        }
        let slot = &mut self.slots[index as usize];
        let mut io = Io::new(ring, Token { task: self.service.task(), slot: index });
        let step = self.handler.resume(&mut slot.chain, &mut slot.request, result, &mut io);
        if matches!(step, Step::Pending) && !self.service.is_running() {
            self.end_waiting(index, ring);
        }
        self.settle(index, step, now);
    }

    #[inline]
    fn settle(&mut self, index: u32, step: Step, now: Instant) {
        let slot = &mut self.slots[index as usize];
        match step {
            Step::Pending => return,
            Step::Done(outcome) => {
                self.service.queue.complete(slot.chain.head, outcome.written);
                self.service.stats.record(outcome.op, outcome.bytes, outcome.ok, slot.seen, now);
            }
            Step::Fault(what) => {
                let head = slot.chain.head;
                self.service.break_off(&RingError::Content { head, what });
            }
        }
        slot.chain.trim();
        self.free.push(index);
    }
}

impl<H: Handler> Task for Worker<H> {
    fn service(&mut self) -> &mut Service {
        &mut self.service
    }

    fn turn(&mut self, ring: &mut Ring) -> bool {
        if !self.ready() {
            return false;
        }
        self.service.disable_kicks();
        let now = Instant::now();
        let room = self.handler.window().saturating_sub(self.in_flight());
        // Take all chains before looking at the first, so that the driver's writes travel from its CPU in the
        // meantime. If one of them breaks the queue, those taken with it end like all requests in flight.
        for _ in 0..H::BATCH.min(room) {
            let index = self.free_slot(now);
            let slot = &mut self.slots[index as usize];
            if !self.service.pop(&mut slot.chain) {
                self.free.push(index);
                break;
            }
            slot.seen = now;
            slot.chain.fetch();
            self.taken.push(index);
        }
        let mut taken = std::mem::take(&mut self.taken);
        for index in taken.drain(..) {
            let slot = &mut self.slots[index as usize];
            let mut io = Io::new(ring, Token { task: self.service.task(), slot: index });
            let step = self.handler.start(&mut slot.chain, &mut slot.request, &mut io);
            self.settle(index, step, now);
        }
        self.taken = taken;
        if !H::MAY_WAIT && self.next_look.is_none() {
            self.next_look = Some(now + LATE);
        }
        true
    }

    fn completed(&mut self, index: u32, result: i32, now: Instant, ring: &mut Ring) {
        self.resume(index, result, now, ring);
    }

    fn woken(&mut self, now: Instant, ring: &mut Ring) {
        while let Some(index) = self.handler.next_woken() {
            self.resume(index, 0, now, ring);
        }
    }

    fn next_wake(&self) -> Option<Instant> {
        self.next_look
    }

    fn due(&mut self, now: Instant) {
        self.look_for_late(now);
    }

    fn ready(&self) -> bool {
        self.service.may_take() && self.in_flight() < self.handler.window() && self.service.queue.has_avail()
    }

    fn arm(&mut self) -> bool {
        // With a full window the next completion brings the thread back, not a kick.
        self.in_flight() < self.handler.window() && self.service.enable_kicks()
    }

    fn files(&self, with: &mut dyn FnMut(BorrowedFd<'_>)) {
        self.handler.files(with);
    }

    fn stop(&mut self, ring: &mut Ring) {
        for index in self.busy() {
            self.end_waiting(index, ring);
        }
    }

    fn is_idle(&self) -> bool {
        self.in_flight() == 0 && self.service.owes_nothing()
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
