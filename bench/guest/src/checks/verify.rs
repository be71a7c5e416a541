//! `job=verify` and `job=reset`: random operations over random ranges, cut in random ways, checked against a model.
//!
//! Each queue has a part of the disk to itself, so that nothing outstanding overlaps; parts move on to the next queue
//! from phase to phase, so that what one queue (and vCPU) wrote is read through another.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::checks::lane::{Counts, Lane, Shared};
use crate::drivers::blk::{Blk, BlkQueue};
use crate::drivers::wait::Waiter;
use crate::job::Options;
use crate::machine::smp::{self, Barrier};
use crate::machine::sync::Lock;
use crate::machine::{clock, fail};
use crate::say;
use crate::shared::rng::Rng;
use crate::spec::{self, SECTOR};

const DEFAULT_OPS: u64 = 20_000;
const PHASES: u64 = 4;

/// `job=verify`.
pub fn verify(options: &Options) {
    let blk = Blk::open(options);
    let shared = Shared::new(&blk, options);
    let lanes = lanes(&blk, &shared);
    say!(
        "start job={} size={} queues={} seg_max={} features={:#x}",
        options.name,
        shared.model.sectors() * SECTOR as u64,
        lanes.len(),
        shared.limits.segs,
        blk.features
    );
    let start = clock::ticks();
    phases(&blk, &shared, &lanes);
    blk.transport.reset();
    report(options, &blk, &lanes, clock::ticks() - start, 0);
}

/// `job=reset`.
pub fn reset(options: &Options) {
    let mut blk = Blk::open(options);
    let shared = Shared::new(&blk, options);
    let lanes = lanes(&blk, &shared);
    let cpus = options.cpus.min(lanes.len());
    say!("start job={} rounds={} queues={}", options.name, options.rounds, lanes.len());
    let start = clock::ticks();
    let mut in_flight = 0;
    for round in 0.. {
        if round >= options.rounds && !options.goes_on() {
            break;
        }
        assign(&shared, &lanes, round);
        let per_lane = 1 + Rng::new(options.seed ^ round).below(400);
        smp::run(cpus, &|cpu| {
            let mut waiter = Waiter::new(options);
            let mut own = hold(&blk, &lanes, cpu, cpus);
            // With a time, a device that answers nothing is reset all the same.
            let end = options.time_ms.map(|ms| clock::ticks() + clock::from_ms(ms));
            drive(&mut own, &shared, &mut waiter, Stop::after(per_lane, end));
        });
        blk.transport.reset();
        for lane in &lanes {
            in_flight += lane.lock().abandon(&shared);
        }
        blk = Blk::up(blk.transport, options);
        if blk.features != shared.features {
            fail(format_args!("features where=reset expected={:#x} got={:#x}", shared.features, blk.features));
        }
        // Long enough for a write of a request that was not waited for.
        clock::delay_ms(2);
        for (lane, queue) in lanes.iter().zip(&blk.queues) {
            let mut lane = lane.lock();
            lane.check_untouched();
            lane.start(usize::from(queue.lock().queue.layout.size));
        }
    }
    phases(&blk, &shared, &lanes);
    blk.transport.reset();
    report(options, &blk, &lanes, clock::ticks() - start, in_flight);
}

/// A model with the lanes that work on it, for jobs that want to know now and then whether a device still works.
pub struct Checker<'a> {
    shared: Shared<'a>,
    lanes: Vec<Lock<Lane>>,
}

impl<'a> Checker<'a> {
    /// For a device that is up.
    pub fn new(blk: &Blk, options: &'a Options) -> Self {
        let shared = Shared::new(blk, options);
        let lanes = lanes(blk, &shared);
        assign(&shared, &lanes, 0);
        Self { shared, lanes }
    }

    /// Does so many random operations on each queue of a device that was just brought up, and waits for all of them.
    pub fn run(&self, blk: &Blk, ops: u64) {
        self.start(blk);
        self.round(blk, ops);
    }

    /// Before the first round of a device that was just brought up.
    pub fn start(&self, blk: &Blk) {
        for (lane, queue) in self.lanes.iter().zip(&blk.queues) {
            lane.lock().start(usize::from(queue.lock().queue.layout.size));
        }
    }

    /// Does so many random operations on each queue, and waits for all of them.
    pub fn round(&self, blk: &Blk, ops: u64) {
        let mut waiter = Waiter::new(self.shared.options);
        let mut own = hold(blk, &self.lanes, 0, 1);
        drive(&mut own, &self.shared, &mut waiter, Stop::after(ops, None));
        drive(&mut own, &self.shared, &mut waiter, Stop::after(0, None));
    }

    /// Reads everything back.
    pub fn read_back(&self, blk: &Blk) {
        let mut waiter = Waiter::new(self.shared.options);
        let mut own = hold(blk, &self.lanes, 0, 1);
        own.iter_mut().for_each(|(lane, _)| lane.read_back = Some(lane.first));
        drive(&mut own, &self.shared, &mut waiter, Stop::after(u64::MAX, None));
    }

    /// How many sectors were compared with the model.
    pub fn sectors_checked(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.lock().counts.sectors_checked).sum()
    }
}

/// Random operations in [`PHASES`], or more if the job goes on, and at the end everything read back.
fn phases(blk: &Blk, shared: &Shared<'_>, lanes: &[Lock<Lane>]) {
    let options = shared.options;
    let cpus = options.cpus.min(lanes.len());
    let barrier = Barrier::new(cpus);
    let ops = options.ops.or(if options.time_ms.is_none() { Some(DEFAULT_OPS) } else { None });
    let over = AtomicBool::new(false);
    smp::run(cpus, &|cpu| {
        let mut waiter = Waiter::new(options);
        for phase in 0.. {
            if cpu == 0 {
                over.store(phase >= PHASES && !options.goes_on(), Ordering::Relaxed);
                assign(shared, lanes, phase);
                if blk.has(spec::F_CONFIG_WCE) {
                    blk.set_writeback(phase % 2 == 0);
                }
            }
            barrier.wait();
            let mut own = hold(blk, lanes, cpu, cpus);
            let over = over.load(Ordering::Relaxed);
            if over {
                own.iter_mut().for_each(|(lane, _)| lane.read_back = Some(lane.first));
                drive(&mut own, shared, &mut waiter, Stop::after(u64::MAX, None));
            } else {
                let per_lane = ops.map_or(u64::MAX, |ops| ops.div_ceil(PHASES * lanes.len() as u64));
                let end = options.time_ms.map(|ms| clock::ticks() + clock::from_ms(ms) / PHASES);
                drive(&mut own, shared, &mut waiter, Stop::after(per_lane, end));
                drive(&mut own, shared, &mut waiter, Stop::after(0, None));
            }
            drop(own);
            barrier.wait();
            if over {
                break;
            }
        }
    });
}

/// Gives each queue its part of the disk.
fn assign(shared: &Shared<'_>, lanes: &[Lock<Lane>], phase: u64) {
    let count = lanes.len() as u64;
    let part = shared.model.sectors() / count / shared.grain * shared.grain;
    for lane in lanes {
        let mut lane = lane.lock();
        let turn = (lane.index + phase) % count;
        lane.first = turn * part;
        lane.end = if turn + 1 == count { shared.model.sectors() } else { lane.first + part };
        lane.read_back = None;
    }
}

type HeldLane<'a> = (crate::machine::sync::Held<'a, Lane>, crate::machine::sync::Held<'a, BlkQueue>);

/// The lanes and queues of one vCPU.
fn hold<'a>(blk: &'a Blk, lanes: &'a [Lock<Lane>], cpu: usize, cpus: usize) -> Vec<HeldLane<'a>> {
    lanes.iter().zip(&blk.queues).skip(cpu).step_by(cpus).map(|(lane, queue)| (lane.lock(), queue.lock())).collect()
}

/// When to leave off.
struct Stop {
    ops: u64,
    time: Option<u64>,
    /// Whether what is in flight is waited for when there is nothing more to submit.
    drain: bool,
}

impl Stop {
    fn after(ops: u64, time: Option<u64>) -> Self {
        Self { ops, time, drain: ops == 0 || ops == u64::MAX && time.is_none() }
    }
}

fn drive(own: &mut [HeldLane<'_>], shared: &Shared<'_>, waiter: &mut Waiter, stop: Stop) {
    let mut left: Vec<u64> = own.iter().map(|_| stop.ops).collect();
    loop {
        let now = clock::ticks();
        if stop.time.is_some_and(|end| now >= end) {
            return;
        }
        let (mut progress, mut more, mut busy) = (false, false, false);
        for ((lane, queue), left) in own.iter_mut().zip(&mut left) {
            progress |= lane.reap(queue, shared);
            let before = *left;
            while *left != 0 && lane.submit(queue, shared) {
                *left -= 1;
            }
            progress |= *left != before;
            queue.queue.publish();
            more |= *left != 0 && !lane.finished();
            busy |= queue.queue.in_flight() != 0;
        }
        if !(more || stop.drain && busy) {
            return;
        }
        if progress {
            waiter.moved(now);
            continue;
        }
        if shared.options.irq && shared.options.mask {
            own.iter_mut().for_each(|(lane, queue)| lane.try_masking(queue, &shared.options.stall_ms));
        }
        waiter.pause(now, own.iter_mut().map(|(_, queue)| &mut **queue));
    }
}

fn lanes(blk: &Blk, shared: &Shared<'_>) -> Vec<Lock<Lane>> {
    blk.queues.iter().map(|queue| Lock::new(Lane::new(&queue.lock(), shared))).collect()
}

fn report(options: &Options, blk: &Blk, lanes: &[Lock<Lane>], ticks: u64, in_flight: u64) {
    let mut all = Counts::default();
    let (mut kicks, mut irqs) = (0, 0);
    for (lane, queue) in lanes.iter().zip(&blk.queues) {
        let (lane, queue) = (lane.lock(), queue.lock());
        let c = lane.counts;
        all.ops += c.ops;
        all.reads += c.reads;
        all.writes += c.writes;
        all.zeroes += c.zeroes;
        all.discards += c.discards;
        all.flushes += c.flushes;
        all.ids += c.ids;
        all.bytes += c.bytes;
        all.sectors_checked += c.sectors_checked;
        all.indirect += c.indirect;
        all.descriptors += c.descriptors;
        all.masked += c.masked;
        kicks += queue.queue.kicks;
        irqs += queue.irq.map_or(0, |irq| irq.count());
    }
    say!(
        "result job={} queues={} cpus={} mode={} time_ns={} ops={} bytes={} reads={} writes={} write_zeroes={} \
         discards={} flushes={} ids={} sectors_checked={} descriptors={} indirect={} abandoned={in_flight} masked={} \
         errors=0 kicks={kicks} irqs={irqs}",
        options.name,
        lanes.len(),
        options.cpus.min(lanes.len()),
        if options.irq { "irq" } else { "poll" },
        clock::to_ns(ticks),
        all.ops,
        all.bytes,
        all.reads,
        all.writes,
        all.zeroes,
        all.discards,
        all.flushes,
        all.ids,
        all.sectors_checked,
        all.descriptors,
        all.indirect,
        all.masked
    );
}
