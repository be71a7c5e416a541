//! The I/O thread: a tokio-uring runtime to park in, and the data ring.
//!
//! A thread serves any number of queues ([`Task`]s). Each turn drains them all, enters one batch, reaps, publishes. With
//! nothing left to do it polls for a while, if polling has paid off lately, then asks for kicks, looks once more and
//! parks in the runtime until a kick, a completion or a command comes.
//!
//! Polling follows what halt polling of a hypervisor does: the window grows when work came soon after the last was done and
//! shrinks when it did not, so an idle queue costs nothing and a busy one no kicks, wake-ups or context switches.
#![allow(unsafe_code, reason = "registering descriptors with the runtime")]

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc as reply;
use std::sync::{Mutex, PoisonError};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use vmm_sys_util::eventfd::EventFd;

use crate::io::ring::{Budget, Ring, Token};
use crate::io::service::Service;
use crate::stats::QueueStats;
use crate::virtqueue::stopping::Departure;
use crate::virtqueue::{End, GuestMemory, Suspended};

/// What a reactor runs: one queue of some device. Called from one thread only.
pub trait Task {
    /// What every queue has.
    fn service(&mut self) -> &mut Service;
    /// Goes on where it can, and pushes operations. Returns whether there was anything to do.
    fn turn(&mut self, ring: &mut Ring) -> bool;
    /// An operation pushed for `slot` has ended.
    fn completed(&mut self, slot: u32, result: i32, now: Instant, ring: &mut Ring);
    /// Whether `turn` would find something. Cheap: this is what polling looks at.
    fn ready(&self) -> bool;
    /// Asks the driver for kicks, if its next chain is what is waited for; returns whether it has come meanwhile.
    fn arm(&mut self) -> bool;
    /// Calls `with` for every file that operations name, as long as they do.
    fn files(&self, with: &mut dyn FnMut(BorrowedFd<'_>));
    /// Nothing new is taken from now on: ends what would wait for others, or all that can be ended if the queue is suspended.
    fn stop(&mut self, ring: &mut Ring);
    /// Whether nothing is in flight.
    fn is_idle(&self) -> bool;
    /// The queue leaves, with nothing in flight: chains that are held go back to the driver's side of the ring.
    fn give_back(&mut self) {}
}

/// How many I/O threads there are, and how they behave.
#[derive(Clone, Debug)]
pub struct ReactorOptions {
    /// Number of threads, at least one.
    pub count: usize,
    /// Host CPUs; thread `i` is bound to entry `i` modulo their number. Empty: wherever the scheduler likes.
    pub affinity: Vec<usize>,
    /// Longest time to poll before parking. Zero: never poll.
    pub poll: Duration,
    /// Most bytes of guest memory that the kernel holds for I/O, all of which is allocated and locked by that (registered
    /// buffers). Zero: none. The bound is that of all threads together.
    pub hold_memory: u64,
    /// Told when a thread dies by a bug of ours: its queues are never served again.
    pub on_panic: OnPanic,
}

/// What is done when an I/O thread has panicked, with its number. By default nothing but a line in the log.
#[derive(Clone, Default)]
pub struct OnPanic(Option<Arc<dyn Fn(usize) + Send + Sync>>);

impl OnPanic {
    /// Calls `tell` on the thread itself.
    pub fn new(tell: impl Fn(usize) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(tell)))
    }

    fn tell(&self, thread: usize) {
        if let Some(tell) = &self.0 {
            tell(thread);
        }
    }
}

/// Tells of a panic when the thread unwinds past it.
struct Teller {
    on_panic: OnPanic,
    thread: usize,
}

impl Drop for Teller {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.on_panic.tell(self.thread);
        }
    }
}

impl std::fmt::Debug for OnPanic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "OnPanic" } else { "OnPanic(nothing)" })
    }
}

impl Default for ReactorOptions {
    fn default() -> Self {
        Self {
            count: 1,
            affinity: Vec::new(),
            poll: Duration::from_micros(50),
            hold_memory: 0,
            on_panic: OnPanic::default(),
        }
    }
}

/// The I/O threads of a process. They end with the last clone.
#[derive(Clone, Debug)]
pub struct ReactorPool(Arc<[Reactor]>);

impl ReactorPool {
    /// Starts the threads, each with its ring, and returns when all are ready.
    ///
    /// # Errors
    /// When a thread, its runtime or its ring can't be had, or an affinity names a CPU that may not be used.
    pub fn new(options: &ReactorOptions) -> io::Result<Self> {
        let budget = (options.hold_memory > 0).then(|| Arc::new(Budget::new(options.hold_memory)));
        let reactors = (0..options.count.max(1)).map(|index| Reactor::start(index, options, budget.clone()));
        Ok(Self(reactors.collect::<io::Result<_>>()?))
    }

    /// A reactor without its thread, and what is asked of it.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn unthreaded() -> (Self, mpsc::UnboundedReceiver<Command>) {
        let (commands, inbox) = mpsc::unbounded_channel();
        let reactor = Reactor { index: 0, commands: Some(commands), load: Arc::default(), thread: None };
        (Self(Arc::from([reactor])), inbox)
    }

    /// The thread that serves the fewest queues.
    #[must_use]
    pub fn least_loaded(&self) -> &Reactor {
        self.0.iter().min_by_key(|reactor| reactor.load.load(Ordering::Relaxed)).expect("at least one thread")
    }

    /// Has every ring keep a file open until nothing is in flight in it any more, also when the process is killed. Returns
    /// whether all do; the descriptor may then be closed.
    #[must_use]
    pub fn keep(&self, file: &Arc<OwnedFd>) -> bool {
        self.0.iter().all(|reactor| {
            let (reply, answer) = reply::channel();
            reactor.send(Command::Keep { file: Arc::clone(file), reply });
            answer.recv().unwrap_or(false)
        })
    }

    /// The thread with this index.
    #[must_use]
    pub fn get(&self, index: usize) -> Option<&Reactor> {
        self.0.get(index)
    }
}

/// A handle to one I/O thread.
#[derive(Debug)]
pub struct Reactor {
    index: usize,
    commands: Option<mpsc::UnboundedSender<Command>>,
    load: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

pub(crate) type Build = Box<dyn FnOnce(u32) -> Box<dyn Task> + Send>;

/// What is asked of an I/O thread.
pub(crate) enum Command {
    Attach {
        kick: EventFd,
        build: Build,
        reply: reply::Sender<io::Result<u32>>,
    },
    Detach {
        task: u32,
        end: End,
        leave: Leave,
    },
    /// Looks again at how those that leave shall come to their end.
    Hurry,
    Stats {
        task: u32,
        reply: reply::Sender<QueueStats>,
    },
    Keep {
        file: Arc<OwnedFd>,
        reply: reply::Sender<bool>,
    },
}

/// A task that was told to leave, as its device sees it.
#[derive(Debug)]
pub(crate) struct Leaving {
    /// The number of its thread.
    pub(crate) reactor: usize,
    pub(crate) departure: Arc<Departure>,
}

/// The other end of a [`Leaving`], on the thread itself.
pub(crate) struct Leave {
    departure: Arc<Departure>,
    /// What the task has counted is added to this.
    counted: Arc<Mutex<Option<QueueStats>>>,
    load: Arc<AtomicUsize>,
}

impl Leave {
    fn end(self, left: Suspended, stats: &QueueStats) {
        // Before the end is told: whoever hears of it may ask for the statistics.
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *counted {
            Some(total) => total.merge(stats),
            none => *none = Some(stats.clone()),
        }
        drop(counted);
        self.load.fetch_sub(1, Ordering::Relaxed);
        self.departure.end(Some(left));
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        // Without such a task, or with its thread dead, nothing of it is in flight either.
        self.departure.end(None);
    }
}

impl Reactor {
    fn start(index: usize, options: &ReactorOptions, budget: Option<Arc<Budget>>) -> io::Result<Self> {
        let (commands, inbox) = mpsc::unbounded_channel();
        let (ready, started) = reply::channel();
        let cpu = (!options.affinity.is_empty()).then(|| options.affinity[index % options.affinity.len()]);
        let (poll, on_panic) = (options.poll, options.on_panic.clone());
        let thread = std::thread::Builder::new().name(format!("io{index}")).stack_size(512 << 10).spawn(move || {
            let core = match Core::new(cpu, poll, budget) {
                Ok(core) => core,
                Err(e) => return drop(ready.send(Err(e))),
            };
            tokio_uring::builder().entries(8).start(async move {
                // A spawned task: as the root future it would cost one more epoll_wait a turn.
                let run = tokio_uring::spawn(core.run(inbox, Teller { on_panic, thread: index }));
                drop(ready.send(Ok(())));
                if let Err(panicked) = run.await {
                    tracing::error!(thread = index, error = %panicked, "I/O thread died, its queues need a reset");
                }
            });
        })?;
        started.recv().map_err(|_| io::Error::other("the I/O thread died at its start"))??;
        Ok(Self { index, commands: Some(commands), load: Arc::default(), thread: Some(thread) })
    }

    /// Its number among the threads of the pool.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Runs a task, built on the thread itself from the number it will be known by.
    ///
    /// # Errors
    /// When the thread has died or can't watch the kick's descriptor.
    pub fn attach(&self, kick: EventFd, build: impl FnOnce(u32) -> Box<dyn Task> + Send + 'static) -> io::Result<u32> {
        let (reply, answer) = reply::channel();
        self.send(Command::Attach { kick, build: Box::new(build), reply });
        let task = answer.recv().map_err(|_| io::Error::other("the I/O thread has died"))??;
        self.load.fetch_add(1, Ordering::Relaxed);
        Ok(task)
    }

    /// Tells a task to leave, without waiting for it. What it has counted goes to `counted` with its end.
    pub(crate) fn detach(&self, task: u32, end: End, counted: Arc<Mutex<Option<QueueStats>>>) -> Leaving {
        let departure = Arc::new(Departure::default());
        if end == End::Suspended {
            departure.hurry();
        }
        let leave = Leave { departure: Arc::clone(&departure), counted, load: Arc::clone(&self.load) };
        self.send(Command::Detach { task, end, leave });
        Leaving { reactor: self.index, departure }
    }

    /// Has a task suspended that was told to leave drained.
    pub(crate) fn hurry(&self, leaving: &Leaving) {
        // Not by the task's number: once it has left, that may be another task's.
        if leaving.departure.hurry() {
            self.send(Command::Hurry);
        }
    }

    /// What a task has counted so far.
    pub fn stats(&self, task: u32) -> Option<QueueStats> {
        let (reply, answer) = reply::channel();
        self.send(Command::Stats { task, reply });
        answer.recv().ok()
    }

    fn send(&self, command: Command) {
        // If the thread has died, the reply's sender dies with the command, and that is what callers see.
        drop(self.commands.as_ref().expect("open until dropped").send(command));
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        // The closed channel tells the thread to end.
        self.commands = None;
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            drop(thread.join());
        }
    }
}

/// A kick's descriptor as `AsyncFd` wants it.
struct Kick(EventFd);

impl AsRawFd for Kick {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

struct RingFd(RawFd);

impl AsRawFd for RingFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

struct Seat {
    task: Box<dyn Task>,
    kick: AsyncFd<Kick>,
    leaving: Option<Leave>,
    /// What the kernel holds for it.
    memory: Option<GuestMemory>,
}

/// How long to wait before submissions that the kernel did not take are tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(1);

/// What one I/O thread owns. The ring comes first: dropped first, it waits for the operations of the tasks.
pub(crate) struct Core {
    ring: Ring,
    seats: Vec<Option<Seat>>,
    completions: Vec<(Token, i32)>,
    window: Window,
    hold_memory: bool,
    /// When the next piece of memory may be held if queues are busy.
    hold_next: Instant,
    /// Whether it was said that some is not held.
    hold_refused: bool,
}

impl Core {
    pub(crate) fn new(cpu: Option<usize>, poll: Duration, budget: Option<Arc<Budget>>) -> io::Result<Self> {
        // Before this thread is bound: the guest may have other CPUs.
        let window = Window::new(poll);
        if let Some(cpu) = cpu {
            bind(cpu)?;
        }
        let hold_memory = budget.is_some();
        let ring = budget.map_or_else(Ring::new, Ring::with_budget).map_err(explain_no_ring)?;
        let (hold_next, hold_refused) = (Instant::now(), false);
        Ok(Self { ring, seats: Vec::new(), completions: Vec::new(), window, hold_memory, hold_next, hold_refused })
    }

    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Command>, teller: Teller) {
        // Dropped before the ring, which waits for what is in flight.
        let _teller = teller;
        // SAFETY: the ring outlives this local and always answers with the same descriptor.
        let ring_fd = match unsafe { AsyncFd::register_with_interest(RingFd(self.ring.fd()), Interest::READABLE) } {
            Ok(fd) => fd,
            Err(error) => return tracing::error!(%error, "I/O thread can't watch its ring"),
        };
        loop {
            loop {
                match inbox.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(mpsc::error::TryRecvError::Empty) => break,
                    Err(mpsc::error::TryRecvError::Disconnected) => return,
                }
            }
            let mut worked = self.turn();
            self.let_go();
            worked |= self.hold_more(worked);
            if worked {
                continue;
            }
            let idle = Instant::now();
            if self.poll(&inbox) {
                continue;
            }
            // Arm every queue, even when one has work already: all must be armed when the thread parks.
            let armed = self.seats.iter_mut().flatten().fold(false, |work, seat| seat.task.arm() | work);
            if armed || self.ring.has_completions() {
                continue;
            }
            let retry = self.ring.has_unsubmitted();
            let park = poll_fn(|cx| self.poll_park(cx, &ring_fd, &mut inbox));
            let woken = if retry {
                // The kernel would not take a submission; what it waits for may have no event.
                tokio::time::timeout(RETRY_PAUSE, park).await.unwrap_or(Woken::Work)
            } else {
                park.await
            };
            match woken {
                Woken::Command(Some(command)) => self.obey(command),
                Woken::Command(None) => return,
                Woken::Work => {}
            }
            self.window.woken(idle.elapsed());
        }
    }

    /// One round over everything. Returns whether there was anything to do.
    pub(crate) fn turn(&mut self) -> bool {
        let mut worked = false;
        for seat in self.seats.iter_mut().flatten() {
            worked |= seat.task.turn(&mut self.ring);
        }
        self.submit();
        if self.ring.has_completions() {
            worked = true;
            self.ring.reap(&mut self.completions);
            let now = Instant::now();
            for &(token, result) in &self.completions {
                let seat = self.seats.get_mut(token.task as usize).and_then(Option::as_mut);
                let seat = seat.expect("a task leaves only when nothing of it is in flight");
                seat.task.completed(token.slot, result, now, &mut self.ring);
            }
            self.submit();
        }
        for seat in self.seats.iter_mut().flatten() {
            seat.task.service().publish();
        }
        worked
    }

    fn submit(&mut self) {
        if let Err(error) = self.ring.submit() {
            // Entries stay where they are and are tried again at the next turn.
            tracing::error!(%error, "the kernel refuses submissions to the data ring");
        }
    }

    /// Polls within the window. Returns whether there is work.
    fn poll(&mut self, inbox: &mpsc::UnboundedReceiver<Command>) -> bool {
        let window = self.window.current;
        if window.is_zero() || self.seats.iter().all(Option::is_none) {
            return false;
        }
        let start = Instant::now();
        loop {
            // Reading the clock costs as much as looking at a few queues.
            for _ in 0..8 {
                if let Some(seat) = self.seats.iter_mut().flatten().find(|seat| seat.task.ready()) {
                    seat.task.service().stats.poll_hits += 1;
                    self.window.hit();
                    return true;
                }
                if self.ring.has_completions() {
                    self.window.hit();
                    return true;
                }
                if !inbox.is_empty() || inbox.is_closed() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= window {
                self.window.missed();
                self.seats.iter_mut().flatten().for_each(|seat| seat.task.service().stats.poll_misses += 1);
                return false;
            }
        }
    }

    fn poll_park(
        &mut self,
        cx: &mut Context<'_>,
        ring_fd: &AsyncFd<RingFd>,
        inbox: &mut mpsc::UnboundedReceiver<Command>,
    ) -> Poll<Woken> {
        let mut woken = false;
        for seat in self.seats.iter_mut().flatten() {
            // Readiness is an edge: clearing it waits for the next write, the counter itself is never read.
            while let Poll::Ready(Ok(mut guard)) = seat.kick.poll_read_ready(cx) {
                guard.clear_ready();
                seat.task.service().stats.kicks += 1;
                woken = true;
            }
        }
        while let Poll::Ready(Ok(mut guard)) = ring_fd.poll_read_ready(cx) {
            guard.clear_ready();
            woken = true;
        }
        if woken {
            return Poll::Ready(Woken::Work);
        }
        inbox.poll_recv(cx).map(Woken::Command)
    }

    pub(crate) fn obey(&mut self, command: Command) {
        match command {
            Command::Attach { kick, build, reply } => {
                // SAFETY: the eventfd is owned by what is registered, which never replaces it.
                let kick = unsafe { AsyncFd::register_with_interest(Kick(kick), Interest::READABLE) };
                let seat = kick.map_err(io::Error::from).map(|kick| {
                    let free = self.seats.iter().position(Option::is_none);
                    let index = free.unwrap_or_else(|| {
                        self.seats.push(None);
                        self.seats.len() - 1
                    });
                    let mut task = build(index as u32);
                    let mut names_files = false;
                    task.files(&mut |file| {
                        self.ring.hold(file);
                        names_files = true;
                    });
                    let holds = self.hold_memory && names_files;
                    let memory = holds.then(|| Arc::clone(task.service().queue.memory()));
                    memory.iter().for_each(|memory| self.ring.hold_memory(memory));
                    self.seats[index] = Some(Seat { task, kick, leaving: None, memory });
                    index as u32
                });
                drop(reply.send(seat));
            }
            Command::Detach { task, end, leave } => {
                let seat = self.seats.get_mut(task as usize).and_then(Option::as_mut);
                if let Some(seat) = seat.filter(|seat| seat.leaving.is_none()) {
                    seat.task.service().stop(end);
                    seat.task.stop(&mut self.ring);
                    seat.leaving = Some(leave);
                }
            }
            Command::Hurry => {
                for seat in self.seats.iter_mut().flatten() {
                    let hurries = seat.leaving.as_ref().is_some_and(|leave| leave.departure.hurries());
                    if hurries && !seat.task.service().is_suspending() {
                        seat.task.service().stop(End::Suspended);
                        seat.task.stop(&mut self.ring);
                    }
                }
            }
            Command::Stats { task, reply } => {
                if let Some(Some(seat)) = self.seats.get_mut(task as usize) {
                    drop(reply.send(seat.task.service().stats.clone()));
                }
            }
            Command::Keep { file, reply } => {
                let kept = self.ring.keep(file.as_fd());
                // Before the answer, so that the caller's is then the only handle.
                drop(file);
                let _ = reply.send(kept);
            }
        }
    }

    /// Has the kernel hold some more of the guest memory that it is to hold, where queues are busy for a tenth of the time.
    /// Returns whether there was any.
    fn hold_more(&mut self, busy: bool) -> bool {
        if !self.ring.wants_memory() {
            return false;
        }
        let start = Instant::now();
        if busy && start < self.hold_next {
            return false;
        }
        let held = self.ring.hold_more().unwrap_or_else(|error| {
            // A guest can have this tried again and again, by resets.
            if !std::mem::replace(&mut self.hold_refused, true) {
                let advice = match error.kind() {
                    io::ErrorKind::QuotaExceeded => "the rest is used like any other",
                    _ => "unless it is a file's, more memory must be allowed to be locked (ulimit -l, CAP_IPC_LOCK)",
                };
                tracing::warn!(%error, "the kernel does not hold all of the guest's memory for I/O; {advice}");
            }
            true
        });
        self.hold_next = start + start.elapsed() * 10;
        held
    }

    /// Lets tasks go that were asked to and have nothing in flight. What they completed was published by `turn`.
    pub(crate) fn let_go(&mut self) {
        for place in &mut self.seats {
            if let Some(seat) = place
                && seat.leaving.is_some()
                && seat.task.is_idle()
                && let Some(mut seat) = place.take()
            {
                seat.task.files(&mut |file| self.ring.release(file));
                seat.task.give_back();
                let service = seat.task.service();
                service.publish();
                if let Some(leave) = seat.leaving.take() {
                    leave.end(service.end(), &service.stats);
                }
                // Last: whoever waits for the queue need not wait for this, and until then `seat` has it mapped.
                if let Some(memory) = &seat.memory {
                    self.ring.release_memory(memory);
                }
            }
        }
    }
}

enum Woken {
    Command(Option<Command>),
    Work,
}

/// How long to poll before parking.
#[derive(Debug)]
struct Window {
    current: Duration,
    max: Duration,
    /// Polls in a row that ended in vain.
    misses: u32,
    /// Wake-ups to let pass before polling is tried again.
    pause: u32,
    /// The next such pause.
    next_pause: u32,
}

/// The shortest window worth having.
const MIN_WINDOW: Duration = Duration::from_micros(4);
/// So many polls in vain, each of which should have met its work, mean that polling keeps the guest from running.
const MAX_MISSES: u32 = 4;
const MIN_PAUSE: u32 = 16;
const MAX_PAUSE: u32 = 2048;

impl Window {
    fn new(max: Duration) -> Self {
        // With one CPU the guest can't make anything available while we poll.
        let alone = std::thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
        let max = if alone { Duration::ZERO } else { max };
        Self { current: Duration::ZERO, max, misses: 0, pause: 0, next_pause: MIN_PAUSE }
    }

    /// Polling met work.
    fn hit(&mut self) {
        self.misses = 0;
        self.next_pause = MIN_PAUSE;
    }

    /// Polling was in vain.
    fn missed(&mut self) {
        self.misses += 1;
        if self.misses >= MAX_MISSES {
            self.misses = 0;
            self.current = Duration::ZERO;
            self.pause = self.next_pause;
            self.next_pause = (self.next_pause * 2).min(MAX_PAUSE);
        }
    }

    /// A wake-up brought work this long after the last was done: would polling have met it?
    fn woken(&mut self, idle: Duration) {
        if self.pause > 0 {
            self.pause -= 1;
        } else if idle <= self.max {
            self.current = (idle * 2).clamp(MIN_WINDOW.min(self.max), self.max);
        } else if self.current > MIN_WINDOW {
            self.current /= 2;
        } else {
            self.current = Duration::ZERO;
        }
    }
}

fn bind(cpu: usize) -> io::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        return Err(io::Error::other(format!("binding an I/O thread to CPU {cpu}: there is no such CPU")));
    }
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set).map_err(|e| {
        let e = io::Error::from(e);
        io::Error::new(e.kind(), format!("binding an I/O thread to CPU {cpu}: {e}; choose among those of this process"))
    })
}

fn explain_no_ring(e: io::Error) -> io::Error {
    let hint = match e.raw_os_error() {
        Some(libc::ENOSYS) => "this kernel has no io_uring, 5.11 or later is needed",
        Some(libc::EPERM) => "io_uring is forbidden here, see the sysctl kernel.io_uring_disabled and seccomp filters",
        Some(libc::ENOMEM) => "too little memory may be locked, raise the memlock limit (ulimit -l)",
        _ => return e,
    };
    io::Error::new(e.kind(), format!("creating an io_uring: {e}: {hint}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(50);

    fn window() -> Window {
        Window { current: Duration::ZERO, max: MAX, misses: 0, pause: 0, next_pause: MIN_PAUSE }
    }

    #[test]
    fn polling_starts_when_work_comes_soon_and_ends_when_it_does_not() {
        let mut window = window();
        window.woken(Duration::from_millis(5));
        assert_eq!(window.current, Duration::ZERO);
        window.woken(Duration::from_micros(15));
        assert_eq!(window.current, Duration::from_micros(30));
        window.woken(Duration::from_micros(49));
        assert_eq!(window.current, MAX);
        for _ in 0..8 {
            window.woken(Duration::from_millis(5));
        }
        assert_eq!(window.current, Duration::ZERO, "an idle queue costs nothing");
    }

    #[test]
    fn polling_in_vain_is_given_up_for_longer_each_time() {
        let mut window = window();
        let mut polls = 0;
        for _ in 0..10_000 {
            // The work always comes just after the poll, as when poller and guest share a CPU.
            if window.current > Duration::ZERO {
                polls += 1;
                window.missed();
            }
            window.woken(Duration::from_micros(20));
        }
        assert!(polls < 100, "{polls} polls in vain");
        window.pause = 0;
        window.woken(Duration::from_micros(20));
        assert!(window.current > Duration::ZERO);
        window.hit();
        assert_eq!((window.misses, window.next_pause), (0, MIN_PAUSE), "one hit and it is worth it again");
    }

    #[test]
    fn no_polling_when_told_so() {
        let mut window = Window::new(Duration::ZERO);
        window.woken(Duration::ZERO);
        assert_eq!(window.current, Duration::ZERO);
    }

    #[test]
    fn a_thread_that_is_bound_to_a_cpu_polls_as_others_do() {
        let cpus = rustix::thread::sched_getaffinity(None).unwrap();
        let cpu = (0..rustix::thread::CpuSet::MAX_CPU).find(|&cpu| cpus.is_set(cpu)).unwrap();
        // Bound on a thread of its own, which ends.
        let bound = std::thread::spawn(move || Core::new(Some(cpu), MAX, None).unwrap().window.max).join().unwrap();
        assert_eq!(bound, Core::new(None, MAX, None).unwrap().window.max);
    }

    #[test]
    fn an_affinity_that_can_not_be_is_refused() {
        for cpu in [1000, usize::MAX] {
            let options = ReactorOptions { affinity: vec![cpu], ..ReactorOptions::default() };
            let error = ReactorPool::new(&options).unwrap_err().to_string();
            assert!(error.contains(&format!("CPU {cpu}")), "{error}");
        }
    }

    #[test]
    fn the_death_of_a_thread_is_told() {
        let (tell, told) = reply::channel();
        let options = ReactorOptions {
            count: 2,
            on_panic: OnPanic::new(move |thread| tell.send(thread).expect("the test waits")),
            ..ReactorOptions::default()
        };
        let pool = ReactorPool::new(&options).unwrap();
        let kick = EventFd::new(0).unwrap();
        pool.get(1).unwrap().attach(kick, |_| panic!("a bug, as this test has it")).unwrap_err();
        assert_eq!(told.recv_timeout(Duration::from_secs(60)), Ok(1));
    }

    #[test]
    fn threads_end_with_their_pool() {
        let names = || -> Vec<String> {
            let tasks = std::fs::read_dir("/proc/self/task").unwrap();
            tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default()).collect()
        };
        let options = ReactorOptions { count: 8, ..ReactorOptions::default() };
        let pool = ReactorPool::new(&options).unwrap();
        assert!(names().iter().any(|name| name.trim() == "io7"), "{:?}", names());
        drop(pool);
        // A thread that was joined has done its work; the kernel may list it for a moment more.
        let deadline = Instant::now() + Duration::from_secs(20);
        while names().iter().any(|name| name.trim() == "io7") {
            assert!(Instant::now() < deadline, "{:?}", names());
            std::thread::yield_now();
        }
    }
}
