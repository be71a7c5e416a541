//! The queue against a driver, a hostile driver, and the `virtio-queue` crate.

use std::sync::Arc;

use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT};
use virtio_queue::{Queue as OracleQueue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::testing::driver::{Buffer, Descriptor, Driver};
use crate::virtqueue::translate::MAX_SPREAD;

const RING: u64 = 0x1000;
/// Two regions that touch, a hole, and one more.
const REGIONS: [(GuestAddress, usize); 3] =
    [(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000), (GuestAddress(0x2_0000), 0x1000)];

fn memory() -> GuestMemory {
    Arc::new(GuestMemoryMmap::from_ranges(&REGIONS).unwrap())
}

struct Rig {
    driver: Driver,
    queue: Queue,
    call: Arc<EventFd>,
    mem: GuestMemory,
}

fn rig_with(size: u16, features: u64) -> Rig {
    rig_in(memory(), RING, size, features)
}

fn rig_in(mem: GuestMemory, ring: u64, size: u16, features: u64) -> Rig {
    let driver = Driver::new(mem.clone(), ring, size, features);
    let call = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let interrupt = Interrupt::Event(Arc::clone(&call));
    let queue = Queue::new(mem.clone(), &driver.ring(), features, QueueState::default(), interrupt).unwrap();
    Rig { driver, queue, call, mem }
}

fn rig() -> Rig {
    rig_with(8, RING_FEATURES)
}

impl Rig {
    fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        let mut chain = Chain::default();
        Ok(self.queue.pop(&mut chain)?.then_some(chain))
    }

    /// Makes `head` available as it lies in the table.
    fn offer(&mut self, head: u16) {
        self.driver.write_avail_entry(self.queue.next_avail, head);
        self.driver.write_avail_index(self.queue.next_avail.wrapping_add(1));
    }

    fn desc(&self, index: u16, addr: u64, len: u32, flags: u32, next: u16) {
        self.driver.write_descriptor(RING, index, Descriptor { addr, len, flags: flags as u16, next });
    }

    fn interrupts(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }
}

fn out(addr: u64, len: u32) -> Buffer {
    Buffer { addr, len, writable: false }
}

fn into(addr: u64, len: u32) -> Buffer {
    Buffer { addr, len, writable: true }
}

#[test]
fn a_chain_over_far_too_many_regions_is_not_all_followed() {
    const PAGES: u64 = 64;
    let regions = (0..PAGES).map(|page| (GuestAddress(0x10_0000 + page * 0x1000), 0x1000));
    let regions: Vec<_> = std::iter::once((GuestAddress(0), 0x1_0000)).chain(regions).collect();
    let mem = Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap());
    let mut rig = rig_in(mem, RING, 8, RING_FEATURES);
    for (count, spread) in [(MAX_SPREAD / PAGES as usize - 1, false), (1000, true)] {
        for writable in [false, true] {
            let all = Buffer { addr: 0x10_0000, len: PAGES as u32 * 0x1000, writable };
            let mut buffers = vec![all; count];
            buffers.push(into(0, 1));
            rig.driver.add_indirect(0x8000, &buffers).unwrap();
            rig.driver.publish();
            let mut chain = rig.pop().unwrap().unwrap();
            assert_eq!(chain.unmapped, spread);
            let pieces = chain.readable.pieces().len() + chain.writable.pieces().len();
            assert!(pieces <= MAX_SPREAD + 1, "{pieces} pieces");
            assert!(chain.writable.take_last(), "it can be answered");
            rig.queue.complete(chain.head, 1);
            rig.queue.notify();
            rig.driver.next_used().unwrap();
            chain.trim();
            assert!(rig.pop().unwrap().is_none());
        }
    }
}

#[test]
fn a_chain_goes_round() {
    let mut rig = rig();
    rig.mem.write_slice(b"hello", GuestAddress(0x4000)).unwrap();
    let head = rig.driver.add(&[out(0x4000, 5), into(0x5000, 3), into(0x6000, 0), into(0x7000, 4)]).unwrap();
    assert!(!rig.queue.has_avail());
    assert!(rig.driver.publish());
    assert!(rig.queue.has_avail());
    let chain = rig.pop().unwrap().unwrap();
    assert_eq!((chain.head, chain.readable.len(), chain.writable.len(), chain.unmapped), (head, 5, 7, false));
    let mut text = [0; 5];
    chain.readable.copy_to(&mut text);
    assert_eq!(&text, b"hello");
    assert_eq!(chain.writable.copy_from(b"goodbye"), 7);
    assert!(rig.pop().unwrap().is_none());
    rig.queue.complete(head, 7);
    assert_eq!(rig.driver.next_used(), None, "not before it is published");
    assert_eq!(rig.queue.notify(), Some(true));
    assert_eq!(rig.queue.notify(), None);
    assert_eq!(rig.interrupts(), 1);
    assert_eq!(rig.driver.next_used(), Some((head, 7)));
    let mut text = [0; 4];
    rig.mem.read_slice(&mut text, GuestAddress(0x7000)).unwrap();
    assert_eq!(&text, b"dbye");
}

#[test]
fn interrupts_follow_the_drivers_wish() {
    for features in [RING_FEATURES, 1 << VIRTIO_F_VERSION_1] {
        let mut rig = rig_with(8, features);
        for want in [true, false, true] {
            rig.driver.want_interrupts(want);
            rig.driver.add(&[out(0x4000, 1)]).unwrap();
            rig.driver.publish();
            let chain = rig.pop().unwrap().unwrap();
            rig.queue.complete(chain.head, 0);
            assert_eq!(rig.queue.notify(), Some(want));
            assert_eq!(rig.interrupts(), u64::from(want));
            rig.driver.next_used().unwrap();
        }
    }
}

#[test]
fn one_interrupt_for_a_batch_that_crosses_the_event() {
    let mut rig = rig();
    for _ in 0..5 {
        rig.driver.add(&[out(0x4000, 1)]).unwrap();
    }
    rig.driver.publish();
    while let Some(chain) = rig.pop().unwrap() {
        rig.queue.complete(chain.head, 0);
    }
    assert_eq!(rig.queue.notify(), Some(true));
    assert_eq!(rig.interrupts(), 1);
}

#[test]
fn pitfall_13_arming_kicks_looks_once_more() {
    for features in [RING_FEATURES, 1 << VIRTIO_F_VERSION_1] {
        let mut rig = rig_with(8, features);
        rig.queue.disable_kicks();
        assert!(!rig.queue.enable_kicks());
        rig.driver.add(&[out(0x4000, 1)]).unwrap();
        assert!(rig.driver.publish(), "armed");
        rig.queue.disable_kicks();
        rig.driver.add(&[out(0x4000, 1)]).unwrap();
        assert!(!rig.driver.publish(), "not armed");
        assert!(rig.queue.enable_kicks(), "what came while not armed is seen");
    }
}

#[test]
fn pitfall_2_a_head_in_flight_is_refused() {
    let mut rig = rig();
    rig.desc(0, 0x4000, 1, 0, 0);
    rig.offer(0);
    assert!(rig.pop().unwrap().is_some());
    rig.offer(0);
    assert_eq!(rig.pop().unwrap_err(), RingError::Twice(0));
}

#[test]
fn a_head_may_come_again_once_completed() {
    let mut rig = rig();
    for _ in 0..20 {
        rig.driver.add(&[out(0x4000, 1)]).unwrap();
        rig.driver.publish();
        let chain = rig.pop().unwrap().unwrap();
        rig.queue.complete(chain.head, 0);
        rig.queue.notify();
        rig.driver.next_used().unwrap();
    }
}

#[test]
fn pitfall_3_an_available_index_that_jumps_is_refused() {
    let mut rig = rig();
    rig.driver.write_avail_index(9);
    assert_eq!(rig.pop().unwrap_err(), RingError::AvailIndex { avail: 9, next: 0 });
    let mut rig = self::rig();
    rig.driver.write_avail_index(u16::MAX);
    assert!(rig.pop().is_err());
}

#[test]
fn pitfall_8_cycles_and_misplaced_tables_are_refused() {
    let next = VRING_DESC_F_NEXT;
    let indirect = VRING_DESC_F_INDIRECT;
    let mut rig = rig();
    rig.desc(0, 0x4000, 1, next, 1);
    rig.desc(1, 0x4000, 1, next, 0);
    rig.offer(0);
    assert_eq!(rig.pop().unwrap_err(), RingError::TooLong(0));
    rig.desc(0, 0x4000, 1, next, 8);
    assert_eq!(rig.pop().unwrap_err(), RingError::Index(8));
    rig.offer(8);
    assert_eq!(rig.pop().unwrap_err(), RingError::Index(8));
    rig.offer(0);
    for (addr, len) in [(0x4000, 0), (0x4000, 17), (0x1_0000, 16), (0xfff8, 16), (u64::MAX - 7, 16), (0x4000, u32::MAX)]
    {
        rig.desc(0, addr, len, indirect, 0);
        assert_eq!(rig.pop().unwrap_err(), RingError::Table { addr, len });
    }
    rig.desc(0, 0x4000, 16, indirect | next, 1);
    assert_eq!(rig.pop().unwrap_err(), RingError::Indirect(0));
    rig.desc(0, 0x4000, 16, indirect, 0);
    let nested = Descriptor { addr: 0x5000, len: 16, flags: indirect as u16, next: 0 };
    rig.driver.write_descriptor(0x4000, 0, nested);
    assert_eq!(rig.pop().unwrap_err(), RingError::Indirect(0));
    let cycle = Descriptor { addr: 0x5000, len: 16, flags: next as u16, next: 0 };
    rig.driver.write_descriptor(0x4000, 0, cycle);
    assert_eq!(rig.pop().unwrap_err(), RingError::TooLong(0));
    let beyond = Descriptor { next: 1, ..cycle };
    rig.driver.write_descriptor(0x4000, 0, beyond);
    assert_eq!(rig.pop().unwrap_err(), RingError::Index(1));
}

#[test]
fn a_table_holds_as_long_a_chain_as_the_queue_and_no_longer() {
    let table = 0x8_0000;
    for (size, most) in [(64, 1026), (1024, 1026), (2048, 2048)] {
        for len in [most, most + 1] {
            let mem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
            let mut rig = rig_in(mem, 0, size, RING_FEATURES);
            for index in 0..len {
                let flags = if index + 1 == len { 0 } else { VRING_DESC_F_NEXT as u16 };
                // Buffers that touch each other would be one piece.
                let desc = Descriptor { addr: 0x4_0000 + u64::from(index) * 16, len: 1, flags, next: index + 1 };
                rig.driver.write_descriptor(table, index, desc);
            }
            let head =
                Descriptor { addr: table, len: u32::from(len) * 16, flags: VRING_DESC_F_INDIRECT as u16, next: 0 };
            rig.driver.write_descriptor(0, 0, head);
            rig.offer(0);
            match rig.pop() {
                Ok(chain) => assert_eq!((len, chain.unwrap().readable.len()), (most, u64::from(most))),
                Err(error) => assert_eq!((len, error), (most + 1, RingError::TooLong(0))),
            }
        }
    }
}

#[test]
fn pitfall_8_indirect_must_be_negotiated() {
    let mut rig = rig_with(8, 1 << VIRTIO_F_VERSION_1);
    rig.driver.add_indirect(0x4000, &[out(0x5000, 1)]).unwrap();
    rig.driver.publish();
    assert_eq!(rig.pop().unwrap_err(), RingError::Indirect(rig.driver.in_flight() as u16 - 1));
}

#[test]
fn pitfall_9_an_indirect_table_is_read_once() {
    // The walk copies a descriptor before it looks at any field, so it uses exactly the values that it checked: a
    // table that is all ones after the pop has no influence on the popped chain.
    let mut rig = rig();
    rig.driver.add_indirect(0x4001, &[out(0x5000, 2), into(0x6000, 3)]).unwrap();
    rig.driver.publish();
    let chain = rig.pop().unwrap().unwrap();
    rig.mem.write_slice(&[0xff; 32], GuestAddress(0x4001)).unwrap();
    assert_eq!((chain.readable.len(), chain.writable.len()), (2, 3));
}

#[test]
fn pitfall_10_rings_must_lie_in_one_piece() {
    let mem = memory();
    let new = |ring: RingConfig| {
        Queue::new(mem.clone(), &ring, RING_FEATURES, QueueState::default(), Interrupt::None).map(drop)
    };
    let good = RingConfig { size: 8, desc: 0x1000, avail: 0x2000, used: 0x3000 };
    assert_eq!(new(good), Ok(()));
    for addr in [0x7ff0, 0xfff0, 0x1_0000, u64::MAX - 15] {
        assert!(matches!(new(RingConfig { desc: addr, ..good }), Err(RingError::Unmapped { .. })), "{addr:#x}");
        assert!(matches!(new(RingConfig { avail: addr | 8, ..good }), Err(RingError::Unmapped { .. })), "{addr:#x}");
        assert!(matches!(new(RingConfig { used: addr | 8, ..good }), Err(RingError::Unmapped { .. })), "{addr:#x}");
    }
    assert!(matches!(new(RingConfig { desc: 0x1008, ..good }), Err(RingError::Misaligned { .. })));
    assert!(matches!(new(RingConfig { avail: 0x2001, ..good }), Err(RingError::Misaligned { .. })));
    assert!(matches!(new(RingConfig { used: 0x3002, ..good }), Err(RingError::Misaligned { .. })));
    for size in [0, 3, 0x8001, u16::MAX] {
        assert_eq!(new(RingConfig { size, ..good }), Err(RingError::Size(size)));
    }
}

#[test]
fn rings_must_be_aligned_where_they_are_mapped() {
    // A region that begins in the middle of a page for the guest begins with a page here.
    let odd =
        |start| -> GuestMemory { Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(start), 0x8000)]).unwrap()) };
    let ring = RingConfig { size: 8, desc: 0x1000, avail: 0x2000, used: 0x3000 };
    for start in [1, 2, 8] {
        let mem = odd(start);
        let queue = Queue::new(mem.clone(), &ring, RING_FEATURES, QueueState::default(), Interrupt::None);
        assert!(matches!(queue.map(drop), Err(RingError::Misaligned { area: "descriptor table", .. })), "{start}");
        assert_eq!(used_index(&mem, &ring).is_some(), start == 8, "{start}");
        assert_eq!(avail_index(&mem, &ring).is_some(), start != 1, "{start}");
    }
    assert_eq!(check_ring(&odd(16), &ring), Ok(()));
}

#[test]
fn a_chain_that_can_not_be_followed_is_not_left_to_anybody() {
    let mut rig = rig();
    rig.desc(3, 0x4000, 1, VRING_DESC_F_NEXT, 8);
    rig.offer(3);
    assert_eq!(rig.pop().unwrap_err(), RingError::Index(8));
    assert_eq!((rig.queue.left(), rig.queue.state()), (Vec::new(), QueueState::default()));
    rig.queue.take_left(&[3]).unwrap();
    assert_eq!(rig.pop().unwrap_err(), RingError::Index(8));
    assert_eq!((rig.queue.left(), rig.queue.state()), (Vec::new(), QueueState::default()));
}

#[test]
fn pitfall_10_buffers_across_regions_are_split_and_holes_marked() {
    let mut rig = rig();
    rig.driver.add(&[out(0x7ff0, 0x20)]).unwrap();
    rig.driver.publish();
    let chain = rig.pop().unwrap().unwrap();
    assert_eq!((chain.readable.pieces().len(), chain.readable.len(), chain.unmapped), (2, 0x20, false));
    rig.driver.add(&[out(0x4000, 16), into(0xfff0, 0x20), into(0x5000, 1)]).unwrap();
    rig.driver.publish();
    let chain = rig.pop().unwrap().unwrap();
    assert!(chain.unmapped);
    assert_eq!((chain.readable.len(), chain.writable.len()), (16, 1), "header and status can be reached");
}

#[test]
fn pitfall_11_an_address_that_wraps_is_a_hole() {
    let mut rig = rig();
    for (addr, len) in [(u64::MAX, 1), (u64::MAX - 1, u32::MAX), (0x2_0fff, 2), (0, u32::MAX)] {
        rig.driver.add(&[into(addr, len)]).unwrap();
        rig.driver.publish();
        let chain = rig.pop().unwrap().unwrap();
        assert!(chain.unmapped && chain.writable.is_empty(), "{addr:#x}");
        rig.queue.complete(chain.head, 0);
        rig.queue.notify();
        rig.driver.next_used().unwrap();
    }
}

#[test]
fn pitfall_12_indices_are_read_whole() {
    let rig = rig_with(256, RING_FEATURES);
    let done = std::sync::atomic::AtomicBool::new(false);
    let word = rig.queue.avail_word(1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                rig.driver.write_avail_index(0x00ff);
                rig.driver.write_avail_index(0x0100);
            }
        });
        for _ in 0..200_000 {
            let index = word.load(Ordering::Acquire);
            assert!(matches!(index, 0 | 0x00ff | 0x0100), "{index:#x} was never written");
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn pitfall_14_a_devices_own_registers_are_not_memory() {
    // Where the machine puts its BARs there is no region, so no buffer reaches a register of any device.
    let mut rig = rig();
    for addr in [0xc000_0000, 0xe000_0000, 0xfee0_0000, 0x40_0000_0000] {
        rig.driver.add(&[into(addr, 4)]).unwrap();
        rig.driver.publish();
        let chain = rig.pop().unwrap().unwrap();
        assert!(chain.unmapped && chain.writable.is_empty(), "{addr:#x}");
        rig.queue.complete(chain.head, 0);
        rig.queue.notify();
        rig.driver.next_used().unwrap();
    }
}

#[test]
fn readable_behind_writable_is_refused() {
    let mut rig = rig();
    rig.driver.add(&[into(0x4000, 1), out(0x5000, 1)]).unwrap();
    rig.driver.publish();
    assert!(matches!(rig.pop().unwrap_err(), RingError::Order(_)));
}

#[test]
fn a_queue_goes_on_where_another_stopped() {
    let mut rig = rig();
    for _ in 0..3 {
        rig.driver.add(&[out(0x4000, 1)]).unwrap();
        rig.driver.publish();
    }
    let chain = rig.pop().unwrap().unwrap();
    rig.queue.complete(chain.head, 0);
    rig.queue.notify();
    let state = rig.queue.state();
    assert_eq!(state, QueueState { next_avail: 1, next_used: 1 });
    let ring = rig.driver.ring();
    rig.queue = Queue::new(rig.mem.clone(), &ring, RING_FEATURES, state, Interrupt::None).unwrap();
    while let Some(chain) = rig.pop().unwrap() {
        rig.queue.complete(chain.head, 0);
    }
    rig.queue.notify();
    assert_eq!(std::iter::from_fn(|| rig.driver.next_used()).count(), 3);
}

/// A chain as a device sees it, for either implementation's pop.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    head: u16,
    readable: u64,
    writable: u64,
}

fn oracle_pop(queue: &mut OracleQueue, mem: &GuestMemoryMmap) -> Option<Seen> {
    let chain = queue.pop_descriptor_chain(mem)?;
    let head = chain.head_index();
    let (mut readable, mut writable) = (0, 0);
    for desc in chain {
        *(if desc.is_write_only() { &mut writable } else { &mut readable }) += u64::from(desc.len());
    }
    Some(Seen { head, readable, writable })
}

proptest! {
    /// Chains of sound drivers look as they do through `virtio-queue`, and so do the used ring and the wish to notify.
    #[test]
    fn sound_drivers_see_what_virtio_queue_shows(
        batches in prop::collection::vec(prop::collection::vec((0u8..3, 0u8..4, 1u32..300, any::<bool>()), 0..6), 1..40),
        want in any::<bool>(),
    ) {
        let size = 16;
        let mut rigs = [rig_with(size, RING_FEATURES), rig_with(size, RING_FEATURES)];
        let mut oracle = OracleQueue::new(size).unwrap();
        let ring = rigs[1].driver.ring();
        oracle.set_size(size);
        oracle.try_set_desc_table_address(GuestAddress(ring.desc)).unwrap();
        oracle.try_set_avail_ring_address(GuestAddress(ring.avail)).unwrap();
        oracle.try_set_used_ring_address(GuestAddress(ring.used)).unwrap();
        oracle.set_event_idx(true);
        oracle.set_ready(true);
        for batch in batches {
            for (readable, writable, len, indirect) in batch {
                let mut buffers: Vec<_> = (0..readable).map(|i| out(0x4000 + u64::from(i), len)).collect();
                buffers.extend((0..writable).map(|i| into(0x6000 + u64::from(i), len + u32::from(i))));
                if buffers.is_empty() {
                    continue;
                }
                for rig in &mut rigs {
                    if indirect {
                        rig.driver.add_indirect(0x3000, &buffers);
                        // The table is used again by the next chain, so this one is taken now.
                    } else {
                        rig.driver.add(&buffers);
                    }
                }
                let kicks = rigs.each_mut().map(|rig| rig.driver.publish());
                prop_assert_eq!(kicks[0], kicks[1]);
                let [mine, theirs] = &mut rigs;
                while let Some(seen) = oracle_pop(&mut oracle, &theirs.mem) {
                    let chain = mine.pop().unwrap().expect("the oracle found one");
                    prop_assert!(!chain.unmapped);
                    let me = Seen { head: chain.head, readable: chain.readable.len(), writable: chain.writable.len() };
                    prop_assert_eq!(&me, &seen);
                    mine.queue.complete(chain.head, len);
                    oracle.add_used(&*theirs.mem, seen.head, len).unwrap();
                }
                prop_assert!(mine.pop().unwrap().is_none());
            }
            let [mine, theirs] = &mut rigs;
            let notified = mine.queue.notify().unwrap_or(false);
            prop_assert_eq!(notified, oracle.needs_notification(&*theirs.mem).unwrap());
            loop {
                let used = (mine.driver.next_used(), theirs.driver.next_used());
                prop_assert_eq!(used.0, used.1);
                if used.0.is_none() {
                    break;
                }
            }
            mine.driver.want_interrupts(want);
            theirs.driver.want_interrupts(want);
            prop_assert_eq!(mine.queue.enable_kicks(), oracle.enable_notification(&*theirs.mem).unwrap());
        }
    }
}

/// With any contents of memory, popping ends, stays in bounds and yields only pieces of guest memory.
#[test]
fn fuzz_queue_with_hostile_memory() {
    let size = 8;
    let mem = memory();
    bolero::check!().with_type::<(Vec<(u16, u64, u32, u16, u16)>, Vec<u16>, u16, bool)>().for_each(
        |(descriptors, heads, index, completes)| {
            let driver = Driver::new(mem.clone(), RING, size, RING_FEATURES);
            let mut queue =
                Queue::new(mem.clone(), &driver.ring(), RING_FEATURES, QueueState::default(), Interrupt::None).unwrap();
            for &(at, addr, len, flags, next) in descriptors {
                // Mostly near the truth, so that more than the first check is reached.
                let desc = Descriptor { addr: addr & 0x2_1fff, len: len & 0x1fff, flags: flags & 7, next: next % 10 };
                let table = if at % 3 == 0 { 0x4000 } else { RING };
                driver.write_descriptor(table, at % size, desc);
            }
            for (i, head) in heads.iter().enumerate() {
                driver.write_avail_entry(i as u16, head % 9);
            }
            driver.write_avail_index(index % 11);
            let mut chain = Chain::default();
            for _ in 0..32 {
                match queue.pop(&mut chain) {
                    Ok(true) => {
                        for piece in chain.readable.pieces().iter().chain(chain.writable.pieces()) {
                            let base = piece.iov_base as usize;
                            assert!(mem.iter().any(|region| {
                                let start = region.as_ptr() as usize;
                                start <= base && base + piece.iov_len <= start + region.len() as usize
                            }));
                        }
                        if *completes {
                            queue.complete(chain.head, 0);
                            queue.notify();
                        }
                    }
                    Ok(false) | Err(_) => break,
                }
            }
        },
    );
}

#[test]
fn what_was_left_is_served_first_and_can_be_left_again() {
    let mut rig = rig();
    let buffer = [Buffer { addr: 0x100, len: 16, writable: true }];
    let heads: Vec<u16> = (0..4).map(|_| rig.driver.add(&buffer).unwrap()).collect();
    rig.driver.publish();
    (0..3).for_each(|_| assert!(rig.pop().unwrap().is_some()));
    rig.queue.complete(heads[1], 0);
    rig.queue.notify();
    let (state, left) = (rig.queue.state(), rig.queue.left());
    assert_eq!((state.next_avail, state.next_used), (3, 1));
    assert_eq!(left, [heads[0], heads[2]]);

    let mut next = Queue::new(rig.mem.clone(), &rig.driver.ring(), RING_FEATURES, state, Interrupt::None).unwrap();
    next.take_left(&left).unwrap();
    assert_eq!(next.left(), left);
    assert!(next.has_avail());
    let mut chain = Chain::default();
    let mut served = Vec::new();
    while next.pop(&mut chain).unwrap() {
        served.push(chain.head);
    }
    assert_eq!(served, [heads[0], heads[2], heads[3]]);
    assert_eq!(next.left().len(), 3, "all of them are in flight");
    served.into_iter().for_each(|head| next.complete(head, 0));
    assert_eq!(next.left(), [0u16; 0]);

    for (wrong, error) in [([0, 8], RingError::Index(8)), ([3, 3], RingError::Twice(3))] {
        let mut next = Queue::new(rig.mem.clone(), &rig.driver.ring(), RING_FEATURES, state, Interrupt::None).unwrap();
        assert_eq!(next.take_left(&wrong), Err(error));
    }
}
