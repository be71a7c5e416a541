//! `job=rng`: asks a virtio entropy device for bytes and looks at them. Virtio 1.3, section 5.4.

use crate::drivers::queue::{WRITE, write_descriptor};
use crate::drivers::virtio::{self, Transport};
use crate::job::Options;
use crate::machine::{clock, fail, mem};
use crate::{say, spec};

const DEFAULT_REQUESTS: u64 = 64;
const LONGEST: usize = 4096;

/// Reads from the first entropy device.
pub fn run(options: &Options) {
    let Some((kind, function)) = virtio::devices().into_iter().find(|&(kind, _)| kind == virtio::ENTROPY) else {
        fail(format_args!("find where=pci expected=virtio-rng got=none"))
    };
    let transport = Transport::new(kind, function);
    transport.negotiate(spec::VERSION_1);
    let mut queue = transport.enable_queue(0, 0, None, false);
    transport.start();
    let buffer = mem::dma(LONGEST, 4096);
    let mut seen = [0_u64; 256];
    let mut bytes = 0;
    for request in 0..options.ops.unwrap_or(DEFAULT_REQUESTS) {
        // All sorts of lengths, from one byte on.
        let len = 1 + (request as usize * 67) % LONGEST;
        buffer.fill(0, LONGEST, 0);
        write_descriptor(queue.layout.desc, 0, buffer.base(), len as u32, WRITE, 0);
        queue.offer(0);
        queue.publish();
        let start = clock::ticks();
        let got = loop {
            if let Some((_, got)) = queue.next_used() {
                break got as usize;
            }
            if clock::ticks().wrapping_sub(start) > clock::from_ms(options.stall_ms) {
                fail(format_args!("stall where=virtio-rng expected=bytes got=none"));
            }
        };
        if got == 0 || got > len {
            fail(format_args!("used-length where=virtio-rng expected=1..={len} got={got}"));
        }
        if let Some(at) = buffer.find_other(got, LONGEST - got, 0) {
            fail(format_args!("dma where=virtio-rng expected=untouched got=written offset={at} len={got}"));
        }
        (0..got).for_each(|at| seen[usize::from(buffer.read::<u8>(at))] += 1);
        bytes += got as u64;
    }
    transport.reset();
    // Eight times the mean, in any of 256 counts that are large enough to have one, does not happen by chance.
    let most = seen.iter().copied().max().unwrap_or(0);
    if bytes > 16_384 && most > bytes / 256 * 8 {
        fail(format_args!("entropy where=virtio-rng expected=random-bytes got=one-byte-{most}-times-in-{bytes}"));
    }
    say!("result job={} bytes={bytes} distinct={} errors=0", options.name, seen.iter().filter(|&&n| n != 0).count());
}
