//! The I/O thread: a tokio-uring runtime to park in, and the data ring.
//!
//! A thread serves any number of queues ([`Task`]s). Each turn drains them all, enters one batch, reaps, publishes.
//! When it runs out of work it polls for a while, if polling has paid off lately. Then it asks for kicks, looks once
//! more and parks in the runtime until a kick, a completion or a command comes.
//!
//! This file is the interface to such a thread; the code that runs there is in `reactor/core.rs`.

mod core;
mod wake;
mod window;

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc as reply;
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use vmm_sys_util::eventfd::EventFd;

pub(crate) use self::core::Core;
use crate::io::ring::{Budget, Ring};
use crate::io::service::{Service, TaskHandle};
use crate::stats::QueueStats;
use crate::virtqueue::stopping::Departure;
use crate::virtqueue::{End, Suspended};

/// A task of a reactor: one queue of some device. Called from one thread only.
pub trait Task {
    /// The part that every queue has.
    fn service(&mut self) -> &mut Service;
    /// Makes progress where it can, and pushes operations. Returns whether there was anything to do.
    fn turn(&mut self, ring: &mut Ring) -> bool;
    /// Somebody has used the task's waker since this was called last.
    fn woken(&mut self, _now: Instant, _ring: &mut Ring) {}
    /// When [`Self::due`] wants to be called, whether or not anything else happens. Asked before the thread parks.
    fn next_wake(&self) -> Option<Instant> {
        None
    }
    /// The time that [`Self::next_wake`] has named has come.
    fn due(&mut self, _now: Instant) {}
    /// An operation pushed for `slot` has ended.
    fn completed(&mut self, slot: u32, result: i32, now: Instant, ring: &mut Ring);
    /// Whether `turn` would find something. Cheap, because polling calls it.
    fn ready(&self) -> bool;
    /// Asks the driver for kicks if the task waits for its next chain; returns whether one has come in the meantime.
    fn arm(&mut self) -> bool;
    /// Calls `with` for every file that operations name, as long as they do.
    fn files(&self, with: &mut dyn FnMut(BorrowedFd<'_>));
    /// Takes nothing new from now on: ends operations that would wait for others, or all that can be ended if the
    /// queue is suspended.
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
    /// Most bytes of guest memory that the kernel holds for I/O (registered buffers), all of which is allocated and
    /// locked. Zero: none. The bound covers all threads together.
    pub hold_memory: u64,
    /// Called when a thread dies by a bug of ours: its queues are never served again.
    pub on_panic: OnPanic,
}

/// Called when a thread that serves queues has panicked, with what it is: `I/O thread 0`, or a backend that brings
/// threads of its own. The default only writes a line to the log.
#[derive(Clone, Default)]
pub struct OnPanic(Option<Arc<Tell>>);

type Tell = dyn Fn(&str) + Send + Sync;

impl OnPanic {
    /// Calls `tell` on the thread itself.
    pub fn new(tell: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(tell)))
    }

    /// Tells who has panicked.
    pub fn tell(&self, who: &str) {
        if let Some(tell) = &self.0 {
            tell(who);
        }
    }
}

/// Reports a panic when the thread unwinds past it.
struct Teller {
    on_panic: OnPanic,
    thread: usize,
}

impl Drop for Teller {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.on_panic.tell(&format!("I/O thread {}", self.thread));
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
    /// When the host refuses a thread, its runtime or its ring, or an affinity names a CPU that may not be used.
    pub fn new(options: &ReactorOptions) -> io::Result<Self> {
        let budget = (options.hold_memory > 0).then(|| Arc::new(Budget::new(options.hold_memory)));
        let reactors = (0..options.count.max(1)).map(|index| Reactor::start(index, options, budget.clone()));
        Ok(Self(reactors.collect::<io::Result<_>>()?))
    }

    /// A reactor without its thread: the thread's part, and its commands.
    ///
    /// # Errors
    /// When the host refuses the ring.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn unthreaded() -> io::Result<(Self, Core, mpsc::UnboundedReceiver<Command>)> {
        let (commands, inbox) = mpsc::unbounded_channel();
        let core = Core::new(None, Duration::ZERO, None, commands.downgrade())?;
        let reactor = Reactor {
            index: 0,
            on_panic: OnPanic::default(),
            commands: Some(commands),
            load: Arc::default(),
            thread: None,
        };
        Ok((Self(Arc::from([reactor])), core, inbox))
    }

    /// The thread that serves the fewest queues.
    #[must_use]
    pub fn least_loaded(&self) -> &Reactor {
        self.0.iter().min_by_key(|reactor| reactor.load.load(Ordering::Relaxed)).expect("at least one thread")
    }

    /// Has every ring keep a file open until nothing is in flight in it any more, even when the process is killed.
    /// Returns whether all do; the descriptor may then be closed.
    #[must_use]
    pub fn keep(&self, file: &Arc<OwnedFd>) -> bool {
        self.0.iter().all(|reactor| {
            let (reply, answer) = reply::channel();
            reactor.send(Command::Keep { file: Arc::clone(file), reply });
            answer.recv().unwrap_or(false)
        })
    }

    /// Whom the threads tell of a panic. Backends that bring threads of their own tell the same.
    #[must_use]
    pub fn on_panic(&self) -> OnPanic {
        self.0[0].on_panic.clone()
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
    on_panic: OnPanic,
    commands: Option<mpsc::UnboundedSender<Command>>,
    load: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

pub(crate) type Build = Box<dyn FnOnce(TaskHandle) -> Box<dyn Task> + Send>;

/// Commands to an I/O thread.
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
    /// Checks again how the leaving tasks are to end.
    Hurry,
    /// The waker of this task was used.
    Wake(u32),
    /// Calls something on the thread, which may spawn tasks there.
    Call(Box<dyn FnOnce() + Send>),
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
    /// The task's counters are added to this.
    counted: Arc<Mutex<Option<QueueStats>>>,
    load: Arc<AtomicUsize>,
}

impl Leave {
    fn end(self, left: Suspended, stats: &QueueStats) {
        // Add the counters before reporting the end: the receiver of that report may ask for the statistics at once.
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
        let (poll, on_panic, theirs) = (options.poll, options.on_panic.clone(), options.on_panic.clone());
        let own_commands = commands.downgrade();
        let thread = std::thread::Builder::new().name(format!("io{index}")).stack_size(512 << 10).spawn(move || {
            let core = match Core::new(cpu, poll, budget, own_commands) {
                Ok(core) => core,
                Err(e) => return drop(ready.send(Err(e))),
            };
            tokio_uring::builder().entries(8).start(async move {
                // A spawned task: as the root future it would cost one more epoll_wait a turn.
                let run = tokio_uring::spawn(core.run(inbox, Teller { on_panic: theirs, thread: index }));
                drop(ready.send(Ok(())));
                if let Err(panicked) = run.await {
                    tracing::error!(thread = index, error = %panicked, "I/O thread died, its queues need a reset");
                }
            });
        })?;
        started.recv().map_err(|_| io::Error::other("the I/O thread died at its start"))??;
        Ok(Self { index, on_panic, commands: Some(commands), load: Arc::default(), thread: Some(thread) })
    }

    /// Its number among the threads of the pool.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Runs a task, built on the thread itself from its place there.
    ///
    /// # Errors
    /// When the thread has died or can't watch the kick's descriptor.
    pub fn attach(
        &self,
        kick: EventFd,
        build: impl FnOnce(TaskHandle) -> Box<dyn Task> + Send + 'static,
    ) -> io::Result<u32> {
        let (reply, answer) = reply::channel();
        self.send(Command::Attach { kick, build: Box::new(build), reply });
        let task = answer.recv().map_err(|_| io::Error::other("the I/O thread has died"))??;
        self.load.fetch_add(1, Ordering::Relaxed);
        Ok(task)
    }

    /// Has the thread call `call`, which may spawn tasks there ([`crate::io::tasks`]) and must not block.
    pub fn call(&self, call: impl FnOnce() + Send + 'static) {
        self.send(Command::Call(Box::new(call)));
    }

    /// Tells a task to leave, without waiting for it. Its counters are added to `counted` when it ends.
    pub(crate) fn detach(&self, task: u32, end: End, counted: Arc<Mutex<Option<QueueStats>>>) -> Leaving {
        let departure = Arc::new(Departure::default());
        if end == End::Suspended {
            departure.hurry();
        }
        let leave = Leave { departure: Arc::clone(&departure), counted, load: Arc::clone(&self.load) };
        self.send(Command::Detach { task, end, leave });
        Leaving { reactor: self.index, departure }
    }

    /// Suspends a task that was told to drain and leave.
    pub(crate) fn hurry(&self, leaving: &Leaving) {
        // Not by the task's number: once it has left, that may be another task's.
        if leaving.departure.hurry() {
            self.send(Command::Hurry);
        }
    }

    /// The task's counters so far.
    pub fn stats(&self, task: u32) -> Option<QueueStats> {
        let (reply, answer) = reply::channel();
        self.send(Command::Stats { task, reply });
        answer.recv().ok()
    }

    fn send(&self, command: Command) {
        // If the thread has died, the reply's sender dies with the command, and the caller sees that.
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

#[cfg(test)]
mod tests {
    use super::*;

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
            on_panic: OnPanic::new(move |who| tell.send(who.to_owned()).expect("the test waits")),
            ..ReactorOptions::default()
        };
        let pool = ReactorPool::new(&options).unwrap();
        let kick = EventFd::new(0).unwrap();
        pool.get(1).unwrap().attach(kick, |_| panic!("a bug, as this test has it")).unwrap_err();
        assert_eq!(told.recv_timeout(Duration::from_secs(60)).as_deref(), Ok("I/O thread 1"));
        pool.on_panic().tell("the backend of vsock0");
        assert_eq!(told.recv_timeout(Duration::from_secs(60)).as_deref(), Ok("the backend of vsock0"));
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
