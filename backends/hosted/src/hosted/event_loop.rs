//! A thread of a hosted backend: kicks, descriptors of the backend's own, and calls of its device.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TryRecvError};
use ringvm_backends::device::{DeviceError, GuestMemory, QueueState, RingConfig, Suspended};
use ringvm_backends::virtqueue::interrupt::Interrupt;
use tracing::{error, warn};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_queue::QueueT;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::STOP_PATIENCE;
use super::contact::{Contact, Panics};
use super::memory::Lease;
use crate::listeners::Listeners;

/// What events of the thread's own carry: beyond the 16 bits that a backend's have.
const KICK: u64 = 1 << 32;
const CALL: u64 = 2 << 32;
const WAKE: u64 = 3 << 32;
const KIND: u64 = !0 << 32;

/// How long to wait before a backend that has failed, and fails again, is called once more.
const FAILED_PAUSE: Duration = Duration::from_millis(50);

/// How often to look whether a backend has given the buffers of a stopping queue back, in milliseconds.
const LOOK_PAUSE: i32 = 5;

/// An aligned address where no guest has memory.
const NOWHERE: u64 = !0xf;

/// A call on one of the backend's threads.
pub(super) type Call<B> = Box<dyn FnOnce(&mut EventLoop<B>) + Send>;

/// A queue's parts, as the thread needs them.
pub(super) struct Ring<Bitmap: vm_memory::bitmap::Bitmap> {
    pub(super) ring: RingConfig,
    pub(super) mem: GuestMemory,
    pub(super) lease: Lease<Bitmap>,
    pub(super) from: QueueState,
    pub(super) kick: EventFd,
    pub(super) call: Interrupt,
    pub(super) fault: Interrupt,
}

/// Why a queue does not start.
pub(super) enum StartError {
    Refused(&'static str),
    Host(io::Error),
}

impl StartError {
    pub(super) fn into_device_error(self, device: &str, index: u16) -> DeviceError {
        let device = device.to_owned();
        match self {
            Self::Refused(reason) => DeviceError::Queue { device, index, reason },
            Self::Host(source) => DeviceError::Host { device, what: "starting a queue", source },
        }
    }
}

impl From<io::Error> for StartError {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

/// A descriptor in the thread's epoll set, which it leaves when this is dropped.
struct Watch {
    epoll: Arc<Epoll>,
    fd: RawFd,
}

impl Watch {
    /// The descriptor stays open for longer than this.
    fn new(epoll: &Arc<Epoll>, fd: RawFd, events: EventSet, data: u64) -> io::Result<Self> {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, data))?;
        Ok(Self { epoll: Arc::clone(epoll), fd })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It was added, so this can't fail. The descriptor's end is not enough: others may have the event, too.
        let _ = self.epoll.ctl(ControlOperation::Delete, self.fd, EpollEvent::default());
    }
}

/// Where the backend's calls come in on their way to a driver that is not reached by an eventfd of its own.
struct Relay {
    _watch: Watch,
    event: EventFd,
    driver: Interrupt,
}

impl Relay {
    /// Passes a call on, if there is one.
    fn pass(&self) {
        // Nonblocking, and ours alone.
        if self.event.read().is_ok() {
            self.driver.raise();
        }
    }
}

/// A queue that runs.
struct Running<Bitmap: vm_memory::bitmap::Bitmap> {
    /// Dropped before anybody is told: whoever is told may unmap the memory.
    lease: Lease<Bitmap>,
    /// Of the kick. Nobody listens to it once the queue is to stop.
    kick: Option<Watch>,
    relay: Option<Relay>,
    leaving: Option<Leaving>,
}

/// A queue that is to stop.
struct Leaving {
    /// When it stops without what its backend has taken.
    deadline: Instant,
    /// Whoever waits for the end.
    tellers: Vec<Sender<Suspended>>,
}

/// Descriptors of the backend's own.
struct Registrar {
    epoll: Arc<Epoll>,
    queues: usize,
}

impl Registrar {
    fn control(&self, operation: ControlOperation, fd: RawFd, events: EventSet, data: u64) -> io::Result<()> {
        if data <= self.queues as u64 || data > u64::from(u16::MAX) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.epoll.ctl(operation, fd, EpollEvent::new(events, data))
    }
}

impl Listeners for Registrar {
    fn register_listener(&self, fd: RawFd, events: EventSet, data: u64) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, events, data)
    }

    fn unregister_listener(&self, fd: RawFd, events: EventSet, data: u64) -> io::Result<()> {
        self.control(ControlOperation::Delete, fd, events, data)
    }
}

/// One thread of a backend.
pub(super) struct EventLoop<B: VhostUserBackend> {
    name: String,
    thread: usize,
    backend: B,
    queues: usize,
    /// Dropped before the vrings, which own the descriptors of kicks.
    running: Vec<Option<Running<B::Bitmap>>>,
    vrings: Vec<B::Vring>,
    /// The backend has failed: its queues need a reset.
    failed: bool,
    epoll: Arc<Epoll>,
    inbox: Receiver<Call<B>>,
    contact: Arc<Contact>,
    /// The device's numbers of this thread's queues.
    numbers: Vec<usize>,
    kicks: Arc<[AtomicU64]>,
}

impl<B: VhostUserBackend> EventLoop<B> {
    pub(super) fn new(
        (name, thread): (String, usize),
        (backend, queues, vrings): (B, usize, Vec<B::Vring>),
        (inbox, contact): (Receiver<Call<B>>, Arc<Contact>),
        (numbers, kicks): (Vec<usize>, Arc<[AtomicU64]>),
    ) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new()?);
        epoll.ctl(ControlOperation::Add, contact.wake.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE))?;
        let running = vrings.iter().map(|_| None).collect();
        let failed = false;
        Ok(Self { name, thread, backend, queues, running, vrings, failed, epoll, inbox, contact, numbers, kicks })
    }

    pub(super) fn listeners(&self) -> Arc<dyn Listeners> {
        Arc::new(Registrar { epoll: Arc::clone(&self.epoll), queues: self.queues })
    }

    pub(super) fn backend(&self) -> &B {
        &self.backend
    }

    /// Serves until the device goes or the backend panics.
    pub(super) fn run(mut self, panics: &Panics) {
        let (name, contact) = (self.name.clone(), Arc::clone(&self.contact));
        let ended = catch_unwind(AssertUnwindSafe(|| self.serve()));
        // What is left of the loop is dropped first: whoever waits for an answer of it waits no longer.
        drop(catch_unwind(AssertUnwindSafe(move || drop(self))));
        match &ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => error!(device = name, %error, "the backend's thread can't wait for events"),
            Err(_) => error!(device = name, "the backend has panicked, the device needs a reset"),
        }
        contact.faults.raise();
        if ended.is_err() {
            panics.tell(&name);
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut events = vec![EpollEvent::default(); 64];
        loop {
            let leaves = self.running.iter().flatten().any(|ring| ring.leaving.is_some());
            let count = match self.epoll.wait(if leaves { LOOK_PAUSE } else { -1 }, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            for event in &events[..count] {
                self.event(event.data(), EventSet::from_bits_truncate(event.events()));
            }
            loop {
                self.make_up();
                match self.inbox.try_recv() {
                    Ok(call) => call(self),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return Ok(()),
                }
            }
            self.let_go();
            self.contact.is_back();
        }
    }

    /// Stops queues whose ends nobody waits for, because the thread did not come back when they were to stop, and makes up for a
    /// reset.
    fn make_up(&mut self) {
        let mut places = self.contact.take_unwanted();
        while places != 0 {
            let place = places.trailing_zeros() as usize;
            places &= places - 1;
            self.stop(place, Instant::now() + STOP_PATIENCE, None);
        }
        if self.contact.take_reset() {
            self.backend.reset_device();
        }
    }

    fn event(&mut self, data: u64, events: EventSet) {
        // The event may be a kick of such a queue.
        self.make_up();
        let place = (data & !KIND) as usize;
        match data & KIND {
            // The counter of a kick is never read: another process may have it too. Its edges count.
            KICK => {
                if let Some(number) = self.numbers.get(place) {
                    self.kicks[*number].fetch_add(1, Ordering::Relaxed);
                }
                self.kicked(place);
            }
            CALL => {
                if let Some(Some(Running { relay: Some(relay), .. })) = self.running.get(place) {
                    relay.pass();
                }
            }
            WAKE => {
                let _ = self.contact.wake.read();
            }
            _ => self.call_backend(place as u16, events),
        }
    }

    /// Has the backend look at a queue.
    fn kicked(&mut self, place: usize) {
        let serves = self.running.get(place).and_then(Option::as_ref).is_some_and(|ring| ring.leaving.is_none());
        if serves {
            self.call_backend(place as u16, EventSet::IN);
        }
    }

    fn call_backend(&mut self, event: u16, events: EventSet) {
        // Descriptors of the backend's own stay its business: one that it did not look at would keep this thread busy.
        if self.failed && usize::from(event) < self.vrings.len() {
            return;
        }
        if let Err(error) = self.backend.handle_event(event, events, &self.vrings, self.thread) {
            if self.failed {
                // The descriptor may report the same event without end.
                std::thread::sleep(FAILED_PAUSE);
                return;
            }
            error!(device = self.name, event, %error, "the backend has failed, the device needs a reset");
            self.failed = true;
            self.contact.faults.raise();
        }
    }

    pub(super) fn set_event_idx(&self, enabled: bool) {
        self.vrings.iter().for_each(|vring| vring.set_queue_event_idx(enabled));
    }

    /// Has the backend serve a queue.
    pub(super) fn start(&mut self, place: usize, ring: Ring<B::Bitmap>) -> Result<(), StartError> {
        if self.running[place].is_some() {
            return Err(StartError::Refused("runs already, or is about to stop"));
        }
        match self.set_up(place, ring) {
            Ok(running) => self.running[place] = Some(running),
            Err(error) => {
                self.clear(place);
                return Err(error);
            }
        }
        self.failed = false;
        // The driver may have made buffers available before.
        self.kicked(place);
        Ok(())
    }

    /// Makes the vring what the queue is. After an error some of it is done.
    fn set_up(&self, place: usize, ring: Ring<B::Bitmap>) -> Result<Running<B::Bitmap>, StartError> {
        let vring = &self.vrings[place];
        let RingConfig { size, desc, avail, used } = ring.ring;
        vring.set_queue_size(size);
        let set = vring.set_queue_info(desc, avail, used);
        set.map_err(|_| StartError::Refused("has a ring that is misaligned"))?;
        vring.set_queue_next_avail(ring.from.next_avail);
        vring.set_queue_next_used(ring.from.next_used);
        vring.set_queue_ready(true);
        let is_valid = {
            let state = vring.get_ref();
            let queue = state.get_queue();
            queue.size() == size && queue.is_valid(&*ring.mem)
        };
        if !is_valid {
            return Err(StartError::Refused(
                "has a ring of a size that its backend does not take, or outside of memory",
            ));
        }
        let (call, relay) = match ring.call {
            // The driver's own event, such as an irqfd: no thread stands in between.
            Interrupt::Event(event) => (Some(event.try_clone()?), None),
            Interrupt::None => (None, None),
            driver => {
                let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
                let watch = Watch::new(&self.epoll, event.as_raw_fd(), EventSet::IN, CALL | place as u64)?;
                (Some(event.try_clone()?), Some(Relay { _watch: watch, event, driver }))
            }
        };
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let kick = Some(Watch::new(&self.epoll, ring.kick.as_raw_fd(), events, KICK | place as u64)?);
        vring.set_call(call.map(into_file));
        vring.set_kick(Some(into_file(ring.kick)));
        vring.set_enabled(true);
        self.contact.faults.set(place, ring.fault);
        Ok(Running { lease: ring.lease, kick, relay, leaving: None })
    }

    /// Leaves nothing of a queue in its vring that is not set anew at the next start.
    fn clear(&self, place: usize) {
        let vring = &self.vrings[place];
        vring.set_queue_ready(false);
        vring.set_enabled(false);
        vring.set_kick(None);
        vring.set_call(None);
        self.contact.faults.set(place, Interrupt::None);
    }

    /// Has a queue stopped; `teller` is told once the backend has given back what it has taken, and dropped if it does
    /// not until `deadline`. A queue that is to stop already does so when it was to.
    pub(super) fn stop(&mut self, place: usize, deadline: Instant, teller: Option<Sender<Suspended>>) {
        let Some(running) = &mut self.running[place] else { return };
        let is_first = running.leaving.is_none();
        let leaving = running.leaving.get_or_insert_with(|| Leaving { deadline, tellers: Vec::new() });
        leaving.tellers.extend(teller);
        if is_first {
            running.kick = None;
            let vring = &self.vrings[place];
            vring.set_queue_ready(false);
            vring.set_enabled(false);
            if let Err(error) = self.backend.stop_vring(self.numbers[place] as u32) {
                error!(device = self.name, queue = self.numbers[place], %error, "the backend fails to stop a queue");
            }
        }
        self.let_go();
    }

    /// Ends queues that are to stop: those that have nothing in flight, and those whose backend has had its time.
    fn let_go(&mut self) {
        for place in 0..self.running.len() {
            let Some(leaving) = self.running[place].as_ref().and_then(|ring| ring.leaving.as_ref()) else { continue };
            let vring = &self.vrings[place];
            let (next_avail, next_used) = {
                let state = vring.get_ref();
                (state.get_queue().next_avail(), state.get_queue().next_used())
            };
            let has_ended = next_avail == next_used;
            if !has_ended {
                // One that has failed may have lost count, and would be waited for in vain.
                if !self.failed && Instant::now() < leaving.deadline {
                    continue;
                }
                let queue = self.numbers[place];
                warn!(device = self.name, queue, "the backend does not give the queue's buffers back");
                self.contact.faults.raise_of(place);
                // What it gives back from now on goes nowhere.
                let _ = vring.set_queue_info(NOWHERE, NOWHERE, NOWHERE);
            }
            let Some(Running { lease, kick: _, relay, leaving }) = self.running[place].take() else { continue };
            self.clear(place);
            // A call that is under way must not be lost, and one that was not made is not made up.
            if let Some(relay) = relay {
                relay.pass();
            }
            // Whoever is told may unmap the memory.
            drop(lease);
            for teller in leaving.into_iter().flat_map(|leaving| leaving.tellers).filter(|_| has_ended) {
                // Whoever asked may have stopped waiting.
                let _ = teller.send(Suspended { state: QueueState { next_avail, next_used }, left: Vec::new() });
            }
        }
    }
}

#[allow(unsafe_code, reason = "the types of both crates own a descriptor, and neither is made of the other")]
fn into_file(event: EventFd) -> File {
    // SAFETY: the descriptor is taken out of its owner.
    unsafe { File::from_raw_fd(event.into_raw_fd()) }
}
