//! Measured NIC jobs. `job=net-tx` sends frames that were laid out once as fast as the device takes them, `job=net-rx`
//! counts what comes from its first frame on. A turn takes all that there is, publishes once and kicks at most once. With
//! `irq=1` a vCPU whose turns find nothing sleeps ([`Doze`]).
//!
//! A driver is not told what becomes of a frame: `net-tx` counts what the device has returned, dropped or sent. Whoever
//! measures by it has to compare with what the device or its port says it has sent.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::drivers::doze::{Doze, Tally};
use crate::drivers::net::{LONGEST, Nic, Pair, Transmit};
use crate::job::Options;
use crate::machine::smp::{self, Barrier};
use crate::machine::sync::{Held, Lock};
use crate::machine::{clock, fail};
use crate::say;
use crate::shared::packet::{self, DISCARD, FILLER, SHORTEST};

const DEFAULT_TIME_MS: u64 = 2_000;
const DEFAULT_SIZE: u64 = 1_500;
/// How often a job that goes on looks whether it was told that it is enough.
const BETWEEN_LOOKS_MS: u64 = 10;

/// What one vCPU has counted.
#[derive(Clone, Copy, Default)]
struct Count {
    frames: u64,
    bytes: u64,
    ticks: u64,
    kicks: u64,
    sleep: Tally,
}

/// Sends frames for a time.
pub fn transmit(options: &Options) {
    let size = options.size.unwrap_or(DEFAULT_SIZE);
    if !(SHORTEST as u64..=LONGEST as u64).contains(&size) {
        fail(format_args!("command-line where=size expected={SHORTEST}..={LONGEST} got={size}"));
    }
    let size = size as usize;
    let nic = Nic::open(options, size);
    let least = clock::from_ms(options.time_ms.unwrap_or(DEFAULT_TIME_MS));
    let counts = on_all_cpus(options, &nic, |cpu, pairs| {
        let mut time = least;
        for pair in pairs.iter_mut() {
            (0..pair.tx.slots()).for_each(|slot| lay_out(&pair.tx, slot, size, nic.mac, options.tso));
        }
        let mut count = Count::default();
        let start = clock::ticks();
        let kicks: u64 = pairs.iter().map(|pair| pair.kicks()).sum();
        let mut last = start;
        let mut doze = Doze::new(nic.irq(cpu), true);
        loop {
            let now = clock::ticks();
            count.ticks = now.wrapping_sub(start);
            if count.ticks >= time {
                if !options.goes_on() {
                    break;
                }
                time += clock::from_ms(BETWEEN_LOOKS_MS);
            }
            let before = count.frames;
            for pair in pairs.iter_mut() {
                let returned = pair.tx.reap();
                count.frames += returned;
                while let Some(slot) = pair.tx.take() {
                    pair.tx.send(slot, size);
                }
                pair.tx.publish();
                if returned != 0 {
                    last = now;
                }
                // Whatever comes meanwhile must not stand in the way.
                while pair.rx.next(|_| {}).is_some() {}
                pair.rx.publish();
            }
            if now.wrapping_sub(last) > clock::from_ms(options.stall_ms) {
                fail(format_args!("stall where=transmit expected=completions got=none frames={}", count.frames));
            }
            doze.turn(now, count.frames - before, pairs.iter_mut().map(|pair| &mut pair.tx.queue));
        }
        count.sleep = doze.tally();
        count.bytes = count.frames * size as u64;
        count.kicks = pairs.iter().map(|pair| pair.kicks()).sum::<u64>() - kicks;
        count
    });
    report(options, &nic, &counts);
    nic.transport.reset();
}

/// Counts the frames that come within a time, which begins with the first of them on any pair.
pub fn receive(options: &Options) {
    let nic = Nic::open(options, LONGEST);
    let time = clock::from_ms(options.time_ms.unwrap_or(DEFAULT_TIME_MS));
    let begun = AtomicBool::new(false);
    let counts = on_all_cpus(options, &nic, |cpu, pairs| {
        let mut count = Count::default();
        let mut start = clock::ticks();
        let mut waiting = true;
        let mut kicks = 0;
        let mut doze = Doze::new(nic.irq(cpu), true);
        loop {
            let now = clock::ticks();
            if waiting && begun.load(Ordering::Relaxed) {
                waiting = false;
                start = now;
                count = Count::default();
                kicks = pairs.iter().map(|pair| pair.kicks()).sum();
            }
            count.ticks = now.wrapping_sub(start);
            if !waiting && count.ticks >= time {
                break;
            }
            if waiting && count.ticks > clock::from_ms(options.stall_ms) {
                fail(format_args!("stall where=receive expected=frames got=none"));
            }
            let before = count.frames;
            for pair in pairs.iter_mut() {
                while let Some(len) = pair.rx.next(|_| {}) {
                    count.frames += 1;
                    count.bytes += len as u64;
                }
                pair.rx.publish();
            }
            if waiting && count.frames != before {
                begun.store(true, Ordering::Relaxed);
            }
            doze.turn(now, count.frames - before, pairs.iter_mut().map(|pair| &mut pair.rx.queue));
        }
        count.sleep = doze.tally();
        count.kicks = pairs.iter().map(|pair| pair.kicks()).sum::<u64>() - kicks;
        count
    });
    report(options, &nic, &counts);
    nic.transport.reset();
}

/// Spreads the pairs over the vCPUs, and lets these begin together.
fn on_all_cpus(
    options: &Options,
    nic: &Nic,
    work: impl Fn(usize, &mut [Held<'_, Pair>]) -> Count + Sync,
) -> Vec<Count> {
    let cpus = options.cpus.min(nic.pairs.len());
    let counts: Vec<Lock<Count>> = (0..cpus).map(|_| Lock::new(Count::default())).collect();
    let barrier = Barrier::new(cpus);
    smp::run(cpus, &|cpu| {
        let mut pairs: Vec<_> = nic.pairs.iter().skip(cpu).step_by(cpus).map(Lock::lock).collect();
        barrier.wait();
        if cpu == 0 {
            say!("start job={}", options.name);
        }
        barrier.wait();
        *counts[cpu].lock() = work(cpu, &mut pairs);
    });
    counts.iter().map(|count| *count.lock()).collect()
}

/// Writes the frame that a slot sends time and again.
fn lay_out(tx: &Transmit, slot: u16, size: usize, mac: [u8; 6], tso: bool) {
    let start = packet::start(size, mac, tso, DISCARD);
    tx.header(slot).copy_in(0, &start.header);
    let frame = tx.frame(slot);
    frame.fill(0, size, FILLER);
    frame.copy_in(0, start.bytes());
}

/// Says what was counted, while the device still runs: some VMMs end its threads at a reset, and what these have cost is
/// looked at when the result comes.
fn report(options: &Options, nic: &Nic, counts: &[Count]) {
    let mut all = Count::default();
    for count in counts {
        all.frames += count.frames;
        all.bytes += count.bytes;
        all.kicks += count.kicks;
        all.sleep.add(count.sleep);
        all.ticks = all.ticks.max(count.ticks);
    }
    // Whoever counts what the VMM does stops here: the letters of a result cost exits of their own.
    say!("end");
    let ns = clock::to_ns(all.ticks).max(1);
    let per_second = |number: u64| (u128::from(number) * 1_000_000_000 / u128::from(ns)) as u64;
    say!(
        "result job={} pairs={} cpus={} features={:#x} time_ns={ns} frames={} bytes={} fps={} bps={} kicks={} {}",
        options.name,
        nic.pairs.len(),
        counts.len(),
        nic.features,
        all.frames,
        all.bytes,
        per_second(all.frames),
        per_second(all.bytes * 8),
        all.kicks,
        all.sleep
    );
}
