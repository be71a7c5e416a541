//! A device whose queues run in another process, over vhost-user (the specification is part of QEMU's documentation).
//!
//! Doorbells and interrupts pass straight between KVM and the daemon; this is control only, and it never gives up: what the
//! driver has set up is kept here, and a thread brings every new connection to the same state. While nobody is there, the
//! driver just waits. Requests in flight are in a table that outlives the daemon, and its successor serves them again.

mod link;
mod patience;
pub mod peer;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ringvm_backends::device::{
    Device, DeviceError, DeviceInfo, GuestMemory, QueueParts, QueueState, RingConfig, Suspended,
};
use ringvm_backends::event::{SharedEvent, borrow, take};
use ringvm_backends::interrupt::Interrupt;
use ringvm_backends::queue::{RING_FEATURES, used_index};
use ringvm_backends::stats::DeviceStats;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;
use tracing::{debug, info, warn};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_MQ;
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_SPEED_DUPLEX, VIRTIO_NET_F_STATUS,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use link::{About, Inflight, Link, LinkError, Vring};
use peer::Peer;

/// How long the first connection may take.
const GREETING: Duration = Duration::from_secs(10);
/// Pause before another attempt to connect: doubled from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// Feature bits of the ring and the transport (virtio 1.3, section 6), of which only those that our transport has are taken.
const RESERVED_FEATURES: u64 = ((1 << 42) - 1) & !((1 << 24) - 1);
/// Largest configuration space that is asked for: what fits a message.
const MAX_CONFIG: u32 = 256;
/// Where `writeback` of a disk lies, the one field of its configuration space that is the driver's.
const BLOCK_WRITEBACK: u32 = 32;

/// What a device in another process is to be.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Virtio device ID.
    pub device_type: u32,
    /// Queues that the driver gets; as many as the daemon says it has, if not given.
    pub queues: Option<u16>,
    /// Descriptors per queue.
    pub queue_size: u16,
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
    keeper: Option<JoinHandle<()>>,
}

struct Shared {
    name: String,
    state: Mutex<State>,
    /// Has the keeper look at the state.
    wake: EventFd,
}

/// What the driver has set up, wherever the daemon is.
struct State {
    peer: Peer,
    link: Option<Link>,
    queue_size: u16,
    /// Accepted by the driver.
    features: Option<u64>,
    memory: Option<GuestMemory>,
    /// Shown to the daemon of this connection.
    shown: bool,
    rings: Vec<Option<Ring>>,
    inflight: Option<Inflight>,
    config: Vec<u8>,
    /// What the driver has written to it, by offset.
    written: BTreeMap<u32, Vec<u8>>,
    config_changed: Interrupt,
    /// Said once that the daemon is away.
    told_away: bool,
    /// What was wrong with the last one that came, said once.
    told_reason: String,
    ends: bool,
}

/// A ring that runs, as far as the driver knows.
struct Ring {
    ring: RingConfig,
    kick: EventFd,
    call: Arc<EventFd>,
    /// Raises the two, which every daemon that was here holds as well.
    again: [SharedEvent; 2],
    /// Where calls go that can't go straight.
    relay: Option<Interrupt>,
    err: EventFd,
    fault: Interrupt,
    from: QueueState,
    /// What the table of requests in flight does not hold yet.
    left: Vec<u16>,
}

fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

impl VhostUserDevice {
    /// Connects to the daemon, waiting a while for it to come.
    ///
    /// # Errors
    /// When nobody comes, or what is there is not the device that is wanted.
    pub fn connect(name: &str, mut peer: Peer, wanted: &Wanted) -> Result<Self, ConnectError> {
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
                    debug!(device = name, %reason, "waiting for {whom}");
                    thread::sleep(Duration::from_millis(20));
                }
                Err(reason) => {
                    let hint = if matches!(peer, Peer::Socket(_)) { "; start its daemon first" } else { "" };
                    return Err(error("connecting to", reason.to_string(), hint));
                }
            }
        };
        let failed = |reason: LinkError| error("talking to", reason.to_string(), "; is it a vhost-user daemon?");
        let (mut link, about) = Link::open(socket, is_counted(wanted.device_type)).map_err(failed)?;
        let config = match wanted.device_type {
            _ if !link.has_config() => Vec::new(),
            device_type => link.within_limits(|link| link.read_config(config_len(device_type))).map_err(failed)?,
        };
        let offered = features(wanted.device_type, about.features, !config.is_empty());
        let count = queue_count(wanted, &about, &config, offered).map_err(|reason| error("using", reason, ""))?;
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
        let state = State {
            peer,
            link: Some(link),
            queue_size: wanted.queue_size,
            features: None,
            memory: None,
            shown: false,
            rings: (0..count).map(|_| None).collect(),
            inflight: None,
            config,
            written: BTreeMap::new(),
            config_changed: Interrupt::None,
            told_away: false,
            told_reason: String::new(),
            ends: false,
        };
        let wake = event().map_err(|source| host("making an event", source))?;
        let shared = Arc::new(Shared { name: name.to_owned(), state: Mutex::new(state), wake });
        let keeper = Arc::clone(&shared);
        let keeper = thread::Builder::new().name(format!("vhost-{name}")).spawn(move || keeper.keep());
        Ok(Self { info, shared, keeper: Some(keeper.map_err(|source| host("starting a thread", source))?) })
    }
}

impl VhostUserDevice {
    /// Whether a daemon is there.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.shared.lock().link.is_some()
    }
}

/// What is offered to the driver of what the daemon offers.
fn features(device_type: u32, theirs: u64, has_config: bool) -> u64 {
    /// What a driver would look for in a configuration space, and what comes with a control queue.
    const NEED_CONFIG: u64 = 1 << VIRTIO_NET_F_MTU
        | 1 << VIRTIO_NET_F_MAC
        | 1 << VIRTIO_NET_F_STATUS
        | 1 << VIRTIO_NET_F_CTRL_VQ
        | 1 << VIRTIO_NET_F_CTRL_RX
        | 1 << VIRTIO_NET_F_CTRL_VLAN
        | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
        | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
        | 1 << VIRTIO_NET_F_MQ
        | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
        | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
        | 1 << VIRTIO_NET_F_SPEED_DUPLEX;
    let without = if device_type == VIRTIO_ID_NET && !has_config { NEED_CONFIG } else { 0 };
    theirs & (!RESERVED_FEATURES | RING_FEATURES) & !without
}

/// Whether a daemon for this kind of device is asked how many queues it has, rather than its configuration space.
fn is_counted(device_type: u32) -> bool {
    !matches!(device_type, VIRTIO_ID_BLOCK | VIRTIO_ID_NET)
}

/// Length of the configuration space of a kind of device.
fn config_len(device_type: u32) -> u32 {
    match device_type {
        VIRTIO_ID_BLOCK => 60,
        VIRTIO_ID_NET => 24,
        _ => MAX_CONFIG,
    }
}

/// How many queues the driver gets.
fn queue_count(wanted: &Wanted, about: &About, config: &[u8], offered: u64) -> Result<u16, String> {
    /// Where `num_queues` of a disk lies, and `max_virtqueue_pairs` of a NIC.
    const BLOCK_QUEUES: std::ops::Range<usize> = 34..36;
    const NET_PAIRS: std::ops::Range<usize> = 8..10;
    let word = |range: std::ops::Range<usize>| {
        let bytes = config.get(range)?.try_into().ok()?;
        Some(u16::from_le_bytes(bytes)).filter(|&count| count > 0)
    };
    let has = |feature: u32| offered & 1 << feature != 0;
    let there = match wanted.device_type {
        VIRTIO_ID_BLOCK if has(VIRTIO_BLK_F_MQ) => word(BLOCK_QUEUES).unwrap_or(1),
        VIRTIO_ID_BLOCK => 1,
        // The control queue is behind all pairs (virtio 1.3, 5.1.2), whether or not the daemon counts it.
        VIRTIO_ID_NET => {
            let pairs = if has(VIRTIO_NET_F_MQ) { word(NET_PAIRS).unwrap_or(1) } else { 1 };
            pairs.saturating_mul(2).saturating_add(u16::from(has(VIRTIO_NET_F_CTRL_VQ)))
        }
        _ => about.queues.unwrap_or(1).max(1),
    };
    match wanted.queues {
        Some(0) => Err("it can't have 0 queues".into()),
        Some(wanted) if wanted > there => Err(format!("it has {there} queues, not {wanted}")),
        Some(wanted) => Ok(wanted),
        None => Ok(there),
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // A full counter is awake.
        let _ = self.wake.write(1);
    }

    /// The connection has failed: what follows is the keeper's.
    fn lost(&self, state: &mut State, error: &dyn std::fmt::Display) {
        if state.link.take().is_some() && !std::mem::replace(&mut state.told_away, true) {
            warn!(device = self.name, "the daemon at {} is away ({error}); the guest waits for it", state.peer.name());
        }
        self.wake();
    }

    /// Does `work` over the connection, if there is one; a failure ends it.
    fn try_with<T>(
        &self,
        state: &mut State,
        work: impl FnOnce(&mut State, &mut Link) -> Result<T, LinkError>,
    ) -> Option<T> {
        let mut link = state.link.take()?;
        let result = link.within_limits(|link| work(state, link));
        state.link = Some(link);
        result.map_err(|error| self.lost(state, &error)).ok()
    }

    /// The life of the keeper thread.
    fn keep(&self) {
        let mut pause = FIRST_PAUSE;
        loop {
            let mut state = self.lock();
            if state.ends {
                return;
            }
            if state.link.is_none() {
                match self.reconnect(&mut state) {
                    Ok(()) => {
                        pause = FIRST_PAUSE;
                        state.told_reason.clear();
                        if std::mem::take(&mut state.told_away) {
                            warn!(device = self.name, "the daemon at {} is back", state.peer.name());
                        }
                    }
                    Err(reason) => {
                        if reason.is_empty() || state.told_reason == reason {
                            debug!(device = self.name, reason, "connecting again");
                        } else {
                            warn!(device = self.name, "the daemon at {} can't be used: {reason}", state.peer.name());
                            state.told_reason = reason;
                        }
                        drop(state);
                        self.sleep(pause);
                        pause = (pause * 2).min(LAST_PAUSE);
                        continue;
                    }
                }
            }
            drop(state);
            self.watch();
        }
    }

    /// Waits for a while, or until it is woken.
    fn sleep(&self, pause: Duration) {
        let timeout = Timespec { tv_sec: pause.as_secs() as i64, tv_nsec: pause.subsec_nanos().into() };
        let mut fds = [PollFd::from_borrowed_fd(borrow(&self.wake), PollFlags::IN)];
        // Woken by a signal is woken.
        let _ = poll(&mut fds, Some(&timeout));
        let _ = self.wake.read();
    }

    /// Waits until there is something to do, and does it.
    fn watch(&self) {
        // Duplicates, so that nothing is held while waiting.
        let (socket, events, rings) = {
            let state = self.lock();
            let Some(link) = &state.link else { return };
            let Ok(socket) = link.socket().try_clone_to_owned() else { return };
            let events = link.events().and_then(|fd| fd.try_clone_to_owned().ok());
            let rings: Vec<_> = state
                .rings
                .iter()
                .enumerate()
                .filter_map(|(index, ring)| ring.as_ref().map(|ring| (index, ring)))
                .filter_map(|(index, ring)| {
                    let call = ring.relay.as_ref().map(|_| Arc::clone(&ring.call));
                    Some((index, ring.err.try_clone().ok()?, call))
                })
                .collect();
            (socket, events, rings)
        };
        let mut fds =
            vec![PollFd::from_borrowed_fd(borrow(&self.wake), PollFlags::IN), PollFd::new(&socket, PollFlags::RDHUP)];
        if let Some(events) = &events {
            fds.push(PollFd::new(events, PollFlags::IN));
        }
        for (_, err, call) in &rings {
            fds.push(PollFd::from_borrowed_fd(borrow(err), PollFlags::IN));
            if let Some(call) = call {
                fds.push(PollFd::from_borrowed_fd(borrow(call), PollFlags::IN));
            }
        }
        if poll(&mut fds, None).is_err() {
            return;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut ready = ready.into_iter();
        let mut next = || ready.next().unwrap_or(false);
        if next() {
            let _ = self.wake.read();
        }
        if next() {
            let mut state = self.lock();
            self.lost(&mut state, &"it has closed the connection");
            return;
        }
        let mut state = self.lock();
        if events.is_some() && next() {
            self.hear(&mut state);
        }
        for (index, err, call) in &rings {
            if next()
                && take(borrow(err))
                && let Some(ring) = &state.rings[*index]
            {
                ring.fault.raise();
            }
            if let Some(call) = call
                && next()
                && take(borrow(call))
                && let Some(relay) = state.rings[*index].as_ref().and_then(|ring| ring.relay.clone())
            {
                relay.raise();
            }
        }
    }

    /// Hears what the daemon has to say.
    fn hear(&self, state: &mut State) {
        let changed = self.try_with(state, |state, link| {
            let changed = link.hear()? && link.has_config();
            if changed {
                state.config = link.read_config(state.config.len() as u32)?;
            }
            Ok(changed)
        });
        if changed == Some(true) {
            info!(device = self.name, "the daemon has changed the configuration space");
            state.config_changed.raise();
        }
    }

    /// Connects, and brings the daemon to where the device is. What is said of a failure is empty if just nobody is there.
    fn reconnect(&self, state: &mut State) -> Result<(), String> {
        let socket = state.peer.connect().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused if matches!(state.peer, Peer::Socket(_)) => {
                String::new()
            }
            _ => error.to_string(),
        })?;
        // How many queues it has does not matter any more.
        let (mut link, about) = Link::open(socket, false).map_err(|error| error.to_string())?;
        let accepted = state.features.unwrap_or(0);
        if accepted & !about.features != 0 {
            let missing = accepted & !about.features;
            return Err(format!("it lacks features that the driver has accepted: {missing:#x}"));
        }
        state.shown = false;
        link.within_limits(|link| self.replay(state, link)).map_err(|error| error.to_string())?;
        state.link = Some(link);
        Ok(())
    }

    fn replay(&self, state: &mut State, link: &mut Link) -> Result<(), LinkError> {
        let Some(features) = state.features else { return Ok(()) };
        link.set_features(features)?;
        if link.has_config() && !state.config.is_empty() {
            for (&offset, data) in &state.written {
                // A daemon that refuses what the one before took says so by what it is read to hold.
                let _ = link.write_config(offset, data);
            }
            let now = link.read_config(state.config.len() as u32)?;
            if now != state.config {
                state.config = now;
                state.config_changed.raise();
            }
        }
        // As the transport starts them.
        for index in (0..state.rings.len()).rev() {
            let Some(ring) = &mut state.rings[index] else { continue };
            // All that is known of a ring whose server is gone; the table knows more.
            if let Some(used) = state.memory.as_ref().and_then(|memory| used_index(memory, &ring.ring)) {
                ring.from = QueueState { next_avail: used, next_used: used };
            }
            start(state, link, index as u16)?;
            let ring = state.rings[index].as_ref().expect("it was there just now");
            // Whatever was said while nobody listened is said again (PITFALLS 48).
            ring.again.iter().for_each(SharedEvent::raise);
        }
        Ok(())
    }
}

/// Starts a ring over there, with what has to be said before the first of them.
fn start(state: &mut State, link: &mut Link, index: u16) -> Result<(), LinkError> {
    let State { memory, rings, inflight, shown, queue_size, .. } = state;
    let count = rings.len() as u16;
    let (Some(memory), Some(ring)) = (memory, &mut rings[usize::from(index)]) else { return Ok(()) };
    if !*shown {
        link.set_inflight(inflight, count, *queue_size)?;
        link.set_memory(memory)?;
        *shown = true;
    }
    let Ring { ring, kick, call, err, from, left, .. } = ring;
    if !left.is_empty() {
        Inflight::put_in(inflight.as_ref(), index, ring.size, from.next_used, left)?;
        left.clear();
    }
    link.start(index, memory, &Vring { ring, from: *from, kick, call, err })
}

impl Device for VhostUserDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn ack_features(&mut self, features: u64) -> Result<(), DeviceError> {
        self.info.check_features(features)?;
        let mut state = self.shared.lock();
        state.features = Some(features);
        self.shared.try_with(&mut state, |_, link| link.set_features(features));
        Ok(())
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        ringvm_backends::device::read_space(&self.shared.lock().config, offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        let mut state = self.shared.lock();
        let written = self.shared.try_with(&mut state, |state, link| {
            if !link.has_config() {
                return Ok(false);
            }
            link.write_config(offset, data)?;
            state.config = link.read_config(state.config.len() as u32)?;
            Ok(true)
        });
        // While nobody is there to say so, it is known of one field that it is the driver's.
        let taken = written.unwrap_or(self.info.device_type == VIRTIO_ID_BLOCK && offset == BLOCK_WRITEBACK);
        let end = offset as usize + data.len();
        if taken && let Some(place) = state.config.get_mut(offset as usize..end) {
            if written.is_none() {
                place.copy_from_slice(data);
            }
            state.written.insert(offset, data.to_vec());
            return Ok(());
        }
        Err(DeviceError::Config { device: self.info.name.clone(), offset, len: data.len() })
    }

    fn start_queue(&mut self, index: u16, parts: QueueParts) -> Result<(), DeviceError> {
        let name = || self.info.name.clone();
        let host = |what, source| DeviceError::Host { device: name(), what, source };
        let QueueParts { ring, mem, kick, call, fault, from, left, inflight: _, log: _, in_order: _ } = parts;
        let mut state = self.shared.lock();
        let place = state.rings.get(usize::from(index));
        match place {
            None => return Err(DeviceError::Queue { device: name(), index, reason: "does not exist" }),
            Some(Some(_)) => return Err(DeviceError::Queue { device: name(), index, reason: "runs already" }),
            Some(None) => {}
        }
        if !left.is_empty() && state.link.as_ref().is_some_and(|link| !link.keeps_table()) {
            let reason = "has requests in flight, of which its daemon can't be told";
            return Err(DeviceError::Queue { device: name(), index, reason });
        }
        // What the driver got wrong is its own fault, not the daemon's.
        let known = used_index(&mem, &ring).is_some() && ring.size.is_power_of_two() && ring.size <= state.queue_size;
        if !known {
            return Err(DeviceError::Queue { device: name(), index, reason: "has a layout that can't be served" });
        }
        let (call, relay) = match call {
            Interrupt::Event(call) => (call, None),
            Interrupt::None => (Arc::new(event().map_err(|error| host("making an event", error))?), None),
            other => (Arc::new(event().map_err(|error| host("making an event", error))?), Some(other)),
        };
        let err = event().map_err(|error| host("making an event", error))?;
        let again = [SharedEvent::of(&kick), SharedEvent::of(&call)];
        let [kick_again, call_again] = again.map(|event| event.map_err(|error| host("duplicating an event", error)));
        let again = [kick_again?, call_again?];
        if state.memory.as_ref().is_none_or(|known| !Arc::ptr_eq(known, &mem)) {
            state.shown = false;
            state.memory = Some(mem);
        }
        state.rings[usize::from(index)] = Some(Ring { ring, kick, call, again, relay, err, fault, from, left });
        self.shared.try_with(&mut state, |state, link| start(state, link, index));
        // The keeper watches one more ring.
        self.shared.wake();
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueueState> {
        let mut state = self.shared.lock();
        state.rings.get(usize::from(index))?.as_ref()?;
        let base = self.shared.try_with(&mut state, |_, link| link.stop(index));
        let ring = state.rings[usize::from(index)].take()?;
        let used = state.memory.as_ref().and_then(|memory| used_index(memory, &ring.ring)).unwrap_or_default();
        // Without a daemon nothing is in flight but what the table says, and that is served first when the ring starts again.
        Some(QueueState { next_avail: base.unwrap_or(used), next_used: used })
    }

    fn suspend(&mut self, queues: &[u16]) -> Vec<Option<Suspended>> {
        let mut state = self.shared.lock();
        let runs = |index: &u16| state.rings.get(usize::from(*index)).is_some_and(Option::is_some);
        let running: Vec<u16> = queues.iter().copied().filter(runs).collect();
        let bases = self.shared.try_with(&mut state, |_, link| link.suspend(&running));
        let mut bases = bases.unwrap_or_default().into_iter();
        let mut end = |&index: &u16| {
            let Ring { ring, left: unsaid, .. } = state.rings.get_mut(usize::from(index))?.take()?;
            let used = state.memory.as_ref().and_then(|memory| used_index(memory, &ring)).unwrap_or_default();
            let table = state.inflight.as_ref();
            let mut left = table.map_or(Vec::new(), |table| table.take_out(index, ring.size, used));
            left.extend(unsaid);
            // Whatever was looked at was given back or is left, also where nobody could be asked.
            let base = bases.next().filter(|_| left.is_empty());
            let next_avail = base.unwrap_or_else(|| used.wrapping_add(left.len() as u16));
            Some(Suspended { state: QueueState { next_avail, next_used: used }, left })
        };
        queues.iter().map(&mut end).collect()
    }

    fn reset(&mut self) {
        for index in 0..self.info.queue_sizes.len() {
            self.stop_queue(index as u16);
        }
        let mut state = self.shared.lock();
        (state.features, state.memory, state.inflight, state.shown) = (None, None, None, false);
        state.written.clear();
        self.shared.try_with(&mut state, |state, link| {
            link.reset()?;
            if link.has_config() {
                state.config = link.read_config(state.config.len() as u32)?;
            }
            Ok(())
        });
    }

    fn on_config_change(&mut self, notify: Interrupt) {
        self.shared.lock().config_changed = notify;
    }

    fn stats(&self) -> DeviceStats {
        // They are counted where the queues run, and the daemon prints them.
        DeviceStats { name: self.info.name.clone(), queues: Vec::new() }
    }
}

impl Drop for VhostUserDevice {
    fn drop(&mut self) {
        self.reset();
        self.shared.lock().ends = true;
        self.shared.wake();
        if let Some(keeper) = self.keeper.take() {
            drop(keeper.join());
        }
        // The connection first: a daemon of ours ends with it.
        self.shared.lock().link = None;
    }
}

#[cfg(test)]
mod random_daemon_tests;
