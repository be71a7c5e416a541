//! Drivers that break the rules.

use ringvm_backends::testing::driver::Descriptor;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::*;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;

/// A console whose output the test reads.
fn rig() -> (Rig, File) {
    let (read, write) = pipe();
    rustix::fs::fcntl_setfl(&read, rustix::fs::OFlags::NONBLOCK).unwrap();
    (Rig::new(End::descriptors(null_input(), write)), read.into())
}

#[test]
fn buffers_of_the_wrong_direction_are_passed_over() {
    let (mut rig, mut read) = rig();
    rig.mem.write_slice(b"ABCDEF", GuestAddress(TX_DATA)).unwrap();
    let buffer = |at, len, writable| Buffer { addr: TX_DATA + at, len, writable };
    rig.offer_output(&[buffer(0, 2, false), buffer(2, 2, true), buffer(4, 2, false)]);
    rig.offer_output(&[buffer(0, 6, true)]);
    let mut got = Vec::new();
    drain(&mut read, &mut got);
    assert_eq!((rig.sent(), got.as_slice()), (2, &b"ABEF"[..]));

    let (input, output) = pipe();
    let mut rig = Rig::new(End::descriptors(input, File::create("/dev/null").unwrap().into()));
    io::Write::write_all(&mut File::from(output), b"abcdef").unwrap();
    let buffer = |at, len, writable| Buffer { addr: RX_DATA + at, len, writable };
    rig.rx.add(&[buffer(0, 4, false)]).unwrap();
    rig.rx.add(&[buffer(0, 4, false), buffer(4, 4, true), buffer(8, 0, true), buffer(12, 100, true)]).unwrap();
    rig.rx.publish();
    rig.call(RECEIVEQ as u16);
    rig.pump();
    assert_eq!(rig.rx.next_used().map(|(_, written)| written), Some(0));
    assert_eq!(rig.rx.next_used().map(|(_, written)| written), Some(6));
    let mut bytes = [0; 16];
    rig.mem.read_slice(&mut bytes, GuestAddress(RX_DATA)).unwrap();
    assert_eq!(&bytes, b"\0\0\0\0abcd\0\0\0\0ef\0\0");
}

#[test]
fn chains_that_cannot_be_read_come_back_and_the_next_ones_are_served() {
    let (mut rig, mut read) = rig();
    rig.mem.write_slice(b"ok", GuestAddress(TX_DATA)).unwrap();
    let sound = Buffer { addr: TX_DATA, len: 2, writable: false };
    let bad = [
        Buffer { addr: MEMORY - 1, len: 2, writable: false },
        Buffer { addr: u64::MAX, len: 1, writable: false },
        Buffer { addr: u64::MAX - 1, len: u32::MAX, writable: false },
        Buffer { addr: TX_DATA, len: u32::MAX, writable: false },
    ];
    let mut sent = 0;
    for bad in bad {
        rig.offer_output(&[sound, bad, sound]);
        rig.offer_output(&[sound]);
        sent += 2;
    }
    let mut got = Vec::new();
    drain(&mut read, &mut got);
    assert_eq!((rig.sent(), got), (sent, b"ok".repeat(sent / 2)));
    assert!(rig.errors.is_empty());
}

#[test]
fn looping_chains_and_bad_tables_come_back() {
    let (mut rig, mut read) = rig();
    rig.mem.write_slice(b"ok", GuestAddress(TX_DATA)).unwrap();
    let data = |flags, next| Descriptor { addr: TX_DATA, len: 2, flags, next };
    let indirect = |addr, len| Descriptor { addr, len, flags: VRING_DESC_F_INDIRECT as u16, next: 0 };
    let heads = [
        data(NEXT, 0),
        data(NEXT, 9999),
        indirect(TX_DATA, 0),
        indirect(TX_DATA, 17),
        indirect(u64::MAX - 8, 32),
        indirect(TX_RING, 16 * u32::from(SIZE)),
    ];
    for desc in heads {
        let head = rig.tx.add(&[Buffer { addr: TX_DATA, len: 2, writable: false }]).unwrap();
        let next = if desc.next == 0 { head } else { desc.next };
        rig.tx.write_descriptor(TX_RING, head, Descriptor { next, ..desc });
        rig.tx.publish();
        rig.call(TRANSMITQ as u16);
    }
    rig.send(b"ok", &[2]);
    let mut got = Vec::new();
    drain(&mut read, &mut got);
    assert_eq!((rig.sent(), got.as_slice()), (heads.len() + 1, &b"ok"[..]));
    assert!(rig.errors.is_empty());
}

#[test]
fn a_broken_ring_is_told_once_and_served_again_after_a_stop() {
    let (mut rig, mut read) = rig();
    // An index that runs ahead of the ring, and a head that is none of its descriptors.
    for breaks in [
        |rig: &mut Rig| rig.tx.write_avail_index(1000),
        |rig: &mut Rig| {
            rig.tx.write_avail_entry(0, 5000);
            rig.tx.write_avail_index(1);
        },
        |rig: &mut Rig| {
            rig.tx.write_avail_entry(0, SIZE);
            rig.tx.write_avail_index(1);
        },
    ] {
        breaks(&mut rig);
        for _ in 0..3 {
            rig.call(TRANSMITQ as u16);
            rig.pump();
        }
        assert_eq!(rig.errors.len(), 1);
        assert_eq!(rig.sent(), 0);
        assert_eq!(rig.positions(TRANSMITQ), (0, 0), "nothing is in flight");
        rig.errors.clear();
        rig.stop(TRANSMITQ);
        rig.tx = Driver::new(Arc::clone(&rig.mem), TX_RING, SIZE, FEATURES);
        rig.vrings[TRANSMITQ].set_queue_next_avail(0);
        rig.vrings[TRANSMITQ].set_queue_next_used(0);
        rig.start(TRANSMITQ, FEATURES);
    }
    rig.send(b"again", &[5]);
    let mut got = Vec::new();
    drain(&mut read, &mut got);
    assert_eq!(got, b"again");
    assert!(rig.errors.is_empty());
    // The other queue was served all the time.
    rig.console.reset_device();
    rig.call(RECEIVEQ as u16);
}

#[test]
fn chains_before_a_bad_entry_interrupt_the_driver() {
    let (mut rig, mut read) = rig();
    rig.mem.write_slice(b"ok", GuestAddress(TX_DATA)).unwrap();
    rig.tx.want_interrupts(true);
    rig.tx.add(&[Buffer { addr: TX_DATA, len: 2, writable: false }]).unwrap();
    rig.tx.write_avail_entry(1, 5000);
    rig.tx.write_avail_index(2);
    rig.call(TRANSMITQ as u16);
    assert_eq!((rig.errors.len(), rig.positions(TRANSMITQ)), (1, (1, 1)));
    assert!(rig.errors[0].to_string().contains("names descriptor 5000, of 16"), "{}", rig.errors[0]);
    assert!(rig.interrupted(TRANSMITQ));
    rig.pump();
    let mut got = Vec::new();
    drain(&mut read, &mut got);
    assert_eq!((rig.sent(), got.as_slice()), (1, &b"ok"[..]));
}

/// Whatever lies in memory, serving ends, and nothing is written but buffers for input.
#[test]
fn fuzz_hostile_queues() {
    type Descriptors = Vec<(u16, u64, u32, u16, u16)>;
    bolero::check!().with_type::<(bool, Descriptors, Vec<u16>, u16, Vec<u8>)>().for_each(
        |(is_rx, descriptors, heads, index, typed)| {
            let (input, keys) = pipe();
            let mut rig = Rig::new(End::descriptors(input, File::create("/dev/null").unwrap().into()));
            let (driver, ring) = if *is_rx { (&rig.rx, RX_RING) } else { (&rig.tx, TX_RING) };
            for &(at, addr, len, flags, next) in descriptors {
                // Mostly near the truth, so that more than the first check is reached.
                let desc = Descriptor {
                    addr: 0x10_000 + addr % MEMORY,
                    len: len & 0x1f_fff,
                    flags: flags & 7,
                    next: next % 18,
                };
                let table = if at % 3 == 0 { 0x4000 } else { ring };
                driver.write_descriptor(table, at % SIZE, desc);
            }
            for (n, head) in heads.iter().enumerate() {
                driver.write_avail_entry(n as u16, head % 17);
            }
            driver.write_avail_index(index % 20);
            io::Write::write_all(&mut File::from(keys), &typed[..typed.len().min(4096)]).unwrap();
            for event in [RECEIVEQ as u16, TRANSMITQ as u16, HOST_EVENT] {
                rig.call(event);
                rig.pump();
            }
            assert!(rig.errors.len() <= 1);
            for index in [RECEIVEQ, TRANSMITQ] {
                let (next_avail, next_used) = rig.positions(index);
                assert_eq!(next_avail, next_used, "queue {index} keeps a chain");
            }
            let used = if *is_rx { rig.rx.used_index() } else { rig.tx.used_index() };
            assert!(used <= index % 20);
        },
    );
}

#[test]
fn a_chain_of_writable_buffers_is_not_output() {
    let (mut rig, _read) = rig();
    let head = rig.tx.add(&[Buffer { addr: TX_DATA, len: 2, writable: true }]).unwrap();
    let flags = (VRING_DESC_F_WRITE | VRING_DESC_F_NEXT) as u16;
    rig.tx.write_descriptor(TX_RING, head, Descriptor { addr: u64::MAX, len: u32::MAX, flags, next: head });
    rig.tx.publish();
    rig.call(TRANSMITQ as u16);
    assert_eq!(rig.sent(), 1);
}
