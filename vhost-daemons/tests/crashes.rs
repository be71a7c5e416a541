//! A daemon that is killed while it serves, over and over: with the table of requests in flight nothing is lost and nothing is
//! completed twice, whatever it was doing. (The driver here panics over a buffer that is given back twice.)

mod common;

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use common::client::{Client, FEATURES, Memory, Ring, SIZE, SKIP_DRAIN, longs, words};
use common::{Daemon, PATIENCE, Random, image, scratch, wait};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::FrontendReq;

const SLOTS: u64 = 20;
const ROUNDS: u32 = 60;

/// A ring and what was written through it.
struct Writer {
    ring: Ring,
    free: BTreeSet<u64>,
    slot_of: Vec<u64>,
    /// The last value of each slot's block.
    values: Vec<u8>,
    done: u64,
}

impl Writer {
    fn new(memory: &Memory, index: u32) -> Self {
        let mut ring = Ring::new(memory, index);
        ring.indirect = true;
        Self {
            ring,
            free: (0..SLOTS).collect(),
            slot_of: vec![0; SIZE.into()],
            values: vec![0; SLOTS as usize],
            done: 0,
        }
    }

    fn sector(&self, slot: u64) -> u64 {
        (u64::from(self.ring.index) * SLOTS + slot) * 8
    }

    fn submit(&mut self, random: &mut Random) {
        while let Some(slot) = self.free.pop_first() {
            let value = random.next() as u8;
            self.values[slot as usize] = value;
            let head = self.ring.add(slot, self.sector(slot), Some(value));
            self.slot_of[usize::from(head)] = slot;
        }
        if self.ring.driver.publish() {
            self.ring.kick();
        }
    }

    fn reap(&mut self) {
        while let Some((head, _)) = self.ring.driver.next_used() {
            let slot = self.slot_of[usize::from(head)];
            assert_eq!(self.ring.status(slot), 0);
            self.free.insert(slot);
            self.done += 1;
        }
    }
}

/// What a frontend does when it connects again.
fn connect(socket: &Path, memory: &Memory, table: &mut Option<(Vec<u8>, OwnedFd)>, writers: &[Writer]) -> Client {
    let mut client = Client::connect(socket);
    client.negotiate(FEATURES);
    client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
    if table.is_none() {
        let mut asked = longs(&[0, 0]);
        asked.extend([2, SIZE, 0, 0].iter().flat_map(|word: &u16| word.to_ne_bytes()));
        client.send(FrontendReq::GET_INFLIGHT_FD, &asked, &[]);
        let (_, body, mut files) = client.receive().expect("a table");
        *table = Some((body, files.remove(0)));
    }
    let (body, file) = table.as_ref().expect("made above");
    client.tell(FrontendReq::SET_INFLIGHT_FD, body, &[file.as_fd()]);
    for writer in writers {
        let ring = &writer.ring;
        for (request, body, file) in ring.messages() {
            let base = words(&[ring.index, ring.driver.used_index().into()]);
            let body = if request == FrontendReq::SET_VRING_BASE { base } else { body };
            client.tell(request, &body, file.as_slice());
        }
    }
    client
}

/// Waits for all that is in flight.
fn finish(writers: &mut [Writer]) {
    for writer in writers {
        wait("what is in flight", || {
            writer.reap();
            writer.ring.driver.in_flight() == 0
        });
    }
}

/// Checks that each block holds what was written to it last.
fn assert_written(writers: &[Writer], path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    for writer in writers {
        assert!(writer.done > u64::from(ROUNDS), "{} requests", writer.done);
        for slot in 0..SLOTS {
            let at = writer.sector(slot) as usize * 512;
            let (value, index) = (writer.values[slot as usize], writer.ring.index);
            assert!(bytes[at..at + 4096].iter().all(|byte| *byte == value), "slot {slot} of ring {index}");
        }
    }
}

#[test]
fn pitfall_55_a_daemon_killed_at_any_moment_loses_and_doubles_nothing() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    let path = image(dir.path(), 1 << 20);
    let disk = format!("path={},queues=2,direct=on", path.display());
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    let mut writers = [Writer::new(&memory, 0), Writer::new(&memory, 1)];
    let mut table = None;
    let mut random = Random(0xc0ffee);
    let mut caught = 0;
    for round in 0..ROUNDS {
        let mut daemon = Daemon::blk(&socket, &disk);
        let client = connect(&socket, &memory, &mut table, &writers);
        let end = Instant::now() + Duration::from_micros(random.below(8000));
        let patience = Instant::now() + PATIENCE;
        // A slow disk is given the time to do something now and then.
        while Instant::now() < end || writers.iter().any(|writer| writer.done <= u64::from(round)) {
            assert!(Instant::now() < patience, "nothing is done in round {round}");
            for writer in &mut writers {
                writer.submit(&mut random);
                writer.reap();
            }
        }
        daemon.child.kill().unwrap();
        daemon.child.wait().unwrap();
        caught += u32::from(writers.iter().any(|writer| writer.ring.driver.in_flight() > 0));
        drop(client);
    }
    assert!(caught > ROUNDS / 2, "{caught} of {ROUNDS} with requests in flight");
    let daemon = Daemon::blk(&socket, &disk);
    let client = connect(&socket, &memory, &mut table, &writers);
    finish(&mut writers);
    drop(client);
    daemon.terminate();
    assert_written(&writers, &path);
    println!(
        "{} requests, {caught} of {ROUNDS} kills with some in flight",
        writers.iter().map(|w| w.done).sum::<u64>()
    );
}

/// Both rings are asked to end at once, in one piece; what is left in the table is served when they start again.
#[test]
fn rings_that_end_without_being_drained_lose_and_double_nothing() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    let path = image(dir.path(), 1 << 20);
    let daemon = Daemon::blk(&socket, &format!("path={},queues=2", path.display()));
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    let mut writers = [Writer::new(&memory, 0), Writer::new(&memory, 1)];
    let mut random = Random(0xdecade);
    let mut client = connect(&socket, &memory, &mut None, &writers);
    for round in 0..ROUNDS {
        let end = Instant::now() + Duration::from_micros(random.below(4000));
        while Instant::now() < end {
            for writer in &mut writers {
                writer.submit(&mut random);
                writer.reap();
            }
        }
        // Now and then with another message behind, which is not one of them.
        let extra = round % 3 == 0;
        let mut bytes = Vec::new();
        for index in [0, 1] {
            bytes.extend([Client::header(SKIP_DRAIN, 1, 8), words(&[index, 0])].concat());
        }
        if extra {
            bytes.extend(Client::header(FrontendReq::GET_QUEUE_NUM.into(), 1, 0));
        }
        assert!(client.raw(&bytes, &[]));
        for writer in &writers {
            let (code, body, _) = client.receive().expect("the position of a ring");
            let base = u16::from_ne_bytes([body[4], body[5]]);
            assert_eq!((code, &body[..4]), (SKIP_DRAIN, &words(&[writer.ring.index])[..]));
            let taken = base.wrapping_sub(writer.ring.driver.used_index());
            assert!(usize::from(taken) <= writer.ring.driver.in_flight(), "{taken} are left");
        }
        if extra {
            assert_eq!(client.receive().expect("an answer").0, u32::from(FrontendReq::GET_QUEUE_NUM));
        }
        for writer in &writers {
            let ring = &writer.ring;
            let used = ring.driver.used_index();
            std::thread::sleep(Duration::from_micros(200));
            assert_eq!(ring.driver.used_index(), used, "a ring that has ended is not served");
            client.tell(FrontendReq::SET_VRING_KICK, &longs(&[ring.index.into()]), &[ring.kick.as_fd()]);
        }
    }
    finish(&mut writers);
    // Without the protocol feature nobody knows the message.
    let mut plain = Client::connect(&socket);
    drop(client);
    plain.send(FrontendReq::SET_OWNER, &[], &[]);
    plain.send_code(SKIP_DRAIN, 0, &words(&[0, 0]), &[]);
    assert!(plain.is_dropped());
    daemon.wait_for("GET_VRING_BASE_SKIP_DRAIN", 1);
    daemon.terminate();
    assert_written(&writers, &path);
}
