//! The log alone, and the pages that a queue marks in it: every page that was written, and none that could not have
//! been.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;
use rustix::fs::MemfdFlags;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::testing::driver::{Buffer, Driver};
use crate::virtqueue::QueueState;
use crate::virtqueue::buffers::Chain;
use crate::virtqueue::split::{Queue, RING_FEATURES};

fn file(size: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create("log", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, size).unwrap();
    file
}

/// A log in the last `len` bytes of a file, and the file.
fn log_at(offset: u64, len: u64) -> (Arc<DirtyLog>, OwnedFd) {
    let file = file(offset + len);
    (Arc::new(DirtyLog::from_file(file.try_clone().unwrap(), offset, len).unwrap()), file)
}

fn bytes(file: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; rustix::fs::fstat(file).unwrap().st_size as usize];
    assert_eq!(rustix::io::pread(file, &mut bytes, 0).unwrap(), bytes.len());
    bytes
}

fn marked(file: &OwnedFd, offset: usize) -> BTreeSet<u64> {
    let bytes = bytes(file);
    assert!(bytes[..offset].iter().all(|&byte| byte == 0), "what is in front of the log is somebody else's");
    let bits =
        (0..).zip(&bytes[offset..]).flat_map(|(at, byte)| (0..8).map(move |bit| (at * 8 + bit, byte >> bit & 1)));
    bits.filter(|&(_, set)| set == 1).map(|(page, _)| page).collect()
}

#[test]
fn a_page_is_a_bit_in_the_order_of_addresses() {
    for offset in [0, 8, 4096, 4097, 10_000] {
        let (log, file) = log_at(offset, 16);
        log.mark(0x9000, 1);
        assert_eq!(bytes(&file)[offset as usize..][..3], [0, 2, 0]);
        log.mark(0x6fff, 2);
        log.mark(0x7000, 0);
        assert_eq!(bytes(&file)[offset as usize..][..3], [0xc0, 2, 0]);
        log.mark(0x1_8000, 0x2_0000);
        let pages: BTreeSet<u64> = [6, 7, 9].into_iter().chain(0x18..0x38).collect();
        assert_eq!(marked(&file, offset as usize), pages);
    }
}

#[test]
fn pitfall_46_what_is_beyond_the_log_is_not_written() {
    for offset in [0, 12] {
        let (log, file) = log_at(offset, 2);
        for (addr, len) in [
            (16 << 12, 1),
            (17 << 12, 4096),
            (24 << 12, u64::MAX),
            (u64::MAX, 1),
            (u64::MAX, u64::MAX),
            (1 << 63, 1 << 63),
        ] {
            log.mark(addr, len);
            assert!(marked(&file, offset as usize).is_empty(), "{addr:#x} {len:#x}");
        }
        log.mark(14 << 12, u64::MAX);
        assert_eq!(marked(&file, offset as usize), [14, 15].into());
    }
}

#[test]
fn pitfall_46_logs_that_are_not_in_their_file_are_refused() {
    let all = file(8192);
    for (offset, len) in [
        (0, 0),
        (8192, 0),
        (0, 8193),
        (1, 8192),
        (8192, 1),
        (4096, 4097),
        (u64::MAX, 1),
        (u64::MAX - 4095, 4096),
        (u64::MAX - 4095, 8192),
        (1 << 63, 4096),
        (4096, u64::MAX),
        (4096, u64::MAX - 4095),
        (4096, i64::MAX as u64 - 4096),
    ] {
        let refused = DirtyLog::from_file(all.try_clone().unwrap(), offset, len).unwrap_err();
        assert!(refused.to_string().contains("is not in a file of 8192"), "{offset} {len}: {refused}");
    }
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    assert!(DirtyLog::from_file(pipe, 0, 4096).is_err());
    let read_only = std::fs::File::open("/proc/self/exe").unwrap();
    assert!(DirtyLog::from_file(read_only.into(), 0, 4096).is_err());
    DirtyLog::from_file(all, 4095, 4097).unwrap();
}

#[test]
fn a_log_in_use_keeps_its_size() {
    let (log, file) = log_at(0, 4096);
    assert!(rustix::fs::ftruncate(file.as_fd(), 0).is_err());
    log.mark(0, 1);
    assert_eq!(marked(&file, 0), [0].into());
}

#[test]
fn no_mark_is_lost_while_one_log_replaces_another() {
    const ROUNDS: u64 = 200;
    let (log, first) = log_at(0, ROUNDS);
    let (ended, done) = (AtomicBool::new(false), AtomicU64::new(0));
    // Also by a test that fails.
    struct End<'a>(&'a AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    std::thread::scope(|scope| {
        // Marks a page, and only then reports it.
        scope.spawn(|| {
            while !ended.load(Ordering::SeqCst) {
                let page = done.load(Ordering::SeqCst) + 1;
                log.mark((page % (8 * ROUNDS)) << 12, 1);
                done.store(page, Ordering::SeqCst);
            }
        });
        let (_end, mut before) = (End(&ended), first);
        for next in 1..=ROUNDS {
            let from = done.load(Ordering::SeqCst);
            while done.load(Ordering::SeqCst) < from + 3 {
                std::hint::spin_loop();
            }
            let (other, file) = log_at(offset_of(next), ROUNDS);
            let old = log.replace(Arc::into_inner(other).unwrap());
            // Pages reported as marked before the change are in the old log, which is final now.
            let pages = marked(&before, offset_of(next - 1) as usize);
            assert!(pages.contains(&((from + 3) % (8 * ROUNDS))), "page {} in round {next}", from + 3);
            drop(old);
            assert_eq!(marked(&before, offset_of(next - 1) as usize), pages);
            before = file;
        }
    });
}

fn offset_of(round: u64) -> u64 {
    round % 3 * 1000
}

#[test]
fn marks_of_many_threads_are_all_there() {
    let (log, file) = log_at(3, 512);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let log = &log;
            scope.spawn(move || (thread..4096).step_by(4).for_each(|page| log.mark(page << 12, 1)));
        }
    });
    assert_eq!(marked(&file, 3), (0..4096).collect());
}

const REGIONS: [(GuestAddress, usize); 3] =
    [(GuestAddress(0), 0x1_0000), (GuestAddress(0x1_0000), 0x1_0000), (GuestAddress(0x4_0000), 0x1_0000)];
const RING: u64 = 0x1000;
/// Indirect tables, a page each.
const TABLES: u64 = 0x2000;
const SIZE: u16 = 16;
/// A page's worth of bits more than there is memory.
const LOG_LEN: u64 = 0x50 / 8 + 1;

struct Rig {
    mem: GuestMemory,
    driver: Driver,
    queue: Queue,
    file: OwnedFd,
    told: Arc<EventFd>,
}

fn rig(features: u64, log_used: bool) -> Rig {
    let mem = Arc::new(GuestMemoryMmap::from_ranges(&REGIONS).unwrap());
    let driver = Driver::new(Arc::clone(&mem), RING, SIZE, features);
    let ring = driver.ring();
    let mut queue = Queue::new(Arc::clone(&mem), &ring, features, QueueState::default(), Interrupt::None).unwrap();
    let (log, file) = log_at(0, LOG_LEN);
    let told = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let marked = Interrupt::Event(Arc::clone(&told));
    queue.log_writes(QueueLog { log, used: log_used.then_some(ring.used), marked });
    Rig { mem, driver, queue, file, told }
}

/// All of memory, page by page.
fn snapshot(mem: &GuestMemory) -> Vec<(u64, Vec<u8>)> {
    let pages = REGIONS.iter().flat_map(|&(start, len)| pages(start.0, len as u64).unwrap());
    let content = |page: u64| {
        let mut bytes = vec![0; LOG_PAGE as usize];
        mem.read_slice(&mut bytes, GuestAddress(page * LOG_PAGE)).unwrap();
        bytes
    };
    pages.map(|page| (page, content(page))).collect()
}

fn changed(before: &[(u64, Vec<u8>)], mem: &GuestMemory) -> BTreeSet<u64> {
    let differ = before.iter().zip(snapshot(mem)).filter(|(before, after)| before.1 != after.1);
    differ.map(|(before, _)| before.0).collect()
}

/// Where a buffer may lie: over two regions that touch, in the last one, and beyond its end.
fn place() -> impl Strategy<Value = (u64, u32)> {
    (
        prop_oneof![0x1_2000_u64..0x1_f000, 0xc000_u64..0x1_0000, 0x4_0000_u64..0x4_f000, 0x4_f000_u64..0x5_1000],
        0u32..9000,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn every_page_that_a_device_writes_is_marked_and_no_other(
        rounds in prop::collection::vec(
            prop::collection::vec(
                (prop::collection::vec(place(), 0..3), prop::collection::vec(place(), 0..4), any::<bool>(), any::<u8>()),
                1..5,
            ),
            1..12,
        ),
        event_idx in any::<bool>(),
        log_used in any::<bool>(),
    ) {
        let features = if event_idx { RING_FEATURES } else { RING_FEATURES & !(1 << 29) };
        let Rig { mem, mut driver, mut queue, file, told } = rig(features, log_used);
        let ring = driver.ring();
        let used_ring: BTreeSet<u64> = pages(ring.used, 6 + 8 * u64::from(SIZE)).unwrap().collect();
        let mut could: BTreeSet<u64> = BTreeSet::new();
        let mut table = 0;
        for (round, chains) in rounds.iter().enumerate() {
            for (readable, writable, indirect, _) in chains {
                let buffer = |writable| move |&(addr, len): &(u64, u32)| Buffer { addr, len, writable };
                let mut buffers: Vec<_> = readable.iter().map(buffer(false)).collect();
                buffers.extend(writable.iter().map(buffer(true)));
                if buffers.is_empty() {
                    continue;
                }
                if *indirect {
                    // One chain may be left over from the round before, with its table.
                    table = (table + 1) % 8;
                    driver.add_indirect(TABLES + table * LOG_PAGE, &buffers);
                } else {
                    driver.add(&buffers);
                }
                could.extend(writable.iter().filter_map(|&(addr, len)| pages(addr, len.into())).flatten());
            }
            driver.publish();
            // Changes from here on are the device's.
            let before = snapshot(&mem);
            rustix::io::pwrite(&file, &[0; LOG_LEN as usize], 0).unwrap();
            told.read().ok();
            let mut taken = Vec::new();
            let mut chain = Chain::default();
            while queue.pop(&mut chain).unwrap() {
                taken.push(std::mem::take(&mut chain));
            }
            prop_assert!(marked(&file, 0).is_empty(), "nothing was written yet");
            if round % 3 == 2 && let Some(last) = taken.pop() {
                last.writable.copy_from(&vec![round as u8 + 1; 5000]);
                prop_assert!(queue.unpop(last.head));
            }
            if round % 2 == 1 {
                taken.reverse();
            }
            for (chain, (.., fill)) in taken.iter().zip(chains) {
                let some = vec![fill | 1; (chain.writable.len() as usize).div_ceil(2)];
                chain.writable.copy_from_at(chain.writable.len() / 3, &some);
                queue.complete(chain.head, 1);
                let wrote = changed(&before, &mem);
                prop_assert!(marked(&file, 0).is_superset(&(&wrote - &used_ring)), "before it is published");
            }
            let published = queue.notify().is_some();
            prop_assert_eq!(told.read().is_ok(), published);
            queue.disable_kicks();
            queue.enable_kicks();
            let (wrote, log) = (changed(&before, &mem), marked(&file, 0));
            if log_used {
                prop_assert!(log.is_superset(&wrote), "{:?} of {:?}", log, wrote);
                prop_assert!(log.is_subset(&(&could | &used_ring)), "{:?} of {:?}", log, could);
            } else {
                prop_assert!(log.is_superset(&(&wrote - &used_ring)), "{:?} of {:?}", log, wrote);
                prop_assert!(log.is_subset(&could), "{:?} of {:?}", log, could);
            }
            while driver.next_used().is_some() {}
        }
    }
}

#[test]
fn a_used_ring_over_pages_is_marked_where_it_is_written() {
    let mem: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let size = 2048;
    let mut driver = Driver::new(Arc::clone(&mem), 0, size, 0);
    let ring = driver.ring();
    let state = QueueState { next_avail: 0, next_used: 0 };
    let mut queue = Queue::new(Arc::clone(&mem), &ring, 0, state, Interrupt::None).unwrap();
    let (log, file) = log_at(0, 64);
    queue.log_writes(QueueLog { log, used: Some(ring.used), marked: Interrupt::None });
    let index_page = ring.used / LOG_PAGE;
    let mut chain = Chain::default();
    for turn in 0..600 {
        // Now and then so many that those around the end are on several pages.
        let batch = if turn % 5 == 0 { 1500 } else { 1 + turn % 7 };
        for _ in 0..batch {
            driver.add(&[Buffer { addr: 0xf_0000, len: 1, writable: false }]).unwrap();
        }
        driver.publish();
        let before = queue.state().next_used;
        rustix::io::pwrite(&file, &[0; 64], 0).unwrap();
        while queue.pop(&mut chain).unwrap() {
            queue.complete(chain.head, 0);
        }
        queue.notify();
        let slots = (0..batch).map(|i| u64::from(before.wrapping_add(i) % size));
        let written: BTreeSet<u64> =
            slots.map(|slot| (ring.used + 4 + 8 * slot) / LOG_PAGE).chain([index_page]).collect();
        let mut log = marked(&file, 0);
        // Entries may lie across the border of two pages.
        assert!(log.is_superset(&written), "turn {turn}: {log:?} of {written:?}");
        log.retain(|page| !written.contains(page));
        assert!(log.len() <= 1, "turn {turn}: {log:?} beside {written:?}");
        while driver.next_used().is_some() {}
    }
}

#[test]
fn no_more_is_marked_of_a_long_chain_than_can_have_been_written() {
    const REGION: u64 = 2 << 30;
    const SECOND: u64 = 4 << 30;
    let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(SECOND), REGION as usize)];
    let mem: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    for (most, pages) in [(u64::MAX, MOST_WRITTEN / LOG_PAGE), (LOG_PAGE, 1)] {
        let mut driver = Driver::new(Arc::clone(&mem), 0, 16, RING_FEATURES);
        let ring = driver.ring();
        let state = QueueState::default();
        let mut queue = Queue::new(Arc::clone(&mem), &ring, RING_FEATURES, state, Interrupt::None).unwrap();
        let (log, file) = log_at(0, (SECOND + REGION) / LOG_PAGE / 8);
        queue.log_writes(QueueLog { log, used: None, marked: Interrupt::None });
        queue.writes_at_most(most);
        // All of the region, again and again, and a status.
        let mut buffers = vec![Buffer { addr: SECOND, len: REGION as u32, writable: true }; 1000];
        buffers.push(Buffer { addr: 0x8000, len: 1, writable: true });
        driver.add_indirect(0x1_0000, &buffers).unwrap();
        driver.publish();
        let mut chain = Chain::default();
        assert!(queue.pop(&mut chain).unwrap());
        queue.complete(chain.head, 1);
        let first = SECOND / LOG_PAGE;
        assert_eq!(marked(&file, 0), (first..first + pages).chain([8]).collect());
    }
}
