//! `job=drained`: one vCPU reads a disk until it answers no more, and resets it, which may never be complete. Another looks at every
//! configuration space all the time, the disk's own included, and says how long the longest access has taken. It goes on until the
//! machine ends.

use core::sync::atomic::{AtomicBool, Ordering};

use crate::drivers::blk::{self, Blk};
use crate::drivers::pci;
use crate::drivers::single::Memory;
use crate::drivers::virtio::{self, Transport, common};
use crate::job::Options;
use crate::machine::{clock, smp};
use crate::say;

/// How long a read may take before it counts as one that is never answered.
const SILENCE_MS: u64 = 1_000;
/// Between two lines of the one who looks.
const LINE_MS: u64 = 250;

/// Does the job.
pub fn run(options: &Options) {
    smp::start(2);
    let function = Blk::find(options).function;
    let memory = Memory::new();
    let (up, resetting) = (AtomicBool::new(false), AtomicBool::new(false));
    say!("start job={}", options.name);
    smp::run(2, &|cpu| {
        if cpu == 0 {
            let mut disk = memory.bring_up(function, options);
            up.store(true, Ordering::Release);
            while disk.request(blk::T_IN, SILENCE_MS).is_some() {}
            resetting.store(true, Ordering::Release);
            disk.transport.common.write::<u8>(common::DEVICE_STATUS, 0);
            loop {
                core::hint::black_box(disk.transport.status());
            }
        }
        while !up.load(Ordering::Acquire) {
            core::hint::spin_loop();
        }
        let others: alloc::vec::Vec<_> = pci::functions();
        let transport = Transport::new(virtio::BLOCK, function);
        loop {
            watch(&others, &transport, resetting.load(Ordering::Acquire));
        }
    });
}

/// Looks for a while, and says what the longest access was.
fn watch(functions: &[pci::Function], disk: &Transport, resetting: bool) {
    let start = clock::ticks();
    let (mut accesses, mut longest) = (0_u64, 0);
    let mut access = |what: &dyn Fn()| {
        let before = clock::ticks();
        what();
        longest = longest.max(clock::ticks().wrapping_sub(before));
        accesses += 1;
    };
    while clock::ticks().wrapping_sub(start) < clock::from_ms(LINE_MS) {
        for function in functions {
            access(&|| _ = core::hint::black_box(function.ids()));
        }
        access(&|| _ = core::hint::black_box(disk.status()));
        access(&|| _ = core::hint::black_box(disk.config.read::<u32>(0)));
    }
    let longest_us = clock::to_ns(longest) / 1_000;
    say!("watched resetting={} accesses={accesses} longest_us={longest_us}", u8::from(resetting));
}
