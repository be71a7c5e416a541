//! Waiting for a device, polled or by interrupts, with a limit: a request that never comes back, and an interrupt that
//! never comes, each end the run with a line that says so.

use alloc::vec::Vec;

use crate::drivers::blk::{BlkQueue, Irq};
use crate::job::Options;
use crate::machine::{clock, fail};

/// How long a returned chain may go without the interrupt that was asked for.
const LOST_MS: u64 = 5_000;

/// One vCPU's waiting.
pub struct Waiter {
    irq: bool,
    limit: u64,
    last: u64,
    watched: Vec<Irq>,
}

impl Waiter {
    /// For a job.
    pub fn new(options: &Options) -> Self {
        Self {
            irq: options.irq,
            limit: clock::from_ms(options.stall_ms),
            last: clock::ticks(),
            watched: Vec::with_capacity(64),
        }
    }

    /// Something came back.
    #[inline(always)]
    pub fn moved(&mut self, now: u64) {
        self.last = now;
    }

    /// Nothing came back: waits a little (polled), or for an interrupt of one of the queues.
    #[inline]
    pub fn pause<'a>(&mut self, now: u64, queues: impl Iterator<Item = &'a mut BlkQueue>) {
        if !self.irq {
            if now.wrapping_sub(self.last) > self.limit {
                self.stalled(queues);
            }
            core::hint::spin_loop();
            return;
        }
        self.sleep(now, queues);
    }

    fn sleep<'a>(&mut self, now: u64, queues: impl Iterator<Item = &'a mut BlkQueue>) {
        let mut ready = false;
        let mut before = 0_u64;
        let mut waiting = Vec::new();
        core::mem::swap(&mut waiting, &mut self.watched);
        waiting.clear();
        let mut queues: Vec<&mut BlkQueue> = queues.collect();
        for queue in &mut queues {
            if let Some(irq) = queue.irq {
                // Counted before it is asked for, so that one that comes at once is not missed.
                before = before.wrapping_add(irq.count());
                waiting.push(irq);
            }
            ready |= queue.queue.arm();
        }
        let taken = |watched: &[Irq]| watched.iter().fold(0_u64, |sum, irq| sum.wrapping_add(irq.count()));
        let start = now;
        while !ready && taken(&waiting) == before {
            core::hint::spin_loop();
            let waited = clock::ticks().wrapping_sub(start);
            if waited > clock::from_ms(LOST_MS)
                && let Some(queue) = queues.iter().find(|queue| queue.queue.pending())
            {
                fail(format_args!(
                    "interrupt where=queue:{} expected=an-interrupt got=none irqs={} used_idx={} device_used_idx={}",
                    queue.queue.index,
                    queue.irq.map_or(0, Irq::count),
                    queue.queue.used_idx(),
                    queue.queue.device_used_idx()
                ));
            }
            if clock::ticks().wrapping_sub(self.last) > self.limit {
                self.stalled(queues.into_iter());
            }
        }
        self.watched = waiting;
    }

    #[cold]
    fn stalled<'a>(&self, mut queues: impl Iterator<Item = &'a mut BlkQueue>) -> ! {
        match queues.find(|queue| queue.queue.in_flight() != 0) {
            Some(queue) => fail(format_args!(
                "stall where=queue:{} expected=completions got=none in_flight={} used_idx={} device_used_idx={} kicks={} irqs={}",
                queue.queue.index,
                queue.queue.in_flight(),
                queue.queue.used_idx(),
                queue.queue.device_used_idx(),
                queue.queue.kicks,
                queue.irq.map_or(0, Irq::count)
            )),
            None => fail(format_args!("stall where=driver expected=requests-in-flight got=none")),
        }
    }
}
