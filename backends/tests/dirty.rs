//! What a disk writes into its guest while somebody copies that elsewhere: whoever wrote it, this process or the kernel, its
//! page is marked in the log, and no page is that could not have been written.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use ringvm_backends::block::{BlockDevice, BlockOptions};
use ringvm_backends::device::{Device, GuestMemory, QueueParts, QueueState};
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_backends::testing::driver::{Buffer, Driver};
use ringvm_backends::virtqueue::dirty::{DirtyLog, LOG_PAGE, QueueLog};
use ringvm_backends::virtqueue::interrupt::Interrupt;
use rustix::fs::MemfdFlags;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY: u64 = 4 << 20;
const HEADERS: u64 = 0x10_0000;
const DATA: u64 = 0x20_0000;
const SECTORS: u64 = 1 << 11;
const PATIENCE: Duration = Duration::from_secs(20);

/// VIRTIO_BLK_T_*, mostly reads, and one that nobody knows.
const KINDS: [u32; 7] = [0, 0, 0, 1, 4, 8, 99];

#[derive(Clone, Debug)]
struct Request {
    kind: u32,
    sector: u64,
    /// Pieces in the page that they begin in and their length, in sectors.
    pieces: Vec<(u64, u32)>,
    indirect: bool,
}

fn request() -> impl Strategy<Value = Request> {
    let piece = (0u64..(MEMORY - DATA) / 512 - 64, 1u32..48);
    (prop::sample::select(&KINDS), 0..SECTORS + 8, prop::collection::vec(piece, 0..4), any::<bool>())
        .prop_map(|(kind, sector, pieces, indirect)| Request { kind, sector, pieces, indirect })
}

fn pages(addr: u64, len: u64) -> impl Iterator<Item = u64> {
    addr / LOG_PAGE..(addr + len).div_ceil(LOG_PAGE)
}

fn snapshot(mem: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY as usize];
    mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

fn marked(log: &OwnedFd) -> BTreeSet<u64> {
    let mut bits = vec![0; (MEMORY / LOG_PAGE / 8) as usize];
    rustix::io::pread(log, &mut bits, 0).unwrap();
    (0..MEMORY / LOG_PAGE).filter(|page| bits[*page as usize / 8] >> (page % 8) & 1 == 1).collect()
}

/// Serves what is in the ring from `from` on, with a log, until all of it is given back.
fn serve(
    device: &mut BlockDevice,
    driver: &mut Driver,
    mem: &GuestMemory,
    from: QueueState,
    log: &OwnedFd,
) -> QueueState {
    let ring = driver.ring();
    let dirty = Arc::new(DirtyLog::from_file(log.try_clone().unwrap(), 0, MEMORY / LOG_PAGE / 8).unwrap());
    let parts = QueueParts {
        from,
        log: Some(QueueLog { log: dirty, used: Some(ring.used), marked: Interrupt::None }),
        ..QueueParts::new(ring, Arc::clone(mem), EventFd::new(EFD_NONBLOCK).unwrap())
    };
    device.start_queue(0, parts).unwrap();
    let begun = Instant::now();
    while driver.in_flight() > 0 {
        if driver.next_used().is_none() {
            assert!(begun.elapsed() < PATIENCE, "the device does not answer");
            std::thread::yield_now();
        }
    }
    device.drain(0).expect("it ran")
}

fn check(mut device: BlockDevice, cases: u32) {
    let mem: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap());
    let features = device.info().features;
    device.ack_features(features).unwrap();
    let log = rustix::fs::memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&log, MEMORY / LOG_PAGE / 8).unwrap();
    let mut driver = Driver::new(Arc::clone(&mem), 0, device.info().queue_sizes[0], features);
    let ring = driver.ring();
    let used_ring: Vec<u64> = pages(ring.used, 6 + 8 * u64::from(ring.size)).collect();
    let mut state = QueueState::default();
    let (mut reads, mut round) = (0, 0u8);
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(cases) });
    let device = std::cell::RefCell::new((&mut device, &mut driver, &mut state, &mut reads, &mut round));
    let requests = prop::collection::vec(request(), 1..12);
    let result = runner.run(&requests, |requests| {
        let (device, driver, state, reads, round) = &mut *device.borrow_mut();
        // So that what is read is not what is there already.
        **round = round.wrapping_add(1);
        mem.write_slice(&vec![**round; (MEMORY - DATA) as usize], GuestAddress(DATA)).unwrap();
        let mut could: BTreeSet<u64> = used_ring.iter().copied().collect();
        for (index, request) in (0..).zip(&requests) {
            let at = HEADERS + index * 2 * LOG_PAGE;
            let header = [&request.kind.to_le_bytes()[..], &[0; 4], &request.sector.to_le_bytes()].concat();
            mem.write_slice(&header, GuestAddress(at)).unwrap();
            mem.write_slice(&[0xee], GuestAddress(at + 16)).unwrap();
            let writable = request.kind != 1;
            let mut buffers = vec![Buffer { addr: at, len: 16, writable: false }];
            for &(sector, sectors) in &request.pieces {
                let buffer = Buffer { addr: DATA + sector * 512, len: sectors * 512, writable };
                could.extend(pages(buffer.addr, buffer.len.into()).filter(|_| writable));
                buffers.push(buffer);
            }
            buffers.push(Buffer { addr: at + 16, len: 1, writable: true });
            could.extend(pages(at + 16, 1));
            let added = if request.indirect { driver.add_indirect(at + 64, &buffers) } else { driver.add(&buffers) };
            added.expect("there is room in the ring");
        }
        driver.publish();
        rustix::io::pwrite(&log, &[0; (MEMORY / LOG_PAGE / 8) as usize], 0).unwrap();
        let before = snapshot(&mem);
        **state = serve(device, driver, &mem, **state, &log);
        let after = snapshot(&mem);
        let log = marked(&log);
        let differs = |page: &u64| {
            let range = (page * LOG_PAGE) as usize..((page + 1) * LOG_PAGE) as usize;
            before[range.clone()] != after[range]
        };
        let wrote: BTreeSet<u64> = (0..MEMORY / LOG_PAGE).filter(differs).collect();
        **reads += wrote.iter().filter(|page| **page >= DATA / LOG_PAGE).count();
        prop_assert!(log.is_superset(&wrote), "marked {:?} of {:?}", log, wrote);
        prop_assert!(log.is_subset(&could), "marked {:?}, could have been {:?}", log, could);
        Ok(())
    });
    result.unwrap();
    assert!(reads > 10 * cases as usize, "{reads} pages were read into");
}

#[test]
fn every_page_that_a_disk_writes_is_marked_and_no_other() {
    let pool = ReactorPool::new(&ReactorOptions::default()).unwrap();
    for direct in [false, true] {
        let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let content: Vec<u8> = (0..SECTORS * 512).map(|at| (at / 512 * 7 + at) as u8).collect();
        std::fs::write(image.path(), content).unwrap();
        let options = BlockOptions { path: Some(image.path().to_owned()), direct, ..BlockOptions::default() };
        check(BlockDevice::open("disk0", &options, &pool).unwrap(), 64);
    }
}
