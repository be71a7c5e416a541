//! Receivers over sources that fail, go away and come back in ways that a real port does only now and then.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::device::{GuestMemory, QueueParts, QueueState};
use crate::driver::{Buffer, Driver};
use crate::queues::Queues;
use crate::reactor::{ReactorOptions, ReactorPool};

const DATA: u64 = 0x10_0000;
const SIZE: u16 = 64;
const PATIENCE: Duration = Duration::from_secs(20);

/// Frames come from one descriptor while it is enabled; while not, another is read.
struct Fake {
    here: Arc<OwnedFd>,
    away: Option<OwnedFd>,
    enabled: Arc<AtomicBool>,
    least_room: u64,
    merged_len: Option<u64>,
    looked: Arc<AtomicUsize>,
    failed: Arc<AtomicBool>,
}

impl Source for Fake {
    const OPS: &'static [&'static str] = &["received"];

    fn frame_len(&self) -> u64 {
        self.merged_len.unwrap_or(64)
    }

    fn merges(&self) -> bool {
        self.merged_len.is_some()
    }

    fn least_room(&self) -> u64 {
        self.least_room
    }

    fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    fn failed(&mut self) {
        self.failed.store(true, Ordering::Release);
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.looked.fetch_add(1, Ordering::AcqRel);
        match &self.away {
            Some(away) if !self.enabled() => away.as_fd(),
            _ => self.here.as_fd(),
        }
    }

    fn received(&mut self, _: &GuestIo, len: u64, _: u16) -> Verdict {
        Verdict::Deliver(len)
    }
}

struct Rig {
    queues: Queues,
    driver: Driver,
    kick: EventFd,
    mem: GuestMemory,
    offered: u64,
    enabled: Arc<AtomicBool>,
    looked: Arc<AtomicUsize>,
    failed: Arc<AtomicBool>,
}

impl Rig {
    fn new(here: OwnedFd, away: Option<OwnedFd>, least_room: u64) -> Self {
        Self::of(SIZE, here, away, least_room, None)
    }

    /// With a ring of its own size; frames of up to `merged_len` are spread over buffers if there is one.
    fn of(size: u16, here: OwnedFd, away: Option<OwnedFd>, least_room: u64, merged_len: Option<u64>) -> Self {
        let pool = ReactorPool::new(&ReactorOptions { count: 1, ..ReactorOptions::default() }).unwrap();
        let mem: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap());
        let driver = Driver::new(Arc::clone(&mem), 0, size, 0);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let (enabled, looked, failed) = (Arc::new(AtomicBool::new(true)), Arc::default(), Arc::default());
        let source = Fake {
            here: Arc::new(here),
            away,
            enabled: Arc::clone(&enabled),
            least_room,
            merged_len,
            looked: Arc::clone(&looked),
            failed: Arc::clone(&failed),
        };
        let parts = QueueParts::new(driver.ring(), Arc::clone(&mem), kick.try_clone().unwrap());
        let mut queues = Queues::new("test", 1, pool);
        queues.start_receiver(0, parts, 0, move || source).unwrap();
        Self { queues, driver, kick, mem, offered: 0, enabled, looked, failed }
    }

    fn offer(&mut self, lens: &[u32]) {
        for &len in lens {
            let addr = DATA + self.offered % 1024 * 64;
            self.offered += 1;
            self.driver.add(&[Buffer { addr, len, writable: true }]).unwrap();
        }
        self.driver.publish();
        self.kick.write(1).unwrap();
    }

    /// The length of the next buffer that comes back.
    fn used(&mut self) -> u32 {
        let start = Instant::now();
        loop {
            if let Some((_, len)) = self.driver.next_used() {
                return len;
            }
            assert!(start.elapsed() < PATIENCE, "no buffer comes back");
            std::thread::yield_now();
        }
    }

    fn counts(&self) -> (u64, u64, u64) {
        let total = self.queues.stats().total().unwrap();
        (total.ops[0].count, total.ops[0].errors, total.bad_chains)
    }

    /// Waits until the source is left alone.
    fn settle(&self) {
        let start = Instant::now();
        let mut before = usize::MAX;
        loop {
            let now = self.looked.load(Ordering::Acquire);
            if now == before {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "the source is read again and again");
            before = now;
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// What is read with EBADFD: the tun driver, of no interface. `None` where there is none and that was allowed by name, as
/// `tests/run` has it.
fn unattached() -> Option<OwnedFd> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
    match opened {
        Ok(file) => Some(file.into()),
        Err(why) => {
            let allowed = std::env::var("RINGVM_ALLOW_MISSING").unwrap_or_default();
            assert!(allowed.split(',').any(|name| name.trim() == "tap"), "this test needs /dev/net/tun: {why}");
            eprintln!("skipped: needs `tap`, allowed to be missing: {why}");
            None
        }
    }
}

#[test]
fn pitfall_40_a_source_whose_reads_fail_while_it_is_disabled_is_left_alone_until_the_queue_is_rung() {
    let Some(away) = unattached() else { return };
    let (here, peer) = UnixDatagram::pair().unwrap();
    let mut rig = Rig::new(here.into(), Some(away), 1);
    rig.offer(&[64; 40]);
    // Oftener than strikes are forgiven.
    for round in 0..u32::from(MAX_STRIKES) * 2 {
        peer.send(&[1; 30]).unwrap();
        assert_eq!(rig.used(), 30);
        rig.settle();
        rig.enabled.store(false, Ordering::Release);
        // The poll that waits finds the first of these, and the reads after it fail.
        peer.send(&[2; 40]).unwrap();
        peer.send(&[3; 50]).unwrap();
        rig.settle();
        assert_eq!(rig.driver.next_used(), None, "round {round}");
        rig.enabled.store(true, Ordering::Release);
        rig.kick.write(1).unwrap();
        assert_eq!((rig.used(), rig.used()), (40, 50), "round {round}");
    }
    assert!(!rig.failed.load(Ordering::Acquire));
    assert_eq!(rig.counts(), (u64::from(MAX_STRIKES) * 6, 0, 0));
}

#[test]
fn pitfall_35_a_source_whose_reads_fail_while_it_is_enabled_is_given_up_and_left_alone() {
    let Some(gone) = unattached() else { return };
    let mut rig = Rig::new(gone, None, 1);
    rig.offer(&[64; 40]);
    let start = Instant::now();
    while !rig.failed.load(Ordering::Acquire) {
        assert!(start.elapsed() < PATIENCE, "a source that fails each time is never given up");
    }
    rig.settle();
    assert_eq!(rig.queues.stop(0).unwrap(), QueueState::default(), "its buffers are the driver's again");
}

#[test]
fn pitfall_34_a_read_that_is_refused_is_counted_and_the_next_ones_go_on() {
    // An event is read in eight bytes, and with EINVAL in less.
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let mut rig = Rig::new(event.try_clone().unwrap(), None, 1);
    rig.offer(&[4]);
    for value in 1..20u64 {
        rig.offer(&[8]);
        rustix::io::write(&event, &value.to_ne_bytes()).unwrap();
        assert_eq!(rig.used(), 8, "value {value}");
        let (received, lost, _) = rig.counts();
        assert_eq!(received - lost, value);
    }
    assert!(rig.counts().1 > u64::from(MAX_STRIKES), "reads were refused all the time");
    assert!(!rig.failed.load(Ordering::Acquire));
}

#[test]
fn a_buffer_that_holds_no_frame_comes_back_empty_and_loses_none() {
    let (here, peer) = UnixDatagram::pair().unwrap();
    let mut rig = Rig::new(here.into(), None, 26);
    rig.offer(&[8, 25, 26, 64]);
    assert_eq!((rig.used(), rig.used()), (0, 0));
    for len in [26, 30] {
        peer.send(&vec![len as u8; len]).unwrap();
        assert_eq!(rig.used(), len as u32);
    }
    let mut last = [0; 30];
    rig.mem.read_slice(&mut last, GuestAddress(DATA + 3 * 64)).unwrap();
    assert_eq!(last, [30; 30]);
    // More of them than the ring holds: each turn takes a ring's worth at most, and none is kept.
    for _ in 0..3 {
        rig.offer(&[1; SIZE as usize]);
        for _ in 0..SIZE {
            assert_eq!(rig.used(), 0);
        }
    }
    rig.offer(&[64]);
    peer.send(&[7; 33]).unwrap();
    assert_eq!(rig.used(), 33);
    assert_eq!(rig.counts(), (3, 0, 2 + 3 * u64::from(SIZE)));
}

#[test]
fn a_ring_of_more_buffers_than_the_kernel_takes_pieces_goes_on_with_those_that_it_takes() {
    let (here, peer) = UnixDatagram::pair().unwrap();
    let mut rig = Rig::of(4096, here.into(), None, 1, Some(65_550));
    rig.offer(&[2; 4096]);
    for round in 0..3u8 {
        peer.send(&[round; 1600]).unwrap();
        assert_eq!((0..800).map(|_| rig.used()).sum::<u32>(), 1600, "round {round}");
    }
    assert_eq!(rig.counts(), (3, 0, 0));
}
