//! The block device without a VM: a virtqueue driver in this process takes the guest's place. What is measured is the
//! device and its I/O threads; no doorbell, interrupt or vCPU of KVM is in it.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use ringvm_backends::block::{BlockDevice, BlockOptions as DiskOptions, StorageKind};
use ringvm_backends::device::{Device, GuestMemory, QueueParts};
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_backends::testing::driver::{Buffer, Driver};
use ringvm_backends::virtqueue::interrupt::Interrupt;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_MQ, VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::cli::{BlockOptions, Pattern};
use crate::document::BlockPoint;
use crate::hist::Hist;
use crate::process;
use crate::rng::Rng;
use crate::run::{Latency, Sample};
use crate::scratch::Scratch;
use crate::signals;

/// Its name in tables and reports.
pub const NAME: &str = "backend alone";
const QUEUE_SIZE: u16 = 256;
const SECTOR: u64 = 512;
const PAGE: u64 = 4096;
/// Header and status of a slot, on cache lines of their own.
const FIXED: u64 = 128;
const STATUS: u64 = 64;
/// Descriptors of a request: header, data, status.
const CHAIN: u64 = 3;
const STATUS_UNSET: u8 = 0xee;
/// Per cent of reads in [`Pattern::Mixed`], as in the guest.
const READS: u64 = 70;
/// How long a completion may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// How many completions go by before "no interrupts" is said again: the index that says it must stay far away.
const REFRESH: u64 = 4096;

/// One queue and its driver.
struct Lane<'a> {
    options: &'a BlockOptions,
    point: BlockPoint,
    mem: GuestMemory,
    driver: Driver,
    kick: EventFd,
    call: Arc<EventFd>,
    /// Waits for `call`.
    called: Epoll,
    rng: Rng,
    blocks: u64,
    next_block: u64,
    /// Where the slots' headers, indirect tables and buffers start.
    fixed: u64,
    tables: u64,
    data: u64,
    /// Chains are direct where all of them fit the ring, as in the guest.
    indirect: bool,
    free: Vec<usize>,
    /// The slot of each chain in flight, by head, and when it was submitted.
    slots: Vec<(usize, Instant)>,
    ops: u64,
    latency: Box<Hist>,
}

/// Runs the job that the options describe.
///
/// # Errors
/// The disk or the device can't be had, or a request fails.
pub fn measure(options: &BlockOptions, point: BlockPoint, scratch: &Scratch, warm: Duration) -> Result<Sample> {
    let BlockPoint { bs, depth, .. } = point;
    if depth > u32::from(QUEUE_SIZE) {
        bail!("depth {depth} does not fit a queue of {QUEUE_SIZE}");
    }
    let threads = usize::from(options.cpus.min(options.queues));
    let hold_memory = if options.others.prefault { u64::MAX } else { 0 };
    let pool = ReactorPool::new(&ReactorOptions { count: threads, hold_memory, ..ReactorOptions::default() })
        .context("starting the I/O threads of the backend")?;
    let disk = DiskOptions {
        path: scratch.path.clone(),
        storage: if scratch.path.is_some() { StorageKind::Raw } else { StorageKind::Null },
        size: scratch.path.is_none().then_some(scratch.size),
        direct: options.direct,
        queues: options.queues,
        queue_size: QUEUE_SIZE,
        ..DiskOptions::default()
    };
    let mut device = BlockDevice::open("disk0", &disk, &pool)?;
    let wanted = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_BLK_F_MQ];
    let wanted = wanted.iter().fold(0, |bits, &bit| bits | 1_u64 << bit);
    let features = device.info().features & wanted;
    device.ack_features(features)?;
    let span = Lane::span(bs, depth);
    let len = usize::try_from(span * u64::from(options.queues)).context("memory for the driver")?;
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).context("mapping memory for the driver")?;
    let mem = Arc::new(mem);
    let mut lanes = Vec::new();
    for index in 0..options.queues {
        let lane = Lane::new(options, point, scratch.size, &mem, index, span * u64::from(index), features)?;
        lane.start(&mut device, index)?;
        lanes.push(lane);
    }
    let sample = drive(&mut lanes, threads, options.time, warm);
    for index in 0..options.queues {
        device.drain(index);
    }
    sample
}

/// What one lane has measured.
type Counts = (u64, Box<Hist>);

/// Deals the lanes out to threads, and lets all of them warm up, measure and stop together.
fn drive(lanes: &mut [Lane<'_>], threads: usize, time: Duration, warm: Duration) -> Result<Sample> {
    let per_thread = lanes.len().div_ceil(threads);
    let workers = lanes.len().div_ceil(per_thread);
    let barrier = Barrier::new(workers + 1);
    let (cpu, results) = thread::scope(|scope| {
        let workers: Vec<_> = lanes
            .chunks_mut(per_thread)
            .map(|own| {
                let barrier = &barrier;
                scope.spawn(move || -> Result<(Duration, Vec<Counts>)> {
                    let warmed = turns(own, warm);
                    own.iter_mut().for_each(|lane| (lane.ops, *lane.latency) = (0, Hist::default()));
                    barrier.wait();
                    let measured = warmed.and_then(|_| turns(own, time));
                    barrier.wait();
                    let elapsed = measured?;
                    // What is drained from here on is not part of the result.
                    let counts = own.iter().map(|lane| (lane.ops, lane.latency.clone())).collect();
                    own.iter_mut().try_for_each(Lane::drain)?;
                    Ok((elapsed, counts))
                })
            })
            .collect();
        barrier.wait();
        let before = io_threads();
        barrier.wait();
        let cpu = io_threads().zip(before).map(|(after, before)| after.saturating_sub(before));
        let join =
            |worker: thread::ScopedJoinHandle<'_, _>| worker.join().map_err(|_| anyhow!("a driver's thread died"));
        (cpu, workers.into_iter().map(join).collect::<Vec<_>>())
    });
    let (mut elapsed, mut ops, mut latency) = (Duration::ZERO, 0, Box::<Hist>::default());
    for result in results {
        let (time, counts) = result??;
        elapsed = elapsed.max(time);
        for (count, hist) in counts {
            ops += count;
            latency.merge(&hist);
        }
    }
    Ok(Sample { ops, time: elapsed, latency: Some(Latency::of(&latency)), cpu, ..Sample::default() })
}

/// CPU time of the backend's threads so far, with the kernel's workers for them.
fn io_threads() -> Option<Duration> {
    process::threads_time(std::process::id(), |name| name.starts_with("io")).ok()
}

/// Keeps lanes full for a time; returns how long that was.
fn turns(lanes: &mut [Lane<'_>], time: Duration) -> Result<Duration> {
    let start = Instant::now();
    let mut last = start;
    loop {
        let now = Instant::now();
        if now.duration_since(start) >= time {
            return Ok(now.duration_since(start));
        }
        signals::check()?;
        let mut progress = false;
        for lane in &mut *lanes {
            progress |= lane.reap(now)?;
            lane.fill(now)?;
        }
        if progress {
            last = now;
        } else if now.duration_since(last) > PATIENCE {
            bail!("the backend has not completed a request for {} s", PATIENCE.as_secs());
        } else if let [lane] = lanes
            && lane.options.irq
        {
            lane.sleep()?;
        } else {
            std::hint::spin_loop();
        }
    }
}

impl<'a> Lane<'a> {
    /// Bytes of memory that a lane takes.
    fn span(bs: u64, depth: u32) -> u64 {
        let slots = u64::from(depth);
        Driver::footprint(QUEUE_SIZE).next_multiple_of(PAGE)
            + (slots * FIXED).next_multiple_of(PAGE)
            + (slots * CHAIN * 16).next_multiple_of(PAGE)
            + (slots * bs).next_multiple_of(PAGE)
    }

    fn new(
        options: &'a BlockOptions,
        point: BlockPoint,
        size: u64,
        mem: &GuestMemory,
        index: u16,
        base: u64,
        features: u64,
    ) -> Result<Self> {
        let BlockPoint { bs, depth, .. } = point;
        let slots = u64::from(depth);
        let fixed = base + Driver::footprint(QUEUE_SIZE).next_multiple_of(PAGE);
        let tables = fixed + (slots * FIXED).next_multiple_of(PAGE);
        let data = tables + (slots * CHAIN * 16).next_multiple_of(PAGE);
        // Not zeroes, and every page is touched before anything is measured.
        mem.write_slice(&vec![0x5a; (slots * bs) as usize], GuestAddress(data)).context("preparing buffers")?;
        let blocks = size / bs;
        let mut driver = Driver::new(Arc::clone(mem), base, QUEUE_SIZE, features);
        driver.want_interrupts(false);
        let call = EventFd::new(EFD_NONBLOCK).context("making an eventfd")?;
        let called = Epoll::new().context("making an epoll instance")?;
        called
            .ctl(ControlOperation::Add, call.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))
            .context("watching an eventfd")?;
        Ok(Self {
            options,
            point,
            mem: Arc::clone(mem),
            driver,
            kick: EventFd::new(EFD_NONBLOCK).context("making an eventfd")?,
            call: Arc::new(call),
            called,
            rng: Rng::new(1 + u64::from(index)),
            blocks,
            next_block: blocks / u64::from(options.queues) * u64::from(index),
            fixed,
            tables,
            data,
            indirect: slots * CHAIN > u64::from(QUEUE_SIZE),
            free: (0..depth as usize).rev().collect(),
            slots: vec![(0, Instant::now()); usize::from(QUEUE_SIZE)],
            ops: 0,
            latency: Box::default(),
        })
    }

    fn start(&self, device: &mut BlockDevice, index: u16) -> Result<()> {
        let call = if self.options.irq { Interrupt::Event(Arc::clone(&self.call)) } else { Interrupt::None };
        let parts = QueueParts {
            call,
            ..QueueParts::new(
                self.driver.ring(),
                Arc::clone(&self.mem),
                self.kick.try_clone().context("copying an eventfd")?,
            )
        };
        Ok(device.start_queue(index, parts)?)
    }

    /// Takes what the device has returned.
    fn reap(&mut self, now: Instant) -> Result<bool> {
        let before = self.ops;
        while let Some((head, _)) = self.driver.next_used() {
            let (slot, submitted) = self.slots[usize::from(head)];
            let status: u8 = self.mem.read_obj(GuestAddress(self.fixed + slot as u64 * FIXED + STATUS))?;
            if u32::from(status) != VIRTIO_BLK_S_OK {
                bail!("the backend ended a request with status {status}");
            }
            self.latency.record(now.duration_since(submitted).as_nanos() as u64);
            self.ops += 1;
            self.free.push(slot);
            if !self.options.irq && self.ops.is_multiple_of(REFRESH) {
                self.driver.want_interrupts(false);
            }
        }
        Ok(self.ops != before)
    }

    /// Submits on all free slots.
    fn fill(&mut self, now: Instant) -> Result<()> {
        let mut any = false;
        while let Some(slot) = self.free.pop() {
            let head = self.submit(slot as u64)?;
            self.slots[usize::from(head)] = (slot, now);
            any = true;
        }
        if any && self.driver.publish() {
            self.kick.write(1).context("kicking the backend")?;
        }
        Ok(())
    }

    fn submit(&mut self, slot: u64) -> Result<u16> {
        let block = if matches!(self.point.rw, Pattern::Read | Pattern::Write) {
            let block = self.next_block;
            self.next_block = (block + 1) % self.blocks;
            block
        } else {
            self.rng.below(self.blocks)
        };
        let read = match self.point.rw {
            Pattern::Read | Pattern::RandRead => true,
            Pattern::Write | Pattern::RandWrite => false,
            Pattern::Mixed => self.rng.below(100) < READS,
        };
        let header = self.fixed + slot * FIXED;
        let kind = if read { VIRTIO_BLK_T_IN } else { VIRTIO_BLK_T_OUT };
        let sector = block * (self.point.bs / SECTOR);
        self.mem.write_obj(u64::from(kind), GuestAddress(header))?;
        self.mem.write_obj(sector, GuestAddress(header + 8))?;
        self.mem.write_obj(STATUS_UNSET, GuestAddress(header + STATUS))?;
        let buffers = [
            Buffer { addr: header, len: 16, writable: false },
            Buffer { addr: self.data + slot * self.point.bs, len: self.point.bs as u32, writable: read },
            Buffer { addr: header + STATUS, len: 1, writable: true },
        ];
        let head = if self.indirect {
            self.driver.add_indirect(self.tables + slot * CHAIN * 16, &buffers)
        } else {
            self.driver.add(&buffers)
        };
        head.context("the driver's ring is full")
    }

    /// Waits for an interrupt.
    fn sleep(&mut self) -> Result<()> {
        self.driver.want_interrupts(true);
        if self.reap(Instant::now())? {
            return Ok(());
        }
        let mut events = [EpollEvent::default()];
        if self.called.wait(PATIENCE.as_millis() as i32, &mut events).context("waiting for the backend")? == 0 {
            bail!("the backend has not interrupted for {} s", PATIENCE.as_secs());
        }
        // Empty if this edge was taken before.
        let _ = self.call.read();
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        let start = Instant::now();
        while self.driver.in_flight() != 0 {
            self.reap(Instant::now())?;
            if start.elapsed() > PATIENCE {
                bail!("the backend has not completed its last requests for {} s", PATIENCE.as_secs());
            }
            std::hint::spin_loop();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    #[test]
    fn the_backend_serves_all_patterns_polled_and_by_interrupts() {
        let common = ["ringvm-bench", "block", "--size", "2M"];
        // A disk that others write to may take long for a batch.
        let direct = ["--rw", "write", "--direct", "--time", "400ms"];
        let cached = ["--time", "40ms", "--queues", "2", "--cpus", "2"];
        let null = ["--time", "40ms", "--storage", "null"];
        for more in [&cached[..], &["--time", "40ms", "--irq", "--rw", "mixed"], &direct, &null] {
            let cli = Cli::try_parse_from(common.iter().chain(more)).unwrap();
            let Some(Command::Block(options)) = cli.command else { unreachable!() };
            let scratch = Scratch::prepare(&options).unwrap();
            for depth in [1, 100] {
                let point = BlockPoint { rw: options.rw[0], bs: options.bs[0], depth };
                let sample = measure(&options, point, &scratch, Duration::from_millis(5)).unwrap();
                let latency = sample.latency.clone().unwrap();
                assert!(sample.ops > 0 && latency.p99 >= latency.p50, "{more:?} {depth}: {sample:?}");
                // How much it is over so short a time is the scheduler's whim on a busy machine.
                assert!(sample.cpu.is_some(), "{more:?} {depth}: {sample:?}");
            }
        }
    }
}
