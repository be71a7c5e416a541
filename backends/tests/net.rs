//! The network device as a driver sees it, over real queues, I/O threads and the ports that need no rights.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ringvm_backends::device::{Device, GuestMemory, QueueParts, QueueState};
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_backends::net::port::loopback::Loopback;
use ringvm_backends::net::port::{Ends, Offloads, Port};
use ringvm_backends::net::{NetDevice, NetOptions};
use ringvm_backends::options::Check;
use ringvm_backends::testing::driver::{Buffer, Driver};
use ringvm_backends::virtqueue::interrupt::Interrupt;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const HEADER: usize = 12;
const TX_DATA: u64 = 0x100_0000;
const RX_DATA: u64 = 0x200_0000;
const CTRL_DATA: u64 = 0xf_0000;
const PATIENCE: Duration = Duration::from_secs(20);
const MRG_RXBUF: u64 = 1 << 15;
const MQ: u64 = 1 << 22;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_ECN: u64 = 1 << 9;
const GUEST_USO4: u64 = 1 << 54;
const GUEST_USO6: u64 = 1 << 55;

struct Queue {
    driver: Driver,
    kick: EventFd,
    /// Where the buffer of each head lies: a device may use them in any order.
    at: BTreeMap<u16, u64>,
}

struct Rig {
    device: NetDevice,
    mem: GuestMemory,
    queues: Vec<Queue>,
    faults: Arc<AtomicUsize>,
    in_order: bool,
    sent: u64,
}

fn pool() -> ReactorPool {
    ReactorPool::new(&ReactorOptions { count: 2, ..ReactorOptions::default() }).unwrap()
}

fn loopback() -> NetOptions {
    NetOptions { loopback: true, mac: Some("52:54:00:12:34:56".parse().unwrap()), ..NetOptions::default() }
}

impl Rig {
    fn new(options: &NetOptions, mask: u64) -> Self {
        let mut rig = Self::over(NetDevice::open("net0", options, &pool()).unwrap());
        let features = rig.device.info().features & mask;
        rig.device.ack_features(features).unwrap();
        let pairs = if features & MQ == 0 { 1 } else { usize::from(options.queues) };
        for index in 0..=pairs * 2 {
            rig.add_queue(index, features);
            rig.start_queue(index, QueueState::default());
        }
        rig
    }

    fn over(device: NetDevice) -> Self {
        let mem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap());
        Self { device, mem, queues: Vec::new(), faults: Arc::default(), in_order: false, sent: 0 }
    }

    /// Lays out the next queue.
    fn add_queue(&mut self, index: usize, features: u64) {
        let size = self.device.info().queue_sizes[index];
        let driver = Driver::new(self.mem.clone(), index as u64 * 0x1_0000, size, features);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        self.queues.push(Queue { driver, kick, at: BTreeMap::new() });
    }

    fn start_queue(&mut self, index: usize, from: QueueState) {
        let queue = &self.queues[index];
        let faults = Arc::clone(&self.faults);
        let parts = QueueParts {
            fault: Interrupt::Call(Arc::new(move || {
                faults.fetch_add(1, Ordering::SeqCst);
            })),
            from,
            in_order: self.in_order,
            ..QueueParts::new(queue.driver.ring(), self.mem.clone(), queue.kick.try_clone().unwrap())
        };
        self.device.start_queue(index as u16, parts).unwrap();
    }

    fn control_index(&self) -> usize {
        self.queues.len() - 1
    }

    fn publish(&mut self, queue: usize) {
        if self.queues[queue].driver.publish() {
            self.queues[queue].kick.write(1).unwrap();
        }
    }

    fn used(&mut self, queue: usize) -> (u16, u32) {
        let start = Instant::now();
        loop {
            if let Some(used) = self.queues[queue].driver.next_used() {
                return used;
            }
            assert!(start.elapsed() < PATIENCE, "queue {queue} does not answer");
            std::thread::yield_now();
        }
    }

    /// Offers receive buffers of these lengths on a pair.
    fn offer(&mut self, pair: usize, lens: &[u32]) {
        for (i, &len) in lens.iter().enumerate() {
            let addr = RX_DATA + pair as u64 * 0x100_0000 + i as u64 * 0x1_1000;
            self.offer_at(pair, addr, len);
        }
        self.publish(pair * 2);
    }

    fn offer_at(&mut self, pair: usize, addr: u64, len: u32) {
        let queue = &mut self.queues[pair * 2];
        let head = queue.driver.add(&[Buffer { addr, len, writable: true }]).unwrap();
        queue.at.insert(head, addr);
    }

    /// Queues a frame with this header, cut after `cut` bytes.
    fn queue_frame(&mut self, pair: usize, header: &[u8], frame: &[u8], cut: usize) {
        let at = TX_DATA + (self.sent % 64) * 0x2_0000;
        self.sent += 1;
        let all = [header, frame].concat();
        self.mem.write_slice(&all, GuestAddress(at)).unwrap();
        let cut = cut.min(all.len()) as u32;
        let chain = [
            Buffer { addr: at, len: cut, writable: false },
            Buffer { addr: at + u64::from(cut), len: all.len() as u32 - cut, writable: false },
        ];
        self.queues[pair * 2 + 1].driver.add(&chain).unwrap();
    }

    fn send(&mut self, frame: &[u8]) {
        self.queue_frame(0, &[0; HEADER], frame, 7);
        self.publish(1);
        assert_eq!(self.used(1).1, 0, "transmit writes nothing");
    }

    /// One used receive buffer.
    fn used_buffer(&mut self, pair: usize) -> Vec<u8> {
        let (head, len) = self.used(pair * 2);
        let addr = self.queues[pair * 2].at[&head];
        let mut bytes = vec![0; len as usize];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    /// Receives one frame on a pair; returns it and the number of buffers it came in.
    fn receive(&mut self, pair: usize) -> (Vec<u8>, u64) {
        let mut bytes = self.used_buffer(pair);
        let count = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..count {
            bytes.extend(self.used_buffer(pair));
        }
        (bytes.split_off(HEADER), u64::from(count))
    }

    fn control(&mut self, bytes: &[u8]) -> u8 {
        let index = self.control_index();
        self.mem.write_slice(bytes, GuestAddress(CTRL_DATA)).unwrap();
        let chain = [
            Buffer { addr: CTRL_DATA, len: bytes.len() as u32, writable: false },
            Buffer { addr: CTRL_DATA + 0x8000, len: 1, writable: true },
        ];
        self.queues[index].driver.add(&chain).unwrap();
        self.publish(index);
        self.used(index);
        self.mem.read_obj(GuestAddress(CTRL_DATA + 0x8000)).unwrap()
    }

    fn counted(&self, name: &str) -> u64 {
        let total = self.device.stats().total().unwrap();
        total.ops.iter().find(|op| op.name == name).map_or(0, |op| op.count)
    }
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| seed.wrapping_add((i * 7 + i / 256) as u8)).collect()
}

#[test]
fn frames_of_all_sizes_come_back_whole() {
    for mask in [u64::MAX, !MRG_RXBUF] {
        for (i, len) in [14, 60, 64, 1514, 1518, 9000, 65535, 65553].into_iter().enumerate() {
            let mut rig = Rig::new(&loopback(), mask);
            rig.offer(0, &[65600]);
            let sent = frame(len, i as u8);
            rig.send(&sent);
            let (got, buffers) = rig.receive(0);
            assert!(got == sent && buffers == 1, "{len}");
        }
    }
}

#[test]
fn pitfall_42_frames_are_merged_over_buffers_and_the_rest_is_kept() {
    let mut rig = Rig::new(&loopback(), u64::MAX);
    rig.offer(0, &[1024; 200]);
    for (i, len) in [60, 1012, 1013, 5000, 60_000, 100, 20_000].into_iter().enumerate() {
        let sent = frame(len, i as u8);
        rig.send(&sent);
        let (got, buffers) = rig.receive(0);
        assert!(got == sent, "{len}");
        assert_eq!(buffers, (len as u64 + HEADER as u64).div_ceil(1024), "{len}");
    }
}

#[test]
fn pitfall_37_room_for_the_header_is_room_for_the_frame() {
    // A frame that fits the buffer only without its header is dropped whole, never cut.
    let mut rig =
        Rig::new(&NetOptions { mtu: Some(1500), ..loopback() }, !(MRG_RXBUF | GUEST_TSO4 | 1 << 8 | 1 << 9 | 3 << 54));
    rig.offer(0, &[1514, 2000]);
    rig.send(&frame(1514, 1));
    rig.send(&frame(1500, 2));
    let (got, _) = rig.receive(0);
    assert!(got == frame(1500, 2));
    assert_eq!(rig.counted("dropped_oversized"), 1);
}

#[test]
fn pitfall_43_malformed_frames_are_dropped_and_counted() {
    let mut rig = Rig::new(&loopback(), u64::MAX);
    rig.offer(0, &[65600; 4]);
    let mut bad = 0;
    let mut drop = |rig: &mut Rig, header: &[u8], len: usize| {
        rig.queue_frame(0, header, &frame(len, 0), 5);
        rig.publish(1);
        rig.used(1);
        bad += 1;
        assert_eq!(rig.counted("dropped_malformed"), bad, "{header:?} {len}");
    };
    drop(&mut rig, &[0; HEADER], 0);
    drop(&mut rig, &[0; HEADER], 13);
    drop(&mut rig, &[0; HEADER], 70_000);
    drop(&mut rig, &[0; 6], 0);
    // TCP segmentation without a segment size, a checksum behind the end, an unknown kind.
    drop(&mut rig, &[1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0], 9000);
    drop(&mut rig, &[1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0], 60);
    drop(&mut rig, &[0, 77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 60);
    rig.queues[1].driver.add(&[Buffer { addr: 1 << 40, len: 100, writable: false }]).unwrap();
    rig.publish(1);
    rig.used(1);
    rig.send(&frame(60, 9));
    assert!(rig.receive(0).0 == frame(60, 9), "and the queue goes on");
    assert_eq!(rig.faults.load(Ordering::SeqCst), 0);
}

#[test]
fn pitfall_36_offloads_need_the_drivers_word() {
    // Neither what the guest sends unfinished nor what it gets may go beyond what was negotiated.
    let mut rig = Rig::new(&loopback(), !0b1 & !(1 << 11) & !(1 << 12) & !(1 << 13) & !(1 << 56));
    rig.offer(0, &[65600; 2]);
    rig.queue_frame(0, &[1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], &frame(60, 0), 12);
    rig.publish(1);
    rig.used(1);
    assert_eq!(rig.counted("dropped_malformed"), 1);
    let mut device = NetDevice::open("net1", &loopback(), &pool()).unwrap();
    let features = device.info().features;
    assert!(device.ack_features(features & !GUEST_CSUM).is_err(), "GUEST_TSO4 without GUEST_CSUM");
    assert!(device.ack_features(features & !(1 << 17)).is_err(), "control features without a control queue");
    device.ack_features(features).unwrap();
}

#[test]
fn many_frames_wait_for_buffers_and_none_is_lost() {
    let mut rig = Rig::new(&loopback(), u64::MAX);
    let total = 20_000u32;
    let (mut sent, mut got) = (0u32, 0u32);
    // Memory of receive buffers that the device does not have: it may use them in any order.
    let mut free: Vec<u64> = (0..64).map(|slot| RX_DATA + slot * 0x2_0000).collect();
    let start = Instant::now();
    // Frames of two buffers each, with few buffers at a time: the port fills up and the transmit queue waits.
    while got < total {
        while sent < total && rig.queues[1].driver.in_flight() < 60 {
            let mut data = frame(60 + (sent as usize * 37) % 1400, 0);
            data[14..18].copy_from_slice(&sent.to_le_bytes());
            rig.queue_frame(0, &[0; HEADER], &data, 12);
            sent += 1;
        }
        rig.publish(1);
        while rig.queues[1].driver.next_used().is_some() {}
        while rig.queues[0].driver.in_flight() < 48 {
            // With room for any frame in each, none is merged.
            rig.offer_at(0, free.pop().unwrap(), 66_000);
        }
        rig.publish(0);
        while let Some((head, len)) = rig.queues[0].driver.next_used() {
            let addr = rig.queues[0].at[&head];
            let number: u32 = rig.mem.read_obj(GuestAddress(addr + HEADER as u64 + 14)).unwrap();
            assert_eq!(number, got, "in order");
            assert_eq!(len as usize, HEADER + 60 + (got as usize * 37) % 1400);
            free.push(addr);
            got += 1;
        }
        assert!(start.elapsed() < PATIENCE * 3, "stuck at {got} of {sent}");
    }
    assert_eq!(rig.counted("sent"), u64::from(total));
    assert_eq!(rig.counted("received"), u64::from(total));
}

#[test]
fn pitfall_24_stopping_gives_held_buffers_back() {
    let mut rig = Rig::new(&loopback(), u64::MAX);
    // Room for one read at a time: of two, the second may find the frame that comes after the first found nothing.
    rig.offer(0, &[4096; 30]);
    rig.send(&frame(100, 1));
    assert!(rig.receive(0).0 == frame(100, 1));
    for round in 1..10u8 {
        let state = rig.device.drain(0).unwrap();
        assert_eq!((state.next_avail, state.next_used), (u16::from(round), u16::from(round)), "nothing is held");
        rig.start_queue(0, state);
        rig.send(&frame(100, round));
        assert!(rig.receive(0).0 == frame(100, round));
    }
}

#[test]
fn a_transmit_queue_that_waits_for_room_stops() {
    // Also where nobody expected it to wait, as with a tap whose buffer was bounded after it was opened.
    for may_block in [true, false] {
        let port = Arc::new(Told { may_block, ..Told::new(1) });
        let device = NetDevice::over("net0", port, [0x52, 0x54, 0, 0, 0, 1], &loopback(), &pool());
        let mut rig = Rig::over(device);
        let features = rig.device.info().features;
        rig.device.ack_features(features).unwrap();
        for index in 0..=2 {
            rig.add_queue(index, features);
        }
        rig.start_queue(1, QueueState::default());
        for i in 0..100 {
            rig.queue_frame(0, &[0; HEADER], &frame(60_000, i), 12);
        }
        rig.publish(1);
        std::thread::sleep(Duration::from_millis(20));
        let state = rig.device.drain(1).unwrap();
        assert_eq!(state.next_avail, state.next_used);
    }
}

#[test]
fn control_commands_are_obeyed_or_refused() {
    let mut rig = Rig::new(&NetOptions { queues: 4, ..loopback() }, u64::MAX);
    let (ok, err) = (0, 1);
    assert_eq!(rig.control(&[0, 0, 1]), ok, "promiscuous");
    assert_eq!(rig.control(&[0, 1, 0]), ok);
    assert_eq!(rig.control(&[0, 0, 2]), err, "neither on nor off");
    assert_eq!(rig.control(&[0, 9, 1]), err);
    assert_eq!(rig.control(&[0, 0]), err, "no data");
    assert_eq!(rig.control(&[0]), err, "no command");
    assert_eq!(rig.control(&[]), err);
    assert_eq!(rig.control(&[99, 0, 1]), err);
    let table = |count: u32, present: usize| {
        let mut bytes = count.to_le_bytes().to_vec();
        bytes.extend(vec![2; present * 6]);
        bytes
    };
    assert_eq!(rig.control(&[&[1, 0][..], &table(2, 2), &table(1, 1)].concat()), ok);
    assert_eq!(rig.control(&[&[1, 0][..], &table(3, 2)].concat()), err, "a table cut short");
    assert_eq!(rig.control(&[&[1, 0][..], &table(u32::MAX, 2)].concat()), err);
    assert_eq!(rig.control(&[1, 1, 0x52, 1, 2, 3, 4, 5]), ok);
    let mut mac = [0; 6];
    rig.device.read_config(0, &mut mac);
    assert_eq!(mac, [0x52, 1, 2, 3, 4, 5]);
    assert_eq!(rig.control(&[1, 1, 0x53, 1, 2, 3, 4, 5]), err, "a multicast address");
    for (pairs, answer) in [(0u16, err), (1, ok), (4, ok), (5, err), (u16::MAX, err), (2, ok)] {
        assert_eq!(rig.control(&[&[4, 0][..], &pairs.to_le_bytes()].concat()), answer, "pitfall 40: {pairs} pairs");
    }
    assert_eq!(rig.control(&[&[5, 0][..], &0u64.to_le_bytes()].concat()), ok);
    assert_eq!(rig.control(&[&[5, 0][..], &(1u64 << 40).to_le_bytes()].concat()), err);
    // Without room for an answer there is none, and the device needs a reset.
    let index = rig.control_index();
    rig.queues[index].driver.add(&[Buffer { addr: CTRL_DATA, len: 3, writable: false }]).unwrap();
    rig.publish(index);
    let start = Instant::now();
    while rig.faults.load(Ordering::SeqCst) == 0 {
        assert!(start.elapsed() < PATIENCE);
    }
    rig.device.reset();
    rig.device.read_config(0, &mut mac);
    assert_eq!(mac, [0x52, 0x54, 0, 0x12, 0x34, 0x56], "a reset brings the first address back");
}

#[test]
fn pitfall_36_offloads_switched_off_while_running_are_off() {
    let mut rig = Rig::new(&loopback(), u64::MAX);
    rig.offer(0, &[65600; 3]);
    let open_checksum = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
    for (offloads, unwanted) in [(0u64, 1), (GUEST_CSUM, 1)] {
        assert_eq!(rig.control(&[&[5, 0][..], &offloads.to_le_bytes()].concat()), 0);
        rig.queue_frame(0, &open_checksum, &frame(60, 0), 12);
        rig.publish(1);
        rig.used(1);
        let start = Instant::now();
        while rig.counted("dropped_unwanted") + rig.counted("received") < unwanted + u64::from(offloads != 0) {
            assert!(start.elapsed() < PATIENCE);
        }
        assert_eq!(rig.counted("dropped_unwanted"), unwanted);
    }
    assert_eq!(rig.counted("received"), 1);
}

#[test]
fn pitfall_39_configuration_space_is_read_only() {
    let mut rig = Rig::new(&NetOptions { mtu: Some(9000), queues: 2, ..loopback() }, u64::MAX);
    for (offset, len) in [(0, 6), (6, 2), (0, 17), (16, 1), (u32::MAX, 1)] {
        rig.device.write_config(offset, &vec![0xff; len]).unwrap_err();
    }
    let mut space = [0xee; 20];
    rig.device.read_config(0, &mut space);
    assert_eq!(space[..6], [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    assert_eq!(space[6..12], [1, 0, 2, 0, 0x28, 0x23]);
    assert_eq!(space[12..], [0x10, 0x27, 0, 0, 1, 0, 0, 0]);
}

#[test]
fn the_control_queue_stands_where_the_driver_looks_for_it() {
    // Without MQ it is queue 2, however many pairs there are.
    let mut rig = Rig::new(&NetOptions { queues: 4, ..loopback() }, !MQ);
    assert_eq!(rig.control_index(), 2);
    assert_eq!(rig.control(&[0, 0, 1]), 0);
    rig.offer(0, &[2000; 1]);
    let parts =
        |rig: &Rig| QueueParts::new(rig.queues[0].driver.ring(), rig.mem.clone(), EventFd::new(EFD_NONBLOCK).unwrap());
    let more = parts(&rig);
    rig.device.start_queue(3, more).unwrap_err();
    let more = parts(&rig);
    rig.device.start_queue(u16::MAX, more).unwrap_err();
}

/// A port that remembers what it was told.
struct Told {
    port: Loopback,
    /// How many pairs it has to use.
    pairs: Arc<AtomicUsize>,
    /// How often it was asked for what no tap takes: UDP segmentation of one IP version only.
    uneven: Arc<AtomicUsize>,
    /// Whether it says that it may find no room.
    may_block: bool,
}

impl Told {
    fn new(pairs: usize) -> Self {
        Self { port: Loopback::new(pairs).unwrap(), pairs: Arc::default(), uneven: Arc::default(), may_block: true }
    }
}

impl Port for Told {
    fn name(&self) -> &str {
        self.port.name()
    }

    fn pairs(&self) -> usize {
        self.port.pairs()
    }

    fn ends(&self, pair: usize) -> Ends {
        self.port.ends(pair)
    }

    fn may_block(&self) -> bool {
        self.may_block
    }

    fn set_offloads(&self, offloads: Offloads) -> std::io::Result<()> {
        if offloads.uso4 != offloads.uso6 {
            self.uneven.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    fn set_pairs(&self, count: usize) -> std::io::Result<()> {
        self.pairs.store(count, Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn offloads_without_their_premise_never_reach_the_port() {
    let told = Told::new(1);
    let uneven = Arc::clone(&told.uneven);
    let port = Arc::new(told);
    let mut device = NetDevice::over("net0", port, [0x52, 0x54, 0, 0, 0, 1], &loopback(), &pool());
    let features = device.info().features;
    for without in [GUEST_USO4, GUEST_USO6] {
        assert!(device.ack_features(features & !without).is_err(), "{without:#x} is the other's premise");
    }
    device.ack_features(features).unwrap();
    let mut rig = Rig::over(device);
    for index in 0..=2 {
        rig.add_queue(index, features);
        rig.start_queue(index, QueueState::default());
    }
    let (ok, err) = (0, 1);
    let both = GUEST_USO4 | GUEST_USO6;
    for (offloads, answer) in [
        (GUEST_CSUM | GUEST_USO4, err),
        (GUEST_CSUM | GUEST_USO6, err),
        (GUEST_CSUM | both, ok),
        (both, err),
        (GUEST_TSO4, err),
        (GUEST_CSUM | GUEST_ECN, err),
        (GUEST_CSUM | GUEST_TSO4 | GUEST_ECN, ok),
        (0, ok),
    ] {
        assert_eq!(rig.control(&[&[5, 0][..], &offloads.to_le_bytes()].concat()), answer, "{offloads:#x}");
    }
    assert_eq!(uneven.load(Ordering::SeqCst), 0, "the port was asked for what it can't do");
}

/// A NIC of four pairs with all features, none of its queues running, and how many pairs its port was told to use.
fn counting() -> (Rig, Arc<AtomicUsize>) {
    let told = Told::new(4);
    let count = Arc::clone(&told.pairs);
    let options = NetOptions { queues: 4, ..loopback() };
    let port = Arc::new(told);
    let device = NetDevice::over("net0", port, [0x52, 0x54, 0, 0, 0, 1], &options, &pool());
    let mut rig = Rig::over(device);
    let features = rig.device.info().features;
    rig.device.ack_features(features).unwrap();
    (0..=8).for_each(|index| rig.add_queue(index, features));
    (rig, count)
}

#[test]
fn pitfall_40_without_the_control_queue_the_pairs_are_those_whose_receive_queues_run() {
    let (mut rig, count) = counting();
    for (index, pairs) in [(0, 1), (1, 1), (2, 2), (3, 2), (4, 3)] {
        rig.start_queue(index, QueueState::default());
        assert_eq!(count.load(Ordering::SeqCst), pairs, "with queue {index}");
    }
    rig.device.drain(4);
    assert_eq!(count.load(Ordering::SeqCst), 2);
    rig.device.drain(2);
    rig.device.drain(0);
    assert_eq!(count.load(Ordering::SeqCst), 1, "one is always in use");
}

#[test]
fn pitfall_40_a_device_that_goes_on_for_another_uses_the_pairs_that_have_buffers_until_it_is_told() {
    let (mut rig, count) = counting();
    rig.start_queue(8, QueueState::default());
    for index in [0, 2] {
        rig.offer_at(index / 2, RX_DATA + index as u64 * 0x1_1000, 2000);
        rig.publish(index);
    }
    (0..8).for_each(|index| rig.start_queue(index, QueueState::default()));
    assert_eq!(count.load(Ordering::SeqCst), 2);
    assert_eq!(rig.control(&[4, 0, 1, 0]), 0);
    assert_eq!(count.load(Ordering::SeqCst), 1);
    rig.device.drain(2);
    rig.start_queue(2, QueueState::default());
    assert_eq!(count.load(Ordering::SeqCst), 1, "what was said holds");
}

#[test]
fn a_receive_buffer_that_is_none_needs_a_reset() {
    for buffer in [Buffer { addr: 1 << 40, len: 2000, writable: true }, Buffer { addr: 0, len: 2000, writable: false }]
    {
        let mut rig = Rig::new(&loopback(), u64::MAX);
        rig.queues[0].driver.add(&[buffer]).unwrap();
        rig.publish(0);
        let start = Instant::now();
        while rig.faults.load(Ordering::SeqCst) == 0 {
            assert!(start.elapsed() < PATIENCE);
        }
    }
}

fn link_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()))
}

#[test]
fn two_nics_are_joined_and_find_each_other_again() {
    let options = NetOptions { loopback: false, link: Some(link_path("pair")), ..loopback() };
    let mut first = Rig::new(&options, u64::MAX);
    first.offer(0, &[2048; 200]);
    // Nobody is there yet: frames are dropped, not kept.
    first.send(&frame(100, 0));
    assert_eq!(first.counted("dropped_unreachable"), 1);
    for round in 0..3u8 {
        let mut second = Rig::new(&options, u64::MAX);
        second.offer(0, &[2048; 200]);
        let third = NetDevice::open("net2", &options, &pool()).map(drop).unwrap_err().to_string();
        assert!(third.contains("both sides of the link are taken"), "{third}");
        second.send(&frame(1000, round));
        assert!(first.receive(0).0 == frame(1000, round));
        // The other direction is found within the pause between searches.
        let start = Instant::now();
        while second.counted("received") == 0 {
            first.send(&frame(500, round));
            std::thread::sleep(Duration::from_millis(5));
            assert!(start.elapsed() < PATIENCE);
        }
        assert!(second.receive(0).0 == frame(500, round));
    }
}

#[test]
fn a_short_ring_of_small_buffers_does_not_stall() {
    // A driver that offers more only when half of its buffers came back, each good for a plain frame.
    let mut rig = Rig::new(&NetOptions { queue_size: 64, ..loopback() }, u64::MAX);
    rig.offer(0, &[1536; 64]);
    for i in 0..60u8 {
        rig.send(&frame(1000, i));
        assert!(rig.receive(0).0 == frame(1000, i), "frame {i}");
    }
}

#[test]
fn a_datagram_of_nothing_is_dropped() {
    let path = link_path("empty");
    let options = NetOptions { loopback: false, link: Some(path.clone()), ..loopback() };
    let mut first = Rig::new(&options, u64::MAX);
    first.offer(0, &[2048; 100]);
    let mut second = Rig::new(&options, u64::MAX);
    let stranger = std::os::unix::net::UnixDatagram::unbound().unwrap();
    for _ in 0..10 {
        stranger.send_to(&[], path.with_extension("0")).unwrap();
    }
    second.send(&frame(1000, 1));
    assert!(first.receive(0).0 == frame(1000, 1));
}

#[test]
fn pitfall_40_a_peer_that_serves_fewer_pairs_gets_all_frames_on_those() {
    let path = link_path("uneven");
    let options = NetOptions { loopback: false, link: Some(path), queues: 2, ..loopback() };
    let mut many = Rig::new(&options, u64::MAX);
    assert_eq!(many.control(&[4, 0, 2, 0]), 0);
    let mut one = Rig::new(&options, !MQ);
    one.offer(0, &[2048; 100]);
    // The first may be what finds out that the other side of the second pair is not served.
    let mut sent = 0;
    let start = Instant::now();
    while one.queues[0].driver.used_index() == 0 {
        assert!(start.elapsed() < PATIENCE);
        many.queue_frame(1, &[0; HEADER], &frame(900, sent), usize::MAX);
        many.publish(3);
        many.used(3);
        sent = u8::wrapping_add(sent, 1);
        std::thread::sleep(Duration::from_millis(5));
    }
    let (got, _) = one.receive(0);
    assert_eq!(got.len(), 900);
}

#[test]
fn a_peer_that_serves_more_pairs_later_gets_frames_on_those() {
    let options = NetOptions { loopback: false, link: Some(link_path("later")), queues: 2, ..loopback() };
    let mut first = Rig::new(&options, u64::MAX);
    assert_eq!(first.control(&[4, 0, 2, 0]), 0);
    let mut second = Rig::new(&options, u64::MAX);
    assert_eq!(second.control(&[4, 0, 1, 0]), 0);
    second.offer(0, &[2048; 200]);
    second.offer(1, &[2048; 200]);
    let mut send_until_it_comes_to = |second: &Rig, queue: usize| {
        let start = Instant::now();
        let before = second.queues[queue].driver.used_index();
        while second.queues[queue].driver.used_index() == before {
            assert!(start.elapsed() < PATIENCE, "nothing comes to queue {queue}");
            first.queue_frame(1, &[0; HEADER], &frame(900, 1), usize::MAX);
            first.publish(3);
            first.used(3);
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    send_until_it_comes_to(&second, 0);
    assert_eq!(second.control(&[4, 0, 2, 0]), 0);
    send_until_it_comes_to(&second, 2);
}

/// Without a table of buffers in flight, all that is known of a queue whose server was killed is how many were used.
#[test]
fn pitfall_48_frames_use_buffers_in_order_where_nothing_else_tells_which_were_used() {
    let mut rig = Rig::over(NetDevice::open("net0", &loopback(), &pool()).unwrap());
    rig.in_order = true;
    let features = rig.device.info().features;
    rig.device.ack_features(features).unwrap();
    for index in [0, 1] {
        rig.add_queue(index, features);
    }
    let heads: Vec<u16> = (0..200)
        .map(|index| {
            rig.offer_at(0, RX_DATA + index * 0x1000, 2048);
            *rig.queues[0].at.iter().find(|(_, at)| **at == RX_DATA + index * 0x1000).unwrap().0
        })
        .collect();
    rig.publish(0);
    // Many at once, so that there is something to read ahead.
    rig.start_queue(1, QueueState::default());
    for seed in 0..60 {
        rig.queue_frame(0, &[0; HEADER], &frame(700, seed), usize::MAX);
    }
    rig.publish(1);
    for _ in 0..60 {
        rig.used(1);
    }
    rig.start_queue(0, QueueState::default());
    let used: Vec<u16> = (0..60).map(|_| rig.used(0).0).collect();
    assert_eq!(used, heads[..60]);
}

#[test]
fn options_that_can_not_be_are_refused_in_one_line() {
    let refusal = |change: fn(&mut NetOptions)| {
        let mut options = loopback();
        change(&mut options);
        let text = NetDevice::open("net0", &options, &pool()).map(drop).unwrap_err().to_string();
        assert!(!text.contains('\n'), "{text}");
        text
    };
    let expect = |text: String, what: &str| assert!(text.contains(what), "{text:?} should say {what:?}");
    expect(refusal(|o| o.loopback = false), "no port is named");
    expect(refusal(|o| o.tap = Some("t0".into())), "more than one port is named");
    expect(refusal(|o| o.queues = 0), "queues=0");
    expect(refusal(|o| o.queues = 33), "queues=33");
    expect(refusal(|o| o.queue_size = 32), "queue-size=32");
    expect(refusal(|o| o.mtu = Some(67)), "mtu=67");
    expect(refusal(|o| (o.loopback, o.link) = (false, Some("".into()))), "link= is empty");
    // Before anything of the host is asked, so that a configuration is refused as a whole.
    for name in ["", "a name", "a-name-too-long-", "a/b", "vm%d", "a:b", ".", "..", "vm\n0", "/dev/tap\n1"] {
        let options = NetOptions { loopback: false, tap: Some(name.into()), ..loopback() };
        let text = options.check().unwrap_err();
        assert!(!text.contains('\n'), "{text}");
        expect(text, "1 to 15 printable characters without / : and %");
    }
    for name in ["t", "a-name-with-15-", "vm0.2", "/dev/tap7", "/dev/no such tap"] {
        NetOptions { loopback: false, tap: Some(name.into()), ..loopback() }.check().unwrap();
    }
    expect(refusal(|o| (o.loopback, o.fds) = (false, vec![3, 4])), "2 descriptors for queues=1");
    expect(refusal(|o| (o.loopback, o.fds) = (false, vec![1])), "a standard stream (0, 1 and 2)");
    expect(refusal(|o| (o.loopback, o.fds) = (false, vec![99_999])), "fd 99999: using the descriptor");
    expect(refusal(|o| (o.loopback, o.link) = (false, Some("/nowhere/x".into()))), "taking a side of the link");
    for mac in
        ["", "52:54:00:12:34", "52:54:00:12:34:5g", "01:00:5e:00:00:01", "00:00:00:00:00:00", "+2:54:00:12:34:56"]
    {
        assert!(mac.parse::<ringvm_backends::net::Mac>().is_err(), "{mac}");
    }
}
