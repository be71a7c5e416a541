//! The log of written pages, as a frontend uses it that copies a running guest elsewhere: switched on and off while rings run,
//! read and emptied meanwhile, and what a frontend may say that makes no sense.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::common::client::{
    Client, FEATURES, GUEST, MEMORY, Memory, PROTOCOL_FEATURES, Ring, SIZE, USER, event, eventfd, longs, memfd,
    running, words,
};
use crate::common::target::Target;
use crate::common::{Daemon, PATIENCE, Random, scratch, wait};
use ringvm_backends::testing::driver::Buffer;
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{FrontendReq, VhostUserHeaderFlag};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, MmapRegion, VolatileMemory};

const LOG_ALL: u64 = 1 << 26;
const PAGE: u64 = 4096;
const LOG_LEN: u64 = 4096;

/// A frontend's log.
struct Log {
    file: OwnedFd,
    map: MmapRegion,
}

impl Log {
    fn new() -> Self {
        let file = memfd(LOG_LEN, MemfdFlags::ALLOW_SEALING);
        let mapped = FileOffset::new(file.try_clone().unwrap().into(), 0);
        Self { file, map: MmapRegion::from_file(mapped, LOG_LEN as usize).unwrap() }
    }

    /// Takes what is marked, as whoever copies the pages does.
    fn take(&self) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for word in 0..LOG_LEN / 8 {
            let cell = self.map.get_atomic_ref::<AtomicU64>(word as usize * 8).unwrap();
            let bits = u64::from_le(cell.swap(0, Ordering::SeqCst));
            pages.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| word * 64 + bit));
        }
        pages
    }
}

/// SET_LOG_BASE, which is answered with what it says.
fn set_base(client: &mut Client, size: u64, offset: u64, file: BorrowedFd<'_>) {
    let said = longs(&[size, offset]);
    client.send(FrontendReq::SET_LOG_BASE, &said, &[file]);
    let (code, body, files) = client.receive().expect("it is answered");
    assert_eq!((code, body, files.len()), (FrontendReq::SET_LOG_BASE.into(), said, 0));
}

fn set_addr(client: &mut Client, ring: &Ring, logged: bool) {
    let at = ring.driver.ring();
    let user = |guest: u64| guest - GUEST + USER;
    let log = if logged { at.used } else { 0 };
    let body = [words(&[ring.index, logged.into()]), longs(&[user(at.desc), user(at.used), user(at.avail), log])];
    client.tell(FrontendReq::SET_VRING_ADDR, &body.concat(), &[]);
}

/// In the order of QEMU.
fn switch(client: &mut Client, rings: &[&Ring], features: u64, log: Option<&Log>) {
    if let Some(log) = log {
        set_base(client, LOG_LEN, 0, log.file.as_fd());
    }
    client.tell(FrontendReq::SET_FEATURES, &longs(&[features | if log.is_some() { LOG_ALL } else { 0 }]), &[]);
    for ring in rings {
        set_addr(client, ring, log.is_some());
    }
}

const SLOTS: u64 = 20;

/// A guest that writes blocks and reads them into memory that it has changed meanwhile.
struct Guest {
    ring: Ring,
    free: BTreeSet<u64>,
    slot_of: Vec<u64>,
    /// The last byte written to each block, and whether the last request was to read it.
    blocks: Vec<(u8, bool)>,
    done: u64,
}

impl Guest {
    fn new(memory: &Memory, index: u32) -> Self {
        let mut ring = Ring::new(memory, index);
        ring.indirect = true;
        let blocks = vec![(0, false); SLOTS as usize];
        Self { ring, free: (0..SLOTS).collect(), slot_of: vec![0; SIZE.into()], blocks, done: 0 }
    }

    fn submit(&mut self, random: &mut Random) {
        while let Some(slot) = self.free.pop_first() {
            let (value, was_read) = self.blocks[slot as usize];
            let write = was_read.then(|| random.next() as u8);
            self.blocks[slot as usize] = (write.unwrap_or(value), write.is_none());
            let head = self.ring.add(slot, (u64::from(self.ring.index) * SLOTS + slot) * 8, write);
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

    fn drain(&mut self) {
        wait("what is in flight", || {
            self.reap();
            self.ring.driver.in_flight() == 0
        });
    }

    /// Where the device alone has written, and what must be there if one can tell.
    fn written(&self) -> Vec<(u64, u64, Option<u8>)> {
        let at = self.ring.driver.ring();
        let mut ranges = vec![(at.used, 6 + 8 * u64::from(at.size), None)];
        for &slot in &self.free {
            let (value, read) = self.blocks[slot as usize];
            let slot_at = GUEST + 0x10_0000 + (u64::from(self.ring.index) * u64::from(SIZE) + slot) * 8192;
            ranges.push((slot_at + 16, 1, Some(0)));
            if read {
                ranges.push((slot_at + 4096, 4096, Some(value)));
            }
        }
        ranges
    }
}

/// A copy of the guest's memory that is brought up to date with what the log says, and with nothing else.
struct Copy(Vec<u8>);

impl Copy {
    fn new(memory: &Memory) -> Self {
        let mut bytes = vec![0; MEMORY as usize];
        memory.mem.read_slice(&mut bytes, GuestAddress(GUEST)).unwrap();
        Self(bytes)
    }

    fn update(&mut self, memory: &Memory, log: &Log) {
        for page in log.take() {
            let at = page * PAGE;
            let bytes = &mut self.0[(at - GUEST) as usize..][..PAGE as usize];
            memory.mem.read_slice(bytes, GuestAddress(at)).unwrap();
        }
    }

    fn is_complete(&self, memory: &Memory, guest: &Guest) {
        for (at, len, value) in guest.written() {
            let copied = &self.0[(at - GUEST) as usize..][..len as usize];
            let mut there = vec![0; len as usize];
            memory.mem.read_slice(&mut there, GuestAddress(at)).unwrap();
            assert!(copied == there, "{len} bytes at {at:#x} of ring {} are not marked", guest.ring.index);
            assert!(value.is_none_or(|value| there.iter().all(|byte| *byte == value)));
        }
    }
}

#[test]
fn a_running_guest_can_be_copied_over_and_over() {
    let target = Target::new();
    let mut client = Client::connect(&target.socket);
    client.negotiate(FEATURES);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
    let mut guests = [Guest::new(&memory, 0), Guest::new(&memory, 1)];
    for guest in &guests {
        guest.ring.start(&mut client);
    }
    let mut random = Random(0x10f);
    let mut run = |guests: &mut [Guest; 2], count: u64| {
        let done = |guests: &[Guest; 2]| guests.iter().map(|guest| guest.done).sum::<u64>();
        let (goal, deadline) = (done(guests) + count, Instant::now() + PATIENCE);
        while done(guests) < goal {
            assert!(Instant::now() < deadline, "the disk does not answer");
            guests.iter_mut().for_each(|guest| {
                guest.submit(&mut random);
                guest.reap();
            });
        }
    };
    for round in 0..12 {
        run(&mut guests, 200);
        let log = Log::new();
        // Each message finds requests in flight.
        let [a, b] = &guests;
        switch(&mut client, &[&a.ring, &b.ring], FEATURES, Some(&log));
        let mut copy = Copy::new(&memory);
        for turn in 0..20 {
            run(&mut guests, 50);
            copy.update(&memory, &log);
            if turn == 10 && round % 3 == 0 {
                // Memory has changed, so the log is another; what the old one says is not lost.
                set_base(&mut client, LOG_LEN, 0, log.file.as_fd());
            }
        }
        if round % 2 == 0 {
            guests.iter_mut().for_each(Guest::drain);
        }
        // Else it is stopped in the middle: what was taken ends, the rest waits in the ring.
        for guest in &mut guests {
            let stopped = client.ask(FrontendReq::GET_VRING_BASE, &words(&[guest.ring.index, 0]));
            let base = u32::from_ne_bytes(stopped[4..].try_into().unwrap());
            assert_eq!(base, u32::from(guest.ring.driver.used_index()), "nothing is in flight");
            guest.reap();
        }
        copy.update(&memory, &log);
        guests.iter().for_each(|guest| copy.is_complete(&memory, guest));
        for guest in &guests {
            let base = words(&[guest.ring.index, guest.ring.driver.used_index().into()]);
            client.tell(FrontendReq::SET_VRING_BASE, &base, &[]);
            let index = longs(&[guest.ring.index.into()]);
            client.tell(FrontendReq::SET_VRING_KICK, &index, &[guest.ring.kick.as_fd()]);
        }
        let [a, b] = &guests;
        switch(&mut client, &[&a.ring, &b.ring], FEATURES, None);
        log.take();
        run(&mut guests, 200);
        guests.iter_mut().for_each(Guest::drain);
        assert!(log.take().is_empty(), "it is off");
    }
    drop(client);
    target.is_well();
    assert_eq!(target.dropped_for(""), 0);
}

#[test]
fn the_frontend_of_the_vhost_crate_reads_the_log() {
    let target = Target::new();
    let log = Log::new();
    let mut frontend = Frontend::connect(&target.socket, 2).unwrap();
    frontend.set_owner().unwrap();
    assert_ne!(frontend.get_features().unwrap() & LOG_ALL, 0);
    let protocol = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    frontend.set_features(FEATURES | LOG_ALL).unwrap();
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    let region = memory.mem.find_region(GuestAddress(GUEST)).unwrap();
    frontend.set_mem_table(&[VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()]).unwrap();
    let handle = log.file.as_raw_fd();
    let region = VhostUserDirtyLogRegion { mmap_size: LOG_LEN, mmap_offset: 0, mmap_handle: handle };
    frontend.set_log_base(0, Some(region)).unwrap();
    let marked = eventfd();
    frontend.set_log_fd(marked.as_raw_fd()).unwrap();
    let mut ring = Ring::new(&memory, 0);
    let at = ring.driver.ring();
    let user = |guest: u64| memory.mem.get_host_address(GuestAddress(guest)).unwrap() as u64;
    let config = VringConfigData {
        queue_max_size: at.size,
        queue_size: at.size,
        flags: 1,
        desc_table_addr: user(at.desc),
        used_ring_addr: user(at.used),
        avail_ring_addr: user(at.avail),
        log_addr: Some(at.used),
    };
    frontend.set_vring_num(0, at.size).unwrap();
    frontend.set_vring_addr(0, &config).unwrap();
    frontend.set_vring_base(0, 0).unwrap();
    frontend.set_vring_call(0, &event(&ring.call)).unwrap();
    frontend.set_vring_kick(0, &event(&ring.kick)).unwrap();
    frontend.set_vring_enable(0, true).unwrap();
    wait("the ring to be armed", || !log.take().is_empty());
    let used: BTreeSet<u64> = (at.used / PAGE..=(at.used + 5 + 8 * u64::from(at.size)) / PAGE).collect();
    let status = (GUEST + 0x10_0000) / PAGE;
    for (write, pages) in [(Some(7), vec![status]), (None, vec![status, status + 1])] {
        Ring::called(&marked, Duration::ZERO);
        ring.add(0, 8, write);
        ring.driver.publish();
        ring.kick();
        ring.used();
        assert!(Ring::called(&marked, PATIENCE), "the frontend is told");
        // The ring is armed again behind its completion.
        let mut all = log.take();
        wait("the used ring's mark", || {
            all.extend(log.take());
            used.iter().any(|page| all.contains(page))
        });
        all.retain(|page| !used.contains(page));
        assert_eq!(all, pages.into_iter().collect());
    }
    assert_eq!(ring.data(0), 7);
    drop(frontend);
    target.is_well();
}

#[test]
fn switching_the_log_resets_nothing() {
    let target = Target::new();
    // CONFIG_WCE.
    let features = FEATURES | 1 << 11;
    let mut client = Client::connect(&target.socket);
    client.negotiate(features);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
    let mut ring = Ring::new(&memory, 0);
    ring.start(&mut client);
    client.tell(FrontendReq::SET_CONFIG, &[words(&[32, 1, 0]), vec![0]].concat(), &[]);
    let log = Log::new();
    for enabled in [1, 0] {
        client.tell(FrontendReq::SET_VRING_ENABLE, &words(&[0, enabled]), &[]);
        for log in [Some(&log), None, Some(&log), None] {
            switch(&mut client, &[&ring], features, log);
            assert_eq!(client.ask(FrontendReq::GET_CONFIG, &words(&[32, 1, 0]))[12], 0, "the driver's choice");
            if enabled == 1 {
                ring.works(3);
            }
        }
    }
    // Any other change is a new driver.
    client.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES | LOG_ALL]), &[]);
    assert_eq!(client.ask(FrontendReq::GET_CONFIG, &words(&[32, 1, 0]))[12], 1);
    drop(client);
    target.is_well();
}

#[test]
fn a_log_that_replaces_another_stops_no_ring() {
    let target = Target::new();
    let mut client = Client::connect(&target.socket);
    client.negotiate(FEATURES);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
    let mut ring = Ring::new(&memory, 0);
    ring.start(&mut client);
    // VRING_AVAIL_F_NO_INTERRUPT: requests interrupt no more, and a ring that starts still does, once.
    memory.mem.write_obj(1u16, GuestAddress(ring.driver.ring().avail)).unwrap();
    let mut log = Log::new();
    switch(&mut client, &[&ring], FEATURES, Some(&log));
    assert!(Ring::called(&ring.call, Duration::ZERO), "it started anew to log what it writes");
    let mappings = target.daemon.mappings();
    for round in 0..20 {
        ring.works(round);
        let next = Log::new();
        set_base(&mut client, LOG_LEN, 0, next.file.as_fd());
        assert!(!Ring::called(&ring.call, Duration::ZERO), "it was stopped in round {round}");
        // What was written before is in the log before, what comes in the new one.
        let page = (GUEST + 0x10_0000) / PAGE;
        assert!(log.take().contains(&page));
        ring.works(round);
        let pages = next.take();
        assert!(pages.contains(&page) && pages.contains(&(page + 1)), "{pages:?}");
        assert!(log.take().is_empty());
        assert_eq!(target.daemon.mappings(), mappings);
        log = next;
    }
    drop(client);
    target.is_well();
}

#[test]
fn frames_that_a_nic_receives_are_marked() {
    let dir = scratch();
    let socket = dir.path().join("n.sock");
    let daemon = Daemon::net(&socket, "loopback=on");
    let mut client = Client::connect(&socket);
    // VERSION_1 and MRG_RXBUF.
    client.negotiate(1 << 32 | 1 << 15 | PROTOCOL_FEATURES | LOG_ALL);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
    let log = Log::new();
    set_base(&mut client, LOG_LEN, 0, log.file.as_fd());
    let mut rings = [Ring::new(&memory, 0), Ring::new(&memory, 1)];
    for ring in &rings {
        ring.start(&mut client);
    }
    let (rx, tx) = (GUEST + 0x20_0000, GUEST + 0x30_0000);
    for round in 0..20u64 {
        // Two buffers over the border of two pages each, of which a frame fills one and a part of the other.
        let buffers = [0, 2].map(|page| rx + (round % 8 * 4 + page) * PAGE + 3000);
        for addr in buffers {
            rings[0].driver.add(&[Buffer { addr, len: 2048, writable: true }]).unwrap();
        }
        rings[0].driver.publish();
        rings[0].kick();
        log.take();
        memory.mem.write_slice(&[0; 12], GuestAddress(tx)).unwrap();
        memory.mem.write_slice(&[round as u8 + 1; 3000], GuestAddress(tx + 12)).unwrap();
        rings[1].driver.add(&[Buffer { addr: tx, len: 3012, writable: false }]).unwrap();
        rings[1].driver.publish();
        rings[1].kick();
        rings[0].used();
        rings[0].used();
        rings[1].used();
        let pages = log.take();
        let first = buffers[0] / PAGE;
        assert_eq!(pages, (first..first + 4).collect(), "round {round}: no flag, so not the used rings");
        assert_eq!(memory.mem.read_obj::<u8>(GuestAddress(buffers[1])).unwrap(), round as u8 + 1);
    }
    drop(client);
    daemon.terminate();
}

pub(crate) fn pitfall_46_logs_that_can_not_be_are_refused(target: &Target) {
    let file = memfd(8192, MemfdFlags::empty());
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    let refused = [
        (4096, u64::MAX - 4095, Some(file.as_fd())),
        (u64::MAX, 1, Some(file.as_fd())),
        (u64::MAX, 4096, Some(file.as_fd())),
        (u64::MAX - 4095, 4096, Some(file.as_fd())),
        (1 << 63, 1 << 63, Some(file.as_fd())),
        (8193, 0, Some(file.as_fd())),
        (4097, 4096, Some(file.as_fd())),
        (1, 8192, Some(file.as_fd())),
        (0, 0, Some(file.as_fd())),
        (0, 4096, Some(file.as_fd())),
        (4096, 0, Some(pipe.as_fd())),
        (4096, 0, None),
    ];
    for (count, (size, offset, file)) in (1..).zip(refused) {
        let (mut client, _memory, mut ring) = running(&target.socket);
        client.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES | LOG_ALL]), &[]);
        ring.works(1);
        client.send(FrontendReq::SET_LOG_BASE, &longs(&[size, offset]), file.as_slice());
        assert!(client.is_dropped(), "{size} bytes at {offset}");
        wait("one line about it", || target.dropped_for("SET_LOG_BASE") == count);
    }
    let (mut client, _memory, _ring) = running(&target.socket);
    assert!(!client.try_tell(FrontendReq::SET_LOG_FD, &[], &[]));
    assert!(!client.try_tell(FrontendReq::SET_LOG_FD, &[], &[file.as_fd()]));
    drop(client);
    target.is_well();
}

pub(crate) fn pitfall_46_what_a_log_is_too_short_for_is_left_out(target: &Target) {
    // One byte at an odd place: eight pages, below all of the memory.
    let file = memfd(3 * 4096, MemfdFlags::ALLOW_SEALING);
    let (mut client, memory, mut ring) = running(&target.socket);
    set_base(&mut client, 1, 4099, file.as_fd());
    client.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES | LOG_ALL]), &[]);
    set_addr(&mut client, &ring, true);
    ring.works(5);
    // The last byte of all addresses, said to be a used ring.
    let at = ring.driver.ring();
    let user = |guest: u64| guest - GUEST + USER;
    for used in [u64::MAX, u64::MAX - 4, 1 << 63] {
        let said = [words(&[0, 1]), longs(&[user(at.desc), user(at.used), user(at.avail), used])].concat();
        client.tell(FrontendReq::SET_VRING_ADDR, &said, &[]);
        ring.works(6);
    }
    let mut bytes = [0; 3 * 4096];
    rustix::io::pread(&file, &mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
    // One that is long enough takes its place.
    set_base(&mut client, 4096, 4097, file.as_fd());
    ring.works(7);
    rustix::io::pread(&file, &mut bytes, 0).unwrap();
    let page = (GUEST + 0x10_0000) / PAGE;
    assert_eq!(bytes[4097 + page as usize / 8] >> (page % 8) & 3, 3);
    drop((client, memory));
    target.is_well();
}

pub(crate) fn pitfall_52_a_log_that_is_cut_short_ends_the_connection_only(target: &Target) {
    let file = memfd(4096, MemfdFlags::empty());
    let (mut client, _memory, mut ring) = running(&target.socket);
    set_base(&mut client, 4096, 0, file.as_fd());
    client.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES | LOG_ALL]), &[]);
    ring.works(5);
    rustix::fs::ftruncate(&file, 0).unwrap();
    ring.add(0, 8, None);
    ring.driver.publish();
    ring.kick();
    assert!(client.is_dropped());
    wait("the line", || target.dropped_for("cut its memory short") == 1);
    target.is_well();
    // Where it can be sealed it can't be cut.
    let file = memfd(4096, MemfdFlags::ALLOW_SEALING);
    let (mut client, _memory, _ring) = running(&target.socket);
    set_base(&mut client, 4096, 0, file.as_fd());
    assert!(rustix::fs::ftruncate(&file, 0).is_err());
    drop(client);
    target.is_well();
}
