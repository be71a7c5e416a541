//! A queue that is stopped without waiting for its requests: whoever goes on with it answers each of them, once.
#![allow(unsafe_code, reason = "storage that waits for descriptors of its own")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use ringvm_backends::block::storage::{Geometry, Progress, Storage};
use ringvm_backends::block::{BlockDevice, BlockOptions};
use ringvm_backends::device::{Device, GuestMemory, QueueParts, Suspended};
use ringvm_backends::io::ops::Io;
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_backends::testing::driver::{Buffer, Driver};
use ringvm_backends::virtqueue::buffers::GuestIo;
use ringvm_backends::virtqueue::inflight::InflightArea;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Long enough for any machine; only a hang takes it.
const PATIENCE: Duration = Duration::from_secs(20);
const GEOMETRY: Geometry =
    Geometry { capacity: 1 << 20, logical_block: 512, physical_block: 512, readonly: false, discard: true };
const REQUESTS: u16 = 5;
const HEADERS: u64 = 0x1_0000;
const STATUS: u64 = 0x2_0000;
const DATA: u64 = 0x3_0000;

/// Reads bytes of one value; those of the first sector never come.
#[derive(Clone)]
struct Slow {
    value: u8,
    /// What reads of the first sector wait for, again and again.
    event: Arc<EventFd>,
    waits: Arc<AtomicUsize>,
    abandoned: Arc<AtomicUsize>,
}

impl Slow {
    fn wait(&self, io: &mut Io<'_>) -> Progress {
        self.waits.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the event is open for as long as the storage lives, which is longer than any request.
        unsafe { io.wait_readable(BorrowedFd::borrow_raw(self.event.as_raw_fd())) };
        Progress::Pending
    }
}

impl Storage for Slow {
    type Op = ();

    fn geometry(&self) -> &Geometry {
        &GEOMETRY
    }

    fn read(&mut self, (): &mut (), offset: u64, data: &mut GuestIo, io: &mut Io<'_>) -> Progress {
        if offset == 0 {
            return self.wait(io);
        }
        data.copy_from(&vec![self.value; data.len() as usize]);
        Progress::Done(Ok(()))
    }

    fn write(&mut self, (): &mut (), _: u64, _: &mut GuestIo, _: bool, _: &mut Io<'_>) -> Progress {
        Progress::Done(Ok(()))
    }

    fn flush(&mut self, (): &mut (), _: &mut Io<'_>) -> Progress {
        Progress::Done(Ok(()))
    }

    fn discard(&mut self, (): &mut (), _: u64, _: u64, _: bool, _: &mut Io<'_>) -> Progress {
        Progress::Done(Ok(()))
    }

    fn write_zeroes(&mut self, (): &mut (), _: u64, _: u64, _: bool, _: bool, _: &mut Io<'_>) -> Progress {
        Progress::Done(Ok(()))
    }

    fn resume(&mut self, (): &mut (), _: &mut GuestIo, result: i32, io: &mut Io<'_>) -> Progress {
        match result {
            0.. => self.wait(io),
            _ => Progress::Done(Err(io::Error::from_raw_os_error(-result))),
        }
    }

    fn abandon(&mut self, (): &mut ()) {
        self.abandoned.fetch_add(1, Ordering::Relaxed);
    }
}

struct Rig {
    pool: ReactorPool,
    mem: GuestMemory,
    driver: Driver,
    kick: EventFd,
    event: Arc<EventFd>,
    waits: Arc<AtomicUsize>,
    abandoned: Arc<AtomicUsize>,
}

impl Rig {
    /// Reads of one sector each have been made available; every second one is of the first.
    fn new() -> Self {
        let mem: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
        let mut driver = Driver::new(mem.clone(), 0, 64, 1 << 32);
        for slot in 0..u64::from(REQUESTS) {
            mem.write_slice(&[0; 16], GuestAddress(HEADERS + 16 * slot)).unwrap();
            mem.write_obj(slot % 2, GuestAddress(HEADERS + 16 * slot + 8)).unwrap();
            mem.write_obj(0xee_u8, GuestAddress(STATUS + slot)).unwrap();
            let buffers = [
                Buffer { addr: HEADERS + 16 * slot, len: 16, writable: false },
                Buffer { addr: DATA + 512 * slot, len: 512, writable: true },
                Buffer { addr: STATUS + slot, len: 1, writable: true },
            ];
            driver.add(&buffers).unwrap();
        }
        driver.publish();
        let pool = ReactorPool::new(&ReactorOptions::default()).unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let (waits, abandoned) = Default::default();
        Self { pool, mem, driver, kick: event(), event: Arc::new(event()), waits, abandoned }
    }

    fn device(&self, value: u8) -> BlockDevice {
        let [waits, abandoned] = [&self.waits, &self.abandoned].map(Arc::clone);
        let slow = Slow { value, event: Arc::clone(&self.event), waits, abandoned };
        let mut device = BlockDevice::over("disk0", slow, &BlockOptions::default(), &self.pool);
        device.ack_features(1 << 32).unwrap();
        device
    }

    fn parts(&self, end: Suspended) -> QueueParts {
        let Suspended { state: from, left } = end;
        let kick = self.kick.try_clone().unwrap();
        QueueParts { from, left, ..QueueParts::new(self.driver.ring(), self.mem.clone(), kick) }
    }

    fn wait_for_used(&self, index: u16) {
        let start = Instant::now();
        while self.driver.used_index() != index {
            assert!(start.elapsed() < PATIENCE, "{} of {index} are answered", self.driver.used_index());
            std::thread::yield_now();
        }
    }

    /// Lets the first sector be read like the others.
    fn move_to_second_sector(&self) {
        for slot in 0..u64::from(REQUESTS) {
            self.mem.write_obj(1_u64, GuestAddress(HEADERS + 16 * slot + 8)).unwrap();
        }
    }

    /// Every request was answered once, with these values.
    fn assert_answered(mut self, values: [u8; REQUESTS as usize]) {
        self.wait_for_used(REQUESTS);
        for _ in 0..REQUESTS {
            // The driver knows what is in flight, and panics over anything else.
            self.driver.next_used().unwrap();
        }
        for (slot, value) in (0..).zip(values) {
            assert_eq!(self.mem.read_obj::<u8>(GuestAddress(STATUS + slot)).unwrap(), 0);
            assert_eq!(self.mem.read_obj::<u8>(GuestAddress(DATA + 512 * slot)).unwrap(), value, "request {slot}");
        }
    }
}

#[test]
fn a_suspended_queue_does_not_wait_and_its_successor_answers_what_is_left() {
    let rig = Rig::new();
    let mut first = rig.device(1);
    first.start_queue(0, rig.parts(Suspended::default())).unwrap();
    rig.wait_for_used(2);
    let ends = first.suspend(&[0, 9]);
    let [Some(end), None] = &ends[..] else { panic!("one queue of two that were asked about: {ends:?}") };
    assert_eq!((end.state.next_avail, end.state.next_used), (REQUESTS, 2));
    assert_eq!(end.left.len(), 3);
    assert_eq!(rig.abandoned.load(Ordering::Relaxed), 3, "what is cancelled is cleared up");
    assert_eq!(first.suspend(&[0]), [Some(end.clone())], "asked again, it stands where it stood");
    drop(first);

    // Taken over and suspended once more, with all of it as it was.
    let mut second = rig.device(2);
    second.start_queue(0, rig.parts(end.clone())).unwrap();
    let mut ends = second.suspend(&[0]);
    let mut again = ends.remove(0).unwrap();
    again.left.sort_unstable();
    assert_eq!(&again, end);
    drop(second);

    rig.move_to_second_sector();
    let mut third = rig.device(3);
    third.start_queue(0, rig.parts(again)).unwrap();
    rig.wait_for_used(REQUESTS);
    assert_eq!(third.drain(0).unwrap().next_used, REQUESTS);
    rig.assert_answered([3, 1, 3, 1, 3]);
}

#[test]
fn what_a_suspended_queue_leaves_is_in_its_table() {
    let rig = Rig::new();
    let area = InflightArea::new(1, 64).unwrap();
    let parts = |end| QueueParts { inflight: area.table(0), ..rig.parts(end) };
    let mut first = rig.device(1);
    first.start_queue(0, parts(Suspended::default())).unwrap();
    rig.wait_for_used(2);
    assert_eq!(first.suspend(&[0]).remove(0).unwrap().left.len(), 3);
    drop(first);
    rig.move_to_second_sector();
    let mut second = rig.device(2);
    // Whoever has the table needs to know no more.
    second.start_queue(0, parts(Suspended::default())).unwrap();
    rig.wait_for_used(REQUESTS);
    drop(second);
    rig.assert_answered([2, 1, 2, 1, 2]);
}

#[test]
fn a_suspended_request_takes_no_further_step() {
    let rig = Rig::new();
    let mut first = rig.device(1);
    first.start_queue(0, rig.parts(Suspended::default())).unwrap();
    // Each step ends at once now, with a result.
    rig.event.write(1).unwrap();
    let start = Instant::now();
    while rig.waits.load(Ordering::Relaxed) < 100 {
        assert!(start.elapsed() < PATIENCE, "the requests do not go on");
        std::thread::yield_now();
    }
    // On a thread of its own: should it never return, the test does.
    let (send, suspended) = std::sync::mpsc::channel();
    std::thread::spawn(move || send.send(first.suspend(&[0]).remove(0).unwrap()));
    let end = suspended.recv_timeout(PATIENCE).expect("a request goes on and on");
    assert_eq!((end.state.next_avail, end.left.len()), (REQUESTS, 3));
    assert_eq!(rig.abandoned.load(Ordering::Relaxed), 3);
    rig.move_to_second_sector();
    let mut second = rig.device(2);
    second.start_queue(0, rig.parts(end)).unwrap();
    rig.wait_for_used(REQUESTS);
    drop(second);
    rig.assert_answered([2, 1, 2, 1, 2]);
}
