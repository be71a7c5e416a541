//! `job=idle`: `disks` and `nics` are brought up as a driver does that waits for them by interrupts, each disk reads a
//! block so that it has worked once, and then nothing: the vCPU halts, but for two ticks of its timer a second that look at
//! the clock. Whatever the VMM takes meanwhile is its own.

use alloc::vec::Vec;

use crate::drivers::blk::{self, Blk};
use crate::drivers::net::Nic;
use crate::drivers::queue::{NEXT, WRITE, write_descriptor};
use crate::job::Options;
use crate::machine::interrupts::{self, TIMER};
use crate::machine::{apic, clock, fail, mem};
use crate::{say, spec};

const DEFAULT_TIME_MS: u64 = 2_000;
/// Where the status lies behind the header, and the data behind both.
const STATUS: usize = 64;
const DATA: usize = 512;
/// Longest frame of the usual MTU.
const LONGEST: usize = 1_514;

/// Brings the devices up and waits.
pub fn run(options: &Options) {
    let options = Options { irq: true, ..options.clone() };
    let disks: Vec<Blk> =
        (0..options.disk).map(|disk| Blk::open(&Options { disk, queues: None, ..options.clone() })).collect();
    disks.iter().for_each(|disk| read(disk, options.stall_ms));
    let nics: Vec<Nic> = (0..options.nics).map(|nth| Nic::open_nth(nth, &options, LONGEST)).collect();
    for pair in nics.iter().flat_map(|nic| &nic.pairs) {
        let mut pair = pair.lock();
        pair.rx.publish();
        // Whatever comes raises one interrupt; nobody takes it, so that there is no second.
        for queue in pair.queues() {
            queue.arm();
        }
    }
    say!("start job={}", options.name);
    let (start, time) = (clock::ticks(), clock::from_ms(options.time_ms.unwrap_or(DEFAULT_TIME_MS)));
    let mut wakes = 0_u64;
    apic::tick_rarely();
    while clock::ticks().wrapping_sub(start) < time {
        interrupts::halt_unless_counted(TIMER, interrupts::count(TIMER));
        wakes += 1;
    }
    apic::stop_ticking();
    let ns = clock::to_ns(clock::ticks().wrapping_sub(start));
    say!("end");
    say!("result job={} disks={} nics={} time_ns={ns} wakes={wakes}", options.name, disks.len(), nics.len());
    disks.iter().for_each(|disk| disk.transport.reset());
    nics.iter().for_each(|nic| nic.transport.reset());
}

/// Reads a disk's first sector through each of its queues, and leaves these with interrupts asked for.
fn read(disk: &Blk, stall_ms: u64) {
    for queue in &disk.queues {
        let mut held = queue.lock();
        let queue = &mut held.queue;
        let memory = mem::dma(DATA + spec::SECTOR, 512);
        memory.copy_in(0, &blk::header(blk::T_IN, 0));
        memory.write::<u8>(STATUS, blk::S_UNSET);
        let table = queue.layout.desc;
        write_descriptor(table, 0, memory.base(), blk::HEADER as u32, NEXT, 1);
        write_descriptor(table, 1, memory.base() + DATA, spec::SECTOR as u32, NEXT | WRITE, 2);
        write_descriptor(table, 2, memory.base() + STATUS, 1, WRITE, 0);
        queue.offer(0);
        queue.publish();
        let start = clock::ticks();
        while queue.next_used().is_none() {
            core::hint::spin_loop();
            if clock::ticks().wrapping_sub(start) > clock::from_ms(stall_ms) {
                fail(format_args!("stall where=queue:{} expected=a-completion got=none", queue.index));
            }
        }
        let status: u8 = memory.read(STATUS);
        if status != blk::S_OK {
            fail(format_args!("status where=queue:{} expected={} got={status}", queue.index, blk::S_OK));
        }
        queue.arm();
    }
}
