//! How connections end: half and whole, cleanly and not, by either side.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost_user_backend::VhostUserBackend;

use super::rig::{Guest, Rig};
use crate::vsock::muxer::Limits;
use crate::vsock::packet::{op, shut};

fn hasty() -> Limits {
    Limits { patience: Duration::from_millis(200), ..Limits::default() }
}

fn read(program: &mut impl Read, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    program.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn the_guest_ends_its_data_and_still_receives() {
    let mut rig = Rig::new();
    let (mut program, mut guest) = rig.connected();
    rig.send(guest.header(op::RW), b"last");
    rig.send(guest.shutdown(shut::SEND), &[]);
    let mut all = Vec::new();
    program.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
    program.write_all(b"answer").unwrap();
    let (header, data) = rig.next();
    assert_eq!((header.op, &data[..]), (op::RW, &b"answer"[..]));
    // Data after the end of data ends it all.
    rig.send(guest.header(op::RW), b"more");
    assert_eq!(rig.next().0.op, op::RST);
    assert_eq!(rig.held().0, 0);
}

#[test]
fn the_program_ends_its_data_and_still_receives() {
    let mut rig = Rig::new();
    let (mut program, mut guest) = rig.connected();
    program.write_all(b"last").unwrap();
    program.shutdown(Shutdown::Write).unwrap();
    let (header, data) = rig.next();
    assert_eq!((header.op, &data[..]), (op::RW, &b"last"[..]));
    let (header, _) = rig.next();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, shut::SEND));
    rig.send(guest.header(op::RW), b"answer");
    assert_eq!(read(&mut program, 6), b"answer");
    rig.send(guest.shutdown(shut::BOTH), &[]);
    assert_eq!(rig.next().0.op, op::RST);
    assert_eq!(program.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(rig.held().0, 0);
    rig.nothing();
}

#[test]
fn a_guest_that_receives_no_more_still_sends() {
    let mut rig = Rig::new();
    let (mut program, mut guest) = rig.connected();
    rig.send(guest.shutdown(shut::RECEIVE), &[]);
    let error = program.write_all(b"for nobody").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    rig.send(guest.header(op::RW), b"data");
    assert_eq!(read(&mut program, 4), b"data");
    // The device knows of the program's end without reading.
    drop(program);
    let (header, _) = rig.next();
    assert_eq!((header.op, header.flags), (op::SHUTDOWN, shut::BOTH));
    rig.send(guest.header(op::RST), &[]);
    assert_eq!(rig.held().0, 0);
    rig.nothing();
}

#[test]
fn a_program_that_receives_no_more_still_sends() {
    let mut rig = Rig::new();
    let (mut program, mut guest) = rig.connected();
    program.shutdown(Shutdown::Read).unwrap();
    rig.send(guest.header(op::RW), b"for nobody");
    let (header, _) = rig.next();
    assert_eq!((header.op, header.flags, header.fwd_cnt), (op::SHUTDOWN, shut::RECEIVE, 10));
    program.write_all(b"data").unwrap();
    assert_eq!(rig.next().1, b"data");
}

#[test]
fn a_program_that_goes_ends_the_connection() {
    let mut rig = Rig::with(hasty());
    for answers in [true, false] {
        let (mut program, mut guest) = rig.connected();
        // It has not read this.
        rig.send(guest.header(op::RW), b"unread");
        program.write_all(b"last").unwrap();
        drop(program);
        assert_eq!(rig.next().1, b"last");
        let (header, _) = rig.next();
        assert_eq!((header.op, header.flags), (op::SHUTDOWN, shut::BOTH));
        if answers {
            rig.send(guest.header(op::RST), &[]);
        } else {
            // In its own time, but for so long only.
            assert_eq!(rig.held().0, 1);
            assert_eq!(rig.next().0.op, op::RST);
        }
        assert_eq!(rig.held().0, 0);
        rig.nothing();
    }
}

#[test]
fn the_guest_resets_in_the_middle() {
    let mut rig = Rig::new();
    let (mut program, mut guest) = rig.connected();
    program.write_all(&[3; 100_000]).unwrap();
    rig.next();
    rig.send(guest.header(op::RST), &[]);
    assert_eq!(rig.held().0, 0);
    assert!(!matches!(program.read(&mut [0; 1]), Ok(1..)));
    while let Some((header, _)) = rig.try_next() {
        assert_eq!(header.op, op::RW);
    }
    rig.nothing();
    // The ports are free.
    rig.connected_with(Guest::new(52, 1024));
}

/// Sends more than the program's socket takes, and closes the connection. Returns the number of bytes.
fn send_and_close(rig: &mut Rig, guest: &mut Guest) -> usize {
    let mut sent = 0;
    while rig.held().2 < 20_000 {
        while let Some((header, _)) = rig.try_next() {
            guest.take(&header);
        }
        let len = guest.credit().min(50_000);
        let header = guest.header(op::RW);
        guest.sent += len as u32;
        sent += len;
        rig.send(header, &vec![9; len]);
    }
    rig.send(guest.shutdown(shut::BOTH), &[]);
    while rig.next().0.op != op::RST {}
    assert_eq!(rig.held().0, 1);
    sent
}

/// Reads to the end while the device has its turns; returns the number of bytes.
fn read_on(rig: &mut Rig, program: &mut UnixStream) -> usize {
    let (mut got, mut room) = (0, vec![0; 10_000]);
    loop {
        match program.read(&mut room).unwrap() {
            0 => return got,
            len => got += len,
        }
        rig.turn();
    }
}

/// Everything is delivered while another connection has the same ports, which carries on.
fn delivered_beside_another(rig: &mut Rig, guest: &Guest, program: &mut UnixStream, sent: usize) {
    let (mut second, mut other) = rig.connected_with(Guest::new(guest.host, guest.port));
    assert_eq!(read_on(rig, program), sent);
    assert_eq!(rig.held().0, 1);
    rig.send(other.header(op::RW), b"data");
    assert_eq!(read(&mut second, 4), b"data");
}

#[test]
fn what_the_guest_has_sent_before_it_closed_is_delivered() {
    let mut rig = Rig::new();
    let (mut program, mut guest) = rig.connected();
    let sent = send_and_close(&mut rig, &mut guest);
    // The guest has forgotten the connection.
    delivered_beside_another(&mut rig, &guest, &mut program, sent);
}

#[test]
fn what_the_guest_has_sent_before_it_closed_is_delivered_after_a_reset() {
    let mut rig = Rig::new();
    let (mut program, mut guest) = rig.connected();
    let sent = send_and_close(&mut rig, &mut guest);
    let (mut open, _) = rig.connected_with(Guest::new(guest.host, guest.port + 1));
    rig.stop();
    rig.vsock.reset_device();
    assert_eq!((rig.held().0, rig.waiting()), (1, 0), "the open connection has ended");
    assert_eq!(open.read(&mut [0; 1]).unwrap(), 0);
    rig.restart();
    // The ports are the new driver's.
    delivered_beside_another(&mut rig, &guest, &mut program, sent);
}

#[test]
fn a_program_that_does_not_take_what_a_reset_guest_has_sent_keeps_its_place_for_a_limited_time() {
    let mut rig = Rig::with(Limits { linger: Duration::from_millis(200), ..hasty() });
    let (_program, mut guest) = rig.connected();
    send_and_close(&mut rig, &mut guest);
    rig.stop();
    rig.vsock.reset_device();
    rig.restart();
    let begun = Instant::now();
    while rig.held().0 > 0 {
        assert!(begun.elapsed() < Duration::from_secs(20), "it keeps its place");
        rig.turn();
    }
}

#[test]
fn a_request_that_the_guest_refuses_or_does_not_answer_ends() {
    let mut rig = Rig::with(hasty());
    for answers in [true, false] {
        let mut client = rig.client();
        client.write_all(b"CONNECT 7\n").unwrap();
        let (request, _) = rig.next();
        let mut guest = rig.answer(&request);
        if answers {
            rig.send(guest.header(op::RST), &[]);
        } else {
            assert_eq!(rig.next().0.op, op::RST);
        }
        assert_eq!(client.read(&mut [0; 10]).unwrap(), 0);
        assert_eq!(rig.held(), (0, 0, 0));
    }
    // A client that goes before the answer.
    let mut client = rig.client();
    client.write_all(b"CONNECT 7\n").unwrap();
    let (request, _) = rig.next();
    drop(client);
    let (header, _) = rig.next();
    assert_eq!((header.op, header.src_port), (op::RST, request.src_port));
    assert_eq!(rig.held(), (0, 0, 0));
    rig.nothing();
}

#[test]
fn data_before_the_answer_to_a_request_ends_the_connection() {
    for what in [op::RW, op::SHUTDOWN] {
        let mut rig = Rig::new();
        let mut client = rig.client();
        client.write_all(b"CONNECT 7\n").unwrap();
        let (request, _) = rig.next();
        let mut guest = rig.answer(&request);
        rig.send(guest.header(what), &[]);
        assert_eq!(rig.next().0.op, op::RST);
        assert_eq!(client.read(&mut [0; 10]).unwrap(), 0);
    }
}
