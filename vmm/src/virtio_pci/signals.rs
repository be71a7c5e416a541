//! The part of the transport that I/O threads may touch: the ISR with its line, and DEVICE_NEEDS_RESET (virtio 1.3,
//! 4.1.4.5 and 2.1.1).

use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ringvm_backends::trace;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use tracing::{Span, warn};

use crate::owner::Listener;
use crate::platform::IrqLine;

/// ISR: a queue has used buffers.
pub(super) const ISR_QUEUE: u8 = 1;
/// ISR: the configuration, which includes the status, has changed.
pub(super) const ISR_CONFIG: u8 = 2;

/// Device status: the device can't continue without a reset.
const NEEDS_RESET: u8 = 0x40;
/// Device status: the driver is set up.
const DRIVER_OK: u8 = 4;

/// Shared between the transport, under its lock, and the interrupts it handed out, which take no other lock.
pub(super) struct Signals {
    /// What lines of the log about the device are part of.
    span: Span,
    status: AtomicU8,
    /// How often the device has changed its configuration space.
    generation: AtomicUsize,
    intx: Mutex<Intx>,
    /// The interrupt for configuration changes under MSI-X.
    config: Mutex<Interrupt>,
}

struct Intx {
    isr: u8,
    disabled: bool,
    line: Arc<dyn IrqLine>,
}

impl Intx {
    fn drive(&self) {
        self.line.set(self.isr != 0 && !self.disabled);
    }
}

impl Signals {
    pub(super) fn new(name: &str, line: Arc<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self {
            span: trace::device(name),
            status: AtomicU8::new(0),
            generation: AtomicUsize::new(0),
            intx: Mutex::new(Intx { isr: 0, disabled: false, line }),
            config: Mutex::new(Interrupt::None),
        })
    }

    /// The device status.
    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// Adds bits to the device status. Only a reset takes any away.
    pub(super) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    /// Logs a fault of the guest. The log has a budget for faults that a guest commits all the time.
    pub(super) fn warn(&self, what: std::fmt::Arguments<'_>) {
        warn!(parent: &self.span, "{what}");
    }

    /// The value of `config_generation`.
    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst) as u8
    }

    /// Tells the driver that the configuration has changed.
    fn config_changed(&self) {
        // Cloned, so that the call is made without the lock.
        let interrupt = lock(&self.config).clone();
        interrupt.raise();
    }

    /// Sets the interrupt for configuration changes.
    pub(super) fn set_config_interrupt(&self, interrupt: Interrupt) {
        *lock(&self.config) = interrupt;
    }

    /// An interrupt by ISR bit and line.
    pub(super) fn intx(self: &Arc<Self>, bit: u8) -> Interrupt {
        let signals = Arc::clone(self);
        Interrupt::Call(Arc::new(move || {
            let mut intx = lock(&signals.intx);
            intx.isr |= bit;
            intx.drive();
        }))
    }

    /// Reads and clears the ISR, as a read of its register does.
    pub(super) fn take_isr(&self) -> u8 {
        let mut intx = lock(&self.intx);
        let isr = std::mem::take(&mut intx.isr);
        intx.drive();
        isr
    }

    /// Whether an INTx is pending.
    pub(super) fn intx_pending(&self) -> bool {
        lock(&self.intx).isr != 0
    }

    /// The interrupt disable bit of the command register.
    pub(super) fn set_intx_disabled(&self, disabled: bool) {
        let mut intx = lock(&self.intx);
        intx.disabled = disabled;
        intx.drive();
    }
}

impl Listener for Signals {
    fn reset(&self) {
        // The interrupts handed out are not raised any more: all queues are stopped.
        self.set_config_interrupt(Interrupt::None);
        self.take_isr();
        self.status.store(0, Ordering::SeqCst);
    }

    fn need_reset(&self, reason: &str) {
        self.warn(format_args!("{reason}; the device needs a reset"));
        if self.status.fetch_or(NEEDS_RESET, Ordering::SeqCst) & DRIVER_OK != 0 {
            self.config_changed();
        }
    }

    fn space_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        if self.status() & DRIVER_OK != 0 {
            self.config_changed();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
