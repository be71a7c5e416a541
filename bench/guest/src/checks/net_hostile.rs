//! `job=net-hostile` on a looped port: frames and headers that no sound driver sends. The device drops them or asks for a
//! reset, and a sound frame comes back after each, alone. Malformed chains are `job=hostile`'s: the rings are the same.

use crate::drivers::net::{ETHERNET, HEADER, LONGEST, Nic, Pair};
use crate::drivers::queue::{NEXT, WRITE, write_descriptor};
use crate::drivers::virtio::NEEDS_RESET;
use crate::job::Options;
use crate::machine::mem::{self, Region};
use crate::machine::{clock, fail};
use crate::say;

const MEMORY: usize = 128 << 10;
/// The length of the sound frame that is sent after each act, unlike all of the acts'.
const SOUND: usize = 777;
/// Beyond all RAM that a test gives its guest, and below what a CPU can address.
const NOWHERE: usize = 1 << 38;
/// How long is listened for frames that must not come.
const SILENCE_MS: u64 = 5;

/// What has to become of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Returned or the device given up, and no frame came of it.
    Dropped,
    /// It comes back as a frame of this length.
    Echoed(usize),
}

/// A chain of `pieces`, each so many bytes, with a header at its beginning.
struct Act {
    name: &'static str,
    header: [u8; HEADER],
    pieces: &'static [usize],
    flags: u16,
    nowhere: bool,
    fate: Fate,
}

const fn act(name: &'static str, header: [u8; HEADER], pieces: &'static [usize], fate: Fate) -> Act {
    Act { name, header, pieces, flags: 0, nowhere: false, fate }
}

const PLAIN: [u8; HEADER] = [0; HEADER];

const ACTS: &[Act] = &[
    act("short-header", PLAIN, &[HEADER - 1], Fate::Dropped),
    act("no-frame", PLAIN, &[HEADER], Fate::Dropped),
    act("short-frame", PLAIN, &[HEADER + ETHERNET - 1], Fate::Dropped),
    act("long-frame", PLAIN, &[HEADER + 70_000], Fate::Dropped),
    act("long-frame-in-pieces", PLAIN, &[HEADER, 40_000, 40_000], Fate::Dropped),
    act("header-in-bytes", PLAIN, &[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 500], Fate::Echoed(500)),
    act("header-across-pieces", PLAIN, &[5, 9, 298], Fate::Echoed(300)),
    // None of these were agreed to: NEEDS_CSUM, each kind of GSO, ECN alone.
    act("checksum", [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0], &[HEADER + 500], Fate::Dropped),
    act("checksum-behind-the-end", [1, 0, 0, 0, 0, 0, 255, 255, 255, 255, 0, 0], &[HEADER + 500], Fate::Dropped),
    act("tso4", [1, 1, 54, 0, 168, 5, 34, 0, 16, 0, 0, 0], &[HEADER + 9_000], Fate::Dropped),
    act("tso4-segments-of-nothing", [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0], &[HEADER + 9_000], Fate::Dropped),
    act("tso6", [1, 4, 74, 0, 148, 5, 54, 0, 16, 0, 0, 0], &[HEADER + 9_000], Fate::Dropped),
    act("ufo", [1, 3, 42, 0, 168, 5, 34, 0, 6, 0, 0, 0], &[HEADER + 9_000], Fate::Dropped),
    act("uso", [1, 5, 42, 0, 168, 5, 34, 0, 6, 0, 0, 0], &[HEADER + 9_000], Fate::Dropped),
    act("unknown-gso", [0, 127, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[HEADER + 500], Fate::Dropped),
    act("ecn-alone", [0, 128, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[HEADER + 500], Fate::Dropped),
    Act { flags: WRITE, ..act("writable", PLAIN, &[HEADER + 500], Fate::Dropped) },
    Act { nowhere: true, ..act("unmapped", PLAIN, &[HEADER, 500], Fate::Dropped) },
];

/// Does all of them.
pub fn run(options: &Options) {
    let memory = mem::dma(MEMORY, 4096);
    for act in ACTS {
        let nic = Nic::open(options, LONGEST);
        let outcome = attempt(&nic, act, memory, options);
        nic.transport.reset();
        say!("net-hostile kind={} outcome={outcome}", act.name);
    }
    say!("result job={} acts={} errors=0", options.name, ACTS.len());
}

fn attempt(nic: &Nic, act: &Act, memory: Region, options: &Options) -> &'static str {
    let mut pair = nic.pairs[0].lock();
    let pair = &mut *pair;
    memory.fill(0, MEMORY, 0x5a);
    memory.copy_in(0, &act.header);
    let last = act.pieces.len() - 1;
    let mut at = 0;
    for (index, &len) in act.pieces.iter().enumerate() {
        let more = if index == last { 0 } else { NEXT };
        let address = if act.nowhere && index == last { NOWHERE } else { memory.base() + at };
        let index = index as u16;
        write_descriptor(pair.tx.queue.layout.desc, index, address, len as u32, act.flags | more, index + 1);
        at += len;
    }
    pair.tx.queue.offer(0);
    pair.tx.publish();
    let start = clock::ticks();
    let waited = |ms: u64| clock::ticks().wrapping_sub(start) > clock::from_ms(ms);
    while pair.tx.queue.next_used().is_none() {
        if nic.transport.status() & NEEDS_RESET != 0 {
            if act.fate != Fate::Dropped {
                fail(format_args!("status where=net-hostile:{} expected=a-frame got=NEEDS_RESET", act.name));
            }
            return "reset";
        }
        if waited(options.stall_ms) {
            fail(format_args!("stall where=net-hostile:{} expected=an-end got=none", act.name));
        }
    }
    if let Fate::Echoed(len) = act.fate {
        expect(pair, act, len, options);
        sound(pair, act, options);
        return "echoed";
    }
    sound(pair, act, options);
    "dropped"
}

/// Sends a frame that nothing is wrong with; it is the next that comes, and the last.
fn sound(pair: &mut Pair, act: &Act, options: &Options) {
    let Some(slot) = pair.tx.take() else {
        fail(format_args!("slots where=net-hostile:{} expected=one got=none", act.name))
    };
    pair.tx.frame(slot).fill(0, SOUND, 0xa5);
    pair.tx.send(slot, SOUND);
    pair.tx.publish();
    expect(pair, act, SOUND, options);
    clock::delay_ms(SILENCE_MS);
    if let Some(len) = pair.rx.next(|_| {}) {
        fail(format_args!("frames where=net-hostile:{} expected=no-more got=len:{len}", act.name));
    }
}

fn expect(pair: &mut Pair, act: &Act, len: usize, options: &Options) {
    let start = clock::ticks();
    let got = loop {
        if let Some(got) = pair.rx.next(|_| {}) {
            break got;
        }
        if clock::ticks().wrapping_sub(start) > clock::from_ms(options.stall_ms) {
            fail(format_args!("stall where=net-hostile:{} expected=len:{len} got=none", act.name));
        }
    };
    pair.rx.publish();
    if got != len {
        fail(format_args!("frames where=net-hostile:{} expected=len:{len} got=len:{got}", act.name));
    }
}
