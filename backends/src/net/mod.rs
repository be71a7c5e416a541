//! The network device (virtio 1.3, section 5.1): features, configuration space and the start and stop of its queues.

mod control;
mod features;
mod frame;
pub mod options;
pub mod port;
mod receive;
mod state;
mod transmit;

use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};

use crate::device::{Device, DeviceError, DeviceInfo, QueueParts};
use crate::host::event::SharedEvent;
use crate::io::queues::Queues;
use crate::io::reactor::ReactorPool;
use crate::net::port::Port;
use crate::options::Checked;
use crate::stats::DeviceStats;
use crate::virtqueue::End;
use crate::virtqueue::interrupt::Interrupt;
use crate::virtqueue::split::{RING_FEATURES, avail_index};
use crate::virtqueue::stopping::Stopping;
use control::{Control, ControlHandler, RxMode};
use frame::{HEADER_LEN, MAX_FRAME};
pub use options::{Lent, MAX_QUEUE_SIZE, Mac, NetOptions, OpenError};
use receive::ReceiveSource;
use state::NetState;
use transmit::TransmitHandler;

/// Bytes of `struct virtio_net_config` up to and with `duplex`.
const CONFIG_LEN: usize = 17;

/// Descriptors of the control queue.
const CONTROL_SIZE: u16 = 64;

/// Ethernet addresses, type and a VLAN tag.
const FRAME_OVERHEAD: u64 = 18;

/// Speed to report for a port without one of its own, in Mbit/s: drivers only show it.
const SPEED: u32 = 10_000;
const FULL_DUPLEX: u8 = 1;

/// A NIC.
pub struct NetDevice {
    info: DeviceInfo,
    port: Arc<dyn Port>,
    control: Arc<Control>,
    /// The initial address.
    mac: [u8; 6],
    mtu: Option<u16>,
    max_pairs: u16,
    features: u64,
    queues: Queues,
    /// Whether the control queue is served here.
    control_runs: bool,
    /// The number of pairs came with the state of another device, so nothing is inferred.
    knows_pairs: bool,
    /// The port serves others while no queue runs here, so that it is changed only while one does.
    lent: bool,
    /// The port is gone for good.
    down: Arc<AtomicBool>,
    config_changed: Arc<Mutex<Interrupt>>,
}

/// The purpose of the queue at some index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive(u16),
    Transmit(u16),
    Control,
}

impl NetDevice {
    /// Opens a NIC whose queues will be spread over the threads of `pool`.
    ///
    /// # Errors
    /// Anything that is wrong with the options or the port, in one line.
    pub fn open(name: &str, options: &NetOptions, pool: &ReactorPool) -> Result<Self, OpenError> {
        let checked = Checked::new(options.clone()).map_err(|what| options.refuse(what))?;
        Self::open_checked(name, &checked, pool)
    }

    /// As [`Self::open`], with options that were checked when they were read.
    ///
    /// # Errors
    /// Anything that is wrong with the port, in one line.
    pub fn open_checked(name: &str, options: &Checked<NetOptions>, pool: &ReactorPool) -> Result<Self, OpenError> {
        let port = options.open()?;
        let mac = options.mac_or_random().map_err(|source| OpenError::Host {
            net: name.to_owned(),
            what: "making a MAC address",
            source,
        })?;
        if options.lent.is_some() {
            return Ok(Self::over_lent(name, port, mac, options, pool));
        }
        Ok(Self::over(name, port, mac, options, pool))
    }

    /// A NIC over a port of any kind. Of the options, the MTU and the queue size are looked at.
    pub fn over(name: &str, port: Arc<dyn Port>, mac: [u8; 6], options: &NetOptions, pool: &ReactorPool) -> Self {
        let mut device = Self::over_lent(name, port, mac, options, pool);
        device.lent = false;
        device.reset();
        device
    }

    /// A NIC over a port that others, here and in other processes, may serve while no queue runs here. Until the
    /// first queue starts the port stays as it is; then it follows the driver's settings, and it keeps them when all
    /// queues have stopped.
    pub fn over_lent(name: &str, port: Arc<dyn Port>, mac: [u8; 6], options: &NetOptions, pool: &ReactorPool) -> Self {
        let pairs = port.pairs() as u16;
        let mtu = options.mtu.or(port.mtu());
        let mut features = RING_FEATURES | features::offered(port.offloads());
        for bit in [
            features::MAC,
            features::MRG_RXBUF,
            features::STATUS,
            features::SPEED_DUPLEX,
            features::CTRL_VQ,
            features::CTRL_RX,
            features::CTRL_MAC_ADDR,
            features::GUEST_ANNOUNCE,
        ] {
            features |= 1 << bit;
        }
        features |= u64::from(mtu.is_some()) << features::MTU;
        features |= u64::from(pairs > 1) << features::MQ;
        let mut queue_sizes = vec![options.queue_size; usize::from(pairs) * 2];
        queue_sizes.push(CONTROL_SIZE);
        let control = Control {
            port: Arc::clone(&port),
            mac: Mutex::new(mac),
            active: Arc::new(AtomicU16::new(pairs)),
            pairs_said: AtomicBool::new(false),
            guest_offloads: Arc::default(),
            receivers: Mutex::new((0..pairs).map(|_| None).collect()),
            announce: AtomicBool::new(false),
            rx: Mutex::new(RxMode::default()),
        };
        let count = queue_sizes.len();
        let mut device = Self {
            info: DeviceInfo {
                device_type: VIRTIO_ID_NET,
                name: name.to_owned(),
                features,
                queue_sizes,
                config_len: CONFIG_LEN as u32,
            },
            port,
            control: Arc::new(control),
            mac,
            mtu,
            max_pairs: pairs,
            features: 0,
            queues: Queues::new(name, count, pool.clone()),
            control_runs: false,
            knows_pairs: false,
            lent: true,
            down: Arc::new(AtomicBool::new(false)),
            config_changed: Arc::new(Mutex::new(Interrupt::None)),
        };
        device.reset();
        device
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// The control queue follows the last pair that the driver can use (5.1.2).
    fn role(&self, index: u16) -> Option<Role> {
        let pairs = if self.has(features::MQ) { self.max_pairs } else { 1 };
        match index {
            _ if index < pairs * 2 && index.is_multiple_of(2) => Some(Role::Receive(index / 2)),
            _ if index < pairs * 2 => Some(Role::Transmit(index / 2)),
            _ if index == pairs * 2 && self.has(features::CTRL_VQ) => Some(Role::Control),
            _ => None,
        }
    }

    /// The longest frame that may come, header included.
    fn frame_len(&self) -> u64 {
        let plain = self.mtu.map_or(MAX_FRAME, |mtu| u64::from(mtu) + FRAME_OVERHEAD);
        let longest = if features::guest_offloads(self.features).any_segmentation() { MAX_FRAME } else { plain };
        longest + HEADER_LEN as u64
    }

    fn receive_source(&self, pair: u16) -> ReceiveSource {
        let (down, changed) = (Arc::clone(&self.down), self.config_change());
        ReceiveSource {
            pair,
            ends: self.port.ends(usize::from(pair)),
            frame_len: self.frame_len(),
            merges: self.has(features::MRG_RXBUF),
            agreed: Arc::clone(&self.control.guest_offloads),
            active: Arc::clone(&self.control.active),
            gone: Interrupt::Call(Arc::new(move || {
                if !down.swap(true, Ordering::AcqRel) {
                    changed.raise();
                }
            })),
        }
    }

    /// The peer was lost and found again. It may have dropped our MAC from its tables, or be a different peer, so ask
    /// the driver to announce itself (5.1.6.5.4).
    fn found_again(&self) -> Interrupt {
        let (control, changed) = (Arc::clone(&self.control), self.config_change());
        let wanted = self.has(features::GUEST_ANNOUNCE);
        Interrupt::Call(Arc::new(move || {
            if wanted && !control.announce.swap(true, Ordering::AcqRel) {
                changed.raise();
            }
        }))
    }

    /// Tells the driver that the configuration space has changed, over the interrupt that is set by that time.
    fn config_change(&self) -> Interrupt {
        let changed = Arc::clone(&self.config_changed);
        Interrupt::Call(Arc::new(move || {
            // Cloned, so that the call is made without the lock.
            let changed = changed.lock().unwrap_or_else(PoisonError::into_inner).clone();
            changed.raise();
        }))
    }

    /// Infers the number of active pairs from which receive queues run, as long as the driver has not said it to this
    /// device. The control queue may be served by another process, which runs just the queues that the driver uses.
    /// Or the driver may have set the number before this device took over; then it has buffers in the queues that it
    /// uses.
    fn guess_pairs(&self, pair: u16, in_use: bool) -> Result<(), DeviceError> {
        let active = self.control.active.load(Ordering::Acquire);
        let count = if in_use { active.max(pair + 1) } else { active.min(pair.max(1)) };
        if !self.has(features::MQ) || self.control.pairs_said.load(Ordering::Acquire) || count == active {
            return Ok(());
        }
        self.control.set_pairs(count).map_err(|source| self.host_error("changing the number of queue pairs", source))
    }

    /// A queue is about to stop, or was told to.
    fn leave_pair(&mut self, index: u16) {
        match self.role(index) {
            Some(Role::Receive(pair)) => {
                self.control.receivers.lock().unwrap_or_else(PoisonError::into_inner)[usize::from(pair)] = None;
                if !self.control_runs
                    && let Err(error) = self.guess_pairs(pair, false)
                {
                    tracing::warn!(%error, "frames may go to a queue that nobody serves");
                }
            }
            Some(Role::Control) => self.control_runs = false,
            Some(Role::Transmit(_)) | None => {}
        }
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let mut space = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        let announce = self.control.announce.load(Ordering::Acquire);
        let announce = if announce { VIRTIO_NET_S_ANNOUNCE as u16 } else { 0 };
        let up = !self.down.load(Ordering::Acquire);
        let status = if up { VIRTIO_NET_S_LINK_UP as u16 | announce } else { 0 };
        put(0, &*self.control.mac.lock().unwrap_or_else(PoisonError::into_inner));
        put(6, &status.to_le_bytes());
        put(8, &self.max_pairs.to_le_bytes());
        put(10, &self.mtu.unwrap_or(0).to_le_bytes());
        put(12, &SPEED.to_le_bytes());
        put(16, &[FULL_DUPLEX]);
        space
    }

    /// Whether the port is this device's now, and there.
    fn may_change_port(&self) -> bool {
        (!self.lent || self.queues.any_run()) && !self.down.load(Ordering::Acquire)
    }

    fn host_error(&self, what: &'static str, source: std::io::Error) -> DeviceError {
        DeviceError::Host { device: self.info.name.clone(), what, source }
    }
}

impl Device for NetDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn ack_features(&mut self, features: u64) -> Result<(), DeviceError> {
        self.info.check_features(features)?;
        if let Some(reason) = features::missing_premise(features) {
            return Err(DeviceError::Features { device: self.info.name.clone(), features, reason });
        }
        // Nothing is given to the guest unfinished that it did not agree to.
        if self.may_change_port() {
            self.port
                .set_offloads(features::guest_offloads(features))
                .map_err(|source| self.host_error("setting the port's offloads", source))?;
        }
        self.features = features;
        self.control.guest_offloads.store(features, Ordering::Relaxed);
        Ok(())
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        crate::device::read_space(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        // The address is changed through the control queue (5.1.4.3).
        Err(DeviceError::Config { device: self.info.name.clone(), offset, len: data.len() })
    }

    fn start_queue(&mut self, index: u16, parts: QueueParts) -> Result<(), DeviceError> {
        let reason = "is none of those that go with the negotiated features";
        let role = self.role(index);
        let role = role.ok_or_else(|| DeviceError::Queue { device: self.info.name.clone(), index, reason })?;
        if self.lent && !self.queues.any_run() && !self.down.load(Ordering::Acquire) {
            let settled = self.control.settle_port();
            settled.map_err(|source| self.host_error("setting up the port", source))?;
        }
        match role {
            Role::Receive(pair) => {
                let kick = SharedEvent::of(&parts.kick);
                let kick = kick.map_err(|source| self.host_error("duplicating a doorbell", source))?;
                let source = self.receive_source(pair);
                let has_buffers = || avail_index(&parts.mem, &parts.ring).is_some_and(|index| index != 0);
                let in_use = !self.control_runs || !self.knows_pairs && has_buffers();
                self.queues.start_receiver(index, parts, self.features, move || source)?;
                let mut receivers = self.control.receivers.lock().unwrap_or_else(PoisonError::into_inner);
                receivers[usize::from(pair)] = Some(kick);
                drop(receivers);
                if in_use { self.guess_pairs(pair, true) } else { Ok(()) }
            }
            Role::Transmit(pair) => {
                let pair = usize::from(pair);
                let agreed = features::host_offloads(self.features);
                let (ends, port, found) = (self.port.ends(pair), Arc::clone(&self.port), self.found_again());
                let handler = TransmitHandler { port, pair, ends, agreed, lost: false, found };
                self.queues.start(index, parts, self.features, move || handler)
            }
            Role::Control => {
                let control = Arc::clone(&self.control);
                let handler = ControlHandler {
                    control,
                    accepted: self.features,
                    max_pairs: self.max_pairs,
                    span: self.queues.span(index),
                };
                self.queues.start(index, parts, self.features, move || handler)?;
                self.control_runs = true;
                Ok(())
            }
        }
    }

    fn stop(&mut self, queues: &[u16], end: End) -> Stopping {
        queues.iter().for_each(|&index| self.leave_pair(index));
        self.queues.stop(queues, end)
    }

    fn reset(&mut self) {
        self.queues.reset();
        self.features = 0;
        *self.control.mac.lock().unwrap_or_else(PoisonError::into_inner) = self.mac;
        self.control.receivers.lock().unwrap_or_else(PoisonError::into_inner).fill_with(|| None);
        self.control.forget_rx();
        self.control.announce.store(false, Ordering::Release);
        self.control.guest_offloads.store(0, Ordering::Relaxed);
        self.control.pairs_said.store(false, Ordering::Release);
        (self.control_runs, self.knows_pairs) = (false, false);
        // A driver serves one pair until it says otherwise; frames spread over others would be lost.
        if self.may_change_port()
            && let Err(error) = self.control.settle_port()
        {
            tracing::warn!(%error, "bringing the port back to its first state");
        }
    }

    fn on_config_change(&mut self, notify: Interrupt) {
        *self.config_changed.lock().unwrap_or_else(PoisonError::into_inner) = notify;
    }

    fn save_state(&self) -> Result<Vec<u8>, DeviceError> {
        Ok(NetState::of(&self.control).to_bytes())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        // Before features are negotiated, those that could be.
        let negotiated = self.features != 0;
        let accepted = if negotiated { self.features } else { self.info.features };
        let state = NetState::from_bytes(state, self.max_pairs, accepted);
        let state = state.map_err(|reason| DeviceError::State { device: self.info.name.clone(), reason })?;
        let settles = negotiated && self.may_change_port();
        if settles {
            self.port
                .set_offloads(features::guest_offloads(state.guest_offloads))
                .map_err(|source| self.host_error("setting the port's offloads", source))?;
            if let Some(pairs) = state.pairs {
                let done = self.control.set_pairs(pairs);
                done.map_err(|source| self.host_error("changing the number of queue pairs", source))?;
            }
        } else if let (true, Some(pairs)) = (negotiated, state.pairs) {
            self.control.active.store(pairs, Ordering::Release);
        }
        self.knows_pairs = negotiated;
        self.control.pairs_said.store(state.pairs.is_some(), Ordering::Release);
        self.control.guest_offloads.store(state.guest_offloads, Ordering::Relaxed);
        self.control.announce.store(state.announce, Ordering::Release);
        *self.control.mac.lock().unwrap_or_else(PoisonError::into_inner) = state.mac;
        let rx = |rx: &mut RxMode| *rx = state.rx;
        if settles {
            self.control.change_rx(rx);
        } else {
            rx(&mut self.control.rx.lock().unwrap_or_else(PoisonError::into_inner));
        }
        Ok(())
    }

    fn stats(&self) -> DeviceStats {
        self.queues.stats()
    }
}
