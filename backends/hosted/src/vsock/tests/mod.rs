//! The device between a guest's driver and programs of the host: real rings, real sockets, events by hand.

mod bounds;
mod bulk;
mod ends;
mod hosted;
mod random;
mod rig;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use vhost_user_backend::VringT;
use virtio_queue::{QueueOwnedT, QueueT};
use virtio_vsock::packet::VsockPacket;
use vm_memory::GuestAddressSpace;

use self::rig::{CID, Rig};
use super::packet::{HOST_CID, Header, TYPE_STREAM, op};
use super::*;

#[test]
fn a_program_of_the_host_connects() {
    let mut rig = Rig::new();
    let mut client = rig.client();
    client.write_all(b"CONNECT 1024\nfirst").unwrap();
    let (header, _) = rig.next();
    assert_eq!((header.op, header.dst_port, header.src_cid, header.dst_cid), (op::REQUEST, 1024, HOST_CID, CID));
    assert!(header.src_port >= 1 << 30 && header.buf_alloc > 0);
    let mut guest = rig.answer(&header);
    rig.send(guest.header(op::RESPONSE), &[]);
    // What follows the line is for the guest.
    let (header, data) = rig.next();
    assert_eq!((header.op, &data[..]), (op::RW, &b"first"[..]));
    rig.send(guest.header(op::RW), b"hello");
    let answer = format!("OK {}\nhello", guest.host);
    let mut got = vec![0; answer.len()];
    client.read_exact(&mut got).unwrap();
    assert_eq!(got, answer.as_bytes());
}

#[test]
fn a_program_of_the_guest_connects() {
    let mut rig = Rig::new();
    let listener = UnixListener::bind(rig.path_of(52)).unwrap();
    let mut guest = rig.connect(52, 1024);
    assert_eq!(rig.next().0.op, op::RESPONSE);
    let (mut program, _) = listener.accept().unwrap();
    rig.send(guest.header(op::RW), b"question");
    let mut got = [0; 8];
    program.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"question");
    program.write_all(b"answer").unwrap();
    let (header, data) = rig.next();
    assert_eq!((header.op, &data[..], header.src_port, header.dst_port), (op::RW, &b"answer"[..], 52, 1024));
}

#[test]
fn a_guest_that_connects_to_nobody_is_refused() {
    let mut rig = Rig::new();
    rig.connect(52, 1024);
    let (header, _) = rig.next();
    assert_eq!((header.op, header.src_port, header.dst_port), (op::RST, 52, 1024));
    // The path of a port does not fit the address of a socket.
    let mut long = Rig::at(&format!("{}/v", "x".repeat(90)), Limits::default());
    long.connect(u32::MAX, 1024);
    assert_eq!(long.next().0.op, op::RST);
}

#[test]
fn what_is_unknown_is_answered_with_rst_and_strangers_are_not() {
    let mut rig = Rig::new();
    let known =
        Header { src_cid: CID, dst_cid: HOST_CID, src_port: 5, dst_port: 6, kind: TYPE_STREAM, ..Header::default() };
    for op in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 8, 0xffff] {
        rig.send(Header { op, ..known }, &[]);
        let (header, _) = rig.next();
        assert_eq!((header.op, header.src_port, header.dst_port), (op::RST, 6, 5), "operation {op}");
    }
    // Seqpacket, and a type that there is not.
    for kind in [0, 2, 77] {
        rig.send(Header { op: op::REQUEST, kind, ..known }, &[]);
        let (header, _) = rig.next();
        assert_eq!((header.op, header.kind), (op::RST, kind));
        rig.send(Header { op: op::RST, kind, ..known }, &[]);
    }
    rig.send(Header { op: op::RST, ..known }, &[]);
    for (src_cid, dst_cid) in [(CID + 1, HOST_CID), (CID, 1), (CID, CID), (CID | 1 << 32, HOST_CID), (0, 0)] {
        rig.send(Header { op: op::REQUEST, src_cid, dst_cid, ..known }, &[]);
    }
    rig.nothing();
    // Without stream sockets there is nothing to be had.
    rig.vsock.acked_features(F_NO_IMPLIED_STREAM);
    rig.send(Header { op: op::REQUEST, ..known }, &[]);
    assert_eq!(rig.next().0.op, op::RST);
}

#[test]
fn an_unknown_operation_ends_a_connection() {
    for op in [0, 8, op::REQUEST, op::RESPONSE] {
        let mut rig = Rig::new();
        let (mut program, mut guest) = rig.connected();
        rig.send(guest.header(op), &[]);
        assert_eq!(rig.next().0.op, op::RST, "operation {op}");
        assert_eq!(program.read(&mut [0; 1]).unwrap(), 0);
        assert_eq!(rig.held().0, 0);
    }
}

#[test]
fn the_header_is_laid_out_as_in_the_crate() {
    let mut rig = Rig::new();
    let header = Header {
        src_cid: 1 << 33,
        dst_cid: 2,
        src_port: 3,
        dst_port: 4,
        len: 5,
        kind: 6,
        op: 7,
        flags: 8,
        buf_alloc: 9,
        fwd_cnt: 10,
    };
    rig.put(header, b"12345", &[44, 5]);
    rig.tx.publish();
    let mem = rig.mem.memory();
    let mut state = rig.vrings[usize::from(TX)].get_mut();
    let mut chain = state.get_queue_mut().pop_descriptor_chain(mem.clone()).unwrap();
    let packet = VsockPacket::from_tx_virtq_chain(&*mem, &mut chain, 100).unwrap();
    assert_eq!((packet.src_cid(), packet.dst_cid(), packet.src_port()), (1 << 33, 2, 3));
    assert_eq!((packet.dst_port(), packet.len(), packet.type_(), packet.op()), (4, 5, 6, 7));
    assert_eq!((packet.flags(), packet.buf_alloc(), packet.fwd_cnt()), (8, 9, 10));
    assert_eq!(Header::read(&mut &header.bytes()[..]).unwrap(), header);
    state.get_queue_mut().go_to_previous_position();
}

#[test]
fn the_configuration_space_has_the_cid() {
    let rig = Rig::new();
    assert_eq!(rig.vsock.get_config(0, 8), CID.to_le_bytes());
    assert_eq!(rig.vsock.get_config(0, 4), CID.to_le_bytes()[..4]);
    for (offset, size) in [(8, 1), (4, 8), (u32::MAX, u32::MAX)] {
        assert!(rig.vsock.get_config(offset, size).is_empty());
    }
}

#[test]
fn a_path_serves_one_device_and_is_removed_with_it() {
    let rig = Rig::new();
    let path = rig.path.clone();
    let options = VsockOptions { cid: 4, socket: path.clone() };
    let error = Vsock::with_limits("vsock0", &options, Limits::default()).err().unwrap();
    let text = format!("vsock0: {}: another process listens there; end it, or give another socket=", path.display());
    assert_eq!(error.to_string(), text);
    let dir = rig.end();
    assert!(!path.exists());
    std::fs::write(&path, "bytes").unwrap();
    let error = Vsock::with_limits("vsock0", &options, Limits::default()).err().unwrap();
    assert!(error.to_string().starts_with("vsock0: ") && error.to_string().contains("no socket"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"bytes");
    let nowhere = VsockOptions { cid: 4, socket: dir.path().join("no/v") };
    let error = Vsock::with_limits("vsock0", &nowhere, Limits::default()).err().unwrap();
    assert!(error.to_string().contains("No such file"), "{error}");
}

#[test]
fn a_reset_ends_all_connections() {
    let mut rig = Rig::new();
    let (mut program, mut guest) = rig.connected();
    let mut waiting = rig.client();
    rig.turn();
    rig.vsock.reset_device();
    assert_eq!(program.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(waiting.read(&mut [0; 1]).unwrap(), 0);
    rig.send(guest.header(op::RW), b"data");
    assert_eq!(rig.next().0.op, op::RST);
}

#[test]
fn a_driver_that_begins_anew_finds_no_connections() {
    let mut rig = Rig::new();
    let (mut program, mut guest) = rig.connected();
    // Stopped and started in the same place, as for a pause.
    rig.stop();
    rig.start();
    rig.send(guest.header(op::RW), b"data");
    program.read_exact(&mut [0; 4]).unwrap();
    rig.stop();
    rig.restart();
    rig.turn();
    rig.send(guest.header(op::RW), b"data");
    assert_eq!(rig.next().0.op, op::RST);
    assert_eq!(program.read(&mut [0; 1]).unwrap(), 0);
}
