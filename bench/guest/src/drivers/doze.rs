//! Sleeping until a queue has something, as network drivers do on Linux (NAPI): take all there is with interrupts off, look
//! for more for a short while, then ask for an interrupt, look once more, and halt.
//!
//! One interrupt is to bring many frames: it is asked for after as many chains as come in [`INTERVAL_US`] at the rate of late
//! (interrupt moderation, by `used_event`), so that at low rates the very next one raises it. The local APIC's timer ticks
//! all the while: it bounds every wait, and finds what a rate that has dropped leaves short of that number.
//!
//! Measured on a software KVM, where a halt and the interrupt that ends it cost the host's threads about 130 us: intervals
//! of 20 to 400 us made a flood slower than polling did, and so did rings of 256, which run dry while a vCPU wakes up.

use core::fmt;

use crate::drivers::blk::Irq;
use crate::drivers::queue::Queue;
use crate::machine::{apic, clock, interrupts};

/// How long is looked for more before an interrupt is asked for.
const LOOK_US: u64 = 2;
/// What interrupts are moderated to be apart.
const INTERVAL_US: u64 = 1_000;
/// Most of a queue that one interrupt is to bring, in eighths: the rest is for the device until it is given more.
const EIGHTHS: u32 = 7;

/// One vCPU's sleep.
pub struct Doze {
    irq: Option<Irq>,
    moderates: bool,
    /// When something came last.
    last: u64,
    /// When sleep was last gone to, and what has come since then.
    slept: u64,
    taken: u64,
    look: u64,
    interval: u64,
    /// Interrupts have been asked for: how many chains ahead, how many had been counted before, and whether the vCPU halted.
    armed: bool,
    wanted: u16,
    before: u64,
    halted: bool,
    tally: Tally,
}

impl Drop for Doze {
    fn drop(&mut self) {
        // Whatever this vCPU does next is not to be interrupted.
        if self.irq.is_some() {
            apic::stop_ticking();
        }
    }
}

/// What it has come to; adds up over vCPUs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Interrupts of the queues.
    pub irqs: u64,
    /// Times that the vCPU was halted.
    pub halts: u64,
    /// Times that a tick found what an interrupt should have announced.
    pub late: u64,
}

impl Tally {
    /// Adds another vCPU's.
    pub fn add(&mut self, other: Self) {
        self.irqs += other.irqs;
        self.halts += other.halts;
        self.late += other.late;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "irqs={} halts={} late={}", self.irqs, self.halts, self.late)
    }
}

impl Doze {
    /// For the vCPU that calls. `irq` is the vector of all its queues; without one, nobody sleeps. `moderates` where frames
    /// come whether or not those before them have been seen.
    pub fn new(irq: Option<Irq>, moderates: bool) -> Self {
        let now = clock::ticks();
        if irq.is_some() {
            apic::tick();
        }
        let (look, interval) = (LOOK_US * clock::khz() / 1_000, INTERVAL_US * clock::khz() / 1_000);
        Self {
            irq,
            moderates,
            last: now,
            slept: now,
            taken: 0,
            look,
            interval,
            armed: false,
            wanted: 1,
            before: 0,
            halted: false,
            tally: Tally::default(),
        }
    }

    /// What was counted so far.
    pub fn tally(&self) -> Tally {
        Tally { irqs: self.irq.map_or(0, Irq::count), ..self.tally }
    }

    /// After a turn that took so many chains, or nothing: goes to sleep if that makes sense. Returns after an interrupt or a
    /// tick, or at once.
    #[inline(always)]
    pub fn turn<'a>(&mut self, now: u64, taken: u64, queues: impl Iterator<Item = &'a mut Queue>) {
        let Some(irq) = self.irq else { return };
        self.taken += taken;
        if taken != 0 {
            self.last = now;
        }
        if self.armed {
            self.woken(irq, taken, queues);
        } else if taken == 0 && now.wrapping_sub(self.last) >= self.look {
            self.sleep(now, irq, queues);
        }
    }

    #[inline(never)]
    fn sleep<'a>(&mut self, now: u64, irq: Irq, queues: impl Iterator<Item = &'a mut Queue>) {
        self.wanted = self.due(now);
        (self.slept, self.taken) = (now, 0);
        // Counted before it is asked for, so that one that comes at once is not slept over.
        self.before = irq.count();
        let mut ready = false;
        for queue in queues {
            if queue.in_flight() != 0 {
                let most = (u32::from(queue.in_flight()) * EIGHTHS / 8) as u16;
                ready |= queue.arm_after(self.wanted.min(most).max(1));
            }
        }
        self.armed = true;
        self.halted = !ready;
        if self.halted {
            self.tally.halts += 1;
            interrupts::halt_unless_counted(irq.index, self.before);
        }
        self.last = clock::ticks();
    }

    /// The first turn after a sleep.
    fn woken<'a>(&mut self, irq: Irq, taken: u64, queues: impl Iterator<Item = &'a mut Queue>) {
        self.armed = false;
        queues.for_each(Queue::disarm);
        if self.halted && taken != 0 && self.wanted == 1 && irq.count() == self.before {
            self.tally.late += 1;
        }
    }

    /// How many chains are to come before the next interrupt.
    fn due(&self, now: u64) -> u16 {
        if !self.moderates {
            return 1;
        }
        let passed = now.wrapping_sub(self.slept).max(1);
        let due = u128::from(self.taken) * u128::from(self.interval) / u128::from(passed);
        u16::try_from(due).unwrap_or(u16::MAX).max(1)
    }
}
