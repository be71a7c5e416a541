//! Several vCPUs: starting them, giving all of them one piece of work, and letting them wait for each other.

#![allow(unsafe_code, reason = "work is handed to other vCPUs as the two words of a trait object's pointer")]

use core::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::machine::boot::{self, MAX_CPUS, TRAMPOLINE};
use crate::machine::{acpi, apic, clock, fail};

type Work<'a> = &'a (dyn Fn(usize) + Sync);

/// How long vCPUs wait for one another before the run is called hung.
const PATIENCE_MS: u64 = 120_000;

static RUNNING: AtomicUsize = AtomicUsize::new(1);
static WORK: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];
static WORKERS: AtomicUsize = AtomicUsize::new(0);
static ROUND: AtomicU32 = AtomicU32::new(0);
static FINISHED: AtomicUsize = AtomicUsize::new(0);
static APIC_IDS: [AtomicU32; MAX_CPUS] = [const { AtomicU32::new(0) }; MAX_CPUS];

/// How many vCPUs run.
pub fn running() -> usize {
    RUNNING.load(Ordering::Acquire)
}

/// The local APIC id of a vCPU that runs.
pub fn apic_id(cpu: usize) -> u32 {
    APIC_IDS[cpu].load(Ordering::Relaxed)
}

/// Notes the boot processor.
pub fn init() {
    APIC_IDS[0].store(apic::id(), Ordering::Relaxed);
}

/// Starts processors until `cpus` run.
pub fn start(cpus: usize) {
    if cpus > MAX_CPUS {
        fail(format_args!("start where=cpus expected=at-most-{MAX_CPUS} got={cpus}"));
    }
    let own = apic_id(0);
    let known = acpi::processors();
    let mut others = match &known {
        Some(ids) => ids.iter().copied().filter(|&id| id != own).collect(),
        None => (0..cpus as u32).filter(|&id| id != own).collect::<alloc::vec::Vec<_>>(),
    }
    .into_iter()
    .skip(running() - 1);
    if running() < cpus {
        boot::place_trampoline();
    }
    while running() < cpus {
        let next = running();
        let Some(id) = others.next() else {
            fail(format_args!("start where=cpus expected={cpus} got={next} (all that the MADT lists)"));
        };
        APIC_IDS[next].store(id, Ordering::Relaxed);
        boot::set_next_cpu(next);
        apic::start(id, TRAMPOLINE);
        wait("start", || running() > next);
    }
}

/// Where an application processor's life is spent.
pub fn serve(cpu: usize) -> ! {
    apic::init();
    let mut round = ROUND.load(Ordering::Acquire);
    RUNNING.store(cpu + 1, Ordering::Release);
    loop {
        // No limit here: the boot processor may be busy for as long as it likes, and ends the machine for all.
        while ROUND.load(Ordering::Acquire) == round {
            core::hint::spin_loop();
        }
        round = round.wrapping_add(1);
        if cpu >= WORKERS.load(Ordering::Acquire) {
            continue;
        }
        let words = [WORK[0].load(Ordering::Acquire), WORK[1].load(Ordering::Acquire)];
        // SAFETY: `run` stored these words of a live reference, and returns only when all workers have finished.
        let work = unsafe { core::mem::transmute::<[usize; 2], Work<'_>>(words) };
        work(cpu);
        FINISHED.fetch_add(1, Ordering::AcqRel);
    }
}

/// Runs `work` on the first `cpus` vCPUs at once, this one among them; returns when all have finished.
pub fn run(cpus: usize, work: Work<'_>) {
    FINISHED.store(0, Ordering::Release);
    WORKERS.store(cpus, Ordering::Release);
    // SAFETY: a wide reference is two words; its lifetime is kept as `serve` says.
    let words = unsafe { core::mem::transmute::<Work<'_>, [usize; 2]>(work) };
    WORK[0].store(words[0], Ordering::Release);
    WORK[1].store(words[1], Ordering::Release);
    ROUND.fetch_add(1, Ordering::AcqRel);
    work(0);
    wait("finish", || FINISHED.load(Ordering::Acquire) + 1 >= cpus);
}

fn wait(what: &str, done: impl Fn() -> bool) {
    let start = clock::ticks();
    while !done() {
        core::hint::spin_loop();
        if clock::ticks().wrapping_sub(start) > clock::from_ms(PATIENCE_MS) {
            fail(format_args!("{what} where=cpus expected=all got=a-cpu-that-hangs running={}", running()));
        }
    }
}

/// Where a fixed number of vCPUs wait for each other, as often as they like.
pub struct Barrier {
    members: usize,
    waiting: AtomicUsize,
    passed: AtomicU32,
}

impl Barrier {
    /// For so many vCPUs.
    pub fn new(members: usize) -> Self {
        Self { members, waiting: AtomicUsize::new(0), passed: AtomicU32::new(0) }
    }

    /// Waits until all members are here.
    pub fn wait(&self) {
        let round = self.passed.load(Ordering::Acquire);
        if self.waiting.fetch_add(1, Ordering::AcqRel) + 1 == self.members {
            self.waiting.store(0, Ordering::Release);
            self.passed.fetch_add(1, Ordering::AcqRel);
        } else {
            wait("barrier", || self.passed.load(Ordering::Acquire) != round);
        }
    }
}
