//! A device's counters: plain numbers kept by the one thread that serves a queue, copied out on request.

pub mod histogram;

use std::time::Instant;

use histogram::Histogram;

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpStats {
    /// Name of the kind, as the specification has it (`read`, `flush`, …).
    pub name: &'static str,
    /// Requests completed, errors included.
    pub count: u64,
    /// Payload bytes moved by those that succeeded.
    pub bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
}

/// Requests in a row that were seen together and ended together, as those of a batch do.
#[derive(Clone, Copy, Debug)]
struct Run {
    seen: Instant,
    ended: Instant,
    count: u64,
}

/// Counters of one queue, or of all queues of a device together.
#[derive(Clone, Debug)]
pub struct QueueStats {
    /// One entry per kind of request that the device knows.
    pub ops: Vec<OpStats>,
    /// From seeing a request to its completion, in nanoseconds.
    pub latency: Histogram,
    /// The latest values, not in the histogram yet.
    run: Option<Run>,
    /// Doorbells that woke the I/O thread.
    pub kicks: u64,
    /// Interrupts raised.
    pub interrupts: u64,
    /// Used buffers whose interrupt the driver did not ask for.
    pub interrupts_suppressed: u64,
    /// Times that polling found work before its budget ran out.
    pub poll_hits: u64,
    /// Times that polling ended without work.
    pub poll_misses: u64,
    /// Chains the driver got wrong in a way that could still be answered.
    pub bad_chains: u64,
}

impl QueueStats {
    /// Nothing counted yet, for a device that knows these kinds of request.
    #[must_use]
    pub fn new(ops: &[&'static str]) -> Self {
        Self {
            ops: ops.iter().map(|name| OpStats { name, ..OpStats::default() }).collect(),
            latency: Histogram::default(),
            run: None,
            kicks: 0,
            interrupts: 0,
            interrupts_suppressed: 0,
            poll_hits: 0,
            poll_misses: 0,
            bad_chains: 0,
        }
    }

    /// Counts one completed request of the kind with index `op`.
    #[inline]
    pub fn record(&mut self, op: usize, bytes: u64, ok: bool, seen: Instant, ended: Instant) {
        self.count(op, bytes, ok);
        match &mut self.run {
            Some(run) if run.seen == seen && run.ended == ended => run.count += 1,
            _ => {
                self.settle();
                self.run = Some(Run { seen, ended, count: 1 });
            }
        }
    }

    /// Brings the histogram up to date. The recording thread calls it before another one looks.
    pub fn settle(&mut self) {
        if let Some(Run { seen, ended, count }) = self.run.take() {
            self.latency.record(ended.duration_since(seen).as_nanos() as u64, count);
        }
    }

    /// Counts what has no latency: it came from outside.
    #[inline]
    pub fn count(&mut self, op: usize, bytes: u64, ok: bool) {
        let entry = &mut self.ops[op];
        entry.count += 1;
        if ok {
            entry.bytes += bytes;
        } else {
            entry.errors += 1;
        }
    }

    /// Adds what another queue, or another run of the same one, counted.
    pub fn merge(&mut self, other: &Self) {
        for theirs in &other.ops {
            let place = self.ops.iter().position(|mine| mine.name == theirs.name).unwrap_or_else(|| {
                self.ops.push(OpStats { name: theirs.name, ..OpStats::default() });
                self.ops.len() - 1
            });
            let mine = &mut self.ops[place];
            mine.count += theirs.count;
            mine.bytes += theirs.bytes;
            mine.errors += theirs.errors;
        }
        self.latency.merge(&other.latency);
        self.kicks += other.kicks;
        self.interrupts += other.interrupts;
        self.interrupts_suppressed += other.interrupts_suppressed;
        self.poll_hits += other.poll_hits;
        self.poll_misses += other.poll_misses;
        self.bad_chains += other.bad_chains;
    }
}

/// The statistics of a device.
#[derive(Clone, Debug, Default)]
pub struct DeviceStats {
    /// Name of the device.
    pub name: String,
    /// Each queue that has ever run, with its index.
    pub queues: Vec<(u16, QueueStats)>,
}

impl DeviceStats {
    /// Adds what another life of the same device counted.
    pub fn merge(&mut self, other: &Self) {
        for (index, theirs) in &other.queues {
            match self.queues.iter_mut().find(|(mine, _)| mine == index) {
                Some((_, mine)) => mine.merge(theirs),
                None => self.queues.push((*index, theirs.clone())),
            }
        }
        self.queues.sort_by_key(|(index, _)| *index);
    }

    /// All queues together; `None` if none has ever run.
    #[must_use]
    pub fn total(&self) -> Option<QueueStats> {
        let (first, rest) = self.queues.split_first()?;
        let mut total = first.1.clone();
        rest.iter().for_each(|(_, queue)| total.merge(queue));
        Some(total)
    }
}
