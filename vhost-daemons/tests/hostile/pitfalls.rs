//! Sharp edges of vhost-user that others have met, each as a test of its number, from the side of a client that is wrong,
//! hostile, or gone. After each the daemon serves the next client, has lost no descriptor, and has said one line.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::common::client::{
    Client, FEATURES, GUEST, Memory, PROTOCOL_FEATURES, Ring, SIZE, USER, VERSION, eventfd, longs, memfd, running,
    words,
};
use crate::common::target::{Target, codes};
use crate::common::wait;
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::FrontendReq;
use vm_memory::{Bytes, GuestAddress};

fn takes_files(code: u32) -> bool {
    use FrontendReq as R;
    let takers = [R::SET_MEM_TABLE, R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR, R::SET_BACKEND_REQ_FD];
    let more =
        [R::SET_INFLIGHT_FD, R::ADD_MEM_REG, R::REM_MEM_REG, R::SET_LOG_BASE, R::SET_LOG_FD, R::SET_DEVICE_STATE_FD];
    takers.into_iter().chain(more).any(|taker| u32::from(taker) == code)
}

pub(crate) fn pitfall_44_descriptors_on_the_wrong_message_do_not_leak(target: &Target) {
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

pub(crate) fn pitfall_44_replacing_descriptors_closes_those_before(target: &Target) {
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

pub(crate) fn pitfall_45_inflight_table_and_queue_size_that_disagree_are_refused(target: &Target) {
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
    let directory = File::open("/").unwrap();
    for wrong in [directory.as_fd(), eventfd().as_fd()] {
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

pub(crate) fn pitfall_47_bit_8_of_a_ring_index_means_no_descriptor(target: &Target) {
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

pub(crate) fn pitfall_48_no_kick_and_no_call_is_lost_over_starts_and_changes(target: &Target) {
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

pub(crate) fn pitfall_48_a_call_that_is_full_and_blocking_stops_nobody(target: &Target) {
    let (mut client, _memory, mut ring) = running(&target.socket);
    let full = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    client.tell(FrontendReq::SET_VRING_CALL, &longs(&[0]), &[full.as_fd()]);
    ring.works(1);
    drop(client);
    target.is_well();
}

pub(crate) fn pitfall_49_features_early_late_and_twice(target: &Target) {
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

pub(crate) fn pitfall_49_without_protocol_features_rings_start_enabled(target: &Target) {
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

pub(crate) fn pitfall_50_resets_under_load_are_answered(target: &Target) {
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

pub(crate) fn pitfall_51_a_client_that_forgot_its_base_loses_and_repeats_nothing(target: &Target) {
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
        (FrontendReq::SET_PROTOCOL_FEATURES, longs(&[crate::common::client::PROTOCOL]), None),
        (FrontendReq::GET_QUEUE_NUM, vec![], None),
        (FrontendReq::SET_FEATURES, longs(&[FEATURES]), None),
        (FrontendReq::GET_INFLIGHT_FD, inflight(0, 0, 2, SIZE), None),
        (FrontendReq::SET_MEM_TABLE, memory.table(), Some(memory.file.as_fd())),
    ];
    life.extend(ring.messages());
    life.push((FrontendReq::GET_VRING_BASE, words(&[0, 0]), None));
    life
}

pub(crate) fn pitfall_51_a_client_may_vanish_between_any_two_messages_and_within_any(target: &Target) {
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

pub(crate) fn pitfall_52_memory_that_is_cut_short_ends_the_connection_only(target: &Target) {
    for flags in [MemfdFlags::empty(), MemfdFlags::ALLOW_SEALING] {
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

pub(crate) fn pitfall_52_memory_that_is_cut_short_before_a_ring_starts(target: &Target) {
    // All of it is gone, or all but the ring.
    for left in [0, 4096] {
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

pub(crate) fn pitfall_53_memory_changes_while_requests_are_in_flight(target: &Target) {
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

pub(crate) fn pitfall_54_a_message_that_never_completes_and_a_reply_that_is_never_read(target: &Target) {
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

pub(crate) fn pitfall_55_what_was_in_flight_is_served_again_once_and_index_0_too(target: &Target) {
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
