//! A driver in this process, which the tests have talk to real descriptors through real queues.

mod ends;
mod hosted;
mod hostile;
mod stalls;
mod traffic;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use ringvm_backends::device::Device;
use ringvm_backends::options::Checked;
use ringvm_backends::testing::driver::{Buffer, Driver};
use ringvm_backends::virtqueue::interrupt::Interrupt;
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

use super::*;

const SIZE: u16 = 16;
const RX_RING: u64 = 0;
const TX_RING: u64 = 0x1000;
const RX_DATA: u64 = 0x10_000;
const TX_DATA: u64 = 0x100_000;
const MEMORY: u64 = 0x200_000;
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX;
const PATIENCE: Duration = Duration::from_secs(20);

/// The listening half of a thread that serves the console.
struct Epolls(Epoll);

impl Listeners for Epolls {
    fn register_listener(&self, fd: i32, events: EventSet, data: u64) -> io::Result<()> {
        assert!(data > QUEUES as u64 && data <= u64::from(u16::MAX));
        self.0.ctl(ControlOperation::Add, fd, EpollEvent::new(events, data))
    }

    fn unregister_listener(&self, fd: i32, events: EventSet, data: u64) -> io::Result<()> {
        self.0.ctl(ControlOperation::Delete, fd, EpollEvent::new(events, data))
    }
}

struct Rig {
    console: ConsoleBackend,
    vrings: [VringRwLock; QUEUES],
    mem: Arc<GuestMemoryMmap>,
    rx: Driver,
    tx: Driver,
    calls: [EventFd; QUEUES],
    thread: Arc<Epolls>,
    /// Input that has come in.
    received: Vec<u8>,
    /// Addresses of buffers for input, by head.
    buffers: BTreeMap<u16, u64>,
    /// Errors of the backend.
    errors: Vec<io::Error>,
}

fn checked(options: ConsoleOptions) -> Checked<ConsoleOptions> {
    Checked::new(options).unwrap()
}

fn open(options: ConsoleOptions) -> End {
    End::open("console0", &checked(options)).unwrap()
}

fn socket_at(path: &Path) -> End {
    open(ConsoleOptions { socket: Some(path.into()), ..ConsoleOptions::default() })
}

fn pty() -> End {
    open(ConsoleOptions { kind: Some(Kind::Pty), ..ConsoleOptions::default() })
}

/// Opens a terminal as a program does that does not wait.
fn terminal(path: &Path) -> File {
    File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).unwrap()
}

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe().unwrap()
}

fn null_input() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn text(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n % 251) as u8).collect()
}

impl Rig {
    fn new(end: End) -> Self {
        Self::with(end, FEATURES)
    }

    fn with(end: End, features: u64) -> Self {
        let console = ConsoleBackend::new("console0", end).unwrap();
        // A test that reads slowly has its own pace. See `stalls` for readers that do not read.
        lock(&console.work).host.stall.limit = Duration::from_secs(3600);
        let mem: Arc<GuestMemoryMmap> =
            Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap());
        let atomic = GuestMemoryAtomic::from(Arc::clone(&mem));
        let rx = Driver::new(Arc::clone(&mem), RX_RING, SIZE, features);
        let tx = Driver::new(Arc::clone(&mem), TX_RING, SIZE, features);
        let vrings = [(); QUEUES].map(|()| VringRwLock::new(atomic.clone(), QUEUE_SIZE as u16).unwrap());
        let calls = [(); QUEUES].map(|()| EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let thread = Arc::new(Epolls(Epoll::new().unwrap()));
        let listeners: Arc<dyn Listeners> = thread.clone();
        console.listen(listeners).unwrap();
        console.update_memory(atomic).unwrap();
        console.acked_features(features);
        let (received, buffers, errors) = (Vec::new(), BTreeMap::new(), Vec::new());
        let mut rig = Self { console, vrings, mem, rx, tx, calls, thread, received, buffers, errors };
        for index in 0..QUEUES {
            rig.start(index, features);
        }
        rig
    }

    fn start(&mut self, index: usize, features: u64) {
        let (ring, vring) = ([self.rx.ring(), self.tx.ring()][index], &self.vrings[index]);
        vring.set_queue_size(ring.size);
        vring.set_queue_info(ring.desc, ring.avail, ring.used).unwrap();
        vring.set_queue_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        let call = self.calls[index].try_clone().unwrap().into_raw_fd();
        // SAFETY: the descriptor was just made and has no other owner.
        #[allow(unsafe_code, reason = "the vring wants a file")]
        vring.set_call(Some(unsafe { File::from_raw_fd(call) }));
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        self.call(index as u16);
    }

    fn stop(&mut self, index: usize) {
        self.vrings[index].set_queue_ready(false);
        self.vrings[index].set_enabled(false);
        self.console.stop_vring(index as u32).unwrap();
    }

    /// Where a queue is in the available and the used ring.
    fn positions(&self, index: usize) -> (u16, u16) {
        let vring = self.vrings[index].get_ref();
        (vring.get_queue().next_avail(), vring.get_queue().next_used())
    }

    fn call(&mut self, event: u16) {
        if let Err(error) = self.console.handle_event(event, EventSet::IN, &self.vrings, 0) {
            self.errors.push(error);
        }
    }

    /// Serves events of the console's descriptor for as long as there are some; returns how many there were.
    fn pump(&mut self) -> usize {
        let mut events = [EpollEvent::default(); 4];
        let mut count = 0;
        while self.thread.0.wait(0, &mut events).unwrap() > 0 {
            self.call(events[0].data() as u16);
            count += 1;
            assert!(count < 10_000, "it spins");
        }
        count
    }

    /// Serves until `done`.
    fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        let mut events = [EpollEvent::default(); 4];
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "it does not come");
            if self.thread.0.wait(1, &mut events).unwrap() > 0 {
                self.call(events[0].data() as u16);
            }
        }
    }

    fn interrupted(&self, index: usize) -> bool {
        self.calls[index].read().is_ok()
    }

    /// Makes one chain of output available, in buffers of these lengths.
    fn send(&mut self, text: &[u8], lens: &[usize]) -> bool {
        let (mut addr, mut at) = (TX_DATA, 0);
        let mut buffers = Vec::new();
        for &len in lens {
            self.mem.write_slice(&text[at..at + len], GuestAddress(addr)).unwrap();
            buffers.push(Buffer { addr, len: len as u32, writable: false });
            (addr, at) = (addr + len as u64, at + len);
        }
        assert_eq!(at, text.len());
        self.offer_output(&buffers)
    }

    fn offer_output(&mut self, buffers: &[Buffer]) -> bool {
        if self.tx.add(buffers).is_none() {
            return false;
        }
        if self.tx.publish() {
            self.call(TRANSMITQ as u16);
        }
        true
    }

    /// Takes used chains of output back; returns how many there were.
    fn sent(&mut self) -> usize {
        let mut count = 0;
        while let Some((_, written)) = self.tx.next_used() {
            assert_eq!(written, 0);
            count += 1;
        }
        count
    }

    /// Sends output in chains of at most `most` bytes, waiting for each to come back while `reader` takes bytes out.
    fn send_all(&mut self, text: &[u8], most: usize, mut reader: impl FnMut()) {
        for piece in text.chunks(most) {
            assert!(self.send(piece, &[piece.len()]));
            self.until(|rig| {
                reader();
                rig.sent() > 0
            });
        }
    }

    /// Offers a buffer of this length for input, as a chain of its own.
    fn offer_input(&mut self, slot: u64, len: u32) {
        self.rx.add(&[Buffer { addr: RX_DATA + slot * 0x1000, len, writable: true }]).unwrap();
        if self.rx.publish() {
            self.call(RECEIVEQ as u16);
        }
    }

    /// Takes input in until there are `count` bytes, with buffers of `len` bytes.
    fn receive(&mut self, count: usize, len: u32) {
        self.until(|rig| {
            while let Some((head, written)) = rig.rx.next_used() {
                let addr = rig.buffers.remove(&head).unwrap();
                let mut bytes = vec![0; written as usize];
                rig.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
                rig.received.extend(bytes);
            }
            for slot in 0..u64::from(SIZE) {
                let addr = RX_DATA + slot * 0x1000;
                if rig.buffers.values().any(|&used| used == addr) {
                    continue;
                }
                let Some(head) = rig.rx.add(&[Buffer { addr, len, writable: true }]) else { break };
                rig.buffers.insert(head, addr);
            }
            if rig.rx.publish() {
                rig.call(RECEIVEQ as u16);
            }
            rig.received.len() >= count
        });
    }
}

/// Reads what is there, from a descriptor that does not wait.
fn drain(file: &mut impl io::Read, into: &mut Vec<u8>) {
    let mut chunk = [0; 8192];
    while let Ok(count) = file.read(&mut chunk) {
        if count == 0 {
            break;
        }
        into.extend(&chunk[..count]);
    }
}

/// A console as a device, which counts the changes that the driver is told of.
fn told(end: End) -> (impl Device, Arc<ConsoleBackend>, Arc<AtomicUsize>) {
    let (mut device, console) = ConsoleBackend::host("console1", end).unwrap();
    let told = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&told);
    device.on_config_change(Interrupt::Call(Arc::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    })));
    (device, console, told)
}

#[test]
fn the_size_is_in_configuration_space_and_changes_are_told_once() {
    let (_device, console, told) = told(pty());
    assert_eq!(console.get_config(0, 12), [0; 12]);
    for _ in 0..3 {
        console.resize(0x123, 0x45);
    }
    assert_eq!(told.load(Ordering::SeqCst), 1);
    assert_eq!(console.get_config(0, 4), [0x23, 0x01, 0x45, 0]);
    assert_eq!(console.get_config(2, 1), [0x45]);
    assert_eq!(console.get_config(8, 100).len(), 4);
    assert!(console.get_config(u32::MAX, u32::MAX).is_empty());
    console.set_config(0, &[1]).unwrap_err();
}

#[test]
fn only_terminals_have_a_size() {
    let dir = tempfile::tempdir().unwrap();
    let has_size = |end| ConsoleBackend::new("console0", end).unwrap().features() & 1 << F_SIZE != 0;
    let owner = Rig::new(pty());
    let slave = terminal(owner.console.slave().unwrap());
    assert!(has_size(pty()));
    assert!(has_size(End::descriptors(null_input(), slave.into())));
    assert!(!has_size(End::null()));
    assert!(!has_size(socket_at(&dir.path().join("c.sock"))));
    assert!(!has_size(End::descriptors(null_input(), pipe().1)));
    let file = ConsoleOptions { file: Some(dir.path().join("c.log")), ..ConsoleOptions::default() };
    assert!(!has_size(open(file)));
}

#[test]
fn the_size_of_a_terminal_is_told() {
    let rig = Rig::new(pty());
    let slave = terminal(rig.console.slave().unwrap());
    let size = |columns, rows| rustix::termios::Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&slave, size(132, 43)).unwrap();
    // A console on that terminal, as the one of a VMM in a window.
    let (_device, console, told) = told(End::descriptors(null_input(), slave.try_clone().unwrap().into()));
    assert_eq!(console.get_config(0, 4), [132, 0, 43, 0]);
    console.update_size();
    assert_eq!(told.load(Ordering::SeqCst), 0);
    rustix::termios::tcsetwinsize(&slave, size(80, 24)).unwrap();
    console.update_size();
    assert_eq!(told.load(Ordering::SeqCst), 1);
    assert_eq!(console.get_config(0, 4), [80, 0, 24, 0]);
    // The console of the pseudoterminal itself takes note with its next event.
    let mut rig = rig;
    rig.until(|rig| rig.console.get_config(0, 4) == [80, 0, 24, 0]);
}
