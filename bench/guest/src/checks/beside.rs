//! `job=beside`: one vCPU verifies a disk in rounds and measures the longest, while another brings the disk behind it up, uses it
//! and resets it, again and again, whoever serves that. The device beside may refuse anything, break or stay silent; the verified
//! disk may lose nothing and must not wait. Before the end, the disk beside has to work again.

use core::sync::atomic::{AtomicBool, Ordering};

use crate::checks::verify::Checker;
use crate::drivers::blk::{self, Blk};
use crate::drivers::queue::{Layout, NEXT, Queue, WRITE, write_descriptor};
use crate::drivers::virtio::{self, Transport, common};
use crate::job::Options;
use crate::machine::mem::{self, Region};
use crate::machine::{clock, fail, smp};
use crate::{say, spec};

/// Operations of each queue in one round of the verified disk.
const ROUND: u64 = 64;
/// Rings that the disk beside is brought up with, if it has as many.
const RINGS: u16 = 2;
/// How long the disk beside is waited for.
const WAIT_MS: u64 = 50;
/// How long a reset of it may take: longer than any limit that a VMM has for a daemon that hangs.
const RESET_MS: u64 = 90_000;
/// How often it must answer in a row before the end, and how long that may take.
const AFTERWARDS: u64 = 10;
const AFTERWARDS_MS: u64 = 60_000;
/// The device vectors of its rings: far behind those of the verified disk.
const VECTOR: usize = 100;
const SIZE: u16 = 16;
/// What the data is filled with before a read.
const POISON: u8 = 0xee;

/// What the verified disk has done.
#[derive(Default)]
struct Verified {
    rounds: u64,
    longest: u64,
}

/// What became of the disk beside.
#[derive(Default)]
struct Churned {
    /// From reset to reset.
    times: u64,
    /// Reads that brought what is on the disk.
    good: u64,
    /// Reads that failed.
    failed: u64,
    /// Reads that were not answered in time.
    silent: u64,
    /// The features were not taken.
    refused: u64,
    /// The device said that it needs a reset.
    broken: u64,
    /// Good reads in a row.
    streak: u64,
    longest_reset: u64,
}

/// Does the job.
pub fn run(options: &Options) {
    smp::start(2);
    let blk = Blk::open(options);
    let checker = Checker::new(&blk, options);
    let mut beside = Beside::new(Blk::find(&Options { disk: options.disk + 1, ..options.clone() }), options);
    say!("start job={} queues={} rings={}", options.name, blk.queues.len(), beside.rings.len());
    let over = AtomicBool::new(false);
    let verified = crate::machine::sync::Lock::new(Verified::default());
    let churned = crate::machine::sync::Lock::new(Churned::default());
    let beside = crate::machine::sync::Lock::new(&mut beside);
    let start = clock::ticks();
    smp::run(2, &|cpu| {
        if cpu == 0 {
            let mut verified = verified.lock();
            checker.start(&blk);
            while verified.rounds < options.rounds || options.goes_on() {
                verified.round(|| checker.round(&blk, ROUND));
            }
            over.store(true, Ordering::Release);
            checker.read_back(&blk);
        } else {
            let (mut beside, mut churned) = (beside.lock(), churned.lock());
            while !over.load(Ordering::Acquire) {
                beside.turn(&mut churned);
            }
            let start = clock::ticks();
            churned.streak = 0;
            while churned.streak < AFTERWARDS {
                beside.turn(&mut churned);
                if clock::ticks().wrapping_sub(start) > clock::from_ms(AFTERWARDS_MS) {
                    let got = churned.streak;
                    fail(format_args!("beside where=reads expected={AFTERWARDS}-in-a-row got={got}"));
                }
            }
        }
    });
    blk.transport.reset();
    let (v, c) = (verified.lock(), churned.lock());
    let ms = |ticks: u64| clock::to_ns(ticks) / 1_000_000;
    say!(
        "result job={} time_ns={} rounds={} sectors_checked={} longest_ms={} churned={} good={} failed={} silent={} refused={} \
         broken={} longest_reset_ms={} good_after={} errors=0",
        options.name,
        clock::to_ns(clock::ticks() - start),
        v.rounds,
        checker.sectors_checked(),
        ms(v.longest),
        c.times,
        c.good,
        c.failed,
        c.silent,
        c.refused,
        c.broken,
        ms(c.longest_reset),
        c.streak
    );
}

impl Verified {
    fn round(&mut self, work: impl FnOnce()) {
        let start = clock::ticks();
        work();
        self.longest = self.longest.max(clock::ticks().wrapping_sub(start));
        self.rounds += 1;
    }
}

/// How a ring's interrupt stands when the device is reset.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Interrupts {
    Wanted,
    Masked,
    /// MSI-X is switched off before the reset.
    Off,
    /// The ring has no vector.
    None,
}

/// Memory of one ring and of the read that it carries.
struct Ring {
    layout: Layout,
    header: Region,
    status: Region,
    data: Region,
}

struct Beside {
    transport: Transport,
    wanted: u64,
    rings: alloc::vec::Vec<Ring>,
}

impl Beside {
    fn new(transport: Transport, options: &Options) -> Self {
        let ring = |_| {
            let memory = mem::dma(2 * 4096, 4096);
            let (header, status) = (memory.sub(0, blk::HEADER), memory.sub(64, 1));
            Ring { layout: Layout::new(SIZE), header, status, data: memory.sub(4096, spec::SECTOR) }
        };
        let rings = (0..transport.queues().min(RINGS)).map(ring).collect();
        Self { transport, wanted: options.wanted_features(), rings }
    }

    /// Once from reset to reset.
    fn turn(&mut self, counts: &mut Churned) {
        let interrupts =
            [Interrupts::Wanted, Interrupts::Masked, Interrupts::Off, Interrupts::None][(counts.times % 4) as usize];
        self.reset(interrupts, counts);
        counts.times += 1;
        let Some(event_idx) = self.negotiate() else {
            (counts.refused, counts.streak) = (counts.refused + 1, 0);
            return;
        };
        let mut queues: alloc::vec::Vec<Queue> =
            (0..self.rings.len()).map(|index| self.enable(index, interrupts, event_idx)).collect();
        self.transport.add_status(virtio::DRIVER_OK);
        self.use_config(counts.times);
        for (ring, queue) in self.rings.iter().zip(&mut queues) {
            ring.submit(queue, interrupts);
        }
        let start = clock::ticks();
        while queues.iter().any(|queue| !queue.pending()) && !self.is_broken() {
            if clock::ticks().wrapping_sub(start) > clock::from_ms(WAIT_MS) {
                break;
            }
        }
        let broken = self.is_broken();
        counts.broken += u64::from(broken);
        for (ring, queue) in self.rings.iter().zip(&queues) {
            match (queue.pending(), ring.is_good()) {
                (true, true) => (counts.good, counts.streak) = (counts.good + 1, counts.streak + 1),
                (true, false) => (counts.failed, counts.streak) = (counts.failed + 1, 0),
                (false, _) => (counts.silent, counts.streak) = (counts.silent + u64::from(!broken), 0),
            }
        }
        if interrupts == Interrupts::Off {
            self.transport.function.switch_msix(false);
        }
        self.reset(interrupts, counts);
        if interrupts == Interrupts::Off {
            self.transport.function.switch_msix(true);
        }
    }

    fn is_broken(&self) -> bool {
        self.transport.status() & virtio::NEEDS_RESET != 0
    }

    /// Masks the interrupts if they are to be, and resets the device.
    fn reset(&self, interrupts: Interrupts, counts: &mut Churned) {
        if let (Interrupts::Masked, Some(msix)) = (interrupts, self.transport.msix) {
            (0..self.rings.len() as u16).for_each(|index| msix.mask(index + 1, true));
        }
        let start = clock::ticks();
        self.transport.common.write::<u8>(common::DEVICE_STATUS, 0);
        while self.transport.status() != 0 {
            if clock::ticks().wrapping_sub(start) > clock::from_ms(RESET_MS) {
                fail(format_args!("reset where=beside expected=0 got={:#x}", self.transport.status()));
            }
        }
        counts.longest_reset = counts.longest_reset.max(clock::ticks().wrapping_sub(start));
    }

    /// From reset to FEATURES_OK. Returns whether EVENT_IDX is in force; nothing if the device refuses the features.
    fn negotiate(&self) -> Option<bool> {
        self.transport.add_status(virtio::ACKNOWLEDGE | virtio::DRIVER);
        let features = self.transport.offered() & (self.wanted | spec::VERSION_1);
        self.transport.accept(features);
        self.transport.add_status(virtio::FEATURES_OK);
        let taken = self.transport.status() & virtio::FEATURES_OK != 0;
        taken.then_some(features & spec::RING_EVENT_IDX != 0)
    }

    fn enable(&self, index: usize, interrupts: Interrupts, event_idx: bool) -> Queue {
        let Layout { desc, avail, used, .. } = self.rings[index].layout;
        [desc, avail, used].iter().for_each(|area| area.fill(0, area.len(), 0));
        let entry = index as u16 + 1;
        let msix = self.transport.msix.filter(|_| interrupts != Interrupts::None);
        if let Some(msix) = msix {
            msix.route(entry, smp::apic_id(1), VECTOR + index);
        }
        self.transport.enable_at(index as u16, self.rings[index].layout, msix.map(|_| entry), event_idx)
    }

    /// Reads the configuration space, whatever is in it, and now and then writes to it.
    fn use_config(&self, turn: u64) {
        let config = self.transport.config;
        for at in (0..config.len() & !3).step_by(4) {
            core::hint::black_box(config.read::<u32>(at));
        }
        if turn.is_multiple_of(2) && config.len() > blk::WRITEBACK {
            config.write::<u8>(blk::WRITEBACK, (turn / 2 % 2) as u8);
        }
    }
}

impl Ring {
    /// Asks for the first sector.
    fn submit(&self, queue: &mut Queue, interrupts: Interrupts) {
        self.header.copy_in(0, &blk::header(blk::T_IN, 0));
        self.data.fill(0, spec::SECTOR, POISON);
        self.status.write::<u8>(0, blk::S_UNSET);
        let table = self.layout.desc;
        write_descriptor(table, 0, self.header.base(), blk::HEADER as u32, NEXT, 1);
        write_descriptor(table, 1, self.data.base(), spec::SECTOR as u32, NEXT | WRITE, 2);
        write_descriptor(table, 2, self.status.base(), 1, WRITE, 0);
        if interrupts != Interrupts::None {
            queue.arm();
        }
        queue.offer(0);
        queue.publish();
    }

    /// Whether it was read: the disk is all zeroes.
    fn is_good(&self) -> bool {
        self.status.read::<u8>(0) == blk::S_OK && self.data.find_other(0, spec::SECTOR, 0).is_none()
    }
}
