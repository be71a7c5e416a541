//! Measured NIC jobs. `job=net-tx` sends frames that were laid out once as fast as the device takes them, `job=net-rx`
//! counts what comes from its first frame on. A turn takes all that there is, publishes once and kicks at most once.
//!
//! A driver is not told what becomes of a frame: `net-tx` counts what the device has returned, dropped or sent. Whoever
//! measures by it has to compare with what the device or its port says it has sent.

use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::job::Options;
use crate::net::{ETHERNET, LONGEST, Nic, Pair, Transmit};
use crate::smp::{self, Barrier};
use crate::sync::{Held, Lock};
use crate::{clock, power, say};

const DEFAULT_TIME_MS: u64 = 2_000;
const DEFAULT_SIZE: u64 = 1_500;
const SHORTEST: u64 = 60;

/// A station that the frames are for; not the host, which so drops them early.
const NOBODY: [u8; 6] = [0x52, 0x54, 0, 0xff, 0xff, 0xff];
const IPV4: [u8; 2] = [0x08, 0x00];
const IP_HEADER: usize = 20;
const TCP: u8 = 6;
const TCP_HEADER: usize = 20;
const UDP: u8 = 17;
/// TEST-NET-1 (RFC 5737).
const FROM: [u8; 4] = [192, 0, 2, 1];
const TO: [u8; 4] = [192, 0, 2, 2];
/// The discard service.
const PORT: u16 = 9;

/// VIRTIO_NET_HDR_F_NEEDS_CSUM.
const NEEDS_CSUM: u8 = 1;
/// VIRTIO_NET_HDR_GSO_TCPV4.
const GSO_TCPV4: u8 = 1;
/// Bytes per TCP segment, as of Linux with timestamps at an MTU of 1500.
const SEGMENT: u16 = 1_448;
const CHECKSUM_IN_TCP: u16 = 16;

/// What one vCPU has counted.
#[derive(Clone, Copy, Default)]
struct Count {
    frames: u64,
    bytes: u64,
    ticks: u64,
    kicks: u64,
}

/// Sends frames for a time.
pub fn transmit(options: &Options) {
    let size = options.size.unwrap_or(DEFAULT_SIZE);
    if !(SHORTEST..=LONGEST as u64).contains(&size) {
        power::fail(format_args!("command-line where=size expected={SHORTEST}..={LONGEST} got={size}"));
    }
    let size = size as usize;
    let nic = Nic::open(options, size);
    let time = clock::from_ms(options.time_ms.unwrap_or(DEFAULT_TIME_MS));
    let counts = on_all_cpus(options, &nic, |pairs| {
        for pair in pairs.iter_mut() {
            (0..pair.tx.slots()).for_each(|slot| lay_out(&pair.tx, slot, size, nic.mac, options.tso));
        }
        let mut count = Count::default();
        let start = clock::ticks();
        let kicks: u64 = pairs.iter().map(|pair| pair.kicks()).sum();
        let mut last = start;
        loop {
            let now = clock::ticks();
            count.ticks = now.wrapping_sub(start);
            if count.ticks >= time {
                break;
            }
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
                power::fail(format_args!("stall where=transmit expected=completions got=none frames={}", count.frames));
            }
        }
        count.bytes = count.frames * size as u64;
        count.kicks = pairs.iter().map(|pair| pair.kicks()).sum::<u64>() - kicks;
        count
    });
    nic.transport.reset();
    report(options, &nic, &counts);
}

/// Counts the frames that come within a time, which begins with the first of them on any pair.
pub fn receive(options: &Options) {
    let nic = Nic::open(options, LONGEST);
    let time = clock::from_ms(options.time_ms.unwrap_or(DEFAULT_TIME_MS));
    let begun = AtomicBool::new(false);
    let counts = on_all_cpus(options, &nic, |pairs| {
        let mut count = Count::default();
        let mut start = clock::ticks();
        let mut waiting = true;
        let mut kicks = 0;
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
                power::fail(format_args!("stall where=receive expected=frames got=none"));
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
        }
        count.kicks = pairs.iter().map(|pair| pair.kicks()).sum::<u64>() - kicks;
        count
    });
    nic.transport.reset();
    report(options, &nic, &counts);
}

/// Spreads the pairs over the vCPUs, and lets these begin together.
fn on_all_cpus(options: &Options, nic: &Nic, work: impl Fn(&mut [Held<'_, Pair>]) -> Count + Sync) -> Vec<Count> {
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
        *counts[cpu].lock() = work(&mut pairs);
    });
    counts.iter().map(|count| *count.lock()).collect()
}

/// Writes an IPv4 frame: UDP, or TCP that the device is to cut into segments.
fn lay_out(tx: &Transmit, slot: u16, size: usize, mac: [u8; 6], tso: bool) {
    let header = tx.header(slot);
    if tso {
        header.copy_in(0, &[NEEDS_CSUM, GSO_TCPV4]);
        let lengths =
            [(ETHERNET + IP_HEADER + TCP_HEADER) as u16, SEGMENT, (ETHERNET + IP_HEADER) as u16, CHECKSUM_IN_TCP];
        for (index, value) in lengths.into_iter().enumerate() {
            header.write(2 + index * 2, value);
        }
    }
    let frame = tx.frame(slot);
    frame.fill(0, size, 0x5a);
    frame.copy_in(0, &NOBODY);
    frame.copy_in(6, &mac);
    frame.copy_in(12, &IPV4);
    let mut ip = [0; IP_HEADER];
    ip[0] = 0x45;
    // A frame may be longer than any IP packet by a VLAN tag: what is behind the packet is padding then.
    let packet = (size - ETHERNET).min(usize::from(u16::MAX)) as u16;
    ip[2..4].copy_from_slice(&packet.to_be_bytes());
    ip[8] = 64;
    ip[9] = if tso { TCP } else { UDP };
    ip[12..16].copy_from_slice(&FROM);
    ip[16..20].copy_from_slice(&TO);
    let sum: u32 = ip.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.copy_in(ETHERNET, &ip);
    let [high, low] = PORT.to_be_bytes();
    if tso {
        // Ports, numbers, a header of five words, ACK, a window; the checksum's field is the device's to fill.
        let tcp = [high, low, high, low, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0];
        frame.copy_in(ETHERNET + IP_HEADER, &tcp);
    } else {
        let [long, short] = (packet - IP_HEADER as u16).to_be_bytes();
        frame.copy_in(ETHERNET + IP_HEADER, &[high, low, high, low, long, short, 0, 0]);
    }
}

fn report(options: &Options, nic: &Nic, counts: &[Count]) {
    let mut all = Count::default();
    for count in counts {
        all.frames += count.frames;
        all.bytes += count.bytes;
        all.kicks += count.kicks;
        all.ticks = all.ticks.max(count.ticks);
    }
    let ns = clock::to_ns(all.ticks).max(1);
    let per_second = |number: u64| (u128::from(number) * 1_000_000_000 / u128::from(ns)) as u64;
    say!(
        "result job={} pairs={} cpus={} features={:#x} time_ns={ns} frames={} bytes={} fps={} bps={} kicks={}",
        options.name,
        nic.pairs.len(),
        counts.len(),
        nic.features,
        all.frames,
        all.bytes,
        per_second(all.frames),
        per_second(all.bytes * 8),
        all.kicks
    );
}
