//! A disk and the driver's side of it, as the tests of several storages need them.
#![allow(dead_code, reason = "not every test file uses all of it")]

use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ringvm_backends::block::{BlockDevice, BlockOptions};
use ringvm_backends::device::{Device, GuestMemory, QueueParts, QueueState};
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_backends::testing::driver::{Buffer, Driver};
use ringvm_backends::virtqueue::interrupt::Interrupt;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) const SECTOR: usize = 512;
pub(crate) const DATA: u64 = 0x10_0000;
pub(crate) const HEADERS: u64 = 0x8_0000;
pub(crate) const T_IN: u32 = 0;
pub(crate) const T_OUT: u32 = 1;
pub(crate) const T_FLUSH: u32 = 4;
pub(crate) const T_GET_ID: u32 = 8;
pub(crate) const T_DISCARD: u32 = 11;
pub(crate) const T_WRITE_ZEROES: u32 = 13;
pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
pub(crate) const UNSUPP: u8 = 2;
pub(crate) const F_RO: u64 = 1 << 5;
pub(crate) const F_FLUSH: u64 = 1 << 9;
pub(crate) const F_CONFIG_WCE: u64 = 1 << 11;

/// Long enough for a slow disk; only a hang takes it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Queue {
    pub(crate) driver: Driver,
    pub(crate) kick: EventFd,
    pub(crate) call: Arc<EventFd>,
}

pub(crate) struct Rig {
    pub(crate) device: BlockDevice,
    pub(crate) mem: GuestMemory,
    pub(crate) queues: Vec<Queue>,
    pub(crate) faults: Arc<AtomicUsize>,
    pub(crate) image: tempfile::NamedTempFile,
}

/// A directory on a disk: O_DIRECT and holes are looked at.
pub(crate) fn scratch() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

pub(crate) fn image(sectors: usize) -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new_in(scratch()).unwrap();
    image.as_file().set_len((sectors * SECTOR) as u64).unwrap();
    image
}

pub(crate) fn pool(threads: usize) -> ReactorPool {
    ReactorPool::new(&ReactorOptions { count: threads, ..ReactorOptions::default() }).unwrap()
}

impl Rig {
    pub(crate) fn new(sectors: usize, change: impl FnOnce(&mut BlockOptions)) -> Self {
        Self::with_features(sectors, u64::MAX, change)
    }

    pub(crate) fn with_features(sectors: usize, mask: u64, change: impl FnOnce(&mut BlockOptions)) -> Self {
        let image = image(sectors);
        let mut options = BlockOptions { path: Some(image.path().to_owned()), ..BlockOptions::default() };
        change(&mut options);
        Self::over(BlockDevice::open("disk0", &options, &pool(2)).unwrap(), image, mask)
    }

    /// Of the device's features, those in `mask` are accepted.
    pub(crate) fn over(device: BlockDevice, image: tempfile::NamedTempFile, mask: u64) -> Self {
        let mem = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap());
        let mut rig = Self { device, mem, queues: Vec::new(), faults: Arc::default(), image };
        rig.start(mask);
        rig
    }

    pub(crate) fn start(&mut self, mask: u64) {
        let features = self.device.info().features & mask;
        self.device.ack_features(features).unwrap();
        self.queues.clear();
        for (index, size) in self.device.info().queue_sizes.clone().into_iter().enumerate() {
            let driver = Driver::new(self.mem.clone(), index as u64 * 0x1_0000, size, features);
            let kick = EventFd::new(EFD_NONBLOCK).unwrap();
            let call = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
            self.queues.push(Queue { driver, kick, call });
            self.start_queue(index, QueueState::default());
        }
    }

    pub(crate) fn start_queue(&mut self, index: usize, from: QueueState) {
        self.start_queue_with(index, from, Vec::new());
    }

    pub(crate) fn start_queue_with(&mut self, index: usize, from: QueueState, left: Vec<u16>) {
        let queue = &self.queues[index];
        let faults = Arc::clone(&self.faults);
        let parts = QueueParts {
            call: Interrupt::Event(Arc::clone(&queue.call)),
            fault: Interrupt::Call(Arc::new(move || {
                faults.fetch_add(1, Ordering::SeqCst);
            })),
            from,
            left,
            ..QueueParts::new(queue.driver.ring(), self.mem.clone(), queue.kick.try_clone().unwrap())
        };
        self.device.start_queue(index as u16, parts).unwrap();
    }

    pub(crate) fn kick(&mut self, queue: usize) {
        let queue = &mut self.queues[queue];
        queue.driver.want_interrupts(true);
        if queue.driver.publish() {
            queue.kick.write(1).unwrap();
        }
    }

    pub(crate) fn next_used(&mut self, queue: usize) -> (u16, u32) {
        let start = Instant::now();
        loop {
            if let Some(used) = self.queues[queue].driver.next_used() {
                return used;
            }
            assert!(start.elapsed() < PATIENCE, "the device does not answer");
            std::thread::yield_now();
        }
    }

    pub(crate) fn wait_for_fault(&self, count: usize) {
        let start = Instant::now();
        while self.faults.load(Ordering::SeqCst) < count {
            assert!(start.elapsed() < PATIENCE, "no fault was raised");
            std::thread::yield_now();
        }
    }

    pub(crate) fn write_header(&self, at: u64, kind: u32, sector: u64) {
        let bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.mem.write_slice(&bytes, GuestAddress(at)).unwrap();
        self.mem.write_slice(&[0xee], GuestAddress(at + 16)).unwrap();
    }

    pub(crate) fn status(&self, at: u64) -> u8 {
        self.mem.read_obj(GuestAddress(at + 16)).unwrap()
    }

    /// One request with its data at `DATA`, in one piece; returns the status and the used length.
    pub(crate) fn request(&mut self, kind: u32, sector: u64, len: u32) -> (u8, u32) {
        self.write_header(HEADERS, kind, sector);
        let mut chain = vec![Buffer { addr: HEADERS, len: 16, writable: false }];
        if len > 0 {
            chain.push(Buffer { addr: DATA, len, writable: matches!(kind, T_IN | T_GET_ID) });
        }
        chain.push(Buffer { addr: HEADERS + 16, len: 1, writable: true });
        self.queues[0].driver.add(&chain).unwrap();
        self.kick(0);
        let (_, len) = self.next_used(0);
        (self.status(HEADERS), len)
    }

    pub(crate) fn segments(&mut self, kind: u32, segments: &[(u64, u32, u32)]) -> u8 {
        let bytes: Vec<u8> = segments
            .iter()
            .flat_map(|(sector, count, flags)| {
                [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
            })
            .collect();
        self.mem.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        self.request(kind, 0, bytes.len() as u32).0
    }

    pub(crate) fn data(&self, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.mem.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        data
    }

    pub(crate) fn fill(&self, byte: u8, len: usize) {
        self.mem.write_slice(&vec![byte; len], GuestAddress(DATA)).unwrap();
    }

    pub(crate) fn contents(&self) -> Vec<u8> {
        let mut all = Vec::new();
        let mut file = std::fs::File::open(self.image.path()).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut all).unwrap();
        all
    }
}
