//! Messages that are no messages, and rings and regions that can't be: each ends its own connection at most, with one line, and the
//! daemon serves the next client and has lost no descriptor.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use crate::common::client::{
    Client, FEATURES, GUEST, MEMORY, Memory, NEED_REPLY, Ring, USER, VERSION, eventfd, longs, memfd, running, words,
};
use crate::common::target::{Target, codes};
use crate::common::{Random, wait};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::FrontendReq;

pub(crate) fn rings_that_are_not_there_are_refused(target: &Target) {
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

pub(crate) fn a_message_may_come_in_pieces(target: &Target) {
    let mut client = target.connect();
    for byte in Client::header(FrontendReq::GET_FEATURES.into(), VERSION, 0) {
        client.raw(&[byte], &[]);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(client.receive().is_some());
    drop(client);
    target.is_well();
}

pub(crate) fn regions_that_can_not_be_are_refused(target: &Target) {
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

pub(crate) fn regions_beyond_the_slots_are_refused(target: &Target) {
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

pub(crate) fn descriptors_that_can_not_be_raised_are_refused_as_kick_and_call(target: &Target) {
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

pub(crate) fn a_client_that_ends_a_ring_without_end_is_answered_meanwhile(target: &Target) {
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let one = [Client::header(crate::common::client::SKIP_DRAIN, 1, 8), words(&[0, 0])].concat();
    // There is always more to read behind these, and the rest of it does not come.
    assert!(client.raw(&[one.repeat(256), one[..4].to_vec()].concat(), &[]));
    for answer in 0..256 {
        let reply = client.receive().unwrap_or_else(|| panic!("no answer {answer}"));
        assert_eq!(reply.0, crate::common::client::SKIP_DRAIN);
    }
    drop(client);
    target.is_well();
}

pub(crate) fn malformed_headers_and_unknown_messages_end_the_connection(target: &Target) {
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

pub(crate) fn payloads_may_be_too_long_and_not_too_short(target: &Target) {
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

pub(crate) fn configuration_is_read_at_many_offsets_and_sizes(target: &Target) {
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

pub(crate) fn a_ring_that_its_driver_breaks_raises_err_once_and_needs_a_reset(target: &Target) {
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

pub(crate) fn noise_ends_connections_and_nothing_else(target: &Target) {
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
