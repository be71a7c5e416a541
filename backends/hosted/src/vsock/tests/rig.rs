//! A guest and its device.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ringvm_backends::testing::driver::{Buffer, Driver};
use rustix::event::EventfdFlags;
use tempfile::TempDir;
use vhost_user_backend::{VhostUserBackend, VringRwLock, VringT};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::listeners::Listeners;
use crate::vsock::muxer::Limits;
use crate::vsock::options::{VsockOptions, path_of_port};
use crate::vsock::packet::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op};
use crate::vsock::{Memory, POLL_EVENT, RX, TX, Vsock};

pub(super) const CID: u64 = 42;
/// Descriptors of each ring.
const SIZE: u16 = 64;
/// Bytes of a receive buffer, as Linux has them.
const BUFFER: u32 = 4096 - 320;
const RX_RING: u64 = 0;
const TX_RING: u64 = 0x2000;
const EVENT_RING: u64 = 0x4000;
const RX_BUFFERS: u64 = 0x10000;
const TX_BUFFERS: u64 = 0x10_0000;
/// Bytes of a packet to send, at most.
const TX_SLOT: u64 = 0x2_0000;
const MEMORY: usize = 16 << 20;
/// What should come comes within this.
const PATIENCE: Duration = Duration::from_secs(20);

/// The thread that would call the device for its descriptors.
struct Outer(Epoll);

impl Listeners for Outer {
    fn register_listener(&self, fd: RawFd, events: EventSet, data: u64) -> io::Result<()> {
        self.0.ctl(ControlOperation::Add, fd, EpollEvent::new(events, data))
    }

    fn unregister_listener(&self, fd: RawFd, events: EventSet, data: u64) -> io::Result<()> {
        self.0.ctl(ControlOperation::Delete, fd, EpollEvent::new(events, data))
    }
}

pub(super) struct Rig {
    pub(super) vsock: Vsock,
    pub(super) vrings: Vec<VringRwLock<Memory>>,
    pub(super) mem: Memory,
    pub(super) rx: Driver,
    pub(super) tx: Driver,
    pub(super) path: PathBuf,
    dir: TempDir,
    plain: Arc<GuestMemoryMmap>,
    calls: [OwnedFd; 2],
    outer: Outer,
    /// Address of each buffer that the device has.
    buffers: HashMap<u16, u64>,
    free: Vec<u64>,
    /// Whether buffers are given to the device at all.
    pub(super) refills: bool,
    slot: u64,
    packets: VecDeque<(Header, Vec<u8>)>,
}

impl Rig {
    pub(super) fn new() -> Self {
        Self::with(Limits::default())
    }

    pub(super) fn with(limits: Limits) -> Self {
        Self::at("v", limits)
    }

    pub(super) fn at(name: &str, limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let options = VsockOptions { cid: CID as u32, socket: path.clone() };
        let vsock = Vsock::with_limits("vsock0", &options, limits).unwrap();
        let outer = Outer(Epoll::new().unwrap());
        vsock.listen(&outer).unwrap();
        let plain = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let mem = GuestMemoryAtomic::from(Arc::clone(&plain));
        vsock.update_memory(mem.clone()).unwrap();
        let vrings = (0..3).map(|_| VringRwLock::new(mem.clone(), 256).unwrap()).collect();
        let calls = [(); 2].map(|()| rustix::event::eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        let features = 1 << VIRTIO_RING_F_EVENT_IDX;
        let driver = |base| Driver::new(Arc::clone(&plain), base, SIZE, features);
        let (rx, tx) = (driver(RX_RING), driver(TX_RING));
        let free = (0..u64::from(SIZE)).map(|i| RX_BUFFERS + 4096 * i).collect();
        let mut rig = Self {
            vsock,
            vrings,
            mem,
            rx,
            tx,
            path,
            dir,
            plain,
            calls,
            outer,
            buffers: HashMap::new(),
            free,
            refills: true,
            slot: 0,
            packets: VecDeque::new(),
        };
        rig.start();
        rig.refill();
        rig
    }

    /// Starts the queues where they were left.
    pub(super) fn start(&mut self) {
        let event = Driver::new(Arc::clone(&self.plain), EVENT_RING, SIZE, 0);
        for (vring, ring) in self.vrings.iter().zip([self.rx.ring(), self.tx.ring(), event.ring()]) {
            vring.set_queue_size(ring.size);
            vring.set_queue_info(ring.desc, ring.avail, ring.used).unwrap();
            vring.set_queue_next_used(vring.queue_used_idx().unwrap());
            vring.set_queue_event_idx(true);
            vring.set_queue_ready(true);
            vring.set_enabled(true);
        }
        for (vring, call) in self.vrings.iter().zip(&self.calls) {
            vring.set_call(Some(call.try_clone().unwrap().into()));
        }
        self.rx.want_interrupts(true);
        self.tx.want_interrupts(true);
    }

    pub(super) fn stop(&mut self) {
        for (queue, vring) in self.vrings.iter().enumerate() {
            vring.set_queue_ready(false);
            self.vsock.stop_vring(queue as u32).unwrap();
        }
    }

    /// Starts the queues of a new driver.
    pub(super) fn restart(&mut self) {
        let features = 1 << VIRTIO_RING_F_EVENT_IDX;
        self.rx = Driver::new(Arc::clone(&self.plain), RX_RING, SIZE, features);
        self.tx = Driver::new(Arc::clone(&self.plain), TX_RING, SIZE, features);
        self.buffers.clear();
        self.free = (0..u64::from(SIZE)).map(|i| RX_BUFFERS + 4096 * i).collect();
        for vring in &self.vrings {
            vring.set_queue_next_avail(0);
        }
        self.start();
        self.refill();
    }

    /// The device goes, and its directory stays for a moment.
    pub(super) fn end(self) -> TempDir {
        self.dir
    }

    pub(super) fn path_of(&self, port: u32) -> PathBuf {
        path_of_port(&self.path, port)
    }

    /// Connections, handshakes, and bytes kept.
    pub(super) fn held(&self) -> (usize, usize, usize) {
        self.vsock.lock().muxer.held()
    }

    /// Packets that wait in the device.
    pub(super) fn waiting(&self) -> usize {
        self.vsock.lock().muxer.waiting()
    }

    pub(super) fn event(&self, event: u16) -> io::Result<()> {
        self.vsock.handle_event(event, EventSet::IN, &self.vrings, 0)
    }

    /// Where a queue is in the available and the used ring.
    pub(super) fn positions(&self, queue: u16) -> (u16, u16) {
        let vring = self.vrings[usize::from(queue)].get_ref();
        (vring.get_queue().next_avail(), vring.get_queue().next_used())
    }

    // The guest.

    /// Makes a packet available, in pieces of these lengths.
    pub(super) fn put(&mut self, header: Header, data: &[u8], pieces: &[usize]) {
        assert!(self.tx.in_flight() < 32, "the device takes no packets");
        let base = TX_BUFFERS + TX_SLOT * self.slot;
        self.slot = (self.slot + 1) % 64;
        let header = Header { len: data.len() as u32, ..header };
        let bytes = [&header.bytes()[..], data].concat();
        self.plain.write_slice(&bytes, GuestAddress(base)).unwrap();
        let mut chain = Vec::new();
        let mut at = 0;
        for &piece in pieces {
            let len = piece.min(bytes.len() - at);
            chain.push(Buffer { addr: base + at as u64, len: len as u32, writable: false });
            at += len;
        }
        if at < bytes.len() {
            chain.push(Buffer { addr: base + at as u64, len: (bytes.len() - at) as u32, writable: false });
        }
        self.tx.add(&chain).expect("few enough pieces");
    }

    /// Sends a packet, in one piece or several.
    pub(super) fn send(&mut self, header: Header, data: &[u8]) {
        const PIECES: [&[usize]; 4] = [&[44], &[], &[10, 34, 1], &[44, 100, 1000]];
        self.put(header, data, PIECES[self.slot as usize % 4]);
        self.kick_tx();
    }

    pub(super) fn kick_tx(&mut self) {
        if self.tx.publish() {
            self.event(TX).unwrap();
        }
        self.collect();
    }

    /// Gives the device all free buffers.
    pub(super) fn refill(&mut self) {
        while self.refills
            && let Some(addr) = self.free.pop()
        {
            let head = self.rx.add(&[Buffer { addr, len: BUFFER, writable: true }]).unwrap();
            self.buffers.insert(head, addr);
        }
        if self.rx.publish() {
            self.event(RX).unwrap();
        }
    }

    /// Gives the device all free buffers from now on.
    pub(super) fn feed(&mut self) {
        self.refills = true;
        self.refill();
        self.collect();
    }

    /// Has the device use up its buffers, and gives it no more.
    pub(super) fn starve(&mut self) {
        self.refills = false;
        while self.rx.in_flight() > 0 {
            let mut nobody = Guest::new(1, 1);
            self.send(nobody.header(op::RW), &[]);
        }
        self.packets.clear();
    }

    /// Takes back what the device has used, and gives it what is free.
    pub(super) fn collect(&mut self) {
        loop {
            let (mut used_tx, mut used_rx) = (false, false);
            while self.tx.next_used().is_some() {
                used_tx = true;
            }
            while let Some((head, len)) = self.rx.next_used() {
                used_rx = true;
                let addr = self.buffers.remove(&head).unwrap();
                self.free.push(addr);
                let mut bytes = vec![0; len as usize];
                self.plain.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
                let header = Header::read(&mut &bytes[..]).unwrap();
                assert_eq!(HEADER_LEN + header.len as usize, bytes.len());
                self.packets.push_back((header, bytes.split_off(HEADER_LEN)));
            }
            for (queue, used) in [(RX, used_rx), (TX, used_tx)] {
                // Interrupts were asked for, from the next used chain on.
                assert_eq!(
                    rustix::io::read(&self.calls[usize::from(queue)], &mut [0; 8]).is_ok(),
                    used,
                    "interrupts of queue {queue}"
                );
            }
            if !used_tx && !used_rx {
                return;
            }
            self.rx.want_interrupts(true);
            self.tx.want_interrupts(true);
            self.refill();
        }
    }

    /// Has the device look at its sockets while they have events.
    pub(super) fn turn(&mut self) {
        let mut turns = 0;
        while self.has_events(Duration::ZERO) {
            turns += 1;
            assert!(turns < 10_000, "the device calls itself for ever");
            self.event(POLL_EVENT).unwrap();
            self.collect();
        }
    }

    fn has_events(&self, limit: Duration) -> bool {
        let mut events = [EpollEvent::default(); 4];
        let count = self.outer.0.wait(limit.as_millis() as i32, &mut events).unwrap();
        assert!(events[..count].iter().all(|event| event.data() == u64::from(POLL_EVENT)));
        count > 0
    }

    /// Waits for events of sockets, for a while.
    pub(super) fn wait(&mut self, limit: Duration) {
        self.has_events(limit);
        self.turn();
    }

    /// A packet, if one is there.
    pub(super) fn try_next(&mut self) -> Option<(Header, Vec<u8>)> {
        if self.packets.is_empty() {
            self.turn();
        }
        self.packets.pop_front()
    }

    /// The next packet.
    pub(super) fn next(&mut self) -> (Header, Vec<u8>) {
        let start = Instant::now();
        loop {
            if let Some(packet) = self.try_next() {
                return packet;
            }
            assert!(start.elapsed() < PATIENCE, "no packet has come");
            self.wait(Duration::from_millis(100));
        }
    }

    /// There is no packet.
    pub(super) fn nothing(&mut self) {
        self.wait(Duration::from_millis(20));
        assert_eq!(self.packets, []);
        assert_eq!(self.tx.in_flight(), 0);
    }

    // Ends of connections.

    /// A program of the host that has said nothing.
    pub(super) fn client(&self) -> UnixStream {
        let client = UnixStream::connect(&self.path).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    }

    /// The guest's end of a connection that the device asks for.
    pub(super) fn answer(&self, request: &Header) -> Guest {
        assert_eq!(request.op, op::REQUEST);
        let mut guest = Guest::new(request.src_port, request.dst_port);
        guest.take(request);
        guest
    }

    /// Asks for a connection.
    pub(super) fn connect(&mut self, host: u32, port: u32) -> Guest {
        let mut guest = Guest::new(host, port);
        self.send(guest.header(op::REQUEST), &[]);
        guest
    }

    /// A connection of the guest to a program.
    pub(super) fn connected(&mut self) -> (UnixStream, Guest) {
        self.connected_with(Guest::new(52, 1024))
    }

    pub(super) fn connected_with(&mut self, mut guest: Guest) -> (UnixStream, Guest) {
        let path = self.path_of(guest.host);
        let listener = UnixListener::bind(&path).unwrap();
        self.send(guest.header(op::REQUEST), &[]);
        let (program, _) = listener.accept().unwrap();
        std::fs::remove_file(path).unwrap();
        program.set_read_timeout(Some(PATIENCE)).unwrap();
        let (header, _) = self.next();
        assert_eq!(header.op, op::RESPONSE);
        guest.take(&header);
        (program, guest)
    }
}

/// The guest's end of a connection.
#[derive(Clone, Debug)]
pub(super) struct Guest {
    pub(super) host: u32,
    pub(super) port: u32,
    /// What it has room for, and what it has read.
    pub(super) room: u32,
    pub(super) read: u32,
    pub(super) sent: u32,
    peer: (u32, u32),
}

impl Guest {
    pub(super) fn new(host: u32, port: u32) -> Self {
        Self { host, port, room: 256 << 10, read: 0, sent: 0, peer: (0, 0) }
    }

    pub(super) fn header(&mut self, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: self.port,
            dst_port: self.host,
            kind: TYPE_STREAM,
            op,
            buf_alloc: self.room,
            fwd_cnt: self.read,
            ..Header::default()
        }
    }

    /// The end of what this end will do.
    pub(super) fn shutdown(&mut self, flags: u32) -> Header {
        Header { flags, ..self.header(op::SHUTDOWN) }
    }

    /// Notes the device's credit.
    pub(super) fn take(&mut self, header: &Header) {
        assert_eq!((header.src_port, header.dst_port), (self.host, self.port));
        self.peer = (header.buf_alloc, header.fwd_cnt);
    }

    /// Bytes that may be sent.
    pub(super) fn credit(&self) -> usize {
        (self.peer.0 - self.sent.wrapping_sub(self.peer.1)) as usize
    }
}

impl Rig {
    /// Length of a descriptor of the transmit queue, if it has one.
    pub(super) fn tx_descriptor(&self, index: u16) -> Option<u32> {
        let len: u32 = self.plain.read_obj(GuestAddress(self.tx.ring().desc + 16 * u64::from(index) + 8)).ok()?;
        (len > 0).then_some(len)
    }
}
