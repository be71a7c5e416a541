//! Much data, with credit, both ways.

use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::rig::{Guest, Rig};
use crate::vsock::connection::BUF_ALLOC;
use crate::vsock::packet::{Header, op, shut};

/// Pseudo-random numbers, the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, most: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        1 + (self.0 >> 11) as usize % most
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        bytes.fill_with(|| self.roll(256) as u8);
    }
}

/// What one end has sent or received.
#[derive(Default)]
struct Tally {
    bytes: usize,
    sum: DefaultHasher,
}

impl Tally {
    fn add(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len();
        // Byte by byte: the sum must not depend on the pieces.
        bytes.iter().for_each(|&byte| self.sum.write_u8(byte));
    }

    fn of(&self) -> (usize, u64) {
        (self.bytes, self.sum.finish())
    }
}

/// A program of the host that writes `total` bytes and ends them, or reads to the end.
fn program(stream: UnixStream, seed: u64, total: usize) -> [JoinHandle<(usize, u64)>; 2] {
    let mut reading = stream.try_clone().unwrap();
    let mut writing = stream;
    let reader = std::thread::spawn(move || {
        let (mut tally, mut dice, mut room) = (Tally::default(), Dice(seed | 1), vec![0; 100_000]);
        loop {
            let most = dice.roll(100_000);
            match reading.read(&mut room[..most]).unwrap() {
                0 => return tally.of(),
                len => tally.add(&room[..len]),
            }
        }
    });
    let writer = std::thread::spawn(move || {
        let (mut tally, mut dice, mut bytes) = (Tally::default(), Dice(seed | 2), vec![0; 100_000]);
        while tally.bytes < total {
            let len = dice.roll(100_000).min(total - tally.bytes);
            dice.fill(&mut bytes[..len]);
            writing.write_all(&bytes[..len]).unwrap();
            tally.add(&bytes[..len]);
        }
        writing.shutdown(std::net::Shutdown::Write).unwrap();
        tally.of()
    });
    [reader, writer]
}

/// A program of the guest that does the same.
struct Peer {
    guest: Guest,
    dice: Dice,
    total: usize,
    sent: Tally,
    received: Tally,
    end_told: bool,
    end_seen: bool,
}

impl Peer {
    fn new(guest: Guest, seed: u64, total: usize) -> Self {
        let (sent, received) = (Tally::default(), Tally::default());
        Self { guest, dice: Dice(seed | 4), total, sent, received, end_told: false, end_seen: false }
    }

    fn is_done(&self) -> bool {
        self.end_told && self.end_seen
    }

    /// Sends some, if it may.
    fn step(&mut self, rig: &mut Rig) {
        let left = self.total - self.sent.bytes;
        let len = self.dice.roll(65536).min(self.guest.credit()).min(left);
        if len > 0 {
            let mut bytes = vec![0; len];
            self.dice.fill(&mut bytes);
            let header = self.guest.header(op::RW);
            self.guest.sent += len as u32;
            self.sent.add(&bytes);
            rig.send(header, &bytes);
        } else if left == 0 && !self.end_told {
            self.end_told = true;
            rig.send(self.guest.shutdown(shut::SEND), &[]);
        }
    }

    fn take(&mut self, rig: &mut Rig, header: &Header, data: &[u8]) {
        self.guest.take(header);
        match header.op {
            op::RW => {
                self.received.add(data);
                let read = self.guest.read.wrapping_add(data.len() as u32);
                // As Linux: now and then.
                let tell = self.dice.roll(8) == 1;
                self.guest.read = read;
                if tell {
                    rig.send(self.guest.header(op::CREDIT_UPDATE), &[]);
                }
            }
            op::CREDIT_REQUEST => rig.send(self.guest.header(op::CREDIT_UPDATE), &[]),
            op::CREDIT_UPDATE | op::RESPONSE => {}
            op::SHUTDOWN if header.flags & shut::SEND != 0 => self.end_seen = true,
            other => panic!("operation {other}"),
        }
    }
}

fn exchange(connections: usize, total: usize) {
    let mut rig = Rig::new();
    let mut all = Vec::new();
    for i in 0..connections {
        let seed = 1000 * (i as u64 + 1);
        let (stream, guest) = if i % 2 == 0 {
            let (stream, guest) = rig.connected_with(Guest::new(52 + i as u32, 1024));
            stream.set_read_timeout(None).unwrap();
            (stream, guest)
        } else {
            let mut client = rig.client();
            client.write_all(format!("CONNECT {}\n", 2000 + i).as_bytes()).unwrap();
            let mut guest = {
                let (request, _) = rig.next();
                rig.answer(&request)
            };
            rig.send(guest.header(op::RESPONSE), &[]);
            let answer = format!("OK {}\n", guest.host);
            let mut got = vec![0; answer.len()];
            client.read_exact(&mut got).unwrap();
            assert_eq!(got, answer.as_bytes());
            client.set_read_timeout(None).unwrap();
            (client, guest)
        };
        all.push((stream, Peer::new(guest, seed, total), seed));
    }
    let all = all.into_iter().map(|(stream, peer, seed)| (program(stream, seed, total), peer));
    let mut all: Vec<_> = all.collect();
    let start = Instant::now();
    while !all.iter().all(|(_, peer)| peer.is_done()) {
        assert!(start.elapsed() < Duration::from_secs(60), "the data has not come");
        let mut packets = 0;
        while let Some((header, data)) = rig.try_next() {
            let peer = all
                .iter_mut()
                .find(|(_, peer)| (peer.guest.host, peer.guest.port) == (header.src_port, header.dst_port));
            peer.expect("a known connection").1.take(&mut rig, &header, &data);
            packets += 1;
        }
        let before: usize = all.iter().map(|(_, peer)| peer.sent.bytes).sum();
        all.iter_mut().for_each(|(_, peer)| peer.step(&mut rig));
        let after: usize = all.iter().map(|(_, peer)| peer.sent.bytes).sum();
        assert!(rig.held().2 <= connections * BUF_ALLOC as usize);
        if packets == 0 && before == after {
            rig.wait(Duration::from_millis(10));
        }
    }
    for (threads, mut peer) in all {
        // Both have ended their data, so the connection ends.
        rig.send(peer.guest.shutdown(shut::BOTH), &[]);
        let [reader, writer] = threads;
        let start = Instant::now();
        while !reader.is_finished() {
            assert!(start.elapsed() < Duration::from_secs(60));
            rig.wait(Duration::from_millis(10));
        }
        assert_eq!(reader.join().unwrap(), peer.sent.of());
        assert_eq!(writer.join().unwrap(), peer.received.of());
    }
    rig.turn();
    while rig.held().0 > 0 {
        rig.wait(Duration::from_millis(10));
    }
}

#[test]
fn megabytes_arrive_whole_both_ways() {
    exchange(1, 8 << 20);
}

#[test]
fn two_hundred_connections_do_not_hinder_each_other() {
    exchange(200, 100_000);
}

#[test]
fn connections_take_turns() {
    let mut rig = Rig::new();
    let mut ends: Vec<_> = (0..4).map(|i| rig.connected_with(Guest::new(60 + i, 1024))).collect();
    rig.starve();
    for (program, _) in &mut ends {
        program.set_nonblocking(true).unwrap();
        while program.write(&[7; 4096]).is_ok() {}
        rig.turn();
    }
    rig.feed();
    let order: Vec<u32> = (0..12).map(|_| rig.next().0.src_port).collect();
    for turn in order.chunks(4) {
        let mut ports = turn.to_vec();
        ports.sort_unstable();
        assert_eq!(ports, [60, 61, 62, 63], "{order:?}");
    }
}

#[test]
fn a_program_that_does_not_read_makes_the_guest_wait() {
    let mut rig = Rig::new();
    let (mut program, mut guest) = rig.connected();
    let mut sent = Tally::default();
    let mut dice = Dice(7);
    // Until the program's socket is full, and what the device keeps too.
    loop {
        while let Some((header, _)) = rig.try_next() {
            guest.take(&header);
        }
        let len = guest.credit().min(10_000);
        if len == 0 {
            break;
        }
        let mut bytes = vec![0; len];
        dice.fill(&mut bytes);
        sent.add(&bytes);
        let header = guest.header(op::RW);
        guest.sent += len as u32;
        rig.send(header, &bytes);
        assert!(rig.held().2 <= BUF_ALLOC as usize);
    }
    assert!(sent.bytes > BUF_ALLOC as usize && rig.held().2 > BUF_ALLOC as usize / 2);
    // The answer to the question for credit is: none.
    rig.send(guest.header(op::CREDIT_REQUEST), &[]);
    let (header, _) = rig.next();
    assert_eq!(header.op, op::CREDIT_UPDATE);
    guest.take(&header);
    let (mut received, mut room) = (Tally::default(), vec![0; 4096]);
    while received.bytes < sent.bytes {
        let len = program.read(&mut room).unwrap();
        received.add(&room[..len]);
        rig.turn();
    }
    assert_eq!(received.of(), sent.of());
    while let Some((header, _)) = rig.try_next() {
        assert_eq!(header.op, op::CREDIT_UPDATE);
        guest.take(&header);
    }
    assert!(guest.credit() > BUF_ALLOC as usize / 2);
    assert_eq!(rig.held().2, 0);
}

#[test]
fn a_guest_that_does_not_read_makes_the_program_wait() {
    let mut rig = Rig::new();
    let mut guest = Guest::new(52, 1024);
    guest.room = 10_000;
    let (mut program, mut guest) = rig.connected_with(guest);
    program.write_all(&[1; 25_000]).unwrap();
    let (mut got, mut asked) = (0, 0);
    for read in [10_000, 20_000, 25_000] {
        while got < read {
            let (header, data) = rig.next();
            match header.op {
                op::RW => got += data.len(),
                op::CREDIT_REQUEST => asked += 1,
                other => panic!("operation {other}"),
            }
        }
        assert_eq!(got, read);
        if got < 25_000 && asked < read / 10_000 {
            assert_eq!(rig.next().0.op, op::CREDIT_REQUEST);
            asked += 1;
        }
        // It has none, and says so. It is not asked again and again.
        rig.send(guest.header(op::CREDIT_UPDATE), &[]);
        rig.nothing();
        guest.read = got as u32;
        rig.send(guest.header(op::CREDIT_UPDATE), &[]);
    }
    assert_eq!(asked, 2);
}

#[test]
fn data_beyond_the_credit_ends_the_connection() {
    for excess in [0, 1] {
        let mut rig = Rig::new();
        let (mut program, mut guest) = rig.connected();
        program.set_nonblocking(true).unwrap();
        // All at once: the device has no turn to give credit in between.
        for len in [30_000, 30_000, BUF_ALLOC as usize - 60_000] {
            rig.put(guest.header(op::RW), &vec![0; len], &[44]);
        }
        if excess > 0 {
            rig.put(guest.header(op::RW), &[0], &[44]);
        }
        rig.kick_tx();
        let mut ops = Vec::new();
        while let Some((header, _)) = rig.try_next() {
            ops.push(header.op);
        }
        assert_eq!(ops.contains(&op::RST), excess > 0, "{ops:?}");
        assert_eq!(rig.held().0, 1 - excess);
        while program.read(&mut [0; 4096]).is_ok_and(|len| len > 0) {}
    }
}
