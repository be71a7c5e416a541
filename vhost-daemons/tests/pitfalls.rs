//! Sharp edges of vhost-user that others have met, each as a test of its number, from the side of a client that is wrong,
//! hostile, or gone. After each the daemon serves the next client, has lost no descriptor, and has said one line.

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::client::{
    Client, FEATURES, GUEST, MEMORY, Memory, NEED_REPLY, PROTOCOL_FEATURES, Ring, SIZE, USER, VERSION, eventfd, longs,
    memfd, running, words,
};
use common::{Daemon, Random, image, scratch, wait};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::FrontendReq;
use vm_memory::{Bytes, GuestAddress};

/// A daemon under attack.
struct Target {
    daemon: Daemon,
    socket: PathBuf,
    before: (usize, usize),
    _dir: tempfile::TempDir,
}

impl Target {
    fn new() -> Self {
        Self::of("")
    }

    fn of(options: &str) -> Self {
        let dir = scratch();
        let socket = dir.path().join("b.sock");
        let disk = format!("path={},queues=2{options}", image(dir.path(), 16 << 20).display());
        let daemon = Daemon::blk(&socket, &disk);
        let before = (daemon.descriptors(), daemon.mappings());
        Self { daemon, socket, before, _dir: dir }
    }

    fn connect(&self) -> Client {
        Client::connect(&self.socket)
    }

    fn dropped(&self) -> usize {
        self.daemon.count("dropping the client")
    }

    /// The next client is served, and nothing of those before is left.
    fn is_well(&self) {
        let (client, memory, mut ring) = running(&self.socket);
        ring.works(0x5a);
        drop((client, memory, ring));
        wait("descriptors and mappings to be gone", || {
            (self.daemon.descriptors(), self.daemon.mappings()) == self.before
        });
        assert_eq!(self.daemon.count("panicked"), 0);
    }

    /// The client is dropped with one line that says `text`.
    fn drops(&self, mut client: Client, text: &str) {
        assert!(client.is_dropped(), "it is dropped for {text:?}");
        let lines = || -> Vec<String> {
            self.daemon.said().into_iter().filter(|line| line.contains("dropping the client")).collect()
        };
        wait("the line", || lines().last().is_some_and(|line| line.contains(text)));
    }
}

/// Every code, those that nobody knows included.
fn codes() -> impl Iterator<Item = u32> {
    (0..=46).chain([255, 1 << 16, u32::MAX])
}

fn takes_files(code: u32) -> bool {
    use FrontendReq as R;
    let takers = [R::SET_MEM_TABLE, R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR, R::SET_BACKEND_REQ_FD];
    let more =
        [R::SET_INFLIGHT_FD, R::ADD_MEM_REG, R::REM_MEM_REG, R::SET_LOG_BASE, R::SET_LOG_FD, R::SET_DEVICE_STATE_FD];
    takers.into_iter().chain(more).any(|taker| u32::from(taker) == code)
}

#[test]
fn pitfall_44_descriptors_on_the_wrong_message_do_not_leak() {
    let target = Target::new();
    let file = memfd(4096, MemfdFlags::empty());
    for code in codes() {
        for count in [1, 3, 32, 40] {
            let client = target.connect();
            client.send_code(code, 0, &[0; 64], &vec![file.as_fd(); count]);
            if count > 32 || !takes_files(code) {
                let mut client = client;
                assert!(client.is_dropped(), "{count} descriptors with message {code}");
            }
        }
    }
    // With the payload, and with each piece of it.
    let client = target.connect();
    client.raw(&Client::header(FrontendReq::SET_FEATURES.into(), VERSION, 8), &[]);
    client.raw(&[0; 8], &[file.as_fd(); 2]);
    target.drops(client, "descriptors came with it");
    let client = target.connect();
    client.raw(&Client::header(FrontendReq::SET_MEM_TABLE.into(), VERSION, 40), &[file.as_fd(); 20]);
    client.raw(&[0; 40], &[file.as_fd(); 20]);
    target.drops(client, "more than 32 descriptors");
    // One that is said to be absent, and one that is.
    for (value, files) in [(0x100, &[file.as_fd()][..]), (0, &[])] {
        let client = target.connect();
        client.send(FrontendReq::SET_VRING_CALL, &longs(&[value]), files);
        target.drops(client, "SET_VRING_CALL");
    }
    target.is_well();
}

#[test]
fn pitfall_44_replacing_descriptors_closes_those_before() {
    let target = Target::new();
    let (mut client, _memory, mut ring) = running(&target.socket);
    ring.works(1);
    let held = target.daemon.descriptors();
    for _ in 0..40 {
        for request in [FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_KICK, FrontendReq::SET_VRING_ERR] {
            let file = eventfd();
            client.tell(request, &longs(&[1]), &[file.as_fd()]);
        }
    }
    assert_eq!(target.daemon.descriptors(), held + 3, "one of each, of the ring that does not run");
    ring.works(2);
    drop(client);
    target.is_well();
}

fn inflight(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut body = longs(&[size, offset]);
    body.extend([queues, queue_size, 0, 0].iter().flat_map(|word| word.to_ne_bytes()));
    body
}

/// Has the daemon make a table for the rings here.
fn inflight_area(client: &mut Client) -> (Vec<u8>, OwnedFd) {
    client.send(FrontendReq::GET_INFLIGHT_FD, &inflight(0, 0, 2, SIZE), &[]);
    let (_, body, mut files) = client.receive().expect("a table");
    assert_eq!((body.len(), files.len()), (24, 1));
    (body, files.remove(0))
}

#[test]
fn pitfall_45_inflight_table_and_queue_size_that_disagree_are_refused() {
    let target = Target::new();
    for (queues, size) in [(0, 64), (3, 64), (1, 0), (u16::MAX, u16::MAX), (1, 8192)] {
        let mut client = target.connect();
        client.negotiate(FEATURES);
        client.send(FrontendReq::GET_INFLIGHT_FD, &inflight(0, 0, queues, size), &[]);
        target.drops(client, "GET_INFLIGHT_FD");
    }
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let (body, file) = inflight_area(&mut client);
    let len = u64::from_ne_bytes(body[..8].try_into().unwrap());
    assert!(rustix::fs::ftruncate(&file, 0).is_err(), "it is sealed");
    for (size, offset, queues, queue_size) in [
        (len, 0, 2, 128),
        (len, 8, 2, SIZE),
        (len, u64::MAX - 4, 2, SIZE),
        (u64::MAX, 16, 2, SIZE),
        (64, 0, 2, SIZE),
        (len, 0, 300, SIZE),
        (len, 0, 0, 0),
    ] {
        let said = inflight(size, offset, queues, queue_size);
        let taken = client.try_tell(FrontendReq::SET_INFLIGHT_FD, &said, &[file.as_fd()]);
        assert!(!taken, "{size} bytes at {offset} for {queues} queues of {queue_size}");
    }
    let unsealed = memfd(len, MemfdFlags::empty());
    let directory = File::open("/").unwrap();
    for wrong in [unsealed.as_fd(), directory.as_fd(), eventfd().as_fd()] {
        assert!(!client.try_tell(FrontendReq::SET_INFLIGHT_FD, &body, &[wrong]));
    }
    // A table that goes with itself, but not with the ring.
    let small = inflight(len, 0, 2, 16);
    client.tell(FrontendReq::SET_INFLIGHT_FD, &small, &[file.as_fd()]);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
    let mut ring = Ring::new(&memory, 0);
    let refused = ring.messages().into_iter().any(|(request, body, file)| {
        request != FrontendReq::SET_VRING_CALL && !client.try_tell(request, &body, file.as_slice())
    });
    assert!(refused, "a ring of {SIZE} over a table of 16");
    let (body, file) = inflight_area(&mut client);
    client.tell(FrontendReq::SET_INFLIGHT_FD, &body, &[file.as_fd()]);
    ring.start(&mut client);
    ring.works(3);
    drop(client);
    target.is_well();
}

#[test]
fn pitfall_47_bit_8_of_a_ring_index_means_no_descriptor() {
    let target = Target::new();
    let (mut client, _memory, mut ring) = running(&target.socket);
    client.tell(FrontendReq::SET_VRING_CALL, &longs(&[0x100]), &[]);
    Ring::called(&ring.call, Duration::ZERO);
    ring.works(7);
    assert!(!Ring::called(&ring.call, Duration::from_millis(20)), "the driver polls now");
    assert!(!client.try_tell(FrontendReq::SET_VRING_KICK, &longs(&[0x100]), &[]), "nobody polls rings here");
    for index in [2, 0xff, 0x102, 0x200, 1 << 63] {
        let files = if index & 0x100 == 0 { &[ring.call.as_fd()][..] } else { &[] };
        for request in [FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_KICK, FrontendReq::SET_VRING_ERR] {
            assert!(!client.try_tell(request, &longs(&[index]), files), "{request:?} of {index:#x}");
        }
    }
    ring.works(8);
    drop(client);
    target.is_well();
}

#[test]
fn rings_that_are_not_there_are_refused() {
    let target = Target::new();
    let mut client = target.connect();
    client.negotiate(FEATURES);
    for index in [2, 3, 255, 256, 0x8000, u32::MAX] {
        for request in [FrontendReq::SET_VRING_NUM, FrontendReq::SET_VRING_BASE, FrontendReq::SET_VRING_ENABLE] {
            assert!(!client.try_tell(request, &words(&[index, 1]), &[]), "{request:?} of {index}");
        }
        let mut addresses = words(&[index, 0]);
        addresses.extend(longs(&[USER; 4]));
        assert!(!client.try_tell(FrontendReq::SET_VRING_ADDR, &addresses, &[]));
    }
    for num in [0, 3, 8192, 65536, u32::MAX] {
        assert!(!client.try_tell(FrontendReq::SET_VRING_NUM, &words(&[0, num]), &[]), "{num} descriptors");
    }
    assert!(!client.try_tell(FrontendReq::SET_VRING_BASE, &words(&[0, 65536]), &[]));
    assert!(!client.try_tell(FrontendReq::SET_VRING_ENABLE, &words(&[0, 2]), &[]));
    client.send(FrontendReq::GET_VRING_BASE, &words(&[2, 0]), &[]);
    target.drops(client, "GET_VRING_BASE: ring 2 of 2");
    target.is_well();
}

#[test]
fn pitfall_48_no_kick_and_no_call_is_lost_over_starts_and_changes() {
    let target = Target::new();
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
    let mut ring = Ring::new(&memory, 0);
    let soon = Duration::from_secs(5);
    // Made available before the ring starts, and never kicked.
    ring.add(0, 0, Some(1));
    ring.driver.publish();
    ring.start(&mut client);
    ring.used();
    assert!(Ring::called(&ring.call, soon), "at the start");
    // Published with its kick while the ring is off.
    client.tell(FrontendReq::SET_VRING_ENABLE, &words(&[0, 0]), &[]);
    ring.add(1, 0, None);
    ring.driver.publish();
    ring.kick();
    std::thread::sleep(Duration::from_millis(30));
    assert!(ring.driver.next_used().is_none(), "a ring that is off stands still");
    Ring::called(&ring.call, Duration::ZERO);
    client.tell(FrontendReq::SET_VRING_ENABLE, &words(&[0, 1]), &[]);
    ring.used();
    assert!(Ring::called(&ring.call, soon), "when it goes on");
    // A new call may stand for what was raised on the old one.
    ring.call = eventfd();
    client.tell(FrontendReq::SET_VRING_CALL, &longs(&[0]), &[ring.call.as_fd()]);
    assert!(Ring::called(&ring.call, soon), "with another call");
    // A new doorbell may miss what was rung on the old one.
    ring.add(2, 0, None);
    ring.driver.publish();
    ring.kick = eventfd();
    client.tell(FrontendReq::SET_VRING_KICK, &longs(&[0]), &[ring.kick.as_fd()]);
    ring.used();
    Ring::called(&ring.call, Duration::ZERO);
    // Another table of memory.
    client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
    assert!(Ring::called(&ring.call, soon), "with another memory table");
    // Stopped, and started where it was.
    let base = client.ask(FrontendReq::GET_VRING_BASE, &words(&[0, 0]));
    assert_eq!(base, words(&[0, 3]));
    ring.add(3, 0, None);
    ring.driver.publish();
    ring.kick();
    client.tell(FrontendReq::SET_VRING_BASE, &base, &[]);
    client.tell(FrontendReq::SET_VRING_KICK, &longs(&[0]), &[ring.kick.as_fd()]);
    ring.used();
    ring.works(9);
    drop(client);
    target.is_well();
}

#[test]
fn pitfall_48_a_call_that_is_full_and_blocking_stops_nobody() {
    let target = Target::new();
    let (mut client, _memory, mut ring) = running(&target.socket);
    let full = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    client.tell(FrontendReq::SET_VRING_CALL, &longs(&[0]), &[full.as_fd()]);
    ring.works(1);
    drop(client);
    target.is_well();
}

#[test]
fn pitfall_49_features_early_late_and_twice() {
    let target = Target::new();
    let mut client = target.connect();
    // Enabled before anything is known of features, as QEMU's net device does.
    client.send(FrontendReq::SET_VRING_ENABLE, &words(&[0, 1]), &[]);
    // Features before protocol features, as blkio does.
    client.send(FrontendReq::SET_FEATURES, &longs(&[FEATURES]), &[]);
    client.negotiate(FEATURES);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::ADD_MEM_REG, &memory.region(), &[memory.file.as_fd()]);
    // Again the same, once for each pair of a NIC.
    client.tell(FrontendReq::ADD_MEM_REG, &memory.region(), &[memory.file.as_fd()]);
    assert_eq!(target.daemon.mappings(), target.before.1 + 1);
    let mut ring = Ring::new(&memory, 0);
    for (request, body, file) in ring.messages() {
        if request != FrontendReq::SET_VRING_ENABLE {
            client.tell(request, &body, file.as_slice());
        }
    }
    ring.works(1);
    client.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES]), &[]);
    ring.works(2);
    // Others while rings run: they go on with those.
    client.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES & !(1 << 9)]), &[]);
    ring.works(3);
    // Refused ones leave a client that can try again; nothing runs meanwhile.
    for features in [FEATURES | 1 << 50, FEATURES & !(1 << 32), 0] {
        assert!(!client.try_tell(FrontendReq::SET_FEATURES, &longs(&[features]), &[]), "{features:#x}");
    }
    client.send(FrontendReq::SET_FEATURES, &longs(&[PROTOCOL_FEATURES]), &[]);
    ring.add(1, 0, None);
    ring.driver.publish();
    ring.kick();
    std::thread::sleep(Duration::from_millis(30));
    assert!(ring.driver.next_used().is_none());
    client.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES]), &[]);
    ring.used();
    ring.works(4);
    assert!(!client.try_tell(FrontendReq::SET_PROTOCOL_FEATURES, &longs(&[1 << 63]), &[]));
    assert_eq!(target.dropped(), 0);
    drop(client);
    target.is_well();
}

#[test]
fn pitfall_49_without_protocol_features_rings_start_enabled() {
    let target = Target::new();
    let client = target.connect();
    client.send(FrontendReq::SET_OWNER, &[], &[]);
    client.send(FrontendReq::SET_FEATURES, &longs(&[FEATURES & !PROTOCOL_FEATURES]), &[]);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.send(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
    let mut ring = Ring::new(&memory, 1);
    for (request, body, file) in ring.messages() {
        if request != FrontendReq::SET_VRING_ENABLE {
            client.send(request, &body, file.as_slice());
        }
    }
    ring.works(1);
    drop(client);
    target.is_well();
}

#[test]
fn pitfall_50_resets_under_load_are_answered() {
    let target = Target::new();
    let (mut client, memory, mut ring) = running(&target.socket);
    // A channel to the frontend that nobody reads.
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    client.tell(FrontendReq::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    for round in 0..20 {
        for slot in 0..16 {
            ring.add(slot, slot * 8, Some(round));
        }
        ring.driver.publish();
        ring.kick();
        if round % 2 == 0 {
            client.tell(FrontendReq::RESET_DEVICE, &[], &[]);
        } else {
            client.tell(FrontendReq::SET_STATUS, &longs(&[0]), &[]);
            assert_eq!(client.ask_number(FrontendReq::GET_STATUS), 0);
        }
        client.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES]), &[]);
        client.tell(FrontendReq::SET_STATUS, &longs(&[15]), &[]);
        assert_eq!(client.ask_number(FrontendReq::GET_STATUS), 15);
        ring = Ring::new(&memory, 0);
        ring.start(&mut client);
        ring.works(round);
    }
    drop((ours, client));
    target.is_well();
}

#[test]
fn pitfall_51_a_client_that_forgot_its_base_loses_and_repeats_nothing() {
    let target = Target::new();
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    let mut ring = Ring::new(&memory, 0);
    for round in 0..3 {
        let mut client = target.connect();
        client.negotiate(FEATURES);
        client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
        ring.add(0, 0, Some(round));
        ring.driver.publish();
        // It says 0 each time, as DPDK's driver does.
        ring.start(&mut client);
        ring.used();
        ring.works(round);
        assert_eq!(client.ask(FrontendReq::GET_VRING_BASE, &words(&[0, 0])), words(&[0, 3 * (u32::from(round) + 1)]));
    }
    target.is_well();
}

/// Everything that a client sends until its ring runs.
fn whole_life<'a>(memory: &'a Memory, ring: &'a Ring) -> Vec<(FrontendReq, Vec<u8>, Option<BorrowedFd<'a>>)> {
    let mut life = vec![
        (FrontendReq::SET_OWNER, vec![], None),
        (FrontendReq::GET_FEATURES, vec![], None),
        (FrontendReq::GET_PROTOCOL_FEATURES, vec![], None),
        (FrontendReq::SET_PROTOCOL_FEATURES, longs(&[common::client::PROTOCOL]), None),
        (FrontendReq::GET_QUEUE_NUM, vec![], None),
        (FrontendReq::SET_FEATURES, longs(&[FEATURES]), None),
        (FrontendReq::GET_INFLIGHT_FD, inflight(0, 0, 2, SIZE), None),
        (FrontendReq::SET_MEM_TABLE, memory.table(), Some(memory.file.as_fd())),
    ];
    life.extend(ring.messages());
    life.push((FrontendReq::GET_VRING_BASE, words(&[0, 0]), None));
    life
}

#[test]
fn pitfall_51_a_client_may_vanish_between_any_two_messages_and_within_any() {
    let target = Target::new();
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    let mut ring = Ring::new(&memory, 0);
    for slot in 0..16 {
        ring.add(slot, 8 * slot, Some(1));
    }
    ring.driver.publish();
    let count = whole_life(&memory, &ring).len();
    for end in 0..=count {
        let client = target.connect();
        for (request, body, file) in whole_life(&memory, &ring).into_iter().take(end) {
            client.send(request, &body, file.as_slice());
        }
    }
    target.is_well();
    assert_eq!(target.dropped(), 0, "whoever goes between messages is nobody's fault");
    // Cut within the last message of a connection, at each byte.
    for cut in 1..20 {
        let client = target.connect();
        client.send(FrontendReq::SET_OWNER, &[], &[]);
        let mut bytes = Client::header(FrontendReq::SET_VRING_KICK.into(), VERSION, 8);
        bytes.extend([0; 8]);
        client.raw(&bytes[..cut], &[ring.kick.as_fd()]);
    }
    target.is_well();
    wait("19 connections that are dropped", || target.dropped() == 19);
    assert_eq!(target.daemon.count("in the middle of a message"), 19);
}

#[test]
fn pitfall_52_memory_that_is_cut_short_ends_the_connection_only() {
    for flags in [MemfdFlags::empty(), MemfdFlags::ALLOW_SEALING] {
        let target = Target::new();
        let mut client = target.connect();
        client.negotiate(FEATURES);
        let memory = Memory::new(flags);
        client.tell(FrontendReq::ADD_MEM_REG, &memory.region(), &[memory.file.as_fd()]);
        let mut ring = Ring::new(&memory, 0);
        ring.start(&mut client);
        ring.works(1);
        let cut = rustix::fs::ftruncate(&memory.file, 0);
        if flags == MemfdFlags::ALLOW_SEALING {
            assert_eq!(cut, Err(rustix::io::Errno::PERM), "what can be sealed is");
            ring.works(2);
            drop(client);
        } else {
            cut.unwrap();
            ring.kick();
            target.drops(client, "it has cut its memory short");
        }
        target.is_well();
    }
}

#[test]
fn pitfall_52_memory_that_is_cut_short_before_a_ring_starts() {
    // All of it is gone, or all but the ring.
    for left in [0, 4096] {
        let target = Target::new();
        let mut client = target.connect();
        client.negotiate(FEATURES);
        let memory = Memory::new(MemfdFlags::empty());
        client.tell(FrontendReq::ADD_MEM_REG, &memory.region(), &[memory.file.as_fd()]);
        let mut ring = Ring::new(&memory, 0);
        ring.add(0, 0, Some(1));
        ring.driver.publish();
        rustix::fs::ftruncate(&memory.file, left).unwrap();
        for (request, body, file) in ring.messages() {
            client.send(request, &body, file.as_slice());
        }
        target.drops(client, "it has cut its memory short");
        target.is_well();
    }
}

#[test]
fn pitfall_53_memory_changes_while_requests_are_in_flight() {
    let target = Target::new();
    let (mut client, memory, mut ring) = running(&target.socket);
    let other = memfd(1 << 20, MemfdFlags::empty());
    let region = longs(&[0, GUEST + (1 << 32), 1 << 20, USER + (1 << 32), 0]);
    let mut free: BTreeSet<u64> = (0..20).collect();
    let mut slots = [0; SIZE as usize];
    let mut done = 0;
    for round in 0..60 {
        while let Some(slot) = free.pop_first() {
            let head = ring.add(slot, slot * 8, Some(round));
            slots[usize::from(head)] = slot;
        }
        ring.driver.publish();
        ring.kick();
        match round % 3 {
            0 => client.tell(FrontendReq::ADD_MEM_REG, &region, &[other.as_fd()]),
            1 => client.tell(FrontendReq::REM_MEM_REG, &region, &[]),
            _ => client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]),
        }
        while let Some((head, _)) = ring.driver.next_used() {
            let slot = slots[usize::from(head)];
            assert_eq!(ring.status(slot), 0);
            free.insert(slot);
            done += 1;
        }
    }
    while ring.driver.in_flight() > 0 {
        ring.used();
        done += 1;
    }
    assert!(done >= 20, "{done} requests");
    // Without the region that the ring lies in nothing can run, and the client is told.
    assert!(!client.try_tell(
        FrontendReq::SET_MEM_TABLE,
        &[words(&[1, 0]), region[8..].to_vec()].concat(),
        &[other.as_fd()]
    ));
    drop(client);
    target.is_well();
}

#[test]
fn pitfall_54_a_message_that_never_completes_and_a_reply_that_is_never_read() {
    let target = Target::new();
    let begun = Instant::now();
    let client = target.connect();
    client.raw(&Client::header(FrontendReq::SET_FEATURES.into(), VERSION, 8)[..7], &[]);
    target.drops(client, "did not come to its end within 5 s");
    let client = target.connect();
    client.raw(&Client::header(FrontendReq::SET_FEATURES.into(), VERSION, 8), &[]);
    target.drops(client, "did not come to its end within 5 s");
    let client = target.connect();
    client.stream.set_nonblocking(true).unwrap();
    let questions = Client::header(FrontendReq::GET_FEATURES.into(), VERSION, 0).repeat(1000);
    let deadline = Instant::now() + Duration::from_secs(20);
    while target.dropped() < 3 && Instant::now() < deadline {
        client.raw(&questions, &[]);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(target.daemon.count("was not read within 5 s"), 1);
    assert!(begun.elapsed() < Duration::from_secs(40));
    drop(client);
    target.is_well();
}

#[test]
fn a_message_may_come_in_pieces() {
    let target = Target::new();
    let mut client = target.connect();
    for byte in Client::header(FrontendReq::GET_FEATURES.into(), VERSION, 0) {
        client.raw(&[byte], &[]);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(client.receive().is_some());
    drop(client);
    target.is_well();
}

#[test]
fn pitfall_55_what_was_in_flight_is_served_again_once_and_index_0_too() {
    let target = Target::new();
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
    let (body, file) = inflight_area(&mut client);
    let mut ring = Ring::new(&memory, 0);
    ring.indirect = true;
    // Five requests; a predecessor took four, completed the second, and ended.
    let heads: Vec<u16> = (0..5).map(|slot| ring.add(slot, slot * 8, Some(slot as u8 + 1))).collect();
    assert!(heads.contains(&0), "index 0 is among them");
    ring.driver.publish();
    let used = ring.driver.ring().used;
    memory.mem.write_obj(u32::from(heads[1]), GuestAddress(used + 4)).unwrap();
    memory.mem.write_obj(1u32, GuestAddress(used + 8)).unwrap();
    memory.mem.store(1u16, GuestAddress(used + 2), Ordering::SeqCst).unwrap();
    assert_eq!(ring.driver.next_used().map(|(head, _)| head), Some(heads[1]));
    let table = |at: u64, bytes: &[u8]| assert_eq!(rustix::io::pwrite(&file, bytes, at).unwrap(), bytes.len());
    // Version 1, as many entries, nothing in a batch, used index 1.
    table(8, &[1u16, SIZE, 0, 1].map(u16::to_ne_bytes).concat());
    for (number, slot) in [(7u64, 0), (9, 2), (8, 3)] {
        let entry = 16 + 16 * u64::from(heads[slot]);
        table(entry, &[1]);
        table(entry + 8, &number.to_ne_bytes());
    }
    client.tell(FrontendReq::SET_INFLIGHT_FD, &body, &[file.as_fd()]);
    for (request, body, file) in ring.messages() {
        // The frontend knows the used index only.
        let body = if request == FrontendReq::SET_VRING_BASE { words(&[0, 1]) } else { body };
        client.tell(request, &body, file.as_slice());
    }
    let served: BTreeSet<u16> = (0..4).map(|_| ring.used()).collect();
    assert_eq!(served, [heads[0], heads[2], heads[3], heads[4]].into());
    assert_eq!(ring.status(1), 0xee, "what was completed is not touched");
    std::thread::sleep(Duration::from_millis(20));
    assert!(ring.driver.next_used().is_none(), "nothing twice");
    assert_eq!(client.ask(FrontendReq::GET_VRING_BASE, &words(&[0, 0])), words(&[0, 5]));
    drop(client);
    target.is_well();
}

#[test]
fn regions_that_can_not_be_are_refused() {
    let target = Target::new();
    let (mut client, _memory, mut ring) = running(&target.socket);
    let file = memfd(1 << 20, MemfdFlags::empty());
    let sparse = memfd(1 << 62, MemfdFlags::empty());
    let far = GUEST + (1 << 40);
    for (guest, size, user, offset, what) in [
        (GUEST, MEMORY, USER + (1 << 33), 0, "the same guest addresses"),
        (GUEST + MEMORY - 4096, 8192, USER + (1 << 33), 0, "an overlap at the end"),
        (GUEST - 4096, 8192, USER + (1 << 33), 0, "an overlap at the beginning"),
        (GUEST + 4096, 4096, USER + (1 << 33), 0, "one within"),
        (u64::MAX - 4095, 8192, USER + (1 << 33), 0, "guest addresses that wrap"),
        (far, 8192, u64::MAX - 4095, 0, "user addresses that wrap"),
        (far, 0, far, 0, "nothing"),
        (far, (1 << 20) + 1, far, 0, "more than the file"),
        (far, 8192, far, (1 << 20) - 4096, "beyond the file's end"),
        (far, 8192, far, u64::MAX - 4095, "an offset that wraps"),
        (far, 4096, far, 1, "an offset that can't be mapped"),
        (far, u64::MAX, far, 0, "everything"),
    ] {
        let body = longs(&[0, guest, size, user, offset]);
        assert!(!client.try_tell(FrontendReq::ADD_MEM_REG, &body, &[file.as_fd()]), "{what}");
    }
    let huge = longs(&[0, far, 1 << 61, far, 0]);
    assert!(!client.try_tell(FrontendReq::ADD_MEM_REG, &huge, &[sparse.as_fd()]), "more than can be mapped");
    let body = longs(&[0, far, 4096, far, 0]);
    let (pipe, _pipe) = rustix::pipe::pipe().unwrap();
    let readonly = File::open(std::env::current_exe().unwrap()).unwrap();
    for (wrong, what) in [
        (pipe.as_fd(), "a pipe"),
        (eventfd().as_fd(), "an eventfd"),
        (File::open("/").unwrap().as_fd(), "a directory"),
        (File::open("/dev/zero").unwrap().as_fd(), "a device"),
        (client.stream.try_clone().unwrap().as_fd(), "a socket"),
        (readonly.as_fd(), "a file that can't be written"),
    ] {
        assert!(!client.try_tell(FrontendReq::ADD_MEM_REG, &body, &[wrong]), "{what}");
    }
    assert!(!client.try_tell(FrontendReq::ADD_MEM_REG, &body, &[]), "no descriptor");
    assert!(!client.try_tell(FrontendReq::REM_MEM_REG, &body, &[]), "one that is not there");
    let table = [words(&[2, 0]), longs(&[far, 8192, far, 0, far + 4096, 8192, far + (1 << 20), 0])].concat();
    assert!(!client.try_tell(FrontendReq::SET_MEM_TABLE, &table, &[file.as_fd(); 2]), "a table that overlaps itself");
    for count in [1, 3, u32::MAX] {
        let table = [words(&[count, 0]), table[8..].to_vec()].concat();
        assert!(!client.try_tell(FrontendReq::SET_MEM_TABLE, &table, &[file.as_fd(); 2]), "{count} regions of 2");
    }
    assert!(!client.try_tell(FrontendReq::SET_MEM_TABLE, &table[..40], &[file.as_fd(); 2]), "a table without its end");
    ring.works(6);
    assert_eq!(target.dropped(), 0);
    drop(client);
    target.is_well();
}

#[test]
fn regions_beyond_the_slots_are_refused() {
    let target = Target::new();
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let slots = client.ask_number(FrontendReq::GET_MAX_MEM_SLOTS);
    let file = memfd(4096, MemfdFlags::empty());
    let region = |index: u64| longs(&[0, GUEST + index * 4096, 4096, USER + index * 4096, 0]);
    for index in 0..slots {
        client.tell(FrontendReq::ADD_MEM_REG, &region(index), &[file.as_fd()]);
    }
    assert!(!client.try_tell(FrontendReq::ADD_MEM_REG, &region(slots), &[file.as_fd()]));
    client.tell(FrontendReq::REM_MEM_REG, &region(17), &[file.as_fd()]);
    client.tell(FrontendReq::ADD_MEM_REG, &region(slots), &[file.as_fd()]);
    drop(client);
    target.is_well();
}

#[test]
fn descriptors_that_are_no_eventfds_are_refused_as_kick_and_call() {
    let target = Target::new();
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let (pipe, _pipe) = rustix::pipe::pipe().unwrap();
    let file = memfd(4096, MemfdFlags::empty());
    for request in [FrontendReq::SET_VRING_CALL, FrontendReq::SET_VRING_KICK, FrontendReq::SET_VRING_ERR] {
        for wrong in [pipe.as_fd(), file.as_fd(), File::open("/").unwrap().as_fd()] {
            assert!(!client.try_tell(request, &longs(&[0]), &[wrong]));
        }
    }
    assert!(!client.try_tell(FrontendReq::SET_BACKEND_REQ_FD, &[], &[pipe.as_fd()]));
    assert!(!client.try_tell(FrontendReq::SET_BACKEND_REQ_FD, &[], &[]));
    drop(client);
    target.is_well();
}

#[test]
fn a_client_that_ends_a_ring_without_end_is_answered_meanwhile() {
    let target = Target::new();
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let one = [Client::header(common::client::SKIP_DRAIN, 1, 8), words(&[0, 0])].concat();
    // There is always more to read behind these, and the rest of it does not come.
    assert!(client.raw(&[one.repeat(256), one[..4].to_vec()].concat(), &[]));
    for answer in 0..256 {
        let reply = client.receive().unwrap_or_else(|| panic!("no answer {answer}"));
        assert_eq!(reply.0, common::client::SKIP_DRAIN);
    }
    drop(client);
    target.is_well();
}

#[test]
fn malformed_headers_and_unknown_messages_end_the_connection() {
    let target = Target::new();
    for header in [
        Client::header(1, 0, 0),
        Client::header(1, 2, 0),
        Client::header(1, VERSION | 4, 0),
        Client::header(2, VERSION, 1 << 20),
        Client::header(2, VERSION, usize::MAX),
        vec![0xff; 12],
    ] {
        let client = target.connect();
        client.raw(&header, &[]);
        target.drops(client, "has a header that can't be");
    }
    for code in [0, 46, 1000, u32::MAX] {
        let client = target.connect();
        client.send_code(code, NEED_REPLY, &[0; 100], &[]);
        target.drops(client, &format!("message {code}: nobody knows this message"));
    }
    // Whoever asks for an answer gets one, but not for ever.
    let mut client = target.connect();
    client.negotiate(FEATURES);
    for _ in 0..64 {
        client.send_code(999, NEED_REPLY, &[], &[]);
        assert_eq!(client.receive().map(|reply| reply.1), Some(longs(&[1])));
    }
    client.send_code(999, NEED_REPLY, &[], &[]);
    target.drops(client, "it was refused 64 times");
    target.is_well();
}

#[test]
fn payloads_may_be_too_long_and_not_too_short() {
    let target = Target::new();
    let needed = |code: u32| -> usize {
        use FrontendReq as R;
        match R::try_from(code) {
            Ok(R::SET_FEATURES | R::SET_PROTOCOL_FEATURES | R::SET_VRING_KICK | R::SET_VRING_CALL | R::SET_STATUS) => 8,
            Ok(R::SET_VRING_NUM | R::SET_VRING_BASE | R::GET_VRING_BASE | R::SET_VRING_ENABLE | R::SET_MEM_TABLE) => 8,
            Ok(R::SET_VRING_ADDR | R::ADD_MEM_REG | R::REM_MEM_REG) => 40,
            Ok(R::GET_CONFIG | R::SET_CONFIG) => 12,
            Ok(R::GET_INFLIGHT_FD) => 20,
            Ok(R::SET_LOG_BASE) => 16,
            Ok(R::SET_DEVICE_STATE_FD) => 8,
            _ => 0,
        }
    };
    for code in codes() {
        for len in [0, 1, 4, 7, 8, 11, 19, 39] {
            let mut client = target.connect();
            client.send_code(code, 0, &vec![0; len], &[]);
            if len < needed(code) {
                assert!(client.is_dropped(), "message {code} of {len} bytes");
            }
        }
    }
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    let padded = |body: Vec<u8>| [body, vec![0; 200]].concat();
    client.tell(FrontendReq::SET_OWNER, &[0; 8], &[]);
    client.tell(FrontendReq::SET_FEATURES, &padded(longs(&[FEATURES])), &[]);
    client.tell(FrontendReq::SET_MEM_TABLE, &padded(memory.table()), &[memory.file.as_fd()]);
    let mut ring = Ring::new(&memory, 0);
    for (request, body, file) in ring.messages() {
        client.tell(request, &padded(body), file.as_slice());
    }
    ring.works(1);
    client.ask(FrontendReq::GET_FEATURES, &[0; 16]);
    drop(client);
    target.is_well();
}

#[test]
fn configuration_is_read_at_many_offsets_and_sizes() {
    let target = Target::new();
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let read = |client: &mut Client, offset: u32, size: usize, sent: usize| {
        let body = [words(&[offset, size as u32, 0]), vec![0; sent]].concat();
        let reply = client.ask(FrontendReq::GET_CONFIG, &body);
        assert_eq!((&reply[..12], reply.len()), (&words(&[offset, size as u32, 0])[..], 12 + size));
        reply[12..].to_vec()
    };
    let whole = read(&mut client, 0, 256, 256);
    assert_eq!(whole[..8], (16u64 << 20 >> 9).to_le_bytes());
    for (offset, size) in [(0, 8), (4, 4), (20, 1), (34, 2), (59, 1), (8, 60), (0, 60), (0, 96), (255, 1), (60, 0)] {
        let expected = &whole[offset..(offset + size).min(256)];
        assert_eq!(read(&mut client, offset as u32, size, size), expected, "{size} at {offset}");
        assert_eq!(read(&mut client, offset as u32, size, 0), expected, "without the room in the request");
    }
    assert!(read(&mut client, u32::MAX, 4096, 0).iter().all(|byte| *byte == 0), "far beyond its end");
    // A guest may try to write what it may not: that is no reason to end anything.
    client.tell(FrontendReq::SET_CONFIG, &[words(&[0, 8, 0]), vec![0xff; 8]].concat(), &[]);
    assert_eq!(read(&mut client, 0, 256, 256), whole);
    assert!(!client.try_tell(FrontendReq::SET_CONFIG, &words(&[0, 8, 0]), &[]), "nothing to write");
    client.send(FrontendReq::GET_CONFIG, &words(&[0, 8000, 0]), &[]);
    target.drops(client, "8000 bytes of configuration space");
    target.is_well();
}

#[test]
fn a_ring_that_its_driver_breaks_raises_err_once_and_needs_a_reset() {
    let target = Target::new();
    let (mut client, memory, mut ring) = running(&target.socket);
    let err = eventfd();
    client.tell(FrontendReq::SET_VRING_ERR, &longs(&[0]), &[err.as_fd()]);
    client.tell(FrontendReq::SET_STATUS, &longs(&[15]), &[]);
    ring.works(1);
    ring.driver.write_avail_index(ring.driver.used_index().wrapping_add(1000));
    ring.kick();
    let mut count = [0; 8];
    wait("the error to be told", || rustix::io::read(&err, &mut count).is_ok());
    assert_eq!(u64::from_ne_bytes(count), 1);
    assert_eq!(client.ask_number(FrontendReq::GET_STATUS), 15 | 64);
    // The other ring goes on, and after a reset this one does too.
    let mut other = Ring::new(&memory, 1);
    other.start(&mut client);
    other.works(2);
    client.tell(FrontendReq::RESET_DEVICE, &[], &[]);
    client.tell(FrontendReq::SET_STATUS, &longs(&[0]), &[]);
    client.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES]), &[]);
    let mut ring = Ring::new(&memory, 0);
    ring.start(&mut client);
    ring.works(3);
    assert_eq!(client.ask_number(FrontendReq::GET_STATUS), 0);
    drop(client);
    target.is_well();
}

#[test]
fn noise_ends_connections_and_nothing_else() {
    let target = Target::new();
    let mut random = Random(0xdead_beef);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    let file = eventfd();
    for _ in 0..300 {
        let mut client = target.connect();
        if random.below(2) == 0 {
            client.negotiate(FEATURES);
        }
        client.stream.set_nonblocking(true).unwrap();
        for _ in 0..random.below(40) {
            let body: Vec<u8> = match random.below(4) {
                0 => (0..random.below(64)).map(|_| random.next() as u8).collect(),
                1 => words(&[random.below(3) as u32, random.below(300) as u32]),
                2 => memory.region(),
                _ => memory.table(),
            };
            let files = [memory.file.as_fd(), file.as_fd()];
            let files = match random.below(3) {
                0 => &files[..1],
                1 => &files[1..],
                _ => &[],
            };
            let flags = if random.below(2) == 0 { NEED_REPLY } else { 0 };
            client.send_code(1 + random.below(44) as u32, flags, &body, files);
        }
    }
    target.is_well();
}
