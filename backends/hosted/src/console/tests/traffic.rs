//! Bytes through sound chains.

use std::collections::VecDeque;
use std::io::Write;

use bolero::TypeGenerator;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::pipe::fcntl_setpipe_size;

use super::super::backlog::CAPACITY;
use super::*;

fn nonblocking(fd: OwnedFd) -> File {
    fcntl_setfl(&fd, OFlags::NONBLOCK).unwrap();
    fd.into()
}

#[test]
fn output_arrives_whole_and_inherited_descriptors_keep_their_flags() {
    for features in [FEATURES, 1 << VIRTIO_F_VERSION_1] {
        let (read, write) = pipe();
        let flags = fcntl_getfl(&write).unwrap();
        let mut rig = Rig::with(End::descriptors(null_input(), write.try_clone().unwrap()), features);
        let mut read = nonblocking(read);
        let (text, mut got) = (text(300_000), Vec::new());
        for (most, part) in [(1, &text[..2000]), (7, &text[2000..9000]), (4096, &text[9000..])] {
            rig.send_all(part, most, || drain(&mut read, &mut got));
        }
        rig.until(|_| {
            drain(&mut read, &mut got);
            got.len() >= text.len()
        });
        assert!(got == text);
        assert_eq!(fcntl_getfl(&write).unwrap(), flags);
        assert!(rig.errors.is_empty());
    }
}

#[test]
fn a_slow_reader_keeps_chains_in_the_queue_and_loses_nothing() {
    let (read, write) = pipe();
    fcntl_setpipe_size(&write, 4096).unwrap();
    let mut rig = Rig::new(End::descriptors(null_input(), write));
    let text = text(SIZE as usize * 0x4000);
    // All chains at once: 256 KiB, of which 68 KiB fit into the backlog and the pipe.
    for (n, piece) in text.chunks(0x4000).enumerate() {
        let addr = TX_DATA + n as u64 * 0x4000;
        rig.mem.write_slice(piece, GuestAddress(addr)).unwrap();
        rig.tx.add(&[Buffer { addr, len: 0x4000, writable: false }]).unwrap();
    }
    rig.tx.publish();
    rig.call(TRANSMITQ as u16);
    rig.pump();
    assert_eq!(rig.sent(), 4, "the rest waits for the reader");
    assert_eq!(rig.positions(TRANSMITQ), (4, 4));
    // Nothing is waited for but the reader.
    assert_eq!(rig.pump(), 0);
    let (mut read, mut got) = (nonblocking(read), Vec::new());
    rig.until(|_| {
        drain(&mut read, &mut got);
        got.len() >= text.len()
    });
    assert!(got == text);
    assert_eq!(rig.sent(), SIZE as usize - 4);
}

#[test]
fn a_chain_longer_than_the_backlog_goes_out_in_pieces() {
    let (read, write) = pipe();
    let mut rig = Rig::new(End::descriptors(null_input(), write));
    let text = text(700_001);
    rig.send(&text, &[1, 300_000, 0, 400_000]);
    assert_eq!(rig.sent(), 0);
    let (mut read, mut got) = (nonblocking(read), Vec::new());
    rig.until(|_| {
        drain(&mut read, &mut got);
        got.len() >= text.len()
    });
    assert!(got == text);
    assert_eq!(rig.sent(), 1);
}

#[test]
fn input_arrives_whole_and_is_read_only_for_buffers() {
    for features in [FEATURES, 1 << VIRTIO_F_VERSION_1] {
        let (input, mut keys) = pipe_of_input();
        let mut rig = Rig::with(End::descriptors(input, File::create("/dev/null").unwrap().into()), features);
        let text = text(50_000);
        keys.write_all(&text).unwrap();
        assert_eq!(rig.pump(), 0, "the guest has no buffers");
        for (count, len) in [(100, 1), (3000, 3), (text.len(), 4096)] {
            rig.receive(count, len);
        }
        assert!(rig.received == text);
        assert!(rig.interrupted(RECEIVEQ));
        drop(keys);
        rig.pump();
        assert_eq!(rig.pump(), 0, "the end of input is no reason to spin");
    }
}

fn pipe_of_input() -> (OwnedFd, File) {
    let (read, write) = pipe();
    (read, write.into())
}

#[test]
fn files_as_input_and_output_are_served_without_epoll() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    let text = text(150_000);
    std::fs::write(&from, &text).unwrap();
    let end = End::descriptors(File::open(&from).unwrap().into(), File::create(&to).unwrap().into());
    let mut rig = Rig::new(end);
    assert_eq!(rig.pump(), 0, "the guest has no buffers");
    rig.receive(text.len(), 1000);
    assert!(rig.received == text);
    rig.send_all(&text, 0x8000, || {});
    rig.pump();
    assert!(std::fs::read(&to).unwrap() == text);
    assert_eq!(rig.pump(), 0);
}

#[test]
fn interrupts_come_as_the_event_index_asks() {
    let mut rig = Rig::new(End::null());
    rig.tx.want_interrupts(false);
    rig.send(b"a", &[1]);
    assert!(!rig.interrupted(TRANSMITQ));
    rig.tx.want_interrupts(true);
    assert_eq!(rig.sent(), 1);
    rig.tx.want_interrupts(true);
    rig.send(b"b", &[1]);
    assert!(rig.interrupted(TRANSMITQ));
    // The driver was kicked for by the index: the device asks for the next kick.
    assert_eq!(rig.sent(), 1);
    rig.tx.add(&[Buffer { addr: TX_DATA, len: 1, writable: false }]).unwrap();
    assert!(rig.tx.publish());
}

#[test]
fn a_stopped_queue_is_not_touched() {
    let (input, mut keys) = pipe_of_input();
    let mut rig = Rig::new(End::descriptors(input, File::create("/dev/null").unwrap().into()));
    rig.offer_input(0, 100);
    rig.stop(RECEIVEQ);
    rig.stop(TRANSMITQ);
    keys.write_all(b"early").unwrap();
    rig.pump();
    assert_eq!(rig.rx.used_index(), 0);
    rig.send(b"late", &[4]);
    rig.call(TRANSMITQ as u16);
    assert_eq!(rig.tx.used_index(), 0);
    // One of the two is not enough.
    for (ready, enabled) in [(true, false), (false, true)] {
        rig.vrings[TRANSMITQ].set_queue_ready(ready);
        rig.vrings[TRANSMITQ].set_enabled(enabled);
        rig.call(TRANSMITQ as u16);
        assert_eq!((rig.tx.used_index(), rig.errors.len()), (0, 0));
    }
    // Input waits for the queue's next life.
    rig.start(RECEIVEQ, FEATURES);
    rig.pump();
    assert_eq!(rig.rx.next_used().map(|(_, written)| written), Some(5));
    rig.start(TRANSMITQ, FEATURES);
    assert_eq!(rig.sent(), 1);
}

/// A step of a driver and of the two people at a console.
#[derive(Clone, Debug, TypeGenerator)]
enum Step {
    /// Output in a chain of buffers of these lengths, some of them empty.
    Send(Vec<u16>),
    /// A chain for input.
    Offer(Vec<u16>),
    /// So many bytes are typed.
    Type(u16),
    /// So many bytes are read.
    Read(u16),
    /// Events are served.
    Pump,
    /// A queue is stopped and started again.
    Restart(bool),
}

/// Whatever the sizes of chains and the order of events, bytes arrive whole and in order, in both directions.
#[test]
fn fuzz_traffic() {
    bolero::check!().with_type::<Vec<Step>>().for_each(|steps| {
        let ((read, write), (input, keys)) = (pipe(), pipe());
        fcntl_setpipe_size(&write, 4096).unwrap();
        let (mut read, mut keys) = (nonblocking(read), nonblocking(keys));
        let mut rig = Rig::new(End::descriptors(input, write));
        let mut output = (VecDeque::new(), 0_u8);
        let mut typed = (VecDeque::new(), 0_u8);
        let mut chains = BTreeMap::new();
        let mut slots = 0_u64;
        let mut has_long = false;
        for step in steps {
            match step {
                Step::Send(lens) if !lens.is_empty() => {
                    let lens: Vec<usize> = lens.iter().take(6).map(|len| usize::from(*len) % 20_000).collect();
                    // The ring has its own place in memory for each chain, so that none is overwritten while it waits.
                    let total: usize = lens.iter().sum();
                    if rig.tx.in_flight() > 0 && slots + total as u64 > 0xf_0000 {
                        continue;
                    }
                    if slots + total as u64 > 0xf_0000 {
                        slots = 0;
                    }
                    let bytes: Vec<u8> = (0..total).map(|_| next(&mut output.1)).collect();
                    let mut addr = TX_DATA + slots;
                    rig.mem.write_slice(&bytes, GuestAddress(addr)).unwrap();
                    let mut buffers = Vec::new();
                    for len in lens {
                        buffers.push(Buffer { addr, len: len as u32, writable: false });
                        addr += len as u64;
                    }
                    if rig.offer_output(&buffers) {
                        slots += total as u64;
                        has_long |= total > CAPACITY;
                        output.0.extend(bytes);
                    } else {
                        output.1 = output.1.wrapping_sub((total % 256) as u8);
                    }
                }
                Step::Offer(lens) if !lens.is_empty() => {
                    let lens: Vec<u32> = lens.iter().take(4).map(|len| u32::from(*len) % 1024).collect();
                    let Some(slot) = (0..u64::from(SIZE)).find(|slot| !chains.values().any(|(used, _)| used == slot))
                    else {
                        continue;
                    };
                    let mut addr = RX_DATA + slot * 0x1000;
                    let mut buffers = Vec::new();
                    for len in &lens {
                        buffers.push(Buffer { addr, len: *len, writable: true });
                        addr += u64::from(*len);
                    }
                    if let Some(head) = rig.rx.add(&buffers) {
                        chains.insert(head, (slot, lens.iter().sum::<u32>()));
                        if rig.rx.publish() {
                            rig.call(RECEIVEQ as u16);
                        }
                    }
                }
                Step::Type(count) => {
                    let mut at = typed.1;
                    let bytes: Vec<u8> = (0..*count).map(|_| next(&mut at)).collect();
                    let written = keys.write(&bytes).unwrap_or(0);
                    typed.0.extend(&bytes[..written]);
                    typed.1 = bytes[..written].last().copied().unwrap_or(typed.1);
                }
                Step::Read(count) => {
                    let mut bytes = vec![0; usize::from(*count)];
                    if let Ok(count) = io::Read::read(&mut read, &mut bytes) {
                        assert!(output.0.drain(..count).eq(bytes[..count].iter().copied()));
                    }
                }
                Step::Pump => drop(rig.pump()),
                // A chain that goes out in pieces begins again.
                Step::Restart(true) if has_long => {}
                Step::Restart(index) => {
                    rig.stop(usize::from(*index));
                    rig.start(usize::from(*index), FEATURES);
                }
                Step::Send(_) | Step::Offer(_) => {}
            }
            rig.sent();
            has_long &= rig.tx.in_flight() > 0;
            collect(&mut rig, &mut chains, &mut typed.0);
        }
        // In the end, everything comes.
        let mut got = Vec::new();
        rig.until(|rig| {
            drain(&mut read, &mut got);
            rig.sent();
            got.len() >= output.0.len()
        });
        assert!(output.0.iter().eq(&got));
        rig.pump();
        assert_eq!((rig.tx.in_flight(), rig.errors.len()), (0, 0));
        collect(&mut rig, &mut chains, &mut typed.0);
        assert!(typed.0.is_empty() || chains.is_empty(), "buffers are left, and so is input");
    });
}

/// The next byte of an endless text.
fn next(at: &mut u8) -> u8 {
    *at = at.wrapping_add(1);
    *at
}

/// Takes input in and compares it with what was typed.
fn collect(rig: &mut Rig, chains: &mut BTreeMap<u16, (u64, u32)>, typed: &mut VecDeque<u8>) {
    while let Some((head, written)) = rig.rx.next_used() {
        let (slot, len) = chains.remove(&head).unwrap();
        assert!(written <= len);
        let mut bytes = vec![0; written as usize];
        rig.mem.read_slice(&mut bytes, GuestAddress(RX_DATA + slot * 0x1000)).unwrap();
        assert!(typed.drain(..bytes.len()).eq(bytes));
    }
}
