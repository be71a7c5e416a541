//! One queue's life on a reactor: drain, submit, reap, publish, poll, stop. Every kind of device runs in it.
//!
//! A device brings a [`Handler`], which turns a chain into operations of the data ring and says when it is done; the
//! worker owns everything around that: the ring's bookkeeping, the request slots, statistics, draining and what happens
//! when the driver breaks the queue.
#![allow(unsafe_code, reason = "passes the data ring's contract on to handlers")]

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use crate::device::QueueState;
use crate::guest_io::GuestIo;
use crate::interrupt::Interrupt;
use crate::queue::{Chain, Queue, RingError};
use crate::reactor::Task;
use crate::ring::{Ring, Token};
use crate::stats::QueueStats;

/// What a kind of device does with the chains of one queue. Lives on one thread.
pub trait Handler {
    /// What is remembered of a request in flight. Reused, so that a request costs no allocation.
    type Request: Default;

    /// Names of the kinds of request, for statistics; [`Outcome::op`] is an index into it.
    const OPS: &'static [&'static str];

    /// Looks at a new chain, and pushes its first operation if it needs one.
    fn start(&mut self, chain: &mut Chain, request: &mut Self::Request, io: &mut Io<'_>) -> Step;

    /// Goes on after the operation pushed last has ended with `result` (as of io_uring: a count or a negated errno).
    fn resume(&mut self, chain: &mut Chain, request: &mut Self::Request, result: i32, io: &mut Io<'_>) -> Step;
}

/// How far a request has come.
#[derive(Debug)]
pub enum Step {
    /// One operation was pushed; its result comes to [`Handler::resume`].
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

/// The data ring as one request sees it: at most one operation at a time.
pub struct Io<'a> {
    ring: &'a mut Ring,
    token: Token,
}

impl<'a> Io<'a> {
    pub(crate) fn new(ring: &'a mut Ring, token: Token) -> Self {
        Self { ring, token }
    }

    /// Reads into the pieces of `data` from `offset` on.
    ///
    /// # Safety
    /// `data` must not be changed or dropped before the request is resumed. What is kept in the request's chain or state
    /// is safe from being dropped: the worker keeps both until then.
    pub unsafe fn read(&mut self, fd: BorrowedFd<'_>, data: &GuestIo, offset: u64) {
        // SAFETY: promised by the caller, and guest memory lives as long as the queue, which outlives the ring's use of it.
        unsafe { self.ring.read(self.token, fd, data.pieces(), offset) }
    }

    /// Writes the pieces of `data` at `offset`, through to stable storage if `durable`.
    ///
    /// # Safety
    /// As for [`Self::read`].
    pub unsafe fn write(&mut self, fd: BorrowedFd<'_>, data: &GuestIo, offset: u64, durable: bool) {
        // SAFETY: as in `read`.
        unsafe { self.ring.write(self.token, fd, data.pieces(), offset, durable) }
    }

    /// Reads into a buffer of the host's.
    ///
    /// # Safety
    /// The buffer must stay where it is until the request is resumed, and nothing else may touch it.
    pub unsafe fn read_buf(&mut self, fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) {
        let piece = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: promised by the caller; a single piece is passed by value.
        unsafe { self.ring.read(self.token, fd, &[piece], offset) }
    }

    /// Writes a buffer of the host's, through to stable storage if `durable`.
    ///
    /// # Safety
    /// The buffer must stay as it is until the request is resumed.
    pub unsafe fn write_buf(&mut self, fd: BorrowedFd<'_>, buf: &[u8], offset: u64, durable: bool) {
        let piece = libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() };
        // SAFETY: promised by the caller; a single piece is passed by value, and a write does not change it.
        unsafe { self.ring.write(self.token, fd, &[piece], offset, durable) }
    }

    /// Makes the file's data durable.
    pub fn sync_data(&mut self, fd: BorrowedFd<'_>) {
        self.ring.sync_data(self.token, fd);
    }

    /// Deallocates or zeroes a range, see fallocate(2).
    pub fn fallocate(&mut self, fd: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) {
        self.ring.fallocate(self.token, fd, mode, offset, len);
    }

    /// Resumes the request after a pause.
    pub fn sleep(&mut self, pause: Duration) {
        self.ring.sleep(self.token, pause);
    }
}

/// Most chains taken in one turn. A batch shares its system call, its publication and its interrupt; a bounded one lets the
/// driver go on with what is done while the next is under way, and a driver that refills faster than its queue is drained
/// can't keep the thread from other queues.
const BATCH: usize = 16;

struct Slot<R> {
    chain: Chain,
    request: R,
    started: Instant,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Running,
    /// The driver broke the queue: nothing new is taken, what is in flight ends.
    Broken,
    /// Asked to stop: likewise.
    Stopping,
}

/// A queue and the handler that serves it.
pub struct Worker<H: Handler> {
    name: String,
    queue: Queue,
    handler: H,
    fault: Interrupt,
    state: State,
    task: u32,
    slots: Vec<Slot<H::Request>>,
    free: Vec<u32>,
    kicks_wanted: bool,
    stats: QueueStats,
}

impl<H: Handler> Worker<H> {
    /// A worker that its reactor knows as `task`. `fault` is raised if the driver breaks the queue.
    pub fn new(name: String, queue: Queue, handler: H, fault: Interrupt, task: u32) -> Self {
        Self {
            name,
            queue,
            handler,
            fault,
            state: State::Running,
            task,
            slots: Vec::new(),
            free: Vec::new(),
            kicks_wanted: true,
            stats: QueueStats::new(H::OPS),
        }
    }

    fn free_slot(&mut self, now: Instant) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot { chain: Chain::default(), request: H::Request::default(), started: now });
            self.slots.len() as u32 - 1
        })
    }

    fn settle(&mut self, index: u32, step: Step, now: Instant) {
        let slot = &self.slots[index as usize];
        match step {
            Step::Pending => return,
            Step::Done(outcome) => {
                self.queue.complete(slot.chain.head, outcome.written);
                let latency = now.duration_since(slot.started).as_nanos() as u64;
                self.stats.record(outcome.op, outcome.bytes, outcome.ok, latency);
            }
            Step::Fault(what) => {
                let head = slot.chain.head;
                self.break_off(&RingError::Content { head, what });
            }
        }
        self.free.push(index);
    }

    fn break_off(&mut self, error: &RingError) {
        self.stats.bad_chains += 1;
        if self.state == State::Running {
            tracing::warn!(queue = %self.name, %error, "the driver broke the queue, the device needs a reset");
            self.state = State::Broken;
            self.fault.raise();
        }
    }
}

impl<H: Handler> Task for Worker<H> {
    fn turn(&mut self, ring: &mut Ring) -> bool {
        if self.state != State::Running || !self.queue.has_avail() {
            return false;
        }
        if std::mem::take(&mut self.kicks_wanted) {
            self.queue.disable_kicks();
        }
        let now = Instant::now();
        for _ in 0..BATCH {
            let index = self.free_slot(now);
            let slot = &mut self.slots[index as usize];
            match self.queue.pop(&mut slot.chain) {
                Ok(true) => {}
                Ok(false) => {
                    self.free.push(index);
                    break;
                }
                Err(error) => {
                    self.free.push(index);
                    self.break_off(&error);
                    break;
                }
            }
            slot.started = now;
            let mut io = Io::new(ring, Token { task: self.task, slot: index });
            let step = self.handler.start(&mut slot.chain, &mut slot.request, &mut io);
            self.settle(index, step, now);
            if self.state != State::Running {
                break;
            }
        }
        true
    }

    fn completed(&mut self, index: u32, result: i32, now: Instant, ring: &mut Ring) {
        let slot = &mut self.slots[index as usize];
        let mut io = Io::new(ring, Token { task: self.task, slot: index });
        let step = self.handler.resume(&mut slot.chain, &mut slot.request, result, &mut io);
        self.settle(index, step, now);
    }

    fn publish(&mut self) {
        match self.queue.notify() {
            Some(true) => self.stats.interrupts += 1,
            Some(false) => self.stats.interrupts_suppressed += 1,
            None => {}
        }
    }

    fn ready(&self) -> bool {
        self.state == State::Running && self.queue.has_avail()
    }

    fn arm(&mut self) -> bool {
        if self.state != State::Running {
            return false;
        }
        self.kicks_wanted = true;
        self.queue.enable_kicks()
    }

    fn kicked(&mut self) {
        self.stats.kicks += 1;
    }

    fn polled(&mut self, hit: bool) {
        if hit {
            self.stats.poll_hits += 1;
        } else {
            self.stats.poll_misses += 1;
        }
    }

    fn stop(&mut self) {
        self.state = State::Stopping;
    }

    fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    fn state(&self) -> QueueState {
        self.queue.state()
    }

    fn stats(&self) -> QueueStats {
        self.stats.clone()
    }
}

impl<H: Handler> Drop for Worker<H> {
    fn drop(&mut self) {
        // The reactor died under it; the driver would wait for ever.
        if self.state == State::Running {
            self.fault.raise();
        }
    }
}
