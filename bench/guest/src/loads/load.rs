//! Measured jobs: requests of one kind at a fixed depth, as tight as a driver can be. Descriptors, headers and buffers are
//! laid out once; a turn takes all completions, refills all free slots, publishes once and kicks at most once.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::Write;

use crate::drivers::blk::{self, Blk, BlkQueue};
use crate::drivers::queue::{DESCRIPTOR, INDIRECT, NEXT, WRITE, write_descriptor};
use crate::drivers::wait::Waiter;
use crate::job::{Load, Options};
use crate::machine::mem::{self, Region};
use crate::machine::smp::{self, Barrier};
use crate::machine::sync::Lock;
use crate::machine::{clock, fail};
use crate::shared::hist::Hist;
use crate::shared::rng::Rng;
use crate::{say, spec};

/// Header and status of a slot, on cache lines of their own: the driver writes one, the device the other.
const FIXED: usize = 128;
const STATUS: usize = 64;
const DEFAULT_TIME_MS: u64 = 2_000;

/// What a lane has measured.
struct Stats {
    ops: u64,
    errors: u64,
    ticks: u64,
    kicks: u64,
    irqs: u64,
    latency: Hist,
}

impl Stats {
    fn new() -> Box<Self> {
        Box::new(Self { ops: 0, errors: 0, ticks: 0, kicks: 0, irqs: 0, latency: Hist::default() })
    }
}

/// How the requests of a lane are laid out.
#[derive(Clone, Copy)]
struct Shape {
    /// Data descriptors.
    segs: u16,
    indirect: bool,
}

/// One queue at work.
struct Lane<'a> {
    queue: &'a mut BlkQueue,
    options: &'a Options,
    load: Load,
    shape: Shape,
    /// How many lanes share the job.
    lanes: u64,
    rng: Rng,
    /// How many blocks of `bs` there are, and the next one of a sequential job.
    blocks: u64,
    next_block: u64,
    free: Vec<u16>,
    submitted: Vec<u64>,
    block: Vec<u64>,
    reading: Vec<bool>,
    fixed: Region,
    data: Region,
    tables: Region,
    stats: Box<Stats>,
    /// Requests that may still be submitted.
    budget: u64,
}

/// What the lanes of one vCPU have measured, by queue.
type Results = Vec<(u16, Box<Stats>)>;

/// Brings the disk up, runs the job on all its queues, and prints the result.
pub fn run(options: &Options, load: Load) {
    let blk = Blk::open(options);
    let shape = check(&blk, options, load);
    let size = options.size.unwrap_or(u64::MAX).min(blk.config.capacity * spec::SECTOR as u64);
    let blocks = size / options.bs as u64;
    if blocks == 0 || blocks > 1 << 32 {
        fail(format_args!("size where=disk expected=1..=2^32-blocks-of-{} got={size}", options.bs));
    }
    let lanes = blk.queues.len();
    let cpus = options.cpus.min(lanes);
    let results: Vec<Lock<Results>> = (0..cpus).map(|_| Lock::new(Vec::new())).collect();
    let barrier = Barrier::new(cpus);
    smp::run(cpus, &|cpu| {
        let mut held: Vec<_> = blk.queues.iter().skip(cpu).step_by(cpus).map(Lock::lock).collect();
        let mut own: Vec<Lane<'_>> =
            held.iter_mut().map(|queue| Lane::new(queue, options, load, shape, blocks, lanes)).collect();
        let mut waiter = Waiter::new(options);
        if options.warm_ms != 0 {
            let end = clock::ticks() + clock::from_ms(options.warm_ms);
            own.iter_mut().for_each(|lane| lane.budget = u64::MAX);
            drive(&mut own, &mut waiter, Some(end));
            drain(&mut own, &mut waiter);
        }
        barrier.wait();
        if cpu == 0 {
            say!("start job={}", options.name);
        }
        barrier.wait();
        own.iter_mut().for_each(Lane::measure);
        let start = clock::ticks();
        let time = options.time_ms.or(if options.ops.is_none() { Some(DEFAULT_TIME_MS) } else { None });
        drive(&mut own, &mut waiter, time.map(|ms| start + clock::from_ms(ms)));
        let ticks = clock::ticks() - start;
        let counted = own.iter_mut().map(|lane| (lane.queue.queue.index, lane.close(ticks))).collect();
        drain(&mut own, &mut waiter);
        *results[cpu].lock() = counted;
    });
    // Whoever counts what the VMM does stops here: the letters of a result cost exits of their own.
    say!("end");
    let latency =
        report(options, shape, cpus, results.iter().flat_map(|lane| core::mem::take(&mut *lane.lock())).collect());
    // After the report: there are VMMs whose I/O threads end with the device, and their CPU time is looked at by then.
    blk.transport.reset();
    if options.hist {
        distribution(&latency);
    }
}

/// Refuses what the device can't do, and decides how chains are laid out.
fn check(blk: &Blk, options: &Options, load: Load) -> Shape {
    let need = match load {
        Load::Flush => spec::F_FLUSH,
        Load::Discard => spec::F_DISCARD,
        Load::WriteZeroes => spec::F_WRITE_ZEROES,
        Load::Read | Load::Write | Load::Mixed => 0,
    };
    if !blk.has(need) {
        fail(format_args!("features where=device expected={need:#x} got={:#x}", blk.features));
    }
    if load != Load::Read && load != Load::Flush && blk.has(spec::F_RO) {
        fail(format_args!("features where=device expected=writable got=VIRTIO_BLK_F_RO"));
    }
    let sectors = (options.bs / spec::SECTOR) as u32;
    let most = match load {
        Load::Discard => blk.config.max_discard_sectors,
        Load::WriteZeroes => blk.config.max_write_zeroes_sectors,
        _ => u32::MAX,
    };
    if sectors > most {
        fail(format_args!("bs where=device expected=at-most-{most}-sectors got={sectors}"));
    }
    let segs = match load {
        Load::Flush => 0,
        Load::Discard | Load::WriteZeroes => 1,
        _ => options.segs.unwrap_or(1),
    };
    let size = usize::from(blk.queues[0].lock().queue.layout.size);
    if segs > blk.config.seg_max as usize || segs + 2 > size || (segs != 0 && !options.bs.is_multiple_of(segs)) {
        fail(format_args!("segs where=device expected=a-divisor-of-bs-up-to-{} got={segs}", blk.config.seg_max));
    }
    let direct_fits = options.depth * (segs + 2) <= size;
    let indirect = options.indirect.unwrap_or(!direct_fits);
    if indirect && !blk.has(spec::RING_INDIRECT_DESC) || !indirect && !direct_fits || options.depth > size {
        fail(format_args!(
            "depth where=queue expected=fits-{size}-descriptors got=depth:{},segs:{segs},indirect:{indirect}",
            options.depth
        ));
    }
    Shape { segs: segs as u16, indirect }
}

/// Submits and reaps on all lanes until `end`, or until no lane has anything left to do.
fn drive(lanes: &mut [Lane<'_>], waiter: &mut Waiter, end: Option<u64>) {
    loop {
        let now = clock::ticks();
        if end.is_some_and(|end| now >= end) {
            return;
        }
        let mut progress = false;
        let mut busy = false;
        for lane in lanes.iter_mut() {
            progress |= lane.reap(now);
            lane.fill(now);
            busy |= lane.queue.queue.in_flight() != 0;
        }
        if progress {
            waiter.moved(now);
        } else if busy {
            waiter.pause(now, lanes.iter_mut().map(|lane| &mut *lane.queue));
        } else {
            return;
        }
    }
}

/// Reaps until nothing is in flight.
fn drain(lanes: &mut [Lane<'_>], waiter: &mut Waiter) {
    lanes.iter_mut().for_each(|lane| lane.budget = 0);
    drive(lanes, waiter, None);
}

impl<'a> Lane<'a> {
    fn new(queue: &'a mut BlkQueue, options: &'a Options, load: Load, shape: Shape, blocks: u64, lanes: usize) -> Self {
        let index = u64::from(queue.queue.index);
        let depth = options.depth;
        let chain = usize::from(shape.segs) + 2;
        let data_len = match load {
            Load::Flush => 0,
            Load::Discard | Load::WriteZeroes => blk::RANGE,
            _ => options.bs,
        };
        let mut lane = Self {
            queue,
            options,
            load,
            shape,
            lanes: lanes as u64,
            rng: Rng::new(options.seed.wrapping_add(index)),
            blocks,
            // Sequential queues start apart from each other.
            next_block: blocks / lanes as u64 * index,
            free: (0..depth as u16).rev().collect(),
            submitted: alloc::vec![0; depth],
            block: alloc::vec![0; depth],
            reading: alloc::vec![load == Load::Read; depth],
            fixed: mem::dma(depth * FIXED, 4096),
            data: mem::dma(depth * data_len, 4096),
            tables: if shape.indirect { mem::dma(depth * chain * DESCRIPTOR, 4096) } else { Region::EMPTY },
            stats: Stats::new(),
            budget: 0,
        };
        for slot in 0..depth as u16 {
            lane.lay_out(slot, data_len);
        }
        lane
    }

    /// Writes what stays the same in a slot's requests.
    fn lay_out(&mut self, slot: u16, data_len: usize) {
        let (table, first) = self.chain(slot);
        let at = usize::from(slot);
        let segs = self.shape.segs;
        let fixed = self.fixed.base() + at * FIXED;
        write_descriptor(table, first, fixed, blk::HEADER as u32, NEXT, first + 1);
        let seg_len = data_len / usize::from(segs.max(1));
        let flags = if self.load == Load::Read { NEXT | WRITE } else { NEXT };
        for seg in 0..segs {
            let address = self.data.base() + at * data_len + usize::from(seg) * seg_len;
            write_descriptor(table, first + 1 + seg, address, seg_len as u32, flags, first + 2 + seg);
        }
        write_descriptor(table, first + 1 + segs, fixed + STATUS, 1, WRITE, 0);
        if self.shape.indirect {
            let len = (usize::from(segs) + 2) * DESCRIPTOR;
            write_descriptor(self.queue.queue.layout.desc, slot, table.base(), len as u32, INDIRECT, 0);
        }
        let kind = match self.load {
            Load::Read | Load::Mixed => blk::T_IN,
            Load::Write => blk::T_OUT,
            Load::Flush => blk::T_FLUSH,
            Load::Discard => blk::T_DISCARD,
            Load::WriteZeroes => blk::T_WRITE_ZEROES,
        };
        self.fixed.copy_in(at * FIXED, &blk::header(kind, 0));
        if self.load == Load::Write || self.load == Load::Mixed {
            // Not zeroes: storage must not get away with holes.
            self.data.fill(at * data_len, data_len, 0x5a ^ slot as u8);
        }
    }

    /// Where a slot's chain is: the table and its first descriptor there.
    fn chain(&self, slot: u16) -> (Region, u16) {
        let chain = self.shape.segs + 2;
        if self.shape.indirect {
            let len = usize::from(chain) * DESCRIPTOR;
            (self.tables.sub(usize::from(slot) * len, len), 0)
        } else {
            (self.queue.queue.layout.desc, slot * chain)
        }
    }

    fn head(&self, slot: u16) -> u16 {
        if self.shape.indirect { slot } else { slot * (self.shape.segs + 2) }
    }

    /// Takes what the device has returned.
    #[inline]
    fn reap(&mut self, now: u64) -> bool {
        let mut any = false;
        let divisor = if self.shape.indirect { 1 } else { u32::from(self.shape.segs) + 2 };
        while let Some((head, _)) = self.queue.queue.next_used() {
            let slot = (head / divisor) as usize;
            if slot >= self.options.depth || head % divisor != 0 || self.submitted[slot] == 0 {
                fail(format_args!("used where=queue:{} expected=a-head-in-flight got={head}", self.queue.queue.index));
            }
            let status: u8 = self.fixed.read(slot * FIXED + STATUS);
            if status != blk::S_OK {
                self.stats.errors += 1;
            }
            self.stats.latency.record(now.wrapping_sub(self.submitted[slot]));
            self.stats.ops += 1;
            self.submitted[slot] = 0;
            if self.options.verify && self.reading[slot] && status == blk::S_OK {
                self.check_block(slot);
            }
            self.free.push(slot as u16);
            any = true;
        }
        if any {
            self.queue.quiet();
        }
        any
    }

    /// Submits on all free slots.
    #[inline]
    fn fill(&mut self, now: u64) {
        while self.budget != 0
            && let Some(slot) = self.free.pop()
        {
            self.budget -= 1;
            self.prepare(slot);
            self.submitted[usize::from(slot)] = now;
            self.queue.queue.offer(self.head(slot));
        }
        self.queue.queue.publish();
    }

    #[inline]
    fn prepare(&mut self, slot: u16) {
        let at = usize::from(slot);
        let block = if self.options.random {
            self.rng.below(self.blocks)
        } else {
            let block = self.next_block;
            self.next_block = if block + 1 == self.blocks { 0 } else { block + 1 };
            block
        };
        let sectors = self.options.bs / spec::SECTOR;
        let sector = block * sectors as u64;
        self.fixed.write::<u8>(at * FIXED + STATUS, blk::S_UNSET);
        match self.load {
            Load::Read | Load::Write => self.fixed.write(at * FIXED + 8, sector),
            Load::Mixed => {
                let read = self.rng.below(100) < self.options.rw;
                self.fixed.write(at * FIXED, if read { blk::T_IN } else { blk::T_OUT });
                self.fixed.write(at * FIXED + 8, sector);
                self.reading[at] = read;
                let (table, first) = self.chain(slot);
                for seg in first + 1..=first + self.shape.segs {
                    table.write(usize::from(seg) * DESCRIPTOR + 12, if read { NEXT | WRITE } else { NEXT });
                }
            }
            Load::Flush => {}
            Load::Discard | Load::WriteZeroes => {
                self.data.copy_in(at * blk::RANGE, &blk::range(sector, sectors as u32, 0));
            }
        }
        if self.options.verify {
            self.block[at] = block;
            if !self.reading[at] && matches!(self.load, Load::Write | Load::Mixed) {
                self.stamp_block(at);
            }
        }
    }

    /// Writes into each sector of a slot's buffer where it belongs.
    fn stamp_block(&mut self, slot: usize) {
        let sectors = self.options.bs / spec::SECTOR;
        for index in 0..sectors {
            let sector = self.block[slot] * sectors as u64 + index as u64;
            let at = slot * self.options.bs + index * spec::SECTOR;
            self.data.write(at, sector ^ STAMP);
            self.data.write(at + spec::SECTOR - 8, sector ^ STAMP);
        }
    }

    fn check_block(&self, slot: usize) {
        let sectors = self.options.bs / spec::SECTOR;
        for index in 0..sectors {
            let sector = self.block[slot] * sectors as u64 + index as u64;
            let at = slot * self.options.bs + index * spec::SECTOR;
            let got = [self.data.read::<u64>(at), self.data.read::<u64>(at + spec::SECTOR - 8)];
            if got != [sector ^ STAMP; 2] {
                fail(format_args!(
                    "verify where=sector:{sector} expected={:#x} got={:#x},{:#x}",
                    sector ^ STAMP,
                    got[0],
                    got[1]
                ));
            }
        }
    }

    /// Starts counting.
    fn measure(&mut self) {
        self.stats = Stats::new();
        self.stats.kicks = self.queue.queue.kicks;
        self.stats.irqs = self.queue.irq.map_or(0, |irq| irq.count());
        self.budget = match self.options.ops {
            Some(ops) => ops / self.lanes + u64::from(u64::from(self.queue.queue.index) < ops % self.lanes),
            None => u64::MAX,
        };
    }

    /// Stops counting: what is drained from here on is not part of the result.
    fn close(&mut self, ticks: u64) -> Box<Stats> {
        let mut stats = core::mem::replace(&mut self.stats, Stats::new());
        stats.ticks = ticks;
        stats.kicks = self.queue.queue.kicks - stats.kicks;
        stats.irqs = self.queue.irq.map_or(0, |irq| irq.count()) - stats.irqs;
        stats
    }
}

/// What makes a stamped sector differ from a zeroed one.
const STAMP: u64 = 0x7269_6e67_766d_0000;

/// Prints the result of all lanes together, and of each if that is wanted; returns the sum.
fn report(options: &Options, shape: Shape, cpus: usize, mut lanes: Vec<(u16, Box<Stats>)>) -> Box<Stats> {
    lanes.sort_by_key(|&(index, _)| index);
    let mut all = Stats::new();
    let mut iops = 0;
    for (index, lane) in &lanes {
        let lane_iops = per_second(lane.ops, lane.ticks);
        iops += lane_iops;
        all.ops += lane.ops;
        all.errors += lane.errors;
        all.ticks = all.ticks.max(lane.ticks);
        all.kicks += lane.kicks;
        all.irqs += lane.irqs;
        all.latency.merge(&lane.latency);
        if options.per_queue {
            print(&format_args!("queue={index}"), options, lane, lane_iops);
        }
    }
    let layout = format_args!(
        "depth={} queues={} cpus={cpus} mode={} chain={} segs={}",
        options.depth,
        lanes.len(),
        if options.irq { "irq" } else { "poll" },
        if shape.indirect { "indirect" } else { "direct" },
        shape.segs
    );
    print(&layout, options, &all, iops);
    all
}

/// Says how latencies were distributed: `END:COUNT` for each step that has some, all that end before END nanoseconds.
fn distribution(stats: &Stats) {
    const PER_LINE: usize = 16;
    let steps: Vec<_> = stats.latency.groups().collect();
    for steps in steps.chunks(PER_LINE) {
        let mut text = String::new();
        for &(end, count) in steps {
            let _ = write!(text, "{}{}:{count}", if text.is_empty() { "" } else { "," }, clock::to_ns(end));
        }
        say!("hist ns={text}");
    }
}

fn print(who: &core::fmt::Arguments<'_>, options: &Options, stats: &Stats, iops: u64) {
    let latency = |per_mille| clock::to_ns(stats.latency.percentile(per_mille));
    say!(
        "result job={} bs={} {who} time_ns={} ops={} bytes={} iops={iops} p50_ns={} p90_ns={} p99_ns={} p999_ns={} \
         max_ns={} errors={} kicks={} irqs={}",
        options.name,
        options.bs,
        clock::to_ns(stats.ticks),
        stats.ops,
        stats.ops * options.bs as u64,
        latency(500),
        latency(900),
        latency(990),
        latency(999),
        clock::to_ns(stats.latency.max()),
        stats.errors,
        stats.kicks,
        stats.irqs
    );
}

fn per_second(count: u64, ticks: u64) -> u64 {
    let ns = clock::to_ns(ticks).max(1);
    (u128::from(count) * 1_000_000_000 / u128::from(ns)) as u64
}
