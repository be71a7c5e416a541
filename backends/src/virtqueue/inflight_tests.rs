//! Crashes at every point between two stores of a request's life, against a model of what a driver may see.

use std::cell::Cell;
use std::collections::VecDeque;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use bolero::TypeGenerator;
use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::*;
use crate::block::{BlockDevice, BlockOptions, StorageKind};
use crate::device::Device;
use crate::io::reactor::{ReactorOptions, ReactorPool};
use crate::net::{NetDevice, NetOptions};
use crate::testing::driver::{Buffer, Driver};
use crate::virtqueue::buffers::Chain;
use crate::virtqueue::interrupt::Interrupt;
use crate::virtqueue::split::{Queue, RING_FEATURES};
use crate::virtqueue::{GuestMemory, QueueParts, QueueState, RingError};

const SIZE: u16 = 8;
const RING: u64 = 0x1000;

thread_local! {
    /// Crash points left to pass; `None` if there is no crash to come.
    static LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// The payload of a crash's unwinding.
struct Crash;

pub(super) fn may_crash() {
    match LEFT.get() {
        Some(0) => {
            LEFT.set(None);
            // Without the message of a panic: it is no mistake.
            resume_unwind(Box::new(Crash));
        }
        Some(left) => LEFT.set(Some(left - 1)),
        None => {}
    }
}

/// Runs `work` and crashes it after `left` crash points. Returns whether the crash happened.
fn crashes(left: u32, work: impl FnOnce()) -> bool {
    LEFT.set(Some(left));
    let result = catch_unwind(AssertUnwindSafe(work));
    LEFT.set(None);
    match result {
        Ok(()) => false,
        Err(payload) if payload.is::<Crash>() => true,
        Err(payload) => resume_unwind(payload),
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The driver offers this many requests.
    Offer(u8),
    /// The device takes this many.
    Take(u8),
    /// The device completes one of those it has taken.
    Complete(u8),
    /// It publishes its completions.
    Publish,
    /// It gives its youngest back as if it had not taken it.
    GiveBack,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (1..4u8).prop_map(Step::Offer),
        (1..4u8).prop_map(Step::Take),
        any::<u8>().prop_map(Step::Complete),
        any::<u8>().prop_map(Step::Complete),
        Just(Step::Publish),
        Just(Step::GiveBack),
    ];
    proptest::collection::vec(step, 1..30)
}

struct Model {
    mem: GuestMemory,
    driver: Driver,
    area: InflightArea,
    /// Heads that the driver has offered and not seen again, in its order.
    offered: Vec<u16>,
    seen: usize,
    submitted: usize,
}

impl Model {
    fn new() -> Self {
        let mem: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap());
        let driver = Driver::new(mem.clone(), RING, SIZE, RING_FEATURES);
        let area = InflightArea::new(2, SIZE).unwrap();
        Self { mem, driver, area, offered: Vec::new(), seen: 0, submitted: 0 }
    }

    /// A device that knows only the memory that its predecessors have left.
    fn device(&self) -> Queue {
        let used = self.driver.used_index();
        // All that a frontend can know of a ring whose device is gone.
        let from = QueueState { next_avail: used, next_used: used };
        let mut queue =
            Queue::new(self.mem.clone(), &self.driver.ring(), RING_FEATURES, from, Interrupt::None).unwrap();
        // As it comes to another process.
        let file = self.area.file().try_clone().unwrap().into();
        let area = InflightArea::from_file(file, 0, self.area.size(), 2, SIZE).unwrap();
        queue.take_over(area.table(1).unwrap()).unwrap();
        queue
    }

    fn reap(&mut self) {
        while let Some((head, len)) = self.driver.next_used() {
            let place = self.offered.iter().position(|&offered| offered == head);
            self.offered.remove(place.unwrap_or_else(|| panic!("{head} was completed twice, or never asked for")));
            assert_eq!(len, 0x100 + u32::from(head));
            self.seen += 1;
        }
    }

    fn offer(&mut self) {
        if let Some(head) = self.driver.add(&[Buffer { addr: 0x3000, len: 16, writable: true }]) {
            self.offered.push(head);
            self.submitted += 1;
        }
    }

    /// One life of a device.
    fn live(&mut self, steps: &[Step]) {
        let mut queue = self.device();
        let mut taken = VecDeque::new();
        let mut chain = Chain::default();
        for step in steps {
            match *step {
                Step::Offer(count) => {
                    self.reap();
                    (0..count).for_each(|_| self.offer());
                    self.driver.publish();
                }
                Step::Take(count) => {
                    for _ in 0..count {
                        if queue.pop(&mut chain).unwrap() {
                            taken.push_back(chain.head);
                        }
                    }
                }
                Step::Complete(which) if !taken.is_empty() => {
                    let head = taken.remove(usize::from(which) % taken.len()).unwrap();
                    queue.complete(head, 0x100 + u32::from(head));
                }
                Step::Publish => drop(queue.notify()),
                Step::GiveBack => {
                    if let Some(head) = taken.pop_back()
                        && !queue.unpop(head)
                    {
                        taken.push_back(head);
                    }
                }
                Step::Complete(_) => {}
            }
        }
    }

    /// A life that ends well: every offered chain is completed, in the driver's order if no other device was in
    /// between.
    fn finish(&mut self) {
        self.reap();
        let mut queue = self.device();
        let mut chain = Chain::default();
        while queue.pop(&mut chain).unwrap() {
            assert!(self.offered.contains(&chain.head), "{} is served again though it was published", chain.head);
            queue.complete(chain.head, 0x100 + u32::from(chain.head));
        }
        queue.notify();
        self.reap();
        assert!(self.offered.is_empty(), "lost: {:?}", self.offered);
        assert_eq!(self.seen, self.submitted);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Pitfall 55: nothing is lost or doubled wherever a device ends, its successor too.
    #[test]
    fn pitfall_55_no_crash_point_loses_or_doubles_a_request(first in steps(), second in steps(), again in 0..60u32) {
        for point in 0.. {
            let mut model = Model::new();
            let crashed = crashes(point, || model.live(&first));
            crashes(again, || model.live(&second));
            model.finish();
            if !crashed {
                break;
            }
        }
    }
}

#[test]
fn pitfall_55_what_was_in_flight_is_served_again_in_its_old_order_index_0_included() {
    let mut model = Model::new();
    let mut queue = model.device();
    // In reverse, so that the order of heads differs from a table's natural one.
    (0..5).for_each(|_| model.offer());
    model.driver.publish();
    let mut chain = Chain::default();
    let mut heads: Vec<u16> = (0..5).map(|_| if queue.pop(&mut chain).unwrap() { chain.head } else { SIZE }).collect();
    heads.rotate_left(2);
    heads.into_iter().for_each(|head| queue.complete(head, 0x100 + u32::from(head)));
    queue.notify();
    model.reap();
    (0..5).for_each(|_| model.offer());
    model.driver.publish();
    let offered = model.offered.clone();
    assert!(!offered.is_sorted() && offered.contains(&0));
    (0..4).for_each(|_| assert!(queue.pop(&mut chain).unwrap()));
    queue.complete(offered[1], 0x100 + u32::from(offered[1]));
    queue.notify();
    queue.complete(offered[2], 0);
    drop(queue);
    let mut queue = model.device();
    assert!(queue.has_avail());
    let mut again = Vec::new();
    while queue.pop(&mut chain).unwrap() {
        again.push(chain.head);
    }
    assert_eq!(again, [offered[0], offered[2], offered[3], offered[4]]);
    drop(queue);
    model.finish();
}

#[test]
fn a_queue_that_was_drained_goes_on_where_it_is_told() {
    let mut model = Model::new();
    for _ in 0..3 {
        model.offer();
        model.driver.publish();
        model.finish();
    }
    let queue = model.device();
    assert_eq!(queue.state(), QueueState { next_avail: 3, next_used: 3 });
}

#[test]
fn pitfall_45_tables_and_queues_that_do_not_fit_are_refused() {
    for (queues, size) in [(0, 8), (1, 0), (1, MAX_ENTRIES + 1)] {
        assert!(InflightArea::new(queues, size).is_err(), "{queues} of {size}");
    }
    let model = Model::new();
    let file = || -> OwnedFd { model.area.file().try_clone().unwrap().into() };
    let len = model.area.size();
    for (offset, len, queues, size) in [
        (0, len, 3, SIZE),
        (0, len, 2, 64),
        (0, 2 * len, 2, SIZE),
        (64, len, 2, SIZE),
        (u64::MAX - 7, len, 2, SIZE),
        (4, len - 64, 1, SIZE),
    ] {
        let error = InflightArea::from_file(file(), offset, len, queues, size).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{offset} {len} {queues} {size}: {error}");
    }
    assert!(model.area.table(2).is_none());

    let driver = Driver::new(model.mem.clone(), RING, 2 * SIZE, RING_FEATURES);
    let from = QueueState::default();
    let mut queue = Queue::new(model.mem.clone(), &driver.ring(), RING_FEATURES, from, Interrupt::None).unwrap();
    assert!(matches!(queue.take_over(model.area.table(0).unwrap()), Err(RingError::Inflight(_))));
}

#[test]
fn pitfall_45_nonsense_in_a_table_is_bounded() {
    let model = Model::new();
    let table = model.area.table(1).unwrap();
    table.word(VERSION_AT).store(VERSION, Ordering::Relaxed);
    table.word(ENTRIES_AT).store(u16::MAX, Ordering::Relaxed);
    table.word(LAST_BATCH_AT).store(7, Ordering::Relaxed);
    table.word(USED_AT).store(0x8000, Ordering::Relaxed);
    for head in 0..SIZE {
        // Each links to itself or to nowhere.
        table.link(head).store(if head == 7 { 7 } else { 0xffff }, Ordering::Relaxed);
        table.mark(head).store(if head == 3 { 9 } else { 1 }, Ordering::Relaxed);
    }
    let mut table = table;
    assert_eq!(table.take_over(SIZE, 0).unwrap(), [0, 1, 2, 4, 5, 6]);
    table.word(VERSION_AT).store(2, Ordering::Relaxed);
    assert!(table.take_over(SIZE, 0).is_err());
}

#[test]
fn what_is_left_goes_into_a_table_and_comes_out_once_in_its_order() {
    let model = Model::new();
    let left = [5, 2, 7];
    model.area.table(1).unwrap().put_in(SIZE, 40, &left).unwrap();
    assert_eq!(model.area.table(1).unwrap().take_over(SIZE, 40).unwrap(), left);
    assert_eq!(model.area.table(1).unwrap().take_out(SIZE, 40).unwrap(), left);
    assert_eq!(model.area.table(1).unwrap().take_out(SIZE, 40).unwrap(), [0u16; 0]);
    assert!(model.area.table(1).unwrap().put_in(SIZE, 40, &[1, SIZE]).is_err());
    assert_eq!(model.area.table(1).unwrap().take_out(SIZE, 40).unwrap(), [0u16; 0], "none of them is in it");
}

#[test]
fn a_table_that_can_be_cut_short_is_read_and_not_mapped() {
    let model = Model::new();
    let bytes = {
        model.area.table(1).unwrap().put_in(SIZE, 40, &[5, 2, 7]).unwrap();
        let mut bytes = vec![0; model.area.size() as usize];
        model.area.file().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    // As DPDK makes it: it can't be sealed any more.
    let file = File::from(rustix::fs::memfd_create("theirs", MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(&bytes, 64).unwrap();
    let theirs = || OwnedFd::from(file.try_clone().unwrap());
    let len = bytes.len() as u64;
    let refused = InflightArea::from_file(theirs(), 64, len, 2, SIZE).unwrap_err();
    assert!(refused.to_string().contains("sealed"), "{refused}");
    let kept = InflightFile::new(theirs(), 64, len, 2, SIZE).unwrap();
    assert_eq!(kept.take_out(1, SIZE, 40).unwrap(), [5, 2, 7]);
    assert_eq!(kept.take_out(1, SIZE, 40).unwrap(), [0u16; 0], "they are out");
    kept.put_in(0, SIZE, 3, &[1, 0]).unwrap();
    assert_eq!(kept.take_out(0, 2 * SIZE, 3).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert!(kept.put_in(0, SIZE, 3, &[SIZE]).is_err() && kept.take_out(2, SIZE, 3).is_err());
    let area = InflightArea::from_unsteady_file(theirs(), 64, len, 2, SIZE).unwrap();
    assert_eq!(area.table(0).unwrap().take_over(SIZE, 3).unwrap(), [1, 0]);
    drop(area);
    file.set_len(0).unwrap();
    assert_eq!(kept.take_out(0, SIZE, 3).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert!(kept.put_in(0, SIZE, 3, &[1]).is_err());
}

/// Starts the queue that a predecessor has left with everything in flight, and stops it at once.
fn start_and_stop(device: &mut dyn Device) -> (Model, QueueState) {
    let mut model = Model::new();
    let mut queue = model.device();
    (0..SIZE).for_each(|_| model.offer());
    model.driver.publish();
    let mut chain = Chain::default();
    (0..SIZE).for_each(|_| assert!(queue.pop(&mut chain).unwrap()));
    drop(queue);
    device.ack_features(RING_FEATURES).unwrap();
    let parts = QueueParts {
        inflight: model.area.table(1),
        ..QueueParts::new(model.driver.ring(), model.mem.clone(), vmm_sys_util::eventfd::EventFd::new(0).unwrap())
    };
    device.start_queue(0, parts).unwrap();
    let state = device.drain(0).unwrap();
    (model, state)
}

/// A position can't express that an earlier chain was not answered, so a queue that stops owes its predecessor that
/// answer.
#[test]
fn pitfall_55_a_queue_that_stops_has_answered_what_its_predecessor_left() {
    let pool = ReactorPool::new(&ReactorOptions::default()).unwrap();
    let null = BlockOptions { storage: StorageKind::Null, size: Some(1 << 20), ..BlockOptions::default() };
    for _ in 0..50 {
        let mut disk = BlockDevice::open("disk0", &null, &pool).unwrap();
        let (model, state) = start_and_stop(&mut disk);
        assert_eq!((state.next_avail, state.next_used), (SIZE, SIZE));
        assert_eq!(model.driver.used_index(), SIZE);
    }
}

#[test]
fn pitfall_55_a_receiver_that_stops_gives_back_what_its_predecessor_held() {
    let pool = ReactorPool::new(&ReactorOptions::default()).unwrap();
    let loopback = NetOptions { loopback: true, ..NetOptions::default() };
    for _ in 0..50 {
        let mut nic = NetDevice::open("net0", &loopback, &pool).unwrap();
        let (model, state) = start_and_stop(&mut nic);
        // Buffers of 16 bytes are too short for any frame, so that some may have come back as such.
        assert_eq!(state.next_avail, state.next_used);
        assert_eq!(model.driver.used_index(), state.next_used);
    }
}

/// One entry of a table that a predecessor has left.
#[derive(Clone, Copy, Debug, TypeGenerator)]
struct Entry {
    mark: u8,
    padding: [u8; 5],
    link: u16,
    number: u64,
}

/// A table that a predecessor has left, mostly of the right version and size so that the entries are looked at.
#[derive(Clone, Debug, TypeGenerator)]
struct LeftTable {
    version: u16,
    entries: u16,
    last_batch: u16,
    used: u16,
    table: [Entry; 2 * SIZE as usize],
}

impl LeftTable {
    fn bytes(&self) -> Vec<u8> {
        let near = |value: u16, most: u16| if value % 16 == 15 { value } else { value % most };
        let version = if self.version % 8 == 7 { self.version } else { self.version % 2 };
        let entries = if self.entries % 8 == 7 { self.entries } else { 2 * SIZE };
        let mut bytes = vec![0; 8];
        for word in [version, entries, near(self.last_batch, SIZE + 2), self.used] {
            bytes.extend(word.to_le_bytes());
        }
        for &Entry { mark, padding, link, number } in &self.table {
            bytes.push(if mark % 8 == 7 { mark } else { mark & 1 });
            bytes.extend(padding);
            bytes.extend(near(link, SIZE + 2).to_le_bytes());
            bytes.extend(number.to_le_bytes());
        }
        bytes
    }
}

/// Any table that a predecessor or a neighbour has left is taken over within bounds or refused. Its heads are served
/// once: not again after their answers were published, even if the end came before the table said so.
#[test]
fn fuzz_inflight_table() {
    bolero::check!().with_type::<(LeftTable, u16, bool, u8)>().for_each(|(left, published, smaller, answered)| {
        let area = InflightArea::new(2, 2 * SIZE).unwrap();
        let neighbour = table_len(2 * SIZE);
        let size = if *smaller { SIZE } else { 2 * SIZE };
        let used = if published % 4 == 3 { *published } else { left.used.wrapping_add(published % (SIZE + 2)) };
        area.file().write_all_at(&left.bytes(), 0).unwrap();
        let mut table = area.table(0).unwrap();
        let Ok(heads) = table.take_over(size, used) else { return };
        assert!(heads.iter().all(|&head| head < size));
        assert!(heads.iter().enumerate().all(|(i, head)| !heads[..i].contains(head)), "{heads:?}");
        let mut again = area.table(0).unwrap();
        assert_eq!(again.take_over(size, used).as_ref(), Ok(&heads), "nothing has happened in between");
        // The queue goes on, and crashes after it has published some answers.
        let (done, open) = heads.split_at(heads.len().min(usize::from(*answered)));
        done.iter().for_each(|&head| table.completed(head));
        let used = used.wrapping_add(done.len() as u16);
        assert_eq!(area.table(0).unwrap().take_over(size, used).as_deref(), Ok(open));
        table.published(used);
        assert_eq!(area.table(0).unwrap().take_over(size, used).as_deref(), Ok(open));
        let mut other = vec![0; neighbour as usize];
        area.file().read_exact_at(&mut other, neighbour).unwrap();
        assert!(other.iter().all(|&byte| byte == 0), "another queue's table was written to");
    });
}
