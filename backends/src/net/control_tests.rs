//! The control queue under a hostile driver, through a worker, over a port that does as it likes.

use std::io;
use std::sync::atomic::AtomicUsize;

use bolero::TypeGenerator;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::device::{GuestMemory, QueueState};
use crate::io::reactor::Task;
use crate::io::ring::Ring;
use crate::io::service::{Service, TaskHandle};
use crate::io::worker::Worker;
use crate::net::port::{Ends, Offloads};
use crate::net::state::NetState;
use crate::testing::driver::{Buffer, Driver};
use crate::virtqueue::interrupt::Interrupt;
use crate::virtqueue::split::{Queue, RING_FEATURES};

const SIZE: u16 = 16;
const DATA: u64 = 0x1000;
const ANSWER: u64 = 0xf000;
const PAIRS: u16 = 4;

/// A command of a driver: one that exists for the most part, in pieces of some lengths, with room for an answer or
/// without.
#[derive(Clone, Debug, TypeGenerator)]
struct Said {
    command: Command,
    pieces: Vec<u8>,
    room: u8,
    /// One of its pieces is outside memory.
    unmapped: u8,
    cut: u8,
}

#[derive(Clone, Debug, TypeGenerator)]
enum Command {
    Receive { what: u8, on: u8 },
    Tables { unicast: Vec<[u8; 6]>, multicast: Vec<[u8; 6]>, claimed: u32 },
    Address([u8; 6]),
    Pairs(u16),
    Offloads(u64),
    Announced,
    Other(Vec<u8>),
}

impl Said {
    fn bytes(&self) -> Vec<u8> {
        let head = |class: u32, command: u32| vec![class as u8, command as u8];
        let mut bytes = match &self.command {
            Command::Receive { what, on } => {
                [head(VIRTIO_NET_CTRL_RX, u32::from(what % 8)), vec![if on % 8 == 7 { *on } else { on & 1 }]].concat()
            }
            Command::Tables { unicast, multicast, claimed } => {
                let mut bytes = head(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET);
                for table in [unicast, multicast] {
                    let count = if claimed % 8 == 7 { *claimed } else { table.len() as u32 };
                    bytes.extend(count.to_le_bytes());
                    bytes.extend(table.as_flattened());
                }
                bytes
            }
            Command::Address(mac) => [&head(VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET)[..], mac].concat(),
            Command::Pairs(count) => {
                let count = if count % 8 == 7 { *count } else { count % (PAIRS + 2) };
                [head(VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET), count.to_le_bytes().into()].concat()
            }
            Command::Offloads(wanted) => {
                let wanted = if wanted % 8 == 7 { *wanted } else { wanted & features::GUEST_OFFLOADS };
                let head = head(VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET);
                [head, wanted.to_le_bytes().into()].concat()
            }
            Command::Announced => head(VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK),
            Command::Other(bytes) => bytes.clone(),
        };
        if self.cut % 8 == 7 {
            bytes.truncate(usize::from(self.cut / 8));
        }
        bytes
    }
}

/// A port that refuses its nth command if bit n (modulo 8) of `refuses` is set.
struct Stubborn {
    refuses: u8,
    asked: AtomicUsize,
    addresses: AtomicUsize,
}

impl Stubborn {
    fn answer(&self) -> io::Result<()> {
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        if self.refuses >> (asked % 8) & 1 == 1 { Err(io::ErrorKind::Other.into()) } else { Ok(()) }
    }
}

impl Port for Stubborn {
    fn name(&self) -> &str {
        "stubborn"
    }

    fn pairs(&self) -> usize {
        PAIRS.into()
    }

    fn ends(&self, _: usize) -> Ends {
        unreachable!("the control queue moves no frames")
    }

    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        self.answer()
    }

    fn set_pairs(&self, count: usize) -> io::Result<()> {
        assert!((1..=usize::from(PAIRS)).contains(&count));
        self.answer()
    }

    fn set_filter(&self, filter: &Filter) -> io::Result<()> {
        self.addresses.fetch_max(filter.addresses.len(), Ordering::Relaxed);
        self.answer()
    }
}

/// Each command gets one answer, and the result is a state that another NIC can continue with.
#[test]
fn fuzz_control_queue() {
    let mem: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap());
    let ring = Mutex::new(Ring::new().unwrap());
    bolero::check!().with_type::<(Vec<Said>, u64, u8)>().for_each(|(commands, lacks, refuses)| {
        let mut ring = ring.lock().unwrap_or_else(PoisonError::into_inner);
        let offered = features::offered(Offloads::ALL)
            | [features::CTRL_VQ, features::CTRL_RX, features::CTRL_MAC_ADDR, features::MQ, features::GUEST_ANNOUNCE]
                .iter()
                .fold(0, |all, bit| all | 1 << bit);
        let accepted = if lacks.is_multiple_of(2) { offered } else { offered & lacks };
        let port = Arc::new(Stubborn { refuses: *refuses, asked: AtomicUsize::new(0), addresses: AtomicUsize::new(0) });
        let control = Arc::new(Control {
            port: Arc::clone(&port) as Arc<dyn Port>,
            mac: Mutex::new([2, 0, 0, 0, 0, 1]),
            active: Arc::new(AtomicU16::new(1)),
            pairs_said: AtomicBool::new(false),
            guest_offloads: Arc::new(AtomicU64::new(accepted)),
            receivers: Mutex::new((0..PAIRS).map(|_| None).collect()),
            announce: AtomicBool::new(true),
            rx: Mutex::new(RxMode::default()),
        });
        let handler =
            ControlHandler { control: Arc::clone(&control), accepted, max_pairs: PAIRS, span: tracing::Span::none() };
        let mut driver = Driver::new(mem.clone(), 0, SIZE, RING_FEATURES);
        let queue =
            Queue::new(mem.clone(), &driver.ring(), RING_FEATURES, QueueState::default(), Interrupt::None).unwrap();
        let service =
            Service::new(tracing::Span::none(), queue, Interrupt::None, TaskHandle::unthreaded(0), ControlHandler::OPS);
        let mut worker = Worker::new(service, handler);
        for said in commands.iter().take(16) {
            let bytes = said.bytes();
            mem.write_slice(&bytes, GuestAddress(DATA)).unwrap();
            mem.write_obj(0xeeu8, GuestAddress(ANSWER)).unwrap();
            let mut chain = Vec::new();
            let (mut at, mut lens) = (0, said.pieces.iter().take(6).map(|len| usize::from(len % 16)));
            while at < bytes.len() {
                let len = lens.next().unwrap_or(bytes.len()).min(bytes.len() - at);
                chain.push(Buffer { addr: DATA + at as u64, len: len as u32, writable: false });
                at += len;
            }
            let unmapped = usize::from(said.unmapped);
            let is_broken = chain.get(unmapped).is_some_and(|piece| piece.len > 0);
            if is_broken {
                chain[unmapped].addr = 1 << 40;
            }
            let room = u32::from(said.room % 8 != 7) + u32::from(said.room % 8 == 6);
            if room > 0 {
                chain.push(Buffer { addr: ANSWER, len: room, writable: true });
            }
            let Some(head) = driver.add(&chain) else { continue };
            driver.publish();
            worker.turn(&mut ring);
            worker.service().publish();
            assert!(worker.is_idle() && ring.in_flight() == 0, "commands are obeyed at once");
            if room == 0 {
                // A command that can't be answered breaks the queue.
                assert_eq!(driver.next_used(), None);
                break;
            }
            assert_eq!(driver.next_used(), Some((head, 1)));
            let answer: u8 = mem.read_obj(GuestAddress(ANSWER)).unwrap();
            assert!(
                u32::from(answer) == VIRTIO_NET_ERR || u32::from(answer) == VIRTIO_NET_OK && !is_broken,
                "{answer}"
            );
        }
        assert!(port.addresses.load(Ordering::Relaxed) <= 1 + 2 * MAX_TABLE as usize);
        assert!((1..=PAIRS).contains(&control.active.load(Ordering::Acquire)));
        let state = NetState::of(&control).to_bytes();
        let again = NetState::from_bytes(&state, PAIRS, accepted).map(|state| state.to_bytes());
        assert_eq!(again, Ok(state));
    });
}
