//! A device whose queues run in another process, over vhost-user (the specification is part of QEMU's documentation).
//!
//! Doorbells and interrupts pass straight between KVM and the daemon. This module is control only, and it never gives
//! up: a thread of the device's own (`keeper`) keeps the driver's setup and brings every new connection to the same
//! state. Without a daemon, the driver just waits. Requests in flight are in a table that outlives the daemon, and
//! its successor serves them again. The wire is that of the daemons, `ringvm-vhost-user`.

mod error;
mod inflight;
mod keeper;
mod link;
mod offer;
pub mod peer;
mod program;
mod ring;
mod sentinel;
mod shared;
#[cfg(test)]
mod tests;
mod transfer;

use std::io;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use ringvm_backends::device::{
    Device, DeviceError, DeviceInfo, End, Ends, GuestMemory, QueueParts, QueueState, RingConfig, Stopping, Suspended,
    read_space,
};
use ringvm_backends::host::event::SharedEvent;
use ringvm_backends::setup::RingSetup;
use ringvm_backends::state::MAX_STATE;
use ringvm_backends::stats::DeviceStats;
use ringvm_backends::trace;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use ringvm_backends::virtqueue::split::{check_ring, used_index};
use thiserror::Error;
use tracing::{debug, debug_span, warn};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use error::LinkError;
use keeper::{Job, Keeper};
use link::Link;
use offer::Field;
use peer::Peer;
use ring::Ring;
use shared::Shared;

/// How long the first connection may take.
const GREETING: Duration = Duration::from_secs(10);
/// Longest wait for a daemon's immediate answer. All rings that are stopped one after another share it.
const ANSWER: Duration = Duration::from_secs(2);
/// Longest wait for all rings of a daemon that can stop only with nothing in flight.
const DRAIN: Duration = Duration::from_secs(10);
/// Longest wait for a dead daemon's requests in flight in the kernel, when rings are suspended. A reset waits for as
/// long as they take: the guest uses its memory for something else then.
const AFTERLIFE: Duration = Duration::from_millis(500);
/// Longest wait for a state that goes to a daemon or comes from it.
const TRANSFER: Duration = Duration::from_secs(10);
/// How long the keeper may take to notice that a connection was ended.
const NOTICE: Duration = Duration::from_secs(2);

/// The device that another process is expected to serve.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Virtio device ID.
    pub device_type: u32,
    /// Queues that the driver gets; as many as the daemon says it has, if not given.
    pub queues: Option<u16>,
    /// Descriptors per queue.
    pub queue_size: u16,
    /// The configuration space, for kinds of device whose daemons have none.
    pub config: Option<Vec<u8>>,
}

impl Wanted {
    /// A device whose configuration space is its daemon's.
    #[must_use]
    pub fn new(device_type: u32, queues: Option<u16>, queue_size: u16) -> Self {
        Self { device_type, queues, queue_size, config: None }
    }
}

/// Why a daemon can't be used.
#[derive(Debug, Error)]
#[error("{device}: {what}: {reason}{hint}")]
pub struct ConnectError {
    device: String,
    what: String,
    reason: String,
    hint: &'static str,
}

/// A device served by a daemon.
pub struct VhostUserDevice {
    info: DeviceInfo,
    shared: Arc<Shared>,
    /// To the keeper, which ends when this is gone.
    jobs: Option<Sender<Job>>,
    /// Disconnected when the keeper has ended.
    ended: Receiver<()>,
    /// Rings that run, as far as the driver knows.
    running: Vec<Option<(RingConfig, GuestMemory)>>,
    /// How long the stops since the last start have taken, in milliseconds.
    spent: Arc<AtomicU64>,
}

fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

impl VhostUserDevice {
    /// Connects to the daemon, waiting a while for it to come.
    ///
    /// # Errors
    /// When no daemon comes, or its device is not the one that is wanted.
    pub fn connect(name: &str, mut peer: Peer, wanted: &Wanted) -> Result<Self, ConnectError> {
        let _device = trace::device(name).entered();
        let _connecting = debug_span!("connect").entered();
        let whom = peer.name();
        let error = |what: &str, reason: String, hint| ConnectError {
            device: name.to_owned(),
            what: format!("{what} {whom}"),
            reason,
            hint,
        };
        let start = Instant::now();
        let socket = loop {
            match peer.connect() {
                Ok(socket) => break socket,
                Err(reason) if start.elapsed() < GREETING && matches!(peer, Peer::Socket(_)) => {
                    debug!(%reason, "waiting for {whom}");
                    thread::sleep(Duration::from_millis(20));
                }
                Err(reason) => {
                    let hint = if matches!(peer, Peer::Socket(_)) { "; start its daemon first" } else { "" };
                    return Err(error("connecting to", reason.to_string(), hint));
                }
            }
        };
        let failed = |reason: LinkError| error("talking to", reason.to_string(), "; is it a vhost-user daemon?");
        let (mut link, about) =
            Link::open(socket, offer::is_counted(wanted.device_type), wanted.config.is_none()).map_err(failed)?;
        let config = match (&wanted.config, wanted.device_type) {
            (Some(config), _) => config.clone(),
            _ if !link.has_config() => Vec::new(),
            (None, kind) => link.within_limits(|link| link.read_config(offer::config_len(kind))).map_err(failed)?,
        };
        let offered = offer::features(wanted.device_type, about.features, !config.is_empty());
        let count =
            offer::queue_count(wanted, &about, &config, offered).map_err(|reason| error("using", reason, ""))?;
        let info = DeviceInfo {
            device_type: wanted.device_type,
            name: name.to_owned(),
            features: offered,
            queue_sizes: vec![wanted.queue_size; usize::from(count)],
            config_len: config.len() as u32,
        };
        let host = |what: &str, source: io::Error| ConnectError {
            device: name.to_owned(),
            what: what.to_owned(),
            reason: source.to_string(),
            hint: "",
        };
        let shared = Arc::new(Shared::new(name).map_err(|source| host("making an event", source))?);
        shared.view().config = config;
        let keeper = Keeper::new(Arc::clone(&shared), peer, link, count, wanted);
        let (jobs, inbox) = mpsc::channel();
        let span = shared.span().clone();
        let (alive, ended) = mpsc::channel::<()>();
        let thread = thread::Builder::new().name(format!("vhost-{name}")).spawn(move || {
            span.in_scope(|| keeper.run(&inbox));
            drop(alive);
        });
        thread.map_err(|source| host("starting a thread", source))?;
        let running = (0..count).map(|_| None).collect();
        Ok(Self { info, shared, jobs: Some(jobs), ended, running, spent: Arc::default() })
    }

    /// Whether a daemon is there.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.shared.view().connected
    }

    /// Whether a daemon of ours that has died has no more requests in flight. Only then may its suspended queues go
    /// on elsewhere.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.shared.outlast(Some(Duration::ZERO))
    }

    /// Has the keeper do something some time.
    fn send(&self, work: impl FnOnce(&mut Keeper) + Send + 'static) {
        if let Some(jobs) = &self.jobs {
            // Without a keeper there is no daemon either: the caller that waits for an answer sees that.
            let _ = jobs.send(Box::new(work));
            self.shared.wake();
        }
    }

    /// Has the keeper do something some time. Returns where its answer comes.
    fn post<T: Send + 'static>(&self, work: impl FnOnce(&mut Keeper) -> T + Send + 'static) -> Receiver<T> {
        let (reply, answer) = mpsc::channel();
        self.send(move |keeper| drop(reply.send(work(keeper))));
        answer
    }

    /// Has the keeper do something, and waits for the answer as [`await_answer`] does.
    fn ask<T: Send + 'static>(
        &self,
        limit: Duration,
        work: impl FnOnce(&mut Keeper) -> T + Send + 'static,
    ) -> Option<T> {
        await_answer(&self.shared, &self.post(work), limit)
    }

    /// As [`Self::ask`], if a daemon is there to answer; otherwise it is done for the next one that comes.
    fn ask_or_send<T: Send + 'static>(&self, work: impl FnOnce(&mut Keeper) -> T + Send + 'static) -> Option<T> {
        if self.is_connected() {
            return self.ask(ANSWER, work);
        }
        self.send(move |keeper| drop(work(keeper)));
        None
    }

    fn spent(&self) -> Duration {
        Duration::from_millis(self.spent.load(Ordering::Relaxed))
    }

    /// How long all stops may take that follow each other.
    fn stop_limit(&self) -> Duration {
        if self.shared.view().suspends { ANSWER } else { DRAIN }
    }

    /// Notes that a ring does not run any more. Returns its layout, and its position according to memory.
    fn take_running(&mut self, index: u16) -> Option<(RingConfig, QueueState)> {
        let (ring, memory) = self.running.get_mut(usize::from(index))?.take()?;
        let used = used_index(&memory, &ring).unwrap_or_default();
        Some((ring, QueueState { next_avail: used, next_used: used }))
    }

    fn queue_error(&self, index: u16, reason: &'static str) -> DeviceError {
        DeviceError::Queue { device: self.info.name.clone(), index, reason }
    }
}

/// Waits for an answer of the keeper. After `limit` it ends the connection, and with it the keeper's own wait. `None`
/// if there is no answer even then.
fn await_answer<T>(shared: &Shared, answer: &Receiver<T>, limit: Duration) -> Option<T> {
    match answer.recv_timeout(limit) {
        Err(RecvTimeoutError::Timeout) => {
            shared.break_off();
            answer.recv_timeout(NOTICE).ok()
        }
        answer => answer.ok(),
    }
}

impl Device for VhostUserDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn ack_features(&mut self, features: u64) -> Result<(), DeviceError> {
        self.info.check_features(features)?;
        if self.ask_or_send(move |keeper| keeper.accept(features)) == Some(false) {
            let device = self.info.name.clone();
            return Err(DeviceError::Features { device, features, reason: "its daemon refuses them" });
        }
        Ok(())
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_space(&self.shared.view().config, offset, data);
    }

    fn driver_fields(&self) -> Vec<std::ops::Range<u32>> {
        let all = 0..self.info.config_len;
        let field = |offset: &u32| offer::field(self.info.device_type, *offset, 1) == Field::Drivers;
        all.filter(field).map(|offset| offset..offset + 1).collect()
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        let refused = || DeviceError::Config { device: self.info.name.clone(), offset, len: data.len() };
        let field = offer::field(self.info.device_type, offset, data.len());
        let end = (offset as usize).checked_add(data.len());
        let end = end.filter(|&end| end <= self.info.config_len as usize).ok_or_else(refused)?;
        if field == Field::ReadOnly || !self.shared.view().has_config {
            return Err(refused());
        }
        let bytes = data.to_vec();
        let answer = self.is_connected().then(|| self.ask(ANSWER, move |keeper| keeper.write_config(offset, &bytes)));
        match answer.flatten().flatten() {
            Some(true) => Ok(()),
            // No daemon is there to answer, but this field is known to be the driver's.
            None if field == Field::Drivers => {
                self.shared.view().config[offset as usize..end].copy_from_slice(data);
                let bytes = data.to_vec();
                self.send(move |keeper| keeper.setup.wrote_config(offset, &bytes));
                Ok(())
            }
            _ => Err(refused()),
        }
    }

    fn start_queue(&mut self, index: u16, parts: QueueParts) -> Result<(), DeviceError> {
        let name = || self.info.name.clone();
        let host = |what, source| DeviceError::Host { device: name(), what, source };
        let setup = RingSetup::of(&parts).map_err(|error| host("duplicating a doorbell", error))?;
        let QueueParts { ring, mem, kick, call, from, left, .. } = parts;
        match (self.running.get(usize::from(index)), self.info.queue_sizes.get(usize::from(index))) {
            (Some(None), Some(&size)) if ring.size <= size => {}
            (Some(None), _) => return Err(self.queue_error(index, "is longer than its daemon serves")),
            (Some(Some(_)), _) => return Err(self.queue_error(index, "runs already")),
            (None, _) => return Err(self.queue_error(index, "does not exist")),
        }
        let (connected, keeps_table) = {
            let view = self.shared.view();
            (view.connected, view.keeps_table)
        };
        if !left.is_empty() && connected && !keeps_table {
            return Err(self.queue_error(index, "has requests in flight, of which its daemon can't be told"));
        }
        // An invalid ring is the driver's own fault, and nothing to try a daemon with.
        check_ring(&mem, &ring).map_err(|source| DeviceError::Ring { device: name(), index, source })?;
        let call = match call {
            Interrupt::Event(call) => call,
            _ => Arc::new(event().map_err(|error| host("making an event", error))?),
        };
        let err = event().map_err(|error| host("making an event", error))?;
        let again = [SharedEvent::of(&kick), SharedEvent::of(&call)];
        let [kick_again, call_again] = again.map(|event| event.map_err(|error| host("duplicating an event", error)));
        let again = [kick_again?, call_again?];
        let run = Ring { call, again, err, faulty: false, from, left };
        self.spent.store(0, Ordering::Relaxed);
        if self.ask_or_send(move |keeper| keeper.add(index, setup, run)) == Some(false) {
            return Err(self.queue_error(index, "is refused by its daemon"));
        }
        self.running[usize::from(index)] = Some((ring, mem));
        Ok(())
    }

    fn stop(&mut self, queues: &[u16], end: End) -> Stopping {
        let running: Vec<_> = queues.iter().map(|&index| self.take_running(index)).collect();
        let states: Vec<_> = running.iter().map(|ring| ring.as_ref().map(|&(_, state)| state)).collect();
        let by_memory = move || {
            // Requests left in the table are served first when the ring starts again.
            let known = |state: &Option<QueueState>| Some(Suspended { state: (*state)?, left: Vec::new() });
            states.iter().map(known).collect::<Ends>()
        };
        if running.iter().all(Option::is_none) {
            return Stopping::done(by_memory());
        }
        let sizes: Vec<_> = running.iter().map(|running| running.as_ref().map_or(0, |(ring, _)| ring.size)).collect();
        let wanted = queues.to_vec();
        let answer = self.post(move |keeper| {
            let ends = keeper.stop(&wanted);
            let ends = ends.into_iter().zip(wanted).zip(sizes);
            ends.map(|((stopped, index), size)| match end {
                End::Drained => Some(Suspended { state: stopped?.state, left: Vec::new() }),
                End::Suspended => Some(keeper.take_left(index, size, stopped?)),
            })
            .collect::<Ends>()
        });
        let (shared, spent) = (Arc::clone(&self.shared), Arc::clone(&self.spent));
        let limit = self.stop_limit().saturating_sub(self.spent());
        Stopping::by(queues.len(), move || {
            let start = Instant::now();
            let ends = await_answer(&shared, &answer, limit);
            spent.fetch_add(start.elapsed().as_millis() as u64, Ordering::Relaxed);
            shared.outlast((end == End::Suspended).then_some(AFTERLIFE));
            ends.unwrap_or_else(by_memory)
        })
    }

    fn reset(&mut self) {
        let runs = self.running.iter().any(Option::is_some);
        let limit = if runs { self.stop_limit() } else { ANSWER };
        self.ask(limit.saturating_sub(self.spent()), Keeper::reset);
        self.shared.outlast(None);
        self.spent.store(0, Ordering::Relaxed);
        self.running.fill_with(|| None);
    }

    fn on_config_change(&mut self, notify: Interrupt) {
        self.shared.view().config_changed = notify;
    }

    fn save_state(&self) -> Result<Vec<u8>, DeviceError> {
        let refused = |reason: &str| DeviceError::Save { device: self.info.name.clone(), reason: reason.to_owned() };
        if !self.shared.view().has_state {
            return Err(refused(
                "its daemon does not hand it over (VHOST_USER_PROTOCOL_F_DEVICE_STATE); use one that does, such as ringvm-net",
            ));
        }
        let away = "its daemon is away, which alone has it; it comes back by itself";
        self.ask(TRANSFER, Keeper::save_state).flatten().unwrap_or_else(|| Err(refused(away)))
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let refused = |reason| DeviceError::State { device: self.info.name.clone(), reason };
        if !self.shared.view().has_state {
            return match state {
                [] => Ok(()),
                _ => Err(refused(
                    "its daemon does not take one over (VHOST_USER_PROTOCOL_F_DEVICE_STATE); use one that does, such as ringvm-net",
                )),
            };
        }
        if state.len() > MAX_STATE {
            return Err(refused("it is longer than 64 KiB"));
        }
        let state = state.to_vec();
        match self.ask(TRANSFER, move |keeper| keeper.load_state(state)) {
            Some(true) => Ok(()),
            Some(false) => Err(refused("its daemon refuses it")),
            None => Err(refused("its daemon does not answer")),
        }
    }

    fn stats(&self) -> DeviceStats {
        // They are counted where the queues run, and the daemon prints them.
        DeviceStats { name: self.info.name.clone(), queues: Vec::new() }
    }
}

impl Drop for VhostUserDevice {
    fn drop(&mut self) {
        self.ask(ANSWER.saturating_sub(self.spent()), Keeper::reset);
        // The keeper ends, and a daemon of ours with it.
        drop(mem::take(&mut self.jobs));
        self.shared.wake();
        if self.ended.recv_timeout(ANSWER) == Err(RecvTimeoutError::Timeout) {
            self.shared.break_off();
            if self.ended.recv_timeout(NOTICE) == Err(RecvTimeoutError::Timeout) {
                warn!(parent: self.shared.span(), "its daemon can't be ended now, and is left alone");
            }
        }
    }
}

#[cfg(test)]
mod random_daemon_tests;
