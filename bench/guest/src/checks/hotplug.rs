//! `job=hotplug`: a disk that comes and goes. Each time one has come that was not there at the start, the guest drives it, checks
//! what it writes and reads, lets it go with a reset, says so, and waits until the bus is empty of it again.

use crate::drivers::single::{Disk, Memory};
use crate::drivers::{blk, pci, virtio};
use crate::job::Options;
use crate::machine::{clock, fail, smp};
use crate::say;

/// How long the bus is looked at in vain.
const WAIT_MS: u64 = 120_000;
/// How long a request may take.
const REQUEST_MS: u64 = 60_000;

/// Does the job.
pub fn run(options: &Options) {
    smp::start(1);
    let settled = pci::functions();
    let memory = Memory::new();
    say!("start job={} devices={}", options.name, settled.len());
    let start = clock::ticks();
    for round in 0..options.rounds {
        let found = wait_for(|| pci::functions().into_iter().find(|function| !settled.contains(function)));
        let Some(function) = found else {
            fail(format_args!("hotplug where=round:{round} expected=a-device got=none"))
        };
        if virtio::kind(function) != Some(virtio::BLOCK) {
            fail(format_args!("hotplug where=round:{round} expected=a-disk got={:04x?}", function.ids()));
        }
        let mut disk = memory.bring_up(function, options);
        let pattern = round as u8 | 1;
        disk.fill(pattern);
        request(&mut disk, blk::T_OUT, round);
        disk.fill(0);
        request(&mut disk, blk::T_IN, round);
        if let Some(at) = disk.find_other(pattern) {
            fail(format_args!("hotplug where=round:{round} expected={pattern:#x} got=another-byte-at:{at}"));
        }
        disk.reset();
        say!("let-go round={round} slot={}", function.device);
        if wait_for(|| (function.ids().0 == 0xffff).then_some(())).is_none() {
            fail(format_args!("hotplug where=round:{round} expected=no-device got={:04x?}", function.ids()));
        }
        say!("gone round={round}");
    }
    let time_ns = clock::to_ns(clock::ticks() - start);
    say!("result job={} time_ns={time_ns} rounds={} errors=0", options.name, options.rounds);
}

fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let start = clock::ticks();
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if clock::ticks().wrapping_sub(start) > clock::from_ms(WAIT_MS) {
            return None;
        }
    }
}

fn request(disk: &mut Disk<'_>, kind: u32, round: u64) {
    let status = disk.request(kind, REQUEST_MS);
    if status != Some(blk::S_OK) {
        fail(format_args!("hotplug where=round:{round} expected=ok got={status:?}"));
    }
}
