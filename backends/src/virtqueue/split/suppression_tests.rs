//! A driver and a device that sleep and wake each other, through all interleavings within a bound, under the memory
//! model of the language (loom). The device's steps are those of the queue; around them it does as the I/O thread
//! does.
//!
//! The bound is on preemptions, as most mistakes need few; LOOM_MAX_PREEMPTIONS raises it, for hours if need be.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize as Count, Ordering::Relaxed as Uncontended};
use std::sync::{Arc, OnceLock};

use loom::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};
use loom::thread::{self, Thread};
use virtio_bindings::virtio_ring::VRING_USED_F_NO_NOTIFY;

use super::*;

/// Most chains that a driver offers.
const MOST: usize = 3;

/// The step that is left out, to see that the model notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    None,
    /// The barrier between the device's index and the driver's wish.
    InterruptFence,
    /// The barrier between the device's wish and the driver's index.
    KickFence,
    /// The device sleeps, whatever it sees, once it has asked for a kick.
    SecondLook,
    /// A device that takes over from another waits for a kick before it looks at the ring.
    FirstLook,
    /// It does not serve the heads that the other has left.
    Left,
    /// It begins after the chains that the other has served, as if none was left: it takes those again.
    Position,
}

/// A ring in memory that both sides share.
struct Ring {
    avail_flags: AtomicU16,
    avail_index: AtomicU16,
    avail: [AtomicU16; MOST],
    used_event: AtomicU16,
    used_flags: AtomicU16,
    used_index: AtomicU16,
    used: [AtomicU16; MOST],
    avail_event: AtomicU16,
    kick: Bell,
    call: Bell,
}

impl Ring {
    fn new() -> Self {
        let word = || AtomicU16::new(0);
        Self {
            avail_flags: word(),
            avail_index: word(),
            avail: std::array::from_fn(|_| word()),
            used_event: word(),
            used_flags: word(),
            used_index: word(),
            used: std::array::from_fn(|_| word()),
            avail_event: word(),
            kick: Bell::default(),
            call: Bell::default(),
        }
    }
}

/// An eventfd, and the one thread that waits for it: it sees every edge once, also one from before.
#[derive(Default)]
struct Bell {
    rung: AtomicBool,
    sleeper: OnceLock<Thread>,
}

impl Bell {
    fn ring(&self) {
        // Not a store: loom knows the order of two changes for certain only if each has read the one before.
        self.rung.swap(true, Ordering::Release);
        if let Some(sleeper) = self.sleeper.get() {
            sleeper.unpark();
        }
    }

    fn wait(&self) {
        while !self.rung.swap(false, Ordering::Acquire) {
            thread::park();
        }
    }
}

/// The device's view of a ring, maybe without its barrier.
struct View<'a> {
    ring: &'a Ring,
    fences: bool,
}

impl Words for View<'_> {
    fn avail_flags(&self) -> u16 {
        self.ring.avail_flags.load(Ordering::Relaxed)
    }

    fn avail_index(&self) -> u16 {
        self.ring.avail_index.load(Ordering::Acquire)
    }

    fn used_event(&self) -> u16 {
        self.ring.used_event.load(Ordering::Relaxed)
    }

    fn set_used_flags(&self, flags: u16) {
        self.ring.used_flags.store(flags, Ordering::Relaxed);
    }

    fn set_avail_event(&self, index: u16) {
        self.ring.avail_event.store(index, Ordering::Relaxed);
    }

    fn fence(&self) {
        if self.fences {
            fence(Ordering::SeqCst);
        }
    }
}

/// The driver (2.7.13 and 2.7.14): offers `total` chains, at most `depth` at once, and sleeps while it can't go on.
struct Driver<'a> {
    ring: &'a Ring,
    event_idx: bool,
    seen: u16,
    /// How often each head came back.
    answers: [u16; MOST],
}

impl<'a> Driver<'a> {
    fn new(ring: &'a Ring, event_idx: bool) -> Self {
        Self { ring, event_idx, seen: 0, answers: [0; MOST] }
    }

    fn run(mut self, total: u16, depth: u16) {
        for index in 0..total {
            while index - self.seen == depth {
                self.wait();
            }
            self.offer(index);
        }
        while self.seen < total {
            self.wait();
        }
        assert!(self.answers[..total.into()].iter().all(|&count| count == 1), "{:?}", self.answers);
    }

    fn offer(&self, index: u16) {
        let ring = self.ring;
        // So that heads differ from an entry that was not written.
        ring.avail[usize::from(index)].store(index + 1, Ordering::Relaxed);
        ring.avail_index.store(index + 1, Ordering::Release);
        fence(Ordering::SeqCst);
        let kick = if self.event_idx {
            ring.avail_event.load(Ordering::Relaxed) == index
        } else {
            u32::from(ring.used_flags.load(Ordering::Relaxed)) & VRING_USED_F_NO_NOTIFY == 0
        };
        if kick {
            ring.kick.ring();
        }
    }

    /// Takes what has come back, or sleeps until something has.
    fn wait(&mut self) {
        if self.take() {
            return;
        }
        if self.event_idx {
            self.ring.used_event.store(self.seen, Ordering::Relaxed);
        } else {
            self.ring.avail_flags.store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        if self.take() {
            return;
        }
        self.ring.call.wait();
        if !self.event_idx {
            self.ring.avail_flags.store(VRING_AVAIL_F_NO_INTERRUPT as u16, Ordering::Relaxed);
        }
    }

    fn take(&mut self) -> bool {
        let index = self.ring.used_index.load(Ordering::Acquire);
        if index == self.seen {
            return false;
        }
        let head = self.ring.used[usize::from(self.seen)].load(Ordering::Relaxed);
        self.answers[usize::from(head) - 1] += 1;
        self.seen += 1;
        true
    }
}

/// A queue in service, as `Queue`, `Service` and the I/O thread have it.
struct Device<'a> {
    ring: &'a Ring,
    event_idx: bool,
    flaw: Flaw,
    next_avail: u16,
    next_used: u16,
    published: u16,
    /// Taken and not given back, the oldest first.
    left: Vec<u16>,
}

impl<'a> Device<'a> {
    fn new(ring: &'a Ring, event_idx: bool, flaw: Flaw) -> Self {
        Self { ring, event_idx, flaw, next_avail: 0, next_used: 0, published: 0, left: Vec::new() }
    }

    fn view(&self, without: Flaw) -> View<'a> {
        View { ring: self.ring, fences: self.flaw != without }
    }

    /// `Queue::pop`, as often as there is something. Returns whether there was.
    fn take(&mut self) -> bool {
        let avail = self.ring.avail_index.load(Ordering::Acquire);
        let any = avail != self.next_avail;
        if any && !self.event_idx {
            // `Queue::disable_kicks`.
            self.ring.used_flags.store(VRING_USED_F_NO_NOTIFY as u16, Ordering::Relaxed);
        }
        while self.next_avail != avail {
            self.left.push(self.ring.avail[usize::from(self.next_avail)].load(Ordering::Relaxed));
            self.next_avail += 1;
        }
        any
    }

    /// `Queue::complete`, for the oldest.
    fn complete(&mut self) {
        let head = self.left.remove(0);
        self.ring.used[usize::from(self.next_used)].store(head, Ordering::Relaxed);
        self.next_used += 1;
    }

    /// `Queue::notify`.
    fn publish(&mut self) {
        if self.published == self.next_used {
            return;
        }
        let old = std::mem::replace(&mut self.published, self.next_used);
        self.ring.used_index.store(self.next_used, Ordering::Release);
        if wants_interrupt(&self.view(Flaw::InterruptFence), self.event_idx, old, self.next_used) {
            self.ring.call.ring();
        }
    }

    /// `Queue::enable_kicks`, and the look at what it returns (`Core::run`). Returns whether to go on.
    fn arm(&self) -> bool {
        ask_for_kick(&self.view(Flaw::KickFence), self.event_idx, self.next_avail) && self.flaw != Flaw::SecondLook
    }

    /// Serves until `total` chains are answered: turn, publish, arm, park.
    fn run(&mut self, total: u16) {
        loop {
            let worked = self.take() || !self.left.is_empty();
            while !self.left.is_empty() {
                self.complete();
            }
            self.publish();
            if self.next_used == total {
                return;
            }
            if !worked && !self.arm() {
                self.ring.kick.wait();
            }
        }
    }
}

/// Runs the driver on this thread and the server of its queue on another, until both have finished.
fn together(event_idx: bool, total: u16, depth: u16, serve: impl FnOnce(&Ring) + 'static) {
    let ring = Arc::new(Ring::new());
    let theirs = Arc::clone(&ring);
    drop(ring.call.sleeper.set(thread::current()));
    let device = thread::spawn(move || serve(&theirs));
    drop(ring.kick.sleeper.set(device.thread().clone()));
    // The model ends with both threads. Joined, one would be woken by a late ring of its bell, which loom does not
    // expect.
    Driver::new(&ring, event_idx).run(total, depth);
}

/// Runs a model through its interleavings. Returns how many there were, or that one of them failed.
fn explore(preemptions: usize, model: impl Fn() + Send + Sync + 'static) -> Result<usize, ()> {
    let explored = Arc::new(Count::new(0));
    let count = Arc::clone(&explored);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    let checked = catch_unwind(AssertUnwindSafe(|| {
        builder.check(move || {
            count.fetch_add(1, Uncontended);
            model();
        });
    }));
    checked.map(|()| explored.load(Uncontended)).map_err(drop)
}

/// A driver and a device that are there all the time.
fn awake(preemptions: usize, event_idx: bool, total: u16, depth: u16, flaw: Flaw) -> Result<usize, ()> {
    explore(preemptions, move || {
        together(event_idx, total, depth, move |ring| Device::new(ring, event_idx, flaw).run(total));
    })
}

/// A device that is suspended with requests in flight; another takes over while the driver offers more.
fn suspended(preemptions: usize, event_idx: bool, total: u16, flaw: Flaw) -> Result<usize, ()> {
    let serve = move |ring: &Ring| {
        let mut first = Device::new(ring, event_idx, flaw);
        // It takes the chains that are there by that time, and answers some of them before it leaves.
        if !first.take() && !first.arm() {
            ring.kick.wait();
        }
        first.take();
        if first.left.len() > 1 {
            first.complete();
        }
        first.publish();
        // `Suspended`, and `Queue::take_left`.
        let mut second = Device::new(ring, event_idx, flaw);
        (second.next_avail, second.next_used, second.published) = (first.next_avail, first.next_used, first.next_used);
        second.left = first.left;
        match flaw {
            Flaw::FirstLook => ring.kick.wait(),
            Flaw::Left => second.left.clear(),
            Flaw::Position => second.next_avail = second.next_used,
            _ => {}
        }
        // `Vring::start` raises the interrupt once.
        ring.call.ring();
        second.run(total);
    };
    explore(preemptions, move || together(event_idx, total, total, serve))
}

#[test]
fn model_no_kick_and_no_interrupt_is_lost() {
    for event_idx in [true, false] {
        for (total, depth) in [(2, 1), (2, 2), (3, 1)] {
            let explored = awake(3, event_idx, total, depth, Flaw::None);
            println!("event_idx {event_idx}, {total} chains, {depth} at once: {explored:?} interleavings");
            assert!(explored.is_ok_and(|count| count > 100));
        }
    }
}

#[test]
fn model_what_was_suspended_is_served_once() {
    for event_idx in [true, false] {
        let explored = suspended(3, event_idx, 3, Flaw::None);
        println!("event_idx {event_idx}, suspended: {explored:?} interleavings");
        assert!(explored.is_ok_and(|count| count > 100));
    }
}

#[test]
fn model_finds_each_step_that_is_left_out() {
    for event_idx in [true, false] {
        for flaw in [Flaw::InterruptFence, Flaw::KickFence, Flaw::SecondLook] {
            assert_eq!(awake(3, event_idx, 2, 1, flaw), Err(()), "{flaw:?}, event_idx {event_idx}");
        }
        for flaw in [Flaw::FirstLook, Flaw::Left, Flaw::Position] {
            assert_eq!(suspended(3, event_idx, 3, flaw), Err(()), "{flaw:?}, event_idx {event_idx}");
        }
    }
}
