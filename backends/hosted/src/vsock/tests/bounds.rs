//! What clients, programs and guests can't have: too much of anything.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use ringvm_backends::testing::driver::{Buffer, Descriptor};

use vhost_user_backend::VhostUserBackend;

use super::rig::{CID, Guest, Rig};
use crate::vsock::muxer::Limits;
use crate::vsock::packet::{HOST_CID, Header, TYPE_STREAM, op};
use crate::vsock::{RX, TX};

#[test]
fn clients_that_say_nonsense_or_nothing_are_dropped() {
    let mut rig = Rig::with(Limits { patience: Duration::from_millis(200), ..Limits::default() });
    let long = [b'x'; 100];
    for line in [&b"GET / HTTP/1.1\r\n"[..], b"CONNECT\n", b"CONNECT 4294967296\n", b"\n", b"\xff\xfe\n", &long] {
        let mut client = rig.client();
        client.write_all(line).unwrap();
        rig.turn();
        // Bytes that nobody has read make it a reset.
        assert!(!matches!(client.read(&mut [0; 1]), Ok(1..)));
    }
    let mut silent = rig.client();
    let mut slow = rig.client();
    rig.turn();
    slow.write_all(b"CONN").unwrap();
    rig.turn();
    assert_eq!(rig.held(), (0, 2, 0));
    while rig.held().1 > 0 {
        rig.wait(Duration::from_millis(50));
    }
    assert_eq!(silent.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(slow.read(&mut [0; 1]).unwrap(), 0);
    rig.nothing();
}

#[test]
fn the_oldest_silent_client_makes_room() {
    let mut rig = Rig::with(Limits { handshakes: 4, ..Limits::default() });
    let mut clients = Vec::new();
    for _ in 0..6 {
        clients.push(rig.client());
        rig.turn();
    }
    assert_eq!(rig.held(), (0, 4, 0));
    for (i, client) in clients.iter_mut().enumerate() {
        client.set_nonblocking(true).unwrap();
        assert_eq!(client.read(&mut [0; 1]).is_ok_and(|len| len == 0), i < 2, "client {i}");
    }
    clients[5].write_all(b"CONNECT 1\n").unwrap();
    assert_eq!(rig.next().0.op, op::REQUEST);
}

#[test]
fn connections_are_limited_both_ways() {
    let mut rig = Rig::with(Limits { connections: 3, ..Limits::default() });
    let ends: Vec<_> = (0..3).map(|i| rig.connected_with(Guest::new(52, 1000 + i))).collect();
    let _listener = UnixListener::bind(rig.path_of(52)).unwrap();
    rig.connect(52, 2000);
    assert_eq!(rig.next().0.op, op::RST);
    let mut client = rig.client();
    rig.turn();
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(rig.held(), (3, 0, 0));
    let mut guest = ends[1].1.clone();
    rig.send(guest.header(op::RST), &[]);
    rig.connect(52, 2000);
    assert_eq!(rig.next().0.op, op::RESPONSE);
}

#[test]
fn a_program_that_accepts_nobody_does_not_block_the_device() {
    let mut rig = Rig::new();
    let listener = UnixListener::bind(rig.path_of(52)).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    let mut ops = Vec::new();
    for port in 0..10 {
        rig.connect(52, port);
        ops.push(rig.next().0.op);
    }
    assert!(ops.contains(&op::RESPONSE) && ops.contains(&op::RST), "{ops:?}");
}

#[test]
fn a_guest_without_receive_buffers_waits_for_its_answers() {
    let mut rig = Rig::with(Limits { replies: 8, ..Limits::default() });
    rig.refills = false;
    let header = Header { src_cid: CID, dst_cid: HOST_CID, kind: TYPE_STREAM, op: op::RW, ..Header::default() };
    let mut sent = 0_u32;
    // The buffers that the device has, then its queue of answers.
    while rig.tx.in_flight() == 0 {
        rig.send(Header { src_port: sent, ..header }, &[]);
        sent += 1;
        assert!(sent < 200);
    }
    for _ in 0..10 {
        rig.send(Header { src_port: sent, ..header }, &[]);
        sent += 1;
    }
    assert_eq!(rig.waiting(), 8);
    assert_eq!(rig.tx.in_flight(), 11);
    rig.feed();
    for port in 0..sent {
        let (header, _) = rig.next();
        assert_eq!((header.op, header.dst_port), (op::RST, port));
    }
    rig.nothing();
}

#[test]
fn buffers_and_chains_that_nothing_fits_come_back() {
    let mut rig = Rig::new();
    // Chains to send that are no packets.
    for chain in [
        vec![Buffer { addr: 0x10_0000, len: 43, writable: false }],
        vec![Buffer { addr: 0x10_0000, len: 44, writable: true }],
        vec![Buffer { addr: u64::MAX - 10, len: 100, writable: false }],
        vec![Buffer { addr: 0x10_0000, len: u32::MAX, writable: false }],
        vec![Buffer { addr: 0x10_0000, len: 0, writable: false }; 20],
    ] {
        rig.tx.add(&chain).unwrap();
        rig.kick_tx();
        assert_eq!(rig.tx.in_flight(), 0);
    }
    // A packet whose header says more than there is.
    let (_program, mut guest) = rig.connected();
    let header = guest.header(op::RW);
    rig.put(header, b"12345678", &[44, 4]);
    // Its last descriptor, in the table of the ring, is made shorter: the chain is the last that was added.
    let last = rig.tx.ring().desc;
    let index = (0..64).find(|&i| rig.tx_descriptor(i) == Some(4)).expect("a descriptor of four bytes");
    rig.tx.write_descriptor(last, index, Descriptor::default());
    rig.kick_tx();
    assert_eq!(rig.next().0.op, op::RST);
    assert_eq!(rig.tx.in_flight(), 0);
}

#[test]
fn receive_buffers_of_all_sizes_are_filled() {
    let mut rig = Rig::new();
    let (mut program, _) = rig.connected();
    rig.starve();
    program.write_all(&[5; 10_000]).unwrap();
    rig.turn();
    // What is given now is not parsed by the rig: it is looked at here.
    for (len, writable, used) in [(43, true, 0), (44, true, 0), (45, true, 45), (4096, false, 0), (4096, true, 4096)] {
        let head = rig.rx.add(&[Buffer { addr: 0x10_0000, len, writable }]).unwrap();
        rig.rx.publish();
        rig.event(RX).unwrap();
        assert_eq!(rig.rx.next_used(), Some((head, used)), "{len} bytes");
    }
    // In pieces.
    let pieces: Vec<_> = (0..30).map(|i| Buffer { addr: 0x10_0000 + 64 * i, len: 7, writable: true }).collect();
    let head = rig.rx.add(&pieces).unwrap();
    rig.rx.publish();
    rig.event(RX).unwrap();
    assert_eq!(rig.rx.next_used(), Some((head, 210)));
}

#[test]
fn a_broken_ring_is_an_error_and_a_reset_mends_it() {
    for queue in [TX, RX] {
        let mut rig = Rig::new();
        let (_program, mut guest) = rig.connected();
        // Something to give, so that both rings are looked at.
        rig.put(guest.header(op::CREDIT_REQUEST), &[], &[]);
        rig.tx.publish();
        let driver = if queue == TX { &rig.tx } else { &rig.rx };
        driver.write_avail_index(driver.used_index().wrapping_add(1000));
        let error = rig.event(queue).unwrap_err();
        assert!(error.to_string().contains("queue is broken"), "{error}");
        rig.stop();
        rig.vsock.reset_device();
        rig.restart();
        rig.connected();
    }
}

#[test]
fn a_bad_entry_is_an_error_and_not_in_flight() {
    for queue in [TX, RX] {
        let mut rig = Rig::new();
        let (_program, mut guest) = rig.connected();
        rig.starve();
        rig.put(guest.header(op::CREDIT_REQUEST), &[], &[]);
        rig.tx.publish();
        let driver = if queue == TX { &rig.tx } else { &rig.rx };
        let position = driver.used_index();
        driver.write_avail_entry(position, 5000);
        driver.write_avail_index(position.wrapping_add(1));
        let error = rig.event(queue).unwrap_err().to_string();
        assert!(error.contains("queue is broken") && error.contains("names descriptor 5000, of 64"), "{error}");
        assert_eq!(rig.positions(queue), (position, position));
        rig.stop();
        rig.vsock.reset_device();
        rig.refills = true;
        rig.restart();
        rig.connected();
    }
}

#[test]
fn packets_before_a_bad_entry_interrupt_the_driver() {
    let mut rig = Rig::new();
    let (mut program, mut guest) = rig.connected();
    let position = rig.tx.used_index();
    rig.put(guest.header(op::RW), b"data", &[]);
    rig.tx.write_avail_entry(position.wrapping_add(1), 64);
    rig.tx.write_avail_index(position.wrapping_add(2));
    rig.event(TX).unwrap_err();
    program.read_exact(&mut [0; 4]).unwrap();
    // The interrupt has come with the chain: `collect` looks.
    rig.collect();
    assert_eq!(rig.tx.in_flight(), 0);
}

#[test]
fn events_that_are_none_are_nothing() {
    let rig = Rig::new();
    for event in [2, 3, 5, 1000] {
        rig.event(event).unwrap();
    }
}
