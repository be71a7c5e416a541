//! The thread that owns a device.
//!
//! A vCPU never waits for a device: the driver's setup is noted as `Wanted`, and the thread brings the device
//! there. Only the latest setup counts, so a driver that changes its mind in a loop piles up nothing. The driver's
//! reads are served from copies. The thread answers questions while the device drains, because it waits for both at
//! once.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, select, unbounded};
use ringvm_backends::device::{Device, DeviceInfo, GuestMemory, QueueParts, RingConfig, Suspended, read_space};
use ringvm_backends::stats::DeviceStats;
use ringvm_backends::trace;
use ringvm_backends::virtqueue::End;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use ringvm_backends::virtqueue::stopping::Ends;
use tracing::{Span, debug, debug_span};
use vmm_sys_util::eventfd::EventFd;

/// Control operations need little stack.
const STACK: usize = 256 << 10;
/// Most different places of the configuration space that a driver may have written before the device takes note.
const MAX_WRITES: usize = 64;

/// Reports from the owner to the transport, on the owner's thread.
pub trait Listener: Send + Sync {
    /// A reset that the driver asked for is complete.
    fn reset(&self);
    /// The device needs a reset for this reason.
    fn need_reset(&self, reason: &str);
    /// The device itself has changed its configuration space.
    fn space_changed(&self);
}

/// A queue as its driver has set it up.
#[derive(Clone)]
pub struct Setup {
    /// Where the ring lies.
    pub ring: RingConfig,
    /// Raised for used buffers.
    pub call: Interrupt,
    /// Changes whenever the way of interrupting does: the queue is then stopped and started with the new one.
    pub wiring: u64,
}

/// The state that the driver wants its device to be in.
#[derive(Default)]
struct Wanted {
    /// How often it has reset the device.
    resets: u64,
    /// The features that it has accepted since.
    features: Option<u64>,
    /// Writes to the configuration space that the device has not seen yet.
    writes: BTreeMap<u32, Vec<u8>>,
    /// The queues that run.
    queues: Vec<Option<Setup>>,
    /// The device says that its configuration space has changed.
    space_changed: bool,
    /// Raised by each change, so that the owner knows whether it has seen the last.
    version: u64,
    /// The version that the device is at.
    settled: u64,
    /// Resets that are complete.
    resets_done: u64,
    /// The device has refused the features.
    refused: bool,
    /// The driver has asked for anything since it reset the device.
    used: bool,
    /// The driver was told that its features are accepted without waiting for the device.
    assumed: bool,
}

impl Wanted {
    /// Whether the device may be in another state than its first.
    fn is_used(&self) -> bool {
        self.used || self.resets != self.resets_done
    }
}

struct Shared {
    wanted: Mutex<Wanted>,
    settled: Condvar,
    wake: Sender<()>,
    /// The configuration space as the driver reads it.
    space: RwLock<Vec<u8>>,
    /// The fields in it that belong to the driver.
    driver_fields: Vec<std::ops::Range<u32>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Wanted)) {
        let mut wanted = self.lock();
        change(&mut wanted);
        wanted.version += 1;
        drop(wanted);
        match self.wake.try_send(()) {
            // Full: the owner has not looked yet, and will see this too. Disconnected: the device was taken back.
            Ok(()) | Err(TrySendError::Full(()) | TrySendError::Disconnected(())) => {}
        }
    }

    fn read_space(&self, device: &dyn Device) {
        let mut space = vec![0; device.info().config_len as usize];
        device.read_config(0, &mut space);
        // Under the lock, so that a driver's write in the meantime is kept.
        let wanted = self.lock();
        wanted.writes.iter().for_each(|(&offset, data)| self.write_own(&mut space, offset, data));
        *self.space.write().unwrap_or_else(PoisonError::into_inner) = space;
    }

    /// Writes those bytes to a configuration space that are the driver's own.
    fn write_own(&self, space: &mut [u8], offset: u32, data: &[u8]) {
        let own = |at: u32| self.driver_fields.iter().any(|field| field.contains(&at));
        for (at, &value) in (offset..).zip(data) {
            if let Some(byte) = space.get_mut(at as usize).filter(|_| own(at)) {
                *byte = value;
            }
        }
    }
}

/// Questions to the thread.
enum Question {
    /// The device's statistics.
    Stats(Sender<DeviceStats>),
    /// The device is wanted back, reset.
    Take(Sender<Taken>),
}

/// A device that was taken back from its owner.
pub struct Taken {
    /// The device, reset.
    pub device: Box<dyn Device>,
    /// Its statistics.
    pub stats: DeviceStats,
}

/// A handle on a device that a thread of its own owns.
pub struct Owner {
    info: DeviceInfo,
    span: Span,
    shared: Arc<Shared>,
    questions: Questions,
}

/// Asks the owner of a device, from any thread. No call waits; answers come over channels.
#[derive(Clone)]
pub struct Questions(Sender<Question>);

impl Questions {
    /// Asks for the device's statistics. The sender is dropped if no answer will come.
    pub fn stats(&self, answer: Sender<DeviceStats>) {
        // Without an owner the sender is gone, which is the answer.
        drop(self.0.send(Question::Stats(answer)));
    }

    /// Asks for the device. Its queues are suspended, and it comes once nothing of them is in flight.
    #[must_use]
    pub fn take(&self) -> Receiver<Taken> {
        let (answer, taken) = bounded(1);
        drop(self.0.send(Question::Take(answer)));
        taken
    }
}

impl Owner {
    /// Gives `device` to a thread of its own. `kicks` are the doorbells of its queues.
    ///
    /// # Errors
    /// When the host has no thread left; the device is gone then.
    pub fn start(
        mut device: Box<dyn Device>,
        memory: GuestMemory,
        kicks: Arc<[EventFd]>,
        listener: Arc<dyn Listener>,
    ) -> std::io::Result<Self> {
        let info = device.info().clone();
        let (wake, woken) = bounded(1);
        let (questions, asked) = unbounded();
        let queues = info.queue_sizes.len();
        let wanted = Wanted { queues: vec![None; queues], ..Wanted::default() };
        let shared = Arc::new(Shared {
            wanted: Mutex::new(wanted),
            settled: Condvar::new(),
            wake,
            space: RwLock::new(Vec::new()),
            driver_fields: device.driver_fields(),
        });
        shared.read_space(device.as_ref());
        let told = Arc::downgrade(&shared);
        device.on_config_change(Interrupt::Call(Arc::new(move || {
            if let Some(shared) = told.upgrade() {
                shared.change(|wanted| wanted.space_changed = true);
            }
        })));
        let keeper = Keeper {
            device,
            memory,
            kicks,
            listener,
            shared: Arc::clone(&shared),
            features: None,
            queues: (0..queues).map(|_| Queue::default()).collect(),
            taker: None,
        };
        let name = format!("dev-{}", info.name);
        let span = trace::device(&info.name);
        let entered = span.clone();
        let run = move || entered.in_scope(|| keeper.run(&woken, &asked));
        thread::Builder::new().name(name).stack_size(STACK).spawn(run)?;
        Ok(Self { info, span, shared, questions: Questions(questions) })
    }

    /// The device's fixed properties.
    #[must_use]
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// What lines of the log about the device are part of.
    #[must_use]
    pub fn span(&self) -> &Span {
        &self.span
    }

    /// Asks the owner.
    #[must_use]
    pub fn questions(&self) -> &Questions {
        &self.questions
    }

    /// Waits until the device is where its driver wants it, for so long at most. Returns whether it is.
    pub fn wait(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut wanted = self.shared.lock();
        while wanted.settled != wanted.version {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let (again, _) = self.shared.settled.wait_timeout(wanted, left).unwrap_or_else(PoisonError::into_inner);
            wanted = again;
        }
        true
    }

    /// The driver resets its device. Its setup is forgotten. Returns whether there is anything to be done for that: a device that
    /// has not been used since its last reset is in its first state already.
    pub fn reset(&self) -> bool {
        if !self.shared.lock().is_used() {
            return false;
        }
        self.shared.change(|wanted| {
            wanted.resets += 1;
            wanted.used = false;
            (wanted.features, wanted.refused, wanted.assumed) = (None, false, false);
            wanted.writes.clear();
            wanted.queues.fill(None);
        });
        true
    }

    /// Whether a reset is in progress.
    #[must_use]
    pub fn is_resetting(&self) -> bool {
        let wanted = self.shared.lock();
        wanted.resets != wanted.resets_done
    }

    /// The driver accepts features. Returns whether the device does so too. A device that does not answer within
    /// `limit` is assumed to accept them, and needs a reset if it refuses them later.
    pub fn accept(&self, features: u64, limit: Duration) -> bool {
        self.shared.change(|wanted| {
            (wanted.features, wanted.used) = (Some(features), true);
            (wanted.refused, wanted.assumed) = (false, false);
        });
        self.wait(limit);
        let mut wanted = self.shared.lock();
        wanted.assumed = !wanted.refused;
        !wanted.refused
    }

    /// The driver has these queues run from now on, and no others.
    pub fn set_queues(&self, queues: Vec<Option<Setup>>) {
        let any = |queues: &[Option<Setup>]| queues.iter().any(Option::is_some);
        if !any(&queues) && !any(&self.shared.lock().queues) {
            // None run, and none are to.
            return;
        }
        self.shared.change(|wanted| {
            wanted.used |= any(&queues);
            wanted.queues = queues;
        });
    }

    /// Reads the latest copy of the configuration space; bytes beyond its end are zero.
    pub fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_space(&self.shared.space.read().unwrap_or_else(PoisonError::into_inner), offset, data);
    }

    /// The driver writes to the configuration space. It reads its own fields back at once; a device that refuses the
    /// write has the last word.
    pub fn write_config(&self, offset: u32, data: &[u8]) {
        self.shared.change(|wanted| {
            if wanted.writes.len() < MAX_WRITES {
                wanted.writes.insert(offset, data.to_vec());
                wanted.used = true;
                let mut space = self.shared.space.write().unwrap_or_else(PoisonError::into_inner);
                self.shared.write_own(&mut space, offset, data);
            }
        });
    }
}

/// One queue in the device's current state.
#[derive(Default)]
struct Queue {
    /// The wiring that it runs with.
    runs: Option<u64>,
    /// The wiring that it could not be started with.
    failed: Option<u64>,
    /// Where it starts or continues, and the heads that it took and did not give back.
    from: Suspended,
}

/// The thread's own.
struct Keeper {
    device: Box<dyn Device>,
    memory: GuestMemory,
    kicks: Arc<[EventFd]>,
    listener: Arc<dyn Listener>,
    shared: Arc<Shared>,
    features: Option<u64>,
    queues: Vec<Queue>,
    /// The receiver of the device, once it is wanted back.
    taker: Option<Sender<Taken>>,
}

impl Keeper {
    fn run(mut self, woken: &Receiver<()>, asked: &Receiver<Question>) {
        while self.taker.is_none() {
            select! {
                recv(woken) -> _ => self.settle(asked),
                recv(asked) -> question => match question {
                    Ok(question) => self.answer(question),
                    // The questions' sender is gone, so no one can take the device back: it goes with the machine.
                    Err(_) => return,
                },
            }
        }
        let _taking = debug_span!("take").entered();
        let running = self.running(|_, _| true);
        self.stop(&running, asked);
        let stats = self.device.stats();
        self.device.reset();
        if let Some(taker) = self.taker.take() {
            // If the receiver is gone, the device is dropped here.
            drop(taker.send(Taken { device: self.device, stats }));
        }
    }

    fn answer(&mut self, question: Question) {
        match question {
            Question::Stats(answer) => drop(answer.send(self.device.stats())),
            Question::Take(taker) => self.taker = Some(taker),
        }
    }

    /// Brings the device to where its driver wants it.
    fn settle(&mut self, asked: &Receiver<Question>) {
        while self.taker.is_none() {
            let (version, reset) = {
                let wanted = self.shared.lock();
                (wanted.version, (wanted.resets != wanted.resets_done).then_some(wanted.resets))
            };
            if let Some(resets) = reset {
                self.reset(resets, asked);
            }
            self.accept_features();
            self.write_config();
            self.settle_queues(asked);
            self.follow_space();
            let mut wanted = self.shared.lock();
            if wanted.version == version {
                wanted.settled = version;
                drop(wanted);
                self.shared.settled.notify_all();
                return;
            }
        }
    }

    fn reset(&mut self, resets: u64, asked: &Receiver<Question>) {
        let _resetting = debug_span!("reset").entered();
        let running = self.running(|_, _| true);
        self.stop(&running, asked);
        if self.taker.is_some() {
            return;
        }
        self.device.reset();
        self.shared.read_space(self.device.as_ref());
        self.features = None;
        self.queues.fill_with(Queue::default);
        // Under the lock, so that the driver's next step comes after this.
        let mut wanted = self.shared.lock();
        wanted.resets_done = resets;
        if wanted.resets == resets {
            self.listener.reset();
        }
    }

    fn accept_features(&mut self) {
        let Some(features) = self.shared.lock().features else { return };
        if self.features == Some(features) {
            return;
        }
        let _accepting = debug_span!("accept", features = format_args!("{features:#x}")).entered();
        let result = self.device.ack_features(features);
        // The configuration space may depend on them.
        self.shared.read_space(self.device.as_ref());
        let mut wanted = self.shared.lock();
        if wanted.features != Some(features) {
            return;
        }
        match result {
            Ok(()) => self.features = Some(features),
            Err(error) => {
                debug!(%error, "the device refuses its driver's features");
                (wanted.features, wanted.refused) = (None, true);
                if wanted.assumed {
                    self.listener.need_reset(&error.to_string());
                }
            }
        }
    }

    fn write_config(&mut self) {
        let writes = std::mem::take(&mut self.shared.lock().writes);
        if writes.is_empty() {
            return;
        }
        let _writing = debug_span!("write_config").entered();
        for (offset, data) in writes {
            if let Err(error) = self.device.write_config(offset, &data) {
                debug!(offset, %error, "a write to configuration space is ignored");
            }
        }
        self.shared.read_space(self.device.as_ref());
    }

    fn follow_space(&mut self) {
        if std::mem::take(&mut self.shared.lock().space_changed) {
            self.shared.read_space(self.device.as_ref());
            self.listener.space_changed();
        }
    }

    /// The queues that run and for which this holds.
    fn running(&self, with: impl Fn(usize, u64) -> bool) -> Vec<u16> {
        let queues = self.queues.iter().enumerate();
        queues
            .filter(|(index, queue)| queue.runs.is_some_and(|wiring| with(*index, wiring)))
            .map(|(i, _)| i as u16)
            .collect()
    }

    fn settle_queues(&mut self, asked: &Receiver<Question>) {
        let wanted = self.shared.lock().queues.clone();
        let wiring = |index: usize| wanted.get(index)?.as_ref().map(|setup| setup.wiring);
        let unwanted = self.running(|index, runs| wiring(index) != Some(runs));
        self.stop(&unwanted, asked);
        if self.features.is_none() || self.taker.is_some() {
            return;
        }
        // Indices are kept as they are, gaps and all (pitfall 16). The last queue comes first: a control queue
        // follows the queues that it controls.
        for (index, setup) in wanted.iter().enumerate().rev() {
            let queue = &mut self.queues[index];
            match setup {
                None => queue.failed = None,
                Some(setup) if queue.runs.is_none() && queue.failed != Some(setup.wiring) => self.start(index, setup),
                Some(_) => {}
            }
        }
    }

    fn start(&mut self, index: usize, setup: &Setup) {
        let _starting = debug_span!("start", queue = index).entered();
        let queue = &mut self.queues[index];
        let listener = Arc::clone(&self.listener);
        let parts = self.kicks[index].try_clone().map(|kick| QueueParts {
            call: setup.call.clone(),
            fault: Interrupt::Call(Arc::new(move || {
                listener.need_reset(&format!("the driver broke the ring of queue {index}"));
            })),
            from: queue.from.state,
            left: queue.from.left.clone(),
            ..QueueParts::new(setup.ring, Arc::clone(&self.memory), kick)
        });
        let started = match parts {
            Ok(parts) => self.device.start_queue(index as u16, parts).map_err(|error| error.to_string()),
            Err(error) => Err(format!("duplicating the doorbell of queue {index}: {error}")),
        };
        match started {
            Ok(()) => {
                queue.runs = Some(setup.wiring);
                queue.from.left.clear();
            }
            Err(error) => {
                queue.failed = Some(setup.wiring);
                self.listener.need_reset(&error);
            }
        }
    }

    /// Suspends queues, all at once, and remembers their positions. Requests that can be cancelled are not waited
    /// for; they are served when the queue goes on. The thread answers questions in the meantime.
    fn stop(&mut self, running: &[u16], asked: &Receiver<Question>) {
        if running.is_empty() {
            return;
        }
        let _suspending = debug_span!("suspend", queues = ?running).entered();
        let stopping = self.device.stop(running, End::Suspended).into_receiver();
        let ends: Ends = loop {
            select! {
                recv(stopping) -> ends => break ends.unwrap_or_else(|_| vec![None; running.len()]),
                recv(asked) -> question => match question {
                    Ok(question) => self.answer(question),
                    Err(_) => break stopping.recv().unwrap_or_else(|_| vec![None; running.len()]),
                },
            }
        };
        for (&index, end) in running.iter().zip(ends) {
            let queue = &mut self.queues[usize::from(index)];
            queue.runs = None;
            if let Some(end) = end {
                queue.from = end;
            }
        }
    }
}
