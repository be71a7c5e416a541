//! Receivers over sources that fail, go away and come back in ways that a real port rarely does.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bolero::TypeGenerator;
use rustix::event::{EventfdFlags, eventfd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::io::queues::Queues;
use crate::io::reactor::{ReactorOptions, ReactorPool};
use crate::io::service::TaskHandle;
use crate::testing::driver::{Buffer, Descriptor, Driver};
use crate::virtqueue::interrupt::Interrupt;
use crate::virtqueue::split::{Queue, RING_FEATURES};
use crate::virtqueue::{End, GuestMemory, QueueParts, QueueState, Suspended};

const DATA: u64 = 0x10_0000;
const SIZE: u16 = 64;
const PATIENCE: Duration = Duration::from_secs(20);

/// Frames come from one descriptor while it is enabled, and from another while it is not.
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

/// A descriptor that reads with EBADFD: the tun driver, without an interface. `None` where there is no tun driver and
/// the test is allowed by name to be missing, as `tests/run` does.
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
    assert_eq!(
        rig.queues.stop(&[0], End::Drained).wait(),
        [Some(Suspended::default())],
        "its buffers are the driver's again"
    );
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

/// Reads a file that is always readable and brings nothing: the results of the reads are made up.
struct Scripted {
    fd: OwnedFd,
    enabled: Arc<AtomicBool>,
    frame_len: u64,
    merges: bool,
    /// Each bit that is set drops a frame.
    drops: u8,
    received: u32,
}

impl Source for Scripted {
    const OPS: &'static [&'static str] = &["received", "dropped"];

    fn frame_len(&self) -> u64 {
        self.frame_len
    }

    fn merges(&self) -> bool {
        self.merges
    }

    fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn received(&mut self, room: &GuestIo, len: u64, chains: u16) -> Verdict {
        assert!((1..=room.len()).contains(&len) && chains > 0);
        self.received += 1;
        if self.drops >> (self.received % 8) & 1 == 1 { Verdict::Drop(1) } else { Verdict::Deliver(len) }
    }
}

/// The next event for a receiver.
#[derive(Clone, Debug, TypeGenerator)]
enum Event {
    /// Buffers are offered: the pieces of each.
    Offer(Vec<(u8, u8)>),
    /// Something is written into the ring that no driver writes.
    Spoil {
        index: u16,
        addr: u64,
        len: u32,
        flags: u16,
        next: u16,
        avail: u16,
    },
    /// A turn, and the results of its reads.
    Turn(Vec<Outcome>),
    Enable(bool),
}

#[derive(Clone, Copy, Debug, TypeGenerator)]
enum Outcome {
    /// As many bytes, within the room.
    Bytes(u16),
    Error(u8),
}

impl Outcome {
    fn result(self, room: u64) -> i32 {
        const ERRORS: [i32; 13] = [
            0,
            libc::EAGAIN,
            libc::EAGAIN,
            libc::EINTR,
            libc::ECANCELED,
            libc::EOPNOTSUPP,
            libc::EBADFD,
            libc::EINVAL,
            libc::EIO,
            libc::EMSGSIZE,
            libc::ENOBUFS,
            libc::EFAULT,
            libc::ENODEV,
        ];
        match self {
            Self::Bytes(count) if room > 0 => 1 + (u64::from(count) % room.min(1 << 20)) as i32,
            Self::Bytes(_) => 0,
            Self::Error(which) => -ERRORS[usize::from(which) % ERRORS.len()],
        }
    }
}

/// A receiver and its ring, a turn at a time.
struct Stage {
    ring: Ring,
    receiver: Receiver<Scripted>,
}

impl Stage {
    /// Enters the pushed operations and waits for them; reads end as `outcomes` say, and with nothing to read after
    /// those.
    fn settle(&mut self, outcomes: &mut dyn Iterator<Item = Outcome>) {
        let mut batch = Vec::new();
        loop {
            self.ring.submit().unwrap();
            if self.ring.in_flight() == 0 {
                return;
            }
            if !self.ring.has_completions() {
                continue;
            }
            self.ring.reap(&mut batch);
            for &(token, _) in &batch {
                let result = match self.receiver.reads.get(token.slot as usize) {
                    Some(read) => outcomes.next().unwrap_or(Outcome::Error(1)).result(read.room().len()),
                    None => 1,
                };
                self.receiver.completed(token.slot, result, Instant::now(), &mut self.ring);
            }
        }
    }
}

/// Whatever the driver offers and the reads bring, each buffer comes back once and none is lost, unless the ring was
/// broken.
#[test]
fn fuzz_receiver() {
    const SIZE: u16 = 16;
    let mem: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap());
    let (here, _peer) = UnixDatagram::pair().unwrap();
    here.shutdown(std::net::Shutdown::Read).unwrap();
    bolero::check!().with_type::<(Vec<Event>, u16, u8, bool, bool, bool)>().for_each(
        |(events, frame_len, drops, merges, in_order, suspends)| {
            let mut driver = Driver::new(Arc::clone(&mem), 0, SIZE, RING_FEATURES);
            let enabled = Arc::new(AtomicBool::new(true));
            let frame_len = 1 + u64::from(frame_len % 300);
            let source = Scripted {
                fd: here.as_fd().try_clone_to_owned().unwrap(),
                enabled: Arc::clone(&enabled),
                frame_len,
                merges: *merges,
                drops: *drops,
                received: 0,
            };
            let faults = Arc::new(AtomicUsize::new(0));
            let counter = Arc::clone(&faults);
            let fault = Interrupt::Call(Arc::new(move || {
                counter.fetch_add(1, Ordering::Relaxed);
            }));
            let mut queue =
                Queue::new(Arc::clone(&mem), &driver.ring(), RING_FEATURES, QueueState::default(), Interrupt::None)
                    .unwrap();
            queue.in_order = *in_order;
            let service = Service::new(tracing::Span::none(), queue, fault, TaskHandle::unthreaded(0), Scripted::OPS);
            let mut stage = Stage { ring: Ring::new().unwrap(), receiver: Receiver::new(service, source) };
            let (mut offered, mut used, mut spoilt) = (0, 0, false);
            for event in events.iter().take(32) {
                match event {
                    Event::Offer(buffers) => {
                        for &(pieces, len) in buffers.iter().take(usize::from(SIZE)) {
                            // Of a piece or a few; in one case of many nothing to write to.
                            let writable = pieces != u8::MAX;
                            let pieces = (0..=u64::from(pieces % 3)).map(|piece| Buffer {
                                addr: DATA + piece * 0x100,
                                len: len.into(),
                                writable,
                            });
                            offered += usize::from(driver.add(&pieces.collect::<Vec<_>>()).is_some());
                        }
                        driver.publish();
                    }
                    &Event::Spoil { index, addr, len, flags, next, avail } => {
                        spoilt = true;
                        let desc = Descriptor { addr: addr & 0x7f_ffff, len: len & 0xffff, flags: flags & 7, next };
                        driver.write_descriptor(driver.ring().desc, index % SIZE, desc);
                        driver.write_avail_entry(index, next % (SIZE + 1));
                        if avail.is_multiple_of(4) {
                            driver.write_avail_index(avail / 4);
                        }
                    }
                    Event::Turn(outcomes) => {
                        stage.receiver.turn(&mut stage.ring);
                        stage.settle(&mut outcomes.iter().copied());
                        stage.receiver.service().publish();
                        assert!(stage.receiver.is_idle());
                        if !spoilt {
                            used += std::iter::from_fn(|| driver.next_used()).count();
                        }
                    }
                    Event::Enable(on) => enabled.store(*on, Ordering::Release),
                }
            }
            let end = if *suspends { End::Suspended } else { End::Drained };
            stage.receiver.service().stop(end);
            stage.receiver.stop(&mut stage.ring);
            stage.settle(&mut std::iter::empty());
            assert!(stage.receiver.is_idle());
            stage.receiver.give_back();
            stage.receiver.service().publish();
            if spoilt {
                return;
            }
            used += std::iter::from_fn(|| driver.next_used()).count();
            let left = stage.receiver.service().end();
            if faults.load(Ordering::Relaxed) == 0 {
                // Buffers that were not used are before the next device as if they had never been taken, or are
                // named.
                assert!(*suspends || left.left.is_empty());
                assert_eq!(usize::from(left.state.next_used), used);
                assert_eq!(usize::from(left.state.next_avail), used + left.left.len(), "of {offered}");
            }
            assert!(used <= offered);
        },
    );
}
