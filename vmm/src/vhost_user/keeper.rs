//! The thread that owns a device's connection. It alone talks to the daemon, so no other thread waits longer than it
//! wants to for a daemon that does not answer: the device asks the keeper with a [`Job`] and a limit, and ends the
//! connection when the limit has passed.

use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use ringvm_backends::device::{DeviceError, GuestMemory, QueueState, Suspended};
use ringvm_backends::host::event::{SharedEvent, borrow, take};
use ringvm_backends::setup::{DriverSetup, RingSetup};
use ringvm_backends::virtqueue::split::used_index;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{Shutdown, shutdown};
use tracing::{debug, debug_span, info, warn};

use super::Wanted;
use super::error::LinkError;
use super::inflight::Inflight;
use super::link::{Link, Vring};
use super::peer::Peer;
use super::ring::{Ring, relay};
use super::sentinel::timespec;
use super::shared::{Breaker, Shared};

/// Back-off between attempts to connect: doubled from the first to the last. The shorter limit is for daemons that
/// came up and were soon lost.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LAST_SHORT_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// A connection that has lasted so long was a good one.
const GOOD: Duration = Duration::from_secs(10);
/// After this time the log says that a dead daemon's I/O is waited for.
const LONG: Duration = Duration::from_secs(1);
/// Pause between two looks for the daemon's messages.
const EVENT_PAUSE: Duration = Duration::from_millis(100);

/// A job for the keeper.
pub(super) type Job = Box<dyn FnOnce(&mut Keeper) + Send>;

/// What the driver has set up, and the daemon that is told.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    peer: Peer,
    link: Option<Link>,
    /// Since when the connection is there.
    since: Instant,
    /// Before the next attempt.
    pause: Duration,
    next_attempt: Instant,
    next_event: Instant,
    queue_size: u16,
    /// Whether daemons are asked for the configuration space.
    asks_config: bool,
    /// Rings that the device has.
    queues: u16,
    pub(super) setup: DriverSetup,
    /// The same rings as those of the setup, always.
    rings: BTreeMap<u16, Ring>,
    /// The state that another device has left for this one; every new daemon is given it. Changes that the driver has
    /// made since through the daemon's queues are lost with the daemon.
    state: Option<Vec<u8>>,
    /// The daemon refuses the features.
    refused: bool,
    /// The memory that the daemon of this connection was shown.
    shown: Option<GuestMemory>,
    inflight: Option<Inflight>,
    /// The log has said that the daemon is away.
    told_away: bool,
    /// The last daemon's fault, reported once.
    told_reason: String,
    /// Since when a predecessor is waited for, and whether that was logged.
    waiting: Option<(Instant, bool)>,
}

impl Keeper {
    /// The keeper of a device that was connected just now.
    pub(super) fn new(shared: Arc<Shared>, peer: Peer, link: Link, queues: u16, wanted: &Wanted) -> Self {
        let now = Instant::now();
        let mut keeper = Self {
            shared,
            peer,
            link: None,
            since: now,
            pause: FIRST_PAUSE,
            next_attempt: now,
            next_event: now,
            queue_size: wanted.queue_size,
            asks_config: wanted.config.is_none(),
            queues,
            setup: DriverSetup::default(),
            rings: BTreeMap::new(),
            state: None,
            refused: false,
            shown: None,
            inflight: None,
            told_away: false,
            told_reason: String::new(),
            waiting: None,
        };
        keeper.arm(link.socket());
        keeper.connected(link);
        keeper
    }

    /// The life of the thread. It ends when the senders of its jobs are gone.
    pub(super) fn run(mut self, jobs: &Receiver<Job>) {
        loop {
            match jobs.try_recv() {
                Ok(job) => job(&mut self),
                Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) if self.link.is_some() => self.watch(),
                Err(TryRecvError::Empty) => self.return_to_service(),
            }
        }
    }

    /// Gives handles to the connection to the threads that may have to end it.
    fn arm(&self, socket: BorrowedFd<'_>) {
        let process = self.peer.program().and_then(|program| program.process()).map(Arc::clone);
        // Without a handle waiting takes as long as the link's own limit.
        let socket = socket.try_clone_to_owned().ok();
        self.shared.view().breaker = socket.map(|socket| Breaker { socket, process });
    }

    fn connected(&mut self, link: Link) {
        let mut view = self.shared.view();
        view.connected = true;
        (view.keeps_table, view.suspends, view.has_config) = (link.keeps_table(), link.suspends(), link.has_config());
        view.has_state = link.has_state();
        view.afterlife = None;
        drop(view);
        self.link = Some(link);
        self.since = Instant::now();
    }

    /// The connection has failed.
    fn lost(&mut self, error: &dyn std::fmt::Display, hangs: bool) {
        if self.link.take().is_none() {
            return;
        }
        if !mem::replace(&mut self.told_away, true) {
            warn!("the daemon at {} is away ({error}); the guest waits for it", self.peer.name());
        }
        self.end_connection(hangs);
        let now = Instant::now();
        self.pause = if now - self.since < GOOD { (self.pause * 2).min(LAST_SHORT_PAUSE) } else { FIRST_PAUSE };
        self.next_attempt = now + self.pause;
    }

    /// The former daemon is not listened to any more.
    fn end_connection(&mut self, hangs: bool) {
        self.peer.lost(hangs);
        let afterlife = self.peer.program().and_then(|program| program.sentinel()).map(Arc::clone);
        let mut view = self.shared.view();
        view.connected = false;
        // Taken already, if it was broken off from outside.
        view.breaker = None;
        view.afterlife = afterlife;
        self.shown = None;
    }

    /// Does `work` over the connection. An error of the connection ends it; a refusal is returned.
    pub(super) fn try_with<T>(
        &mut self,
        work: impl FnOnce(&mut Self, &mut Link) -> Result<T, LinkError>,
    ) -> Option<Result<T, LinkError>> {
        let mut link = self.link.take()?;
        let result = link.within_limits(|link| work(self, link));
        self.link = Some(link);
        match result {
            Err(error) if error.ends_connection() => {
                self.lost(&error, error.hangs());
                None
            }
            other => Some(other),
        }
    }

    /// One step on the way to a daemon that serves the device.
    fn return_to_service(&mut self) {
        let now = Instant::now();
        if self.peer.has_predecessor() {
            let (since, told) = self.waiting.get_or_insert((now, false));
            let waited = now - *since;
            self.shared.sleep((waited / 8).clamp(FIRST_PAUSE, LAST_SHORT_PAUSE));
            if waited > LONG && !mem::replace(told, true) {
                let name = self.peer.name();
                warn!(
                    "the daemon at {name} has not gone yet, or has I/O in flight in the kernel; the next one waits for that"
                );
            }
            return;
        }
        self.waiting = None;
        if now < self.next_attempt {
            self.shared.sleep(self.next_attempt - now);
            return;
        }
        match self.reconnect() {
            Ok(()) => {
                self.told_reason.clear();
                if mem::take(&mut self.told_away) {
                    warn!("the daemon at {} is back", self.peer.name());
                }
            }
            Err(reason) => {
                if reason.is_empty() || self.told_reason == reason {
                    debug!(reason, "connecting again");
                } else {
                    warn!("the daemon at {} can't be used: {reason}", self.peer.name());
                    self.told_reason = reason;
                }
                self.next_attempt = Instant::now() + self.pause;
                self.pause = (self.pause * 2).min(LAST_PAUSE);
            }
        }
    }

    /// Connects, and brings the daemon to the device's state. The reason for a failure is empty if there is just no
    /// daemon.
    fn reconnect(&mut self) -> Result<(), String> {
        let socket = self.peer.connect().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused if self.peer.program().is_none() => {
                String::new()
            }
            _ => error.to_string(),
        })?;
        let result = self.greet(socket);
        if let Err((hangs, _)) = &result {
            self.end_connection(*hangs);
        }
        result.map_err(|(_, reason)| reason)
    }

    /// The failure comes with whether it is one of not answering.
    fn greet(&mut self, socket: UnixStream) -> Result<(), (bool, String)> {
        let _greeting = debug_span!("greet").entered();
        self.arm(socket.as_fd());
        let failed = |error: LinkError| (error.hangs(), error.to_string());
        // How many queues it has does not matter any more.
        let (mut link, about) = Link::open(socket, false, self.asks_config).map_err(failed)?;
        let accepted = self.setup.features.unwrap_or(0);
        if accepted & !about.features != 0 {
            let missing = accepted & !about.features;
            return Err((false, format!("it lacks features that the driver has accepted: {missing:#x}")));
        }
        let replayed = link.within_limits(|link| self.replay(link));
        replayed.map_err(failed)?;
        self.connected(link);
        Ok(())
    }

    fn replay(&mut self, link: &mut Link) -> Result<(), LinkError> {
        let _replaying = debug_span!("replay").entered();
        (self.shown, self.refused) = (None, false);
        let Some(features) = self.setup.features else { return Ok(()) };
        if let Err(error) = link.set_features(features) {
            return self.refuse(error);
        }
        let len = self.shared.view().config.len() as u32;
        if link.has_config() && len > 0 {
            for (offset, data) in self.setup.config_writes() {
                match link.write_config(offset, data) {
                    // A daemon that refuses what the one before took says so by what it is read to hold.
                    Err(error) if error.ends_connection() => return Err(error),
                    _ => {}
                }
            }
            let now = link.read_config(len)?;
            let changed = self.shared.view().config != now;
            if changed {
                self.take_config(now);
            }
        }
        if let Some(state) = &self.state {
            match link.load_state(state) {
                Err(error) if error.ends_connection() => return Err(error),
                Err(error) => self.say_refusal(&error),
                Ok(()) => {}
            }
        }
        // As the transport starts them.
        let running: Vec<u16> = self.rings.keys().rev().copied().collect();
        for index in running {
            let Some((setup, ring)) = self.ring(index) else { continue };
            // Memory tells no more than this about a ring whose server is gone; the table knows more.
            if let Some(used) = used_index(&setup.mem, &setup.ring) {
                ring.from = QueueState { next_avail: used, next_used: used };
            }
            self.start_over(link, index)?;
            if let Some((_, ring)) = self.ring(index) {
                // A doorbell or interrupt may have been missed without a listener, so raise them again (pitfall 48).
                ring.again.iter().for_each(SharedEvent::raise);
            }
        }
        Ok(())
    }

    fn ring(&mut self, index: u16) -> Option<(&RingSetup, &mut Ring)> {
        Some((self.setup.rings.get(&index)?, self.rings.get_mut(&index)?))
    }

    /// Tells the driver that a ring does not run any more, once.
    fn fail(&mut self, index: u16) {
        if let Some((setup, ring)) = self.ring(index)
            && !mem::replace(&mut ring.faulty, true)
        {
            setup.fault.raise();
        }
    }

    /// Starts a ring that runs as far as the driver knows; one that is refused needs a reset.
    fn start_over(&mut self, link: &mut Link, index: u16) -> Result<(), LinkError> {
        match self.start(link, index) {
            Err(error) if !error.ends_connection() => {
                self.say_refusal(&error);
                self.fail(index);
                Ok(())
            }
            other => other,
        }
    }

    /// The daemon won't serve the driver's features: no ring runs until the driver resets the device.
    fn refuse(&mut self, error: LinkError) -> Result<(), LinkError> {
        if error.ends_connection() {
            return Err(error);
        }
        self.say_refusal(&error);
        self.refused = true;
        (0..self.queues).for_each(|index| self.fail(index));
        Ok(())
    }

    fn say_refusal(&self, error: &LinkError) {
        warn!("the daemon at {} does not serve what the driver wants: {error}", self.peer.name());
    }

    /// Starts a daemon's ring, after the messages that must come before the first one.
    fn start(&mut self, link: &mut Link, index: u16) -> Result<(), LinkError> {
        let Self { setup, rings, inflight, shown, queues, queue_size, .. } = self;
        let (Some(setup), Some(beside)) = (setup.rings.get(&index), rings.get_mut(&index)) else { return Ok(()) };
        let RingSetup { ring, mem, kick, .. } = setup;
        if self.refused {
            return Err(LinkError::ours("starting a ring", "its daemon has refused the features"));
        }
        if shown.as_ref().is_none_or(|shown| !Arc::ptr_eq(shown, mem)) {
            link.set_inflight(inflight, *queues, *queue_size)?;
            link.set_memory(mem)?;
            *shown = Some(Arc::clone(mem));
        }
        let Ring { call, err, from, left, .. } = beside;
        if !left.is_empty() {
            Inflight::put_in(inflight.as_ref(), index, ring.size, from.next_used, left)?;
            left.clear();
        }
        link.start(index, mem, &Vring { ring, from: *from, kick, call, err })
    }

    /// Takes the features that the driver has accepted. Returns whether the daemon, if there is one, accepts them
    /// too.
    pub(super) fn accept(&mut self, features: u64) -> bool {
        let _accepting = debug_span!("accept").entered();
        (self.setup.features, self.refused) = (Some(features), false);
        match self.try_with(|_, link| link.set_features(features)) {
            Some(Err(error)) => {
                self.say_refusal(&error);
                (self.setup.features, self.refused) = (None, false);
                false
            }
            None | Some(Ok(())) => true,
        }
    }

    /// Has a ring served from now on, if the daemon that is there does so.
    pub(super) fn add(&mut self, index: u16, setup: RingSetup, ring: Ring) -> bool {
        let _starting = debug_span!("start", queue = index).entered();
        self.setup.rings.insert(index, setup);
        self.rings.insert(index, ring);
        match self.try_with(|keeper, link| keeper.start(link, index)) {
            Some(Err(error)) => {
                self.say_refusal(&error);
                self.setup.rings.remove(&index);
                self.rings.remove(&index);
                false
            }
            None | Some(Ok(())) => true,
        }
    }

    /// Ends rings. For those that are no longer served, the table knows the requests that are left.
    pub(super) fn stop(&mut self, queues: &[u16]) -> Vec<Option<Suspended>> {
        let running: Vec<u16> = queues.iter().copied().filter(|&index| self.runs(index)).collect();
        if running.is_empty() {
            return queues.iter().map(|_| None).collect();
        }
        let _stopping = debug_span!("stop", queues = ?running).entered();
        let drains = !self.shared.view().suspends;
        let positions = match self.try_with(|_, link| link.stop(&running)) {
            // The positions of rings that have left nothing in the table.
            Some(Ok(positions)) if drains => positions,
            Some(_) => Vec::new(),
            None => {
                // The rings' positions are unknown before the daemon is dead, if it is one of ours.
                self.peer.end();
                Vec::new()
            }
        };
        let mut ends: Vec<_> = queues.iter().map(|&index| self.take_ring(index)).collect();
        for (end, position) in ends.iter_mut().flatten().zip(positions) {
            end.state.next_avail = position;
        }
        ends
    }

    fn runs(&self, index: u16) -> bool {
        self.rings.contains_key(&index)
    }

    /// The position of a ring that is no longer served.
    fn take_ring(&mut self, index: u16) -> Option<Suspended> {
        let (setup, Ring { left: unsaid, .. }) = (self.setup.rings.remove(&index)?, self.rings.remove(&index)?);
        let used = used_index(&setup.mem, &setup.ring).unwrap_or_default();
        Some(Suspended { state: QueueState { next_avail: used, next_used: used }, left: unsaid })
    }

    /// Takes a ring's unanswered heads out of the table, for another server.
    pub(super) fn take_left(&self, index: u16, size: u16, end: Suspended) -> Suspended {
        let Suspended { mut state, left: unsaid } = end;
        let mut left = self.inflight.as_ref().map_or(Vec::new(), |table| table.take_out(index, size, state.next_used));
        left.extend(unsaid);
        if !left.is_empty() {
            // Every entry that was looked at was either given back or is left, even where no daemon could be asked.
            state.next_avail = state.next_used.wrapping_add(left.len() as u16);
        }
        Suspended { state, left }
    }

    /// Forgets the driver's setup.
    pub(super) fn reset(&mut self) {
        let _resetting = debug_span!("reset").entered();
        let all: Vec<u16> = (0..self.queues).collect();
        self.stop(&all);
        self.setup = DriverSetup::default();
        (self.state, self.inflight) = (None, None);
        (self.shown, self.refused) = (None, false);
        let config = self.try_with(|keeper, link| {
            match link.reset() {
                Err(error) if error.ends_connection() => return Err(error),
                _ => {}
            }
            keeper.read_config(link)
        });
        if let Some(Ok(Some(config))) = config {
            self.shared.view().config = config;
        }
    }

    /// Reads the configuration space, if it is the daemon's.
    fn read_config(&self, link: &mut Link) -> Result<Option<Vec<u8>>, LinkError> {
        let len = self.shared.view().config.len() as u32;
        (link.has_config() && len > 0).then(|| link.read_config(len)).transpose()
    }

    /// Writes to the daemon's configuration space. Returns whether the daemon takes it; `None` if there is no daemon.
    pub(super) fn write_config(&mut self, offset: u32, data: &[u8]) -> Option<bool> {
        let config = self.try_with(|keeper, link| {
            if !link.has_config() {
                return Ok(None);
            }
            link.write_config(offset, data)?;
            keeper.read_config(link)
        })?;
        let Ok(Some(config)) = config else { return Some(false) };
        self.shared.view().config = config;
        self.setup.wrote_config(offset, data);
        Some(true)
    }

    /// Asks the daemon for its state. `None` if there is no daemon.
    pub(super) fn save_state(&mut self) -> Option<Result<Vec<u8>, DeviceError>> {
        let device = self.shared.name().to_owned();
        let saved = self.try_with(|_, link| link.save_state())?;
        Some(saved.map_err(|error| DeviceError::Save { device, reason: error.to_string() }))
    }

    /// Gives another device's state to the daemon, and to every later one. Returns whether the present daemon takes
    /// it.
    pub(super) fn load_state(&mut self, state: Vec<u8>) -> bool {
        let result = self.try_with(|keeper, link| {
            link.load_state(&state)?;
            keeper.read_config(link)
        });
        match result {
            Some(Err(error)) => {
                self.say_refusal(&error);
                return false;
            }
            Some(Ok(Some(config))) => self.shared.view().config = config,
            None | Some(Ok(None)) => {}
        }
        self.state = Some(state);
        true
    }

    fn take_config(&self, config: Vec<u8>) {
        let changed = {
            let mut view = self.shared.view();
            view.config = config;
            view.config_changed.clone()
        };
        // Without the lock: it may be a call into the transport.
        changed.raise();
    }

    /// Waits until there is something to do, and does it.
    fn watch(&mut self) {
        let Some(link) = &self.link else { return };
        let now = Instant::now();
        let pause = self.next_event.saturating_duration_since(now);
        let mut fds = vec![
            PollFd::from_borrowed_fd(borrow(self.shared.wakes()), PollFlags::IN),
            PollFd::from_borrowed_fd(link.socket(), PollFlags::RDHUP),
        ];
        // A daemon that talks without end is heard now and then.
        let events = link.events().filter(|_| pause.is_zero());
        let hears = events.is_some();
        fds.extend(events.map(|events| PollFd::from_borrowed_fd(events, PollFlags::IN)));
        let mut watched = Vec::new();
        for ((&index, ring), setup) in self.rings.iter().zip(self.setup.rings.values()) {
            if !ring.faulty {
                watched.push((index, false));
                fds.push(PollFd::from_borrowed_fd(borrow(&ring.err), PollFlags::IN));
            }
            if relay(&setup.call).is_some() {
                watched.push((index, true));
                fds.push(PollFd::from_borrowed_fd(borrow(&ring.call), PollFlags::IN));
            }
        }
        let limit = (!pause.is_zero()).then(|| timespec(pause));
        if poll(&mut fds, limit.as_ref()).is_err() {
            return;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ready = ready.into_iter();
        let mut next = || ready.next().unwrap_or(false);
        if next() {
            take(borrow(self.shared.wakes()));
        }
        if next() {
            self.lost(&"it has closed the connection", false);
            return;
        }
        if hears && next() {
            self.hear();
        }
        for (index, is_call) in watched {
            let (true, Some((setup, ring))) = (next(), self.ring(index)) else { continue };
            let event = if is_call { &*ring.call } else { &ring.err };
            if !take(borrow(event)) {
                continue;
            }
            match relay(&setup.call) {
                Some(relay) if is_call => relay.raise(),
                _ => self.fail(index),
            }
        }
    }

    /// Reads the daemon's messages.
    fn hear(&mut self) {
        self.next_event = Instant::now() + EVENT_PAUSE;
        let config = self.try_with(|keeper, link| if link.hear()? { keeper.read_config(link) } else { Ok(None) });
        if let Some(Ok(Some(config))) = config {
            info!("the daemon has changed the configuration space");
            self.take_config(config);
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Before waiting for the program: a daemon of ours ends with its connection, and the breaker has a handle to
        // that as well.
        if let Some(link) = self.link.take() {
            let _ = shutdown(link.socket(), Shutdown::Both);
        }
    }
}
