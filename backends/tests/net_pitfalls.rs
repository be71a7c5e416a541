//! The sharp edges of network devices, met on real taps where a tap is what makes them: the host's kernel at one end of the
//! interface, a driver in this process at the device's. Each tap is in a network of its test's own, which ends with it.
#![allow(unsafe_code, reason = "UDP_SEGMENT and TUNGETIFF have no safe wrapper among our dependencies")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ringvm_backends::device::{Device, GuestMemory, QueueParts};
use ringvm_backends::host::inherited;
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_backends::net::port::Port;
use ringvm_backends::net::port::tap::Tap;
use ringvm_backends::net::{NetDevice, NetOptions};
use ringvm_backends::testing::driver::{Buffer, Driver};
use ringvm_backends::virtqueue::interrupt::Interrupt;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const HEADER: usize = 12;
const RX: usize = 0;
const TX: usize = 1;
const CONTROL_DATA: u64 = 0xf_0000;
const TX_DATA: u64 = 0x100_0000;
const RX_DATA: u64 = 0x200_0000;
const RX_STRIDE: u64 = 0x1_1000;
const TABLES: u64 = 0x380_0000;
const PATIENCE: Duration = Duration::from_secs(20);

const CSUM: u64 = 1 << 0;
const MRG_RXBUF: u64 = 1 << 15;
const MQ: u64 = 1 << 22;
const INDIRECT_DESC: u64 = 1 << 28;
const GUEST_USO: u64 = 1 << 54 | 1 << 55;
const HASH_REPORT: u64 = 1 << 57;
const GUEST_HDRLEN: u64 = 1 << 59;
const RSS: u64 = 1 << 60;
const RSC_EXT: u64 = 1 << 61;

const MAC: &str = "52:54:00:12:34:56";
const MAC_BYTES: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// The device with one queue pair and its control queue.
struct Rig {
    device: NetDevice,
    mem: GuestMemory,
    queues: Vec<(Driver, EventFd)>,
    /// Where the receive buffer of each head lies.
    at: BTreeMap<u16, u64>,
    /// Memory for receive buffers that the device does not have: it may use them in any order.
    free: Vec<u64>,
    features: u64,
    faults: Arc<AtomicUsize>,
}

fn pool() -> ReactorPool {
    ReactorPool::new(&ReactorOptions { count: 2, ..ReactorOptions::default() }).unwrap()
}

fn options() -> NetOptions {
    NetOptions { mac: Some(MAC.parse().unwrap()), ..NetOptions::default() }
}

fn loopback() -> NetOptions {
    NetOptions { loopback: true, ..options() }
}

fn on_tap() -> NetOptions {
    NetOptions { tap: Some("t0".into()), ..options() }
}

impl Rig {
    fn new(options: &NetOptions, mask: u64) -> Self {
        Self::over(NetDevice::open("net0", options, &pool()).unwrap(), mask)
    }

    /// A driver that takes of the features offered those of the mask; INDIRECT_DESC then for its receive buffers.
    fn over(mut device: NetDevice, mask: u64) -> Self {
        let features = device.info().features & mask;
        device.ack_features(features).unwrap();
        let mem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap());
        let faults: Arc<AtomicUsize> = Arc::default();
        let last = if features & MQ == 0 { 2 } else { device.info().queue_sizes.len() - 1 };
        let free = (0..256).rev().map(|slot| RX_DATA + slot * RX_STRIDE).collect();
        let mut rig = Self { device, mem, queues: Vec::new(), at: BTreeMap::new(), free, features, faults };
        for index in [RX, TX, last] {
            rig.start(index);
        }
        rig
    }

    /// Starts one queue more; returns its place among those of this rig.
    fn start(&mut self, index: usize) -> usize {
        let base = self.queues.len() as u64 * 0x1_0000;
        let driver = Driver::new(Arc::clone(&self.mem), base, self.device.info().queue_sizes[index], self.features);
        let (kick, raised) = (EventFd::new(EFD_NONBLOCK).unwrap(), Arc::clone(&self.faults));
        let parts = QueueParts {
            fault: Interrupt::Call(Arc::new(move || {
                raised.fetch_add(1, Ordering::SeqCst);
            })),
            ..QueueParts::new(driver.ring(), Arc::clone(&self.mem), kick.try_clone().unwrap())
        };
        self.device.start_queue(index as u16, parts).unwrap();
        self.queues.push((driver, kick));
        self.queues.len() - 1
    }

    fn publish(&mut self, queue: usize) {
        let (driver, kick) = &mut self.queues[queue];
        if driver.publish() {
            kick.write(1).unwrap();
        }
    }

    fn used(&mut self, queue: usize) -> (u16, u32) {
        let start = Instant::now();
        loop {
            if let Some(used) = self.queues[queue].0.next_used() {
                return used;
            }
            assert!(start.elapsed() < PATIENCE, "queue {queue} does not answer");
            std::thread::yield_now();
        }
    }

    /// Offers receive buffers of `len` bytes as long as there is room for them in the ring.
    fn offer(&mut self, len: u32, count: usize) {
        for _ in 0..count {
            let Some(addr) = self.free.pop() else { break };
            let buffer = [Buffer { addr, len, writable: true }];
            let table = TABLES + (addr - RX_DATA) / RX_STRIDE * 16;
            let driver = &mut self.queues[RX].0;
            let head = if self.features & INDIRECT_DESC != 0 {
                driver.add_indirect(table, &buffer)
            } else {
                driver.add(&buffer)
            };
            let Some(head) = head else {
                self.free.push(addr);
                break;
            };
            self.at.insert(head, addr);
        }
        self.publish(RX);
    }

    /// Receives one frame, in one buffer or more: its header and the rest.
    fn receive(&mut self) -> (Vec<u8>, Vec<u8>) {
        let (mut bytes, mut left) = (Vec::new(), 1);
        while left > 0 {
            let (head, len) = self.used(RX);
            let from = bytes.len();
            bytes.resize(from + len as usize, 0);
            let addr = self.at[&head];
            self.mem.read_slice(&mut bytes[from..], GuestAddress(addr)).unwrap();
            self.free.push(addr);
            if from == 0 {
                left = u16::from_le_bytes([bytes[10], bytes[11]]);
            }
            left -= 1;
        }
        let frame = bytes.split_off(HEADER);
        (bytes, frame)
    }

    /// Transmits one frame and waits until it is given back.
    fn send(&mut self, header: [u8; HEADER], frame: &[u8]) {
        self.mem.write_slice(&[&header, frame].concat(), GuestAddress(TX_DATA)).unwrap();
        let len = (HEADER + frame.len()) as u32;
        self.queues[TX].0.add(&[Buffer { addr: TX_DATA, len, writable: false }]).unwrap();
        self.publish(TX);
        assert_eq!(self.used(TX).1, 0, "transmit writes nothing");
    }

    fn set_pairs(&mut self, pairs: u16) -> u8 {
        let [low, high] = pairs.to_le_bytes();
        self.mem.write_slice(&[4, 0, low, high], GuestAddress(CONTROL_DATA)).unwrap();
        let answer = CONTROL_DATA + 64;
        let chain =
            [Buffer { addr: CONTROL_DATA, len: 4, writable: false }, Buffer { addr: answer, len: 1, writable: true }];
        self.queues[2].0.add(&chain).unwrap();
        self.publish(2);
        self.used(2);
        self.mem.read_obj(GuestAddress(answer)).unwrap()
    }

    fn counted(&self, name: &str) -> u64 {
        self.counts(name).0
    }

    /// How many there were, and how many of them failed.
    fn counts(&self, name: &str) -> (u64, u64) {
        let total = self.device.stats().total().unwrap();
        total.ops.iter().find(|op| op.name == name).map_or((0, 0), |op| (op.count, op.errors))
    }
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| seed.wrapping_add((i * 7 + i / 256) as u8)).collect()
}

/// Moves this thread, and what it starts, into a network of its own in which taps can be made. False where that is not
/// possible and was allowed by name, as `tests/run` has it.
fn own_network() -> bool {
    #[allow(deprecated)]
    let done = rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET)
        .map_err(|e| format!("making a network namespace: {e}"))
        .and_then(|()| Tap::open("t0", 1, None).map(drop).map_err(|e| e.to_string()));
    let Err(why) = done else {
        // The kernel says nothing of its own on the taps.
        drop(fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"));
        return true;
    };
    let allowed = std::env::var("RINGVM_ALLOW_MISSING").unwrap_or_default();
    assert!(
        allowed.split(',').any(|name| name.trim() == "tap"),
        "this test needs `tap`, which this host lacks: {why}; to run the others: tests/run --allow-missing tap"
    );
    eprintln!("skipped: needs `tap`, allowed to be missing: {why}");
    false
}

fn ip(arguments: &str) {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let ended = Command::new("ip").args(arguments.split(' ')).env("PATH", path).output().unwrap();
    assert!(ended.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&ended.stderr));
}

/// The host's end of `t0`: what is sent to it comes to the device in frames.
fn host() -> UdpSocket {
    ip("addr add 10.7.0.1/24 dev t0");
    ip(&format!("neigh add 10.7.0.2 lladdr {MAC} dev t0"));
    let socket = UdpSocket::bind("10.7.0.1:7000").unwrap();
    socket.connect("10.7.0.2:7000").unwrap();
    socket
}

/// Frames that the host's kernel has taken from the device.
fn taken() -> u64 {
    let table = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = table.lines().find_map(|line| line.trim().strip_prefix("t0:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn pitfall_34_frames_that_the_tap_refuses_are_dropped_and_counted_and_the_next_ones_go() {
    if !own_network() {
        return;
    }
    let mut rig = Rig::new(&on_tap(), u64::MAX);
    rig.send([0; HEADER], &frame(100, 1));
    assert_eq!((rig.counted("sent"), taken()), (1, 1));
    // EINVAL: nothing in the header is against its frame, but there is no room for a header of TCP behind the one of IP.
    rig.send([1, 1, 53, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0], &frame(53, 2));
    assert_eq!((rig.counted("dropped_refused"), rig.counted("dropped_malformed")), (1, 0));
    // EIO: the interface is down.
    ip("link set t0 down");
    rig.send([0; HEADER], &frame(100, 3));
    assert_eq!(rig.counted("dropped_unreachable"), 1);
    ip("link set t0 up");
    rig.send([0; HEADER], &frame(100, 4));
    assert_eq!((rig.counted("sent"), taken()), (2, 2));
    assert_eq!(rig.faults.load(Ordering::SeqCst), 0);
}

#[test]
fn pitfall_34_a_buffer_that_the_tap_would_refuse_costs_no_frame() {
    if !own_network() {
        return;
    }
    // Without merging a buffer takes a frame or nothing; a tap answers EINVAL to one that is shorter than the header, and
    // the frame is lost.
    let mut rig = Rig::new(&on_tap(), !MRG_RXBUF);
    let host = host();
    rig.offer(8, 1);
    rig.offer(2048, 100);
    assert_eq!(rig.used(RX).1, 0, "it comes back empty");
    // One by one: each would find the short buffer first.
    for round in 0..20 {
        host.send(&[round; 500]).unwrap();
        let (_, frame) = rig.receive();
        assert_eq!((&frame[..6], frame.len()), (&MAC_BYTES[..], 14 + 20 + 8 + 500));
        assert_eq!(frame[14 + 20 + 8..], [round; 500]);
    }
    assert_eq!(rig.counts("received"), (20, 0));
    assert_eq!(rig.faults.load(Ordering::SeqCst), 0);
}

#[test]
fn pitfall_34_short_reads_are_dropped_and_counted_and_the_next_ones_come() {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("short-{}", std::process::id()));
    let options = NetOptions { link: Some(path.clone()), ..options() };
    let mut first = Rig::new(&options, u64::MAX);
    first.offer(2048, 100);
    let mut second = Rig::new(&options, u64::MAX);
    let stranger = UnixDatagram::unbound().unwrap();
    // All that is shorter than a header and the addresses and type of a frame, but for nothing at all, which is no read.
    for len in 1..HEADER + 14 {
        stranger.send_to(&vec![0; len], path.with_extension("0")).unwrap();
    }
    second.send([0; HEADER], &frame(1000, 1));
    assert!(first.receive().1 == frame(1000, 1));
    assert_eq!(first.counted("dropped_short"), (HEADER + 14 - 1) as u64);
    assert_eq!(first.faults.load(Ordering::SeqCst), 0);
}

#[test]
fn pitfall_35_a_tap_that_is_deleted_is_a_link_that_is_down_and_told_once() {
    if !own_network() {
        return;
    }
    let mut rig = Rig::new(&on_tap(), u64::MAX);
    let told = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&told);
    rig.device.on_config_change(Interrupt::Call(Arc::new(move || {
        counter.fetch_add(1, Ordering::SeqCst);
    })));
    rig.offer(2048, 100);
    let mut status = [0; 2];
    rig.device.read_config(6, &mut status);
    assert_eq!(status, [1, 0]);
    ip("link del t0");
    let start = Instant::now();
    while told.load(Ordering::SeqCst) == 0 {
        assert!(start.elapsed() < PATIENCE, "nobody is told");
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.device.read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
    for seed in 0..10 {
        rig.send([0; HEADER], &frame(100, seed));
    }
    assert_eq!(rig.counted("dropped_unreachable"), 10);
    assert_eq!(told.load(Ordering::SeqCst), 1);
    // And it can still be reset and driven.
    rig.device.reset();
    rig.device.ack_features(rig.device.info().features).unwrap();
}

#[test]
fn pitfall_38_hashes_are_not_reported_and_the_header_is_of_twelve_bytes() {
    let longer = HASH_REPORT | RSS | GUEST_HDRLEN | RSC_EXT;
    let mut device = NetDevice::open("net1", &NetOptions { queues: 4, ..loopback() }, &pool()).unwrap();
    assert_eq!(device.info().features & longer, 0);
    for bit in [HASH_REPORT, RSS, GUEST_HDRLEN, RSC_EXT] {
        device.ack_features(device.info().features | bit).unwrap_err();
    }
    // With every set of the features that are offered, not a byte more than header and frame is written.
    for mask in [u64::MAX, !MRG_RXBUF, 1 << 32] {
        let mut rig = Rig::new(&loopback(), mask | 1 << 17);
        for slot in 0..256 {
            rig.mem.write_slice(&[0xa5; 4096], GuestAddress(RX_DATA + slot * RX_STRIDE)).unwrap();
        }
        rig.offer(4096, 32);
        rig.send([0; HEADER], &frame(64, 3));
        let (head, len) = rig.used(RX);
        assert_eq!(len as usize, HEADER + 64);
        let mut bytes = [0; 4096];
        rig.mem.read_slice(&mut bytes, GuestAddress(rig.at[&head])).unwrap();
        assert_eq!(bytes[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert!(bytes[HEADER..HEADER + 64] == frame(64, 3));
        assert!(bytes[HEADER + 64..].iter().all(|&byte| byte == 0xa5), "written behind the frame");
    }
}

/// Whether the interface spreads frames over this queue too.
fn is_attached(queue: &OwnedFd) -> bool {
    // SAFETY: all of it is plain bytes and numbers, for which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills in one `ifreq`.
    let done = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
    assert_eq!(done, 0, "TUNGETIFF: {}", std::io::Error::last_os_error());
    // SAFETY: the kernel filled this member in.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    libc::c_int::from(flags) & libc::IFF_DETACH_QUEUE == 0
}

#[test]
fn pitfall_40_only_the_pairs_that_the_driver_serves_are_attached_to_the_tap() {
    if !own_network() {
        return;
    }
    let tap = Tap::open("t0", 4, None).unwrap();
    let attached = || {
        let states: Vec<bool> = (0..4).map(|pair| is_attached(&tap.ends(pair).rx)).collect();
        let count = states.iter().take_while(|&&is| is).count();
        assert!(!states[count..].contains(&true), "the first ones: {states:?}");
        count
    };
    assert_eq!(attached(), 4);
    // The tap's own stay open, to look at.
    let fds = (0..4).map(|pair| inherited::leave(tap.ends(pair).rx.try_clone().unwrap())).collect();
    let device = NetDevice::open("net0", &NetOptions { fds, queues: 4, ..options() }, &pool()).unwrap();
    assert_eq!(attached(), 1, "before there is a driver");
    let mut rig = Rig::over(device, u64::MAX);
    assert_eq!(attached(), 1, "a driver serves one pair until it says otherwise");
    for (pairs, answer, then) in
        [(4, 0, 4), (2, 0, 2), (5, 1, 2), (0, 1, 2), (u16::MAX, 1, 2), (3, 0, 3), (1, 0, 1), (4, 0, 4)]
    {
        assert_eq!((rig.set_pairs(pairs), attached()), (answer, then), "{pairs} pairs");
    }
    rig.set_pairs(1);
    let read = rustix::io::read(&tap.ends(3).rx, &mut [0; 2048]).unwrap_err();
    assert!(matches!(read, rustix::io::Errno::AGAIN | rustix::io::Errno::BADFD), "a queue without frames: {read}");
    rig.device.reset();
    assert_eq!(attached(), 1, "after a reset");
    let rig = Rig::over(rig.device, !MQ);
    assert_eq!(attached(), 1, "a driver that knows of one");
    drop(rig);
}

#[test]
fn pitfall_40_frames_come_again_on_a_pair_that_was_not_served_for_a_while() {
    if !own_network() {
        return;
    }
    const SECOND_DATA: u64 = 0x320_0000;
    let mut rig = Rig::new(&NetOptions { queues: 2, ..on_tap() }, !MRG_RXBUF);
    let second = rig.start(2);
    for slot in 0..100 {
        rig.queues[second].0.add(&[Buffer { addr: SECOND_DATA + slot * 0x800, len: 0x800, writable: true }]).unwrap();
    }
    rig.publish(second);
    drop(host());
    // Streams enough to be spread over all queues that there are.
    let hosts: Vec<UdpSocket> = (0..16)
        .map(|_| {
            let socket = UdpSocket::bind("10.7.0.1:0").unwrap();
            socket.connect("10.7.0.2:7000").unwrap();
            socket
        })
        .collect();
    for round in 0..6 {
        assert_eq!(rig.set_pairs(2), 0);
        let start = Instant::now();
        let before = rig.queues[second].0.in_flight();
        while rig.queues[second].0.in_flight() == before {
            rig.offer(2048, 100);
            for host in &hosts {
                host.send(&[round; 100]).unwrap();
            }
            let deadline = Instant::now() + Duration::from_millis(5);
            while Instant::now() < deadline {
                while rig.queues[second].0.next_used().is_some() {}
                while let Some((head, _)) = rig.queues[RX].0.next_used() {
                    rig.free.push(rig.at[&head]);
                }
            }
            assert!(start.elapsed() < PATIENCE, "round {round}: no frame comes on the second pair");
        }
        assert_eq!(rig.set_pairs(1), 0);
        let (before, second_before) = (rig.counted("received"), rig.queues[second].0.used_index());
        rig.offer(2048, 100);
        for host in &hosts {
            host.send(&[round; 100]).unwrap();
        }
        while rig.counted("received") < before + hosts.len() as u64 {
            assert!(start.elapsed() < PATIENCE, "round {round}: frames are lost to a pair that is not served");
        }
        assert_eq!(rig.queues[second].0.used_index(), second_before, "round {round}");
        while let Some((head, _)) = rig.queues[RX].0.next_used() {
            rig.free.push(rig.at[&head]);
        }
    }
    assert_eq!(rig.faults.load(Ordering::SeqCst), 0);
}

#[test]
fn an_interface_that_is_no_tap_or_refuses_its_mtu_is_named_with_what_to_do() {
    if !own_network() {
        return;
    }
    let refusal = |name: &str, mtu| {
        let text = Tap::open(name, 1, mtu).map(drop).unwrap_err().to_string();
        assert!(text.starts_with(&format!("tap {name}: ")) && !text.contains('\n'), "{text}");
        text
    };
    let expect = |text: String, words: &[&str]| {
        assert!(words.iter().all(|word| text.contains(word)), "{text:?} should say {words:?}");
    };
    ip("tuntap add ip0 mode tun");
    ip("tuntap add many mode tap vnet_hdr multi_queue");
    for name in ["lo", "ip0", "many"] {
        expect(
            refusal(name, None),
            &["attaching to the interface", "Invalid argument", "it is no tap, or one with other"],
        );
    }
    // Ethernet allows a little more than an interface does.
    expect(refusal("t0", Some(u16::MAX)), &["setting the MTU: Invalid argument", "an mtu= that the interface takes"]);
    ip("tuntap add mine mode tap vnet_hdr");
    ip("link set mine up");
    // As anybody's, in a thread that ends with it.
    let unprivileged = std::thread::scope(|scope| {
        let without = scope.spawn(|| {
            rustix::thread::set_capabilities(
                None,
                rustix::thread::CapabilitySets {
                    effective: rustix::thread::CapabilitySet::empty(),
                    permitted: rustix::thread::CapabilitySet::empty(),
                    inheritable: rustix::thread::CapabilitySet::empty(),
                },
            )
            .unwrap();
            drop(Tap::open("mine", 1, Some(1500)).unwrap());
            refusal("mine", Some(9000))
        });
        without.join().unwrap()
    });
    expect(unprivileged, &["setting the MTU: Operation not permitted", "ip link set NAME mtu MTU", "CAP_NET_ADMIN"]);
}

fn segment(socket: &UdpSocket, size: libc::c_int) {
    let len = size_of_val(&size) as libc::socklen_t;
    // SAFETY: the kernel reads one number of that length.
    let done = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_UDP, libc::UDP_SEGMENT, (&raw const size).cast(), len)
    };
    assert_eq!(done, 0, "UDP_SEGMENT: {}", std::io::Error::last_os_error());
}

#[test]
fn pitfall_41_large_udp_comes_whole_or_cut_and_does_not_stall() {
    if !own_network() {
        return;
    }
    const SIZE: usize = 60_000;
    const SEGMENT: usize = 1400;
    const UDP_L4: u8 = 5;
    const PLAIN: usize = 14 + 20 + 8;
    // UDP segmentation offload, where the host's taps have it, and without; buffers of a frame each, or merged.
    for (mask, merges) in [(u64::MAX, true), (!MRG_RXBUF, false), (!GUEST_USO, true), (!(GUEST_USO | MRG_RXBUF), false)]
    {
        let mut rig = Rig::new(&on_tap(), mask);
        let whole = rig.device.info().features & mask & GUEST_USO != 0;
        let room = if merges { 2048 } else { 65_562 };
        let host = host();
        segment(&host, SEGMENT as libc::c_int);
        let mut frames = 0;
        for round in 0..40u8 {
            rig.offer(room, 256);
            host.send(&vec![round; SIZE]).unwrap();
            let mut left = SIZE;
            while left > 0 {
                let (header, frame) = rig.receive();
                let payload = frame.len() - PLAIN;
                assert!(frame[PLAIN..].iter().all(|&byte| byte == round), "round {round}");
                if whole {
                    assert_eq!((header[1], payload), (UDP_L4, SIZE), "one frame with its segments uncut");
                    assert_eq!(usize::from(u16::from_le_bytes([header[4], header[5]])), SEGMENT);
                } else {
                    assert_eq!((header[1], payload), (0, left.min(SEGMENT)), "cut by the host");
                }
                left -= payload;
                frames += 1;
            }
        }
        assert_eq!(frames, if whole { 40 } else { 40 * SIZE.div_ceil(SEGMENT) });
        // In fragments of IP, which no offload puts together.
        segment(&host, 0);
        for round in 0..40u8 {
            rig.offer(room, 256);
            host.send(&vec![round; SIZE]).unwrap();
            let mut left = SIZE + 8;
            while left > 0 {
                left -= rig.receive().1.len() - 34;
            }
        }
        assert_eq!(rig.counted("received"), frames as u64 + 40 * (SIZE as u64 + 8).div_ceil(1480));
        assert_eq!((rig.counts("received").1, rig.counted("dropped_unwanted")), (0, 0));
        drop(rig);
    }
}

/// How many frames a second go round a looped port, and so both out and in, in buffers of 2 KiB.
fn rate(mask: u64) -> f64 {
    const FRAMES: u32 = 4000;
    let mut rig = Rig::new(&loopback(), mask);
    let data = [vec![0; HEADER], frame(1500, 0)].concat();
    for slot in 0..64 {
        rig.mem.write_slice(&data, GuestAddress(TX_DATA + slot * 0x1000)).unwrap();
    }
    let start = Instant::now();
    let (mut sent, mut got) = (0, 0);
    while got < FRAMES {
        while sent < FRAMES && rig.queues[TX].0.in_flight() < 64 {
            let addr = TX_DATA + u64::from(sent % 64) * 0x1000;
            rig.queues[TX].0.add(&[Buffer { addr, len: data.len() as u32, writable: false }]).unwrap();
            sent += 1;
        }
        rig.publish(TX);
        while rig.queues[TX].0.next_used().is_some() {}
        let free = 240usize.saturating_sub(rig.queues[RX].0.in_flight());
        if free >= 32 {
            rig.offer(2048, free);
        }
        while let Some((head, _)) = rig.queues[RX].0.next_used() {
            rig.free.push(rig.at[&head]);
            got += 1;
        }
        assert!(start.elapsed() < PATIENCE, "{got} of {FRAMES} frames came with features {mask:#x}");
    }
    f64::from(FRAMES) / start.elapsed().as_secs_f64()
}

#[test]
fn pitfall_42_no_feature_makes_either_direction_collapse() {
    let device = NetDevice::open("net0", &NetOptions { mtu: Some(1500), ..loopback() }, &pool()).unwrap();
    let offered = device.info().features;
    drop(device);
    let guest_segments = 1 << 7 | 1 << 8 | 1 << 9 | GUEST_USO;
    let host_segments = 1 << 11 | 1 << 12 | 1 << 13 | 1 << 56;
    let control = 1 << 17 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 2;
    // Each bit alone, with those that presuppose it, and the pair that once made receiving a thousand times slower.
    let mut sets = vec![("all".to_owned(), 0u64), ("MRG_RXBUF and INDIRECT_DESC".to_owned(), MRG_RXBUF | 1 << 28)];
    for bit in (0..64).filter(|bit| offered & 1 << bit != 0 && *bit != 32 && *bit != 17) {
        let with = match bit {
            0 => host_segments,
            1 => guest_segments,
            7 | 8 => 1 << 9,
            11 | 12 => 1 << 13,
            54 | 55 => GUEST_USO,
            _ => 0,
        };
        sets.push((format!("bit {bit}"), with | 1 << bit));
    }
    sets.push(("all that can be off".to_owned(), !(1 << 32 | control)));
    let mut rates: Vec<f64> = sets.iter().map(|(_, off)| rate(!off)).collect();
    let best = rates.iter().copied().fold(0.0, f64::max);
    let enough = best / 20.0;
    for (rate_of, (_, off)) in rates.iter_mut().zip(&sets) {
        // A machine may be busy for a moment; a feature that collapses does so each time.
        for _ in 0..5 {
            if *rate_of < enough {
                *rate_of = rate_of.max(rate(!off));
            }
        }
    }
    let mut table = String::from("off                            frames/s out and in\n");
    for ((name, _), rate) in sets.iter().zip(&rates) {
        writeln!(table, "{name:<30} {rate:>9.0}").unwrap();
    }
    println!("{table}");
    for ((name, _), rate) in sets.iter().zip(&rates) {
        assert!(*rate >= enough, "without {name} {rate:.0} frames/s, the best are {best:.0}");
    }
}

#[test]
fn pitfall_43_no_header_that_lies_upsets_the_tap_or_the_device() {
    if !own_network() {
        return;
    }
    let mut rig = Rig::new(&on_tap(), u64::MAX);
    assert_ne!(rig.device.info().features & CSUM, 0, "headers are looked at in earnest");
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    const ROUNDS: u64 = 5000;
    let mut ip_frame = frame(9000, 0);
    for round in 0..ROUNDS {
        let mut header = [0; HEADER];
        // Flags and kinds as they are and are not, and lengths mostly near what could be.
        header[0] = [0, 1, 1, 1, 2, 3, 0xff][(next() % 7) as usize];
        header[1] = [0, 1, 1, 3, 4, 5, 0x81, 0x84, 0x80, 77][(next() % 10) as usize];
        for word in header[2..10].chunks_mut(2) {
            let value = if next() % 8 == 0 { next() as u16 } else { (next() % 120) as u16 };
            word.copy_from_slice(&value.to_le_bytes());
        }
        header[10..].copy_from_slice(&(next() as u16).to_le_bytes());
        let len = if next() % 2 == 0 { next() % 140 } else { next() % 9000 } as usize;
        // To anybody, and sometimes IP or IPv6 by its looks.
        ip_frame[12..15].copy_from_slice(&[[8, 0, 0x45], [0x86, 0xdd, 0x60], [0x81, 0, 0]][(next() % 3) as usize]);
        ip_frame[23] = [6, 17, 1][(next() % 3) as usize];
        rig.send(header, &ip_frame[..len]);
        let counts = ["sent", "dropped_malformed", "dropped_refused"].map(|name| rig.counted(name));
        assert_eq!(counts.iter().sum::<u64>(), round + 1, "{header:?} {len}: {counts:?}");
    }
    let counts = ["sent", "dropped_malformed", "dropped_refused"].map(|name| rig.counted(name));
    println!("sent, malformed, refused by the kernel: {counts:?}");
    assert!(counts.iter().all(|&count| count > ROUNDS / 100), "all of it was tried: {counts:?}");
    let before = taken();
    rig.send([0; HEADER], &frame(100, 1));
    assert_eq!((rig.counted("sent"), taken()), (counts[0] + 1, before + 1), "and a sound frame goes");
    assert_eq!(rig.faults.load(Ordering::SeqCst), 0);
}
