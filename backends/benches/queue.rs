//! The virtqueue: chains popped and given back, in batches that are published once.

use std::fmt;

use divan::Bencher;
use divan::counter::ItemsCount;
use ringvm_backends::device::QueueState;
use ringvm_backends::testing::replay::{QUEUE_SIZE, Replay, pages};
use ringvm_backends::virtqueue::buffers::Chain;
use ringvm_backends::virtqueue::inflight::InflightArea;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use ringvm_backends::virtqueue::split::{Queue, RING_FEATURES};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

fn main() {
    divan::main();
}

/// How chains look, and how many are popped before they are given back.
struct Case {
    descriptors: u32,
    indirect: bool,
    batch: u16,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let table = if self.indirect { "indirect" } else { "direct  " };
        write!(f, "{:2} {table}, batch {:2}", self.descriptors, self.batch)
    }
}

const fn case(descriptors: u32, indirect: bool, batch: u16) -> Case {
    Case { descriptors, indirect, batch }
}

const CASES: [Case; 12] = [
    case(1, false, 1),
    case(3, false, 1),
    case(17, false, 1),
    case(1, true, 1),
    case(3, true, 1),
    case(17, true, 1),
    case(1, false, 32),
    case(3, false, 32),
    case(17, false, 32),
    case(1, true, 32),
    case(3, true, 32),
    case(17, true, 32),
];

/// The same chains on and on, as a device sees them.
struct Rig {
    replay: Replay,
    queue: Queue,
    chains: Vec<Chain>,
}

impl Rig {
    fn new(case: &Case, features: u64) -> Self {
        let replay = Replay::of(features, case.indirect, |_, slot| pages(slot, case.descriptors, true).collect());
        let queue = Queue::new(replay.memory(), &replay.ring(), features, QueueState::default(), Interrupt::None);
        let chains = (0..case.batch).map(|_| Chain::default()).collect();
        Self { replay, queue: queue.expect("a sound ring"), chains }
    }

    fn batch(&mut self) {
        self.replay.offer(self.chains.len() as u16);
        for chain in &mut self.chains {
            assert!(matches!(self.queue.pop(chain), Ok(true)), "a chain was offered");
        }
        for chain in &self.chains {
            self.queue.complete(chain.head, 1);
        }
        self.queue.notify();
    }

    fn run(mut self, bencher: Bencher<'_, '_>) {
        bencher.counter(ItemsCount::new(self.chains.len())).bench_local(|| self.batch());
    }
}

#[divan::bench(args = &CASES)]
fn event_idx(bencher: Bencher<'_, '_>, case: &Case) {
    Rig::new(case, RING_FEATURES).run(bencher);
}

#[divan::bench(args = &CASES)]
fn flags(bencher: Bencher<'_, '_>, case: &Case) {
    Rig::new(case, RING_FEATURES & !(1 << VIRTIO_RING_F_EVENT_IDX)).run(bencher);
}

/// With what is in flight noted for a successor.
#[divan::bench(args = [&CASES[1], &CASES[7]])]
fn inflight_table(bencher: Bencher<'_, '_>, case: &Case) {
    let mut rig = Rig::new(case, RING_FEATURES);
    let area = InflightArea::new(1, QUEUE_SIZE).expect("memory for the table");
    rig.queue.take_over(area.table(0).expect("a table for one queue")).expect("the table of this queue");
    rig.run(bencher);
}
