//! The common configuration structure and the life of its device (virtio 1.3, 4.1.4.3, 2.1 and 3.1).
//!
//! These are registers only: a thread of its own brings the device to the state that they ask for ([`Owner`]).
//!
//! The driver's writes are not trusted to come in order: a write that comes too early, too late or twice changes
//! nothing. A running queue's parameters are frozen from DRIVER_OK until reset.

use std::sync::Arc;
use std::time::Duration;

use ringvm_backends::device::{Device, GuestMemory, RingConfig};
use ringvm_backends::host::event::SharedEvent;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use tracing::debug;
use vmm_sys_util::eventfd::EventFd;

use super::signals::{ISR_CONFIG, ISR_QUEUE, Signals};
use crate::owner::{Listener, Owner, Setup};

/// Device status bits.
pub(super) mod status {
    pub(in crate::virtio_pci) const ACKNOWLEDGE: u8 = 1;
    pub(in crate::virtio_pci) const DRIVER: u8 = 2;
    pub(in crate::virtio_pci) const DRIVER_OK: u8 = 4;
    pub(in crate::virtio_pci) const FEATURES_OK: u8 = 8;
    pub(in crate::virtio_pci) const FAILED: u8 = 0x80;
}

const VERSION_1: u64 = 1 << 32;
/// "No vector" in a vector register.
pub(super) const NO_VECTOR: u16 = 0xffff;

/// The source of a function's interrupts at this moment: MSI-X, or INTx while that is off.
pub(super) trait Vectors {
    /// Whether MSI-X is on.
    fn msix_enabled(&self) -> bool;
    /// The event of a vector, if there is one of that number.
    fn event(&self, vector: u16) -> Option<Arc<EventFd>>;
}

/// One queue as its driver sets it up.
struct Queue {
    max_size: u16,
    ring: RingConfig,
    enabled: bool,
    vector: u16,
    /// Rings the doorbell of the queue's server: a daemon may hold it as well.
    doorbell: SharedEvent,
}

impl Queue {
    fn new(max_size: u16, kick: &EventFd) -> std::io::Result<Self> {
        Ok(Self {
            max_size,
            ring: RingConfig { size: max_size, ..Default::default() },
            enabled: false,
            vector: NO_VECTOR,
            doorbell: SharedEvent::of(kick)?,
        })
    }

    fn reset(&mut self) {
        // Destructured so that no field is forgotten; the doorbell stays.
        let Self { max_size, ring, enabled, vector, doorbell: _ } = self;
        *ring = RingConfig { size: *max_size, ..Default::default() };
        (*enabled, *vector) = (false, NO_VECTOR);
    }
}

/// The transport's state and the device.
pub(super) struct Transport {
    owner: Owner,
    signals: Arc<Signals>,
    queues: Vec<Queue>,
    kicks: Arc<[EventFd]>,
    /// How long a vCPU waits for the owner to finish before it continues.
    patience: Duration,
    /// Tells one way of interrupting from the next.
    wiring: u64,
    /// A reset was in progress when the registers were last looked at.
    resetting: bool,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    config_vector: u16,
    queue_select: u16,
    /// The function may not access memory (bus mastering is off): queues wait.
    may_run: bool,
}

impl Transport {
    pub(super) fn new(
        device: Box<dyn Device>,
        memory: GuestMemory,
        signals: Arc<Signals>,
        patience: Duration,
    ) -> std::io::Result<Self> {
        let sizes = device.info().queue_sizes.clone();
        let kick = |_| EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let kicks: Arc<[EventFd]> = sizes.iter().map(kick).collect::<std::io::Result<_>>()?;
        let queues = sizes.iter().zip(kicks.iter()).map(|(&size, kick)| Queue::new(size, kick));
        let queues = queues.collect::<std::io::Result<_>>()?;
        let owner = Owner::start(device, memory, Arc::clone(&kicks), Arc::clone(&signals) as _)?;
        Ok(Self {
            owner,
            signals,
            queues,
            kicks,
            patience,
            wiring: 0,
            resetting: false,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            may_run: false,
        })
    }

    pub(super) fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Whether a reset that was in progress is complete now. Returns true once.
    pub(super) fn has_been_reset(&mut self) -> bool {
        if self.resetting && !self.owner.is_resetting() {
            self.resetting = false;
            return true;
        }
        false
    }

    /// The doorbells, in the order of the queues.
    pub(super) fn kicks(&self) -> impl Iterator<Item = &EventFd> {
        self.kicks.iter()
    }

    /// A doorbell that did not take the kernel's path.
    pub(super) fn kick(&self, index: usize) {
        if let Some(queue) = self.queues.get(index) {
            queue.doorbell.raise();
        }
    }

    fn has(&self, bits: u8) -> bool {
        self.signals.status() & bits == bits
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// Reads the common configuration structure. Fields answer to accesses of their own size, 64-bit ones to halves
    /// too.
    pub(super) fn read_common(&self, offset: u64, data: &mut [u8]) {
        let queue = self.selected();
        let of_queue = |get: fn(&Queue) -> u64| queue.map_or(0, get);
        let value = match (offset, data.len()) {
            (0x00, 4) => u64::from(self.device_feature_select),
            (0x04, 4) => half(self.owner.info().features, self.device_feature_select),
            (0x08, 4) => u64::from(self.driver_feature_select),
            (0x0c, 4) => half(self.driver_features, self.driver_feature_select),
            (0x10, 2) => u64::from(self.config_vector),
            (0x12, 2) => self.queues.len() as u64,
            (0x14, 1) => u64::from(self.signals.status()),
            (0x15, 1) => u64::from(self.signals.generation()),
            (0x16, 2) => u64::from(self.queue_select),
            (0x18, 2) => of_queue(|queue| u64::from(queue.ring.size)),
            (0x1a, 2) => queue.map_or(u64::from(NO_VECTOR), |queue| u64::from(queue.vector)),
            (0x1c, 2) => of_queue(|queue| u64::from(queue.enabled)),
            (0x1e, 2) => queue.map_or(0, |_| u64::from(self.queue_select)),
            (0x20, 4 | 8) => of_queue(|queue| queue.ring.desc),
            (0x24, 4) => of_queue(|queue| queue.ring.desc >> 32),
            (0x28, 4 | 8) => of_queue(|queue| queue.ring.avail),
            (0x2c, 4) => of_queue(|queue| queue.ring.avail >> 32),
            (0x30, 4 | 8) => of_queue(|queue| queue.ring.used),
            (0x34, 4) => of_queue(|queue| queue.ring.used >> 32),
            _ => 0,
        };
        data.fill(0);
        let len = data.len().min(8);
        data[..len].copy_from_slice(&value.to_le_bytes()[..len]);
    }

    /// Writes the common configuration structure.
    pub(super) fn write_common(&mut self, offset: u64, data: &[u8], vectors: &dyn Vectors) {
        let mut bytes = [0; 8];
        let len = data.len().min(8);
        bytes[..len].copy_from_slice(&data[..len]);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = value as u32,
            (0x08, 4) => self.driver_feature_select = value as u32,
            (0x0c, 4) => self.write_features(value as u32),
            (0x10, 2) => {
                self.config_vector = checked_vector(value as u16, vectors);
                self.update_config_interrupt(vectors);
            }
            (0x14, 1) => self.write_status(value as u8, vectors),
            (0x16, 2) => self.queue_select = value as u16,
            _ => self.write_queue(offset, data.len(), value, vectors),
        }
    }

    fn write_features(&mut self, value: u32) {
        if self.has(status::FEATURES_OK) {
            return;
        }
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | u64::from(value),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    /// Writes a field of the selected queue.
    fn write_queue(&mut self, offset: u64, len: usize, value: u64, vectors: &dyn Vectors) {
        // Pitfall 1 (docs/pitfalls.md): nothing of a queue changes once it may be in use.
        if self.has(status::DRIVER_OK) {
            return;
        }
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else { return };
        let low = |field: &mut u64| *field = *field & !0xffff_ffff | value & 0xffff_ffff;
        let high = |field: &mut u64| *field = *field & 0xffff_ffff | value << 32;
        match (offset, len) {
            (0x18, 2) => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max_size {
                    queue.ring.size = size;
                }
            }
            (0x1a, 2) => queue.vector = checked_vector(value as u16, vectors),
            // A queue can't be disabled again but by a reset.
            (0x1c, 2) if value == 1 => queue.enabled = true,
            (0x20, 8) => queue.ring.desc = value,
            (0x20, 4) => low(&mut queue.ring.desc),
            (0x24, 4) => high(&mut queue.ring.desc),
            (0x28, 8) => queue.ring.avail = value,
            (0x28, 4) => low(&mut queue.ring.avail),
            (0x2c, 4) => high(&mut queue.ring.avail),
            (0x30, 8) => queue.ring.used = value,
            (0x30, 4) => low(&mut queue.ring.used),
            (0x34, 4) => high(&mut queue.ring.used),
            _ => {}
        }
    }

    /// Writes the device status; 0 resets.
    fn write_status(&mut self, value: u8, vectors: &dyn Vectors) {
        if value == 0 {
            self.reset();
            return;
        }
        if self.owner.is_resetting() {
            // A driver is to wait until the status reads as 0 (4.1.4.3.2).
            debug!(parent: self.owner.span(), "a status written before the reset was complete is ignored");
            return;
        }
        let old = self.signals.status();
        let driver_bits =
            status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK | status::FAILED;
        let added = value & driver_bits & !old;
        self.signals.add_status(added & (status::ACKNOWLEDGE | status::FAILED));
        if added & status::DRIVER != 0 && self.has(status::ACKNOWLEDGE) {
            self.signals.add_status(status::DRIVER);
        }
        if added & status::FEATURES_OK != 0 && self.has(status::DRIVER) && self.accept_features() {
            self.signals.add_status(status::FEATURES_OK);
        }
        if added & status::DRIVER_OK != 0 && self.has(status::FEATURES_OK) {
            self.signals.add_status(status::DRIVER_OK);
            self.update_config_interrupt(vectors);
            self.update_queues(vectors);
        }
    }

    fn accept_features(&mut self) -> bool {
        let (offered, chosen) = (self.owner.info().features, self.driver_features);
        let span = self.owner.span();
        if chosen & VERSION_1 == 0 {
            debug!(parent: span, features = format_args!("{chosen:#x}"), "a driver without VERSION_1 is refused");
            return false;
        }
        let refused = chosen & !offered;
        if refused != 0 {
            debug!(parent: span, features = format_args!("{refused:#x}"), "features never offered are refused");
            return false;
        }
        // A driver looks at the bit once, right after it has set it.
        self.owner.accept(chosen, self.patience)
    }

    /// Whether the function may access memory (bus mastering).
    pub(super) fn set_may_run(&mut self, may_run: bool, vectors: &dyn Vectors) {
        if self.may_run != may_run {
            self.may_run = may_run;
            self.update_queues(vectors);
        }
    }

    /// MSI-X was switched on or off: running queues get new interrupts.
    pub(super) fn interrupts_switched(&mut self, vectors: &dyn Vectors) {
        self.update_config_interrupt(vectors);
        self.wiring += 1;
        self.update_queues(vectors);
    }

    fn update_config_interrupt(&self, vectors: &dyn Vectors) {
        let interrupt = match self.interrupt(self.config_vector, ISR_CONFIG, vectors) {
            // The vector may belong to a queue as well, and the queue's daemon then holds the event too.
            Interrupt::Event(event) => SharedEvent::of(&event).map_or_else(
                |error| {
                    self.signals.warn(format_args!("the driver won't hear of configuration changes: {error}"));
                    Interrupt::None
                },
                |event| Interrupt::Shared(Arc::new(event)),
            ),
            other => other,
        };
        self.signals.set_config_interrupt(interrupt);
    }

    /// Starts and stops queues according to the driver's and the bus's current settings.
    fn update_queues(&mut self, vectors: &dyn Vectors) {
        let run = self.may_run && self.has(status::DRIVER_OK);
        let setup = |queue: &Queue| {
            let call = self.interrupt(queue.vector, ISR_QUEUE, vectors);
            (run && queue.enabled).then_some(Setup { ring: queue.ring, call, wiring: self.wiring })
        };
        self.owner.set_queues(self.queues.iter().map(setup).collect());
        self.owner.wait(self.patience);
    }

    /// Returns to the state after power-on. Requests in flight are cancelled, or waited for where they can't be:
    /// until then the status reads as before. Firmware that does not poll it is given a moment.
    fn reset(&mut self) {
        if self.owner.reset() {
            self.resetting = true;
        } else {
            // Nothing to wait for: the status reads as 0 at once, and the driver goes on at once.
            self.signals.reset();
        }
        for queue in &mut self.queues {
            queue.reset();
        }
        let Self {
            owner: _,
            signals: _,
            queues: _,
            kicks: _,
            patience: _,
            wiring: _,
            resetting: _,
            device_feature_select,
            driver_feature_select,
            driver_features,
            config_vector,
            queue_select,
            may_run: _,
        } = self;
        (*device_feature_select, *driver_feature_select, *driver_features) = (0, 0, 0);
        (*config_vector, *queue_select) = (NO_VECTOR, 0);
        self.owner.wait(self.patience);
    }

    /// Reads the device configuration space.
    pub(super) fn read_device(&self, offset: u64, data: &mut [u8]) {
        self.owner.read_config(offset as u32, data);
    }

    /// Writes the device configuration space. A driver that reads it back finds its own value, unless the device
    /// refuses it or takes long.
    pub(super) fn write_device(&mut self, offset: u64, data: &[u8]) {
        self.owner.write_config(offset as u32, data);
        self.owner.wait(self.patience);
    }

    fn interrupt(&self, vector: u16, isr: u8, vectors: &dyn Vectors) -> Interrupt {
        if !vectors.msix_enabled() {
            return self.signals.intx(isr);
        }
        vectors.event(vector).map_or(Interrupt::None, Interrupt::Event)
    }
}

fn half(features: u64, select: u32) -> u64 {
    match select {
        0 => features & 0xffff_ffff,
        1 => features >> 32,
        _ => 0,
    }
}

/// A vector register reads back NO_VECTOR if the vector is not available (4.1.5.1.2).
fn checked_vector(vector: u16, vectors: &dyn Vectors) -> u16 {
    if vectors.event(vector).is_some() { vector } else { NO_VECTOR }
}
