//! The part common to every queue that a reactor serves, whatever its chains wait for: the ring's bookkeeping,
//! statistics, and the handling of a broken ring or a request to stop.

use std::task::Waker;

use tracing::Span;

use crate::stats::QueueStats;
use crate::virtqueue::buffers::Chain;
use crate::virtqueue::interrupt::Interrupt;
use crate::virtqueue::split::Queue;
use crate::virtqueue::{End, RingError, Suspended};

/// Most chains taken in one turn, unless a device sets its own bound. A batch shares its system call, its publication
/// and its interrupt. A bounded batch lets the driver continue with finished requests while the next batch is in
/// flight. And a driver that refills faster than its queue is drained can't keep the thread from other queues.
pub(crate) const BATCH: usize = 16;

#[derive(Debug, PartialEq, Eq)]
enum State {
    Running,
    /// The driver broke the queue: no new chains are taken, requests in flight end.
    Broken,
    /// Asked to leave: likewise.
    Stopping,
    /// Asked to leave at once: requests that can be cancelled are not waited for.
    Suspending,
}

/// A queue's place on its I/O thread, as the queue itself sees it.
#[derive(Debug)]
pub struct TaskHandle {
    /// Its number there.
    pub task: u32,
    /// Has the thread call `Task::woken`. Any thread may use it, for as long as it likes.
    pub waker: Waker,
}

#[cfg(test)]
impl TaskHandle {
    /// That of a queue without a thread, which nobody wakes.
    pub(crate) fn unthreaded(task: u32) -> Self {
        Self { task, waker: Waker::noop().clone() }
    }
}

/// One queue in service.
pub struct Service {
    span: Span,
    pub(crate) queue: Queue,
    pub(crate) stats: QueueStats,
    fault: Interrupt,
    state: State,
    handle: TaskHandle,
    kicks_wanted: bool,
}

impl Service {
    /// A queue with this place at its reactor, which the log knows by `span`. `fault` is raised if the driver breaks
    /// it; `ops` names what is counted.
    pub(crate) fn new(span: Span, queue: Queue, fault: Interrupt, handle: TaskHandle, ops: &[&'static str]) -> Self {
        Self { span, queue, stats: QueueStats::new(ops), fault, state: State::Running, handle, kicks_wanted: true }
    }

    /// Its number on the reactor.
    pub(crate) fn task(&self) -> u32 {
        self.handle.task
    }

    /// Has its thread look for requests that were woken.
    pub(crate) fn waker(&self) -> &Waker {
        &self.handle.waker
    }

    /// What lines of the log about it are part of.
    pub(crate) fn span(&self) -> &Span {
        &self.span
    }

    /// Whether new chains may be taken.
    pub(crate) fn is_running(&self) -> bool {
        self.state == State::Running
    }

    /// Whether requests in flight are left to another server.
    pub(crate) fn is_suspending(&self) -> bool {
        self.state == State::Suspending
    }

    /// Whether chains may be taken: new ones or, while the queue stops, those left by a predecessor. This queue alone
    /// knows of the latter: a position says how far the driver's ring was looked at, and everything before it counts
    /// as answered.
    pub(crate) fn may_take(&self) -> bool {
        match self.state {
            State::Running => true,
            State::Stopping => self.queue.has_replay(),
            State::Broken | State::Suspending => false,
        }
    }

    /// Whether it could be left now, with nothing in flight.
    pub(crate) fn owes_nothing(&self) -> bool {
        self.state != State::Stopping || !self.queue.has_replay()
    }

    /// Takes the next chain, if there is one and it is sound.
    pub(crate) fn pop(&mut self, chain: &mut Chain) -> bool {
        self.may_take()
            && self.queue.pop(chain).unwrap_or_else(|error| {
                self.break_off(&error);
                false
            })
    }

    /// The driver broke the queue so that it can't be answered.
    pub(crate) fn break_off(&mut self, error: &RingError) {
        self.stats.bad_chains += 1;
        if self.state == State::Running {
            // A driver can do this at will, so it is the transport, told by the fault line, that warns, as often as it likes.
            tracing::info!(parent: &self.span, %error, "the driver broke the queue, the device needs a reset");
            self.state = State::Broken;
            self.fault.raise();
        }
    }

    /// Asks the driver for kicks; returns whether a chain has come in the meantime.
    pub(crate) fn enable_kicks(&mut self) -> bool {
        if self.state != State::Running {
            return false;
        }
        self.kicks_wanted = true;
        self.queue.enable_kicks()
    }

    /// Asks the driver for no kicks, if it was asked for some.
    pub(crate) fn disable_kicks(&mut self) {
        if std::mem::take(&mut self.kicks_wanted) {
            self.queue.disable_kicks();
        }
    }

    /// Publishes the completions since the last call, with at most one interrupt.
    pub(crate) fn publish(&mut self) {
        self.stats.settle();
        match self.queue.notify() {
            Some(true) => self.stats.interrupts += 1,
            Some(false) => self.stats.interrupts_suppressed += 1,
            None => {}
        }
    }

    /// Takes nothing new from now on.
    pub(crate) fn stop(&mut self, end: End) {
        self.state = match end {
            End::Drained => State::Stopping,
            End::Suspended => State::Suspending,
        };
    }

    /// The queue's position, with no operation in progress.
    pub(crate) fn end(&self) -> Suspended {
        let left = if self.is_suspending() { self.queue.left() } else { Vec::new() };
        Suspended { state: self.queue.state(), left }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // The reactor died under it; the driver would wait for ever.
        if self.state == State::Running {
            self.fault.raise();
        }
    }
}
