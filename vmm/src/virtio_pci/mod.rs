//! The virtio-pci transport, modern only, over any [`Device`] (virtio 1.3, 4.1).
//!
//! Everything is in BAR 0: the structures of 4.1.4, a doorbell per queue, the MSI-X table. Doorbells are ioeventfds
//! attached while the BAR is decoded, so a request does not come here at all.

mod signals;
#[cfg(test)]
mod tests;
mod transport;

use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use ringvm_backends::device::{Device, DeviceInfo, GuestMemory};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::layout::pci_irq;
use crate::bus::{BusDevice, Buses, Handler};
use crate::owner::Questions;
use crate::pci::{
    Bar, BarWindow, COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE, COMMAND_MEMORY, ConfigSpace, Identity, Msix, PciFunction,
};
use crate::platform::Platform;
use signals::Signals;
use transport::{Transport, Vectors};

const VENDOR: u16 = 0x1af4;
/// PCI device IDs of modern devices are this plus the virtio device ID.
const DEVICE_BASE: u16 = 0x1040;
/// Non-transitional devices have revision 1 or higher.
const REVISION: u8 = 1;

/// The BAR and what is where in it.
pub const BAR_SIZE: u64 = 0x2_0000;
const COMMON: u64 = 0;
const COMMON_LEN: u32 = 0x38;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DEVICE_LEN: u64 = 0x1000;
const NOTIFY: u64 = 0x3000;
const NOTIFY_END: u64 = 0x8000;
const MSIX_TABLE: u64 = 0x8000;
const MSIX_PBA: u64 = 0x1_0000;
const MSIX_PBA_END: u64 = 0x1_1000;
/// Bytes between the doorbells of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;
/// The table holds 2048 vectors, the limit of MSI-X, and one is the configuration's.
const MAX_QUEUES: usize = 2047;

/// Vendor-specific capability, and the structure types of 4.1.4.
const CAPABILITY_VENDOR: u8 = 9;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;
/// In `virtio_pci_cfg_cap`: where the window to the BAR is described, and the window itself (4.1.4.9).
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;

/// A device on the PCI bus.
pub struct VirtioPci {
    space: ConfigSpace,
    bar: Bar,
    /// Where the BAR is on the memory bus now.
    mapped: Option<u64>,
    /// The function was taken off its bus, for good.
    unplugged: bool,
    window: u16,
    msix: Msix,
    signals: Arc<Signals>,
    transport: Transport,
    /// Weak, for the buses hold the function.
    buses: Weak<Buses>,
    platform: Arc<dyn Platform>,
    this: Weak<Mutex<Self>>,
}

/// Where a device goes.
pub struct Place {
    /// Slot on the bus.
    pub slot: u8,
    /// Address its BAR is given before any software asks.
    pub bar: u64,
    /// Where software may move it.
    pub window: BarWindow,
    /// How long a vCPU lets the device follow its registers before it goes on, usually [`PATIENCE`].
    pub patience: Duration,
}

/// Longest wait of a vCPU for its device. A device without requests to wait for is done by then, unless the machine
/// is overloaded.
pub const PATIENCE: Duration = Duration::from_millis(20);

impl VirtioPci {
    /// Puts a transport around `device`.
    ///
    /// # Errors
    /// When the host has no descriptors or interrupt routes left. The device is gone then.
    pub fn new(
        device: Box<dyn Device>,
        memory: GuestMemory,
        place: Place,
        buses: &Arc<Buses>,
        platform: &Arc<dyn Platform>,
    ) -> io::Result<Arc<Mutex<Self>>> {
        let info = device.info().clone();
        if info.queue_sizes.len() > MAX_QUEUES {
            return Err(io::Error::other(format!("{} has more than {MAX_QUEUES} queues", info.name)));
        }
        let id = DEVICE_BASE + info.device_type as u16;
        let identity = Identity {
            vendor: VENDOR,
            device: id,
            revision: REVISION,
            class: class(info.device_type),
            subsystem_vendor: VENDOR,
            subsystem: id,
        };
        let mut space = ConfigSpace::new(&identity, COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE);
        let irq = pci_irq(place.slot);
        space.set_interrupt(irq as u8);
        let bar = Bar::new(&mut space, BAR_SIZE, place.bar, place.window);
        let window = add_capabilities(&mut space, &info);
        let vectors = info.queue_sizes.len() as u16 + 1;
        let msix = Msix::new(platform.as_ref(), &mut space, vectors, MSIX_TABLE as u32, MSIX_PBA as u32)?;
        let signals = Signals::new(&info.name, platform.line(irq));
        let transport = Transport::new(device, memory, Arc::clone(&signals), place.patience)?;
        Ok(Arc::new_cyclic(|this| {
            Mutex::new(Self {
                space,
                bar,
                mapped: None,
                unplugged: false,
                window,
                msix,
                signals,
                transport,
                buses: Arc::downgrade(buses),
                platform: Arc::clone(platform),
                this: Weak::clone(this),
            })
        }))
    }

    /// Asks the thread that owns the device.
    #[must_use]
    pub fn questions(&self) -> Questions {
        self.transport.owner().questions().clone()
    }

    /// Takes the function off the memory bus: neither its registers nor its doorbells answer any more.
    pub fn unplug(&mut self) {
        self.unmap();
        self.unplugged = true;
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.notice_reset();
        match offset {
            COMMON..ISR => self.transport.read_common(offset, data),
            // Reading acknowledges: only its first byte does (4.1.4.5).
            ISR if !data.is_empty() => data[0] = self.signals.take_isr(),
            DEVICE..NOTIFY => self.transport.read_device(offset - DEVICE, data),
            MSIX_TABLE..MSIX_PBA => self.msix.read_table(offset - MSIX_TABLE, data),
            MSIX_PBA..MSIX_PBA_END => self.msix.read_pba(offset - MSIX_PBA, data),
            _ => {}
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        self.notice_reset();
        match offset {
            COMMON..ISR => {
                self.transport.write_common(offset, data, &MsixVectors(&self.msix));
                self.notice_reset();
            }
            DEVICE..NOTIFY => self.transport.write_device(offset - DEVICE, data),
            NOTIFY..NOTIFY_END => self.transport.kick(((offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER)) as usize),
            MSIX_TABLE..MSIX_PBA => self.msix.write_table(offset - MSIX_TABLE, data),
            _ => {}
        }
    }

    /// Interrupts that the queues raised before a reset was complete are forgotten with the queues.
    fn notice_reset(&mut self) {
        if self.transport.has_been_reset() {
            self.msix.clear_pending();
        }
    }

    /// Follows what software did to the command register and the BAR.
    fn update_mapping(&mut self) {
        let wanted = self.bar.decoded(&self.space).filter(|_| !self.unplugged);
        if wanted == self.mapped {
            return;
        }
        self.unmap();
        let (Some(base), Some(this), Some(buses)) = (wanted, self.this.upgrade(), self.buses.upgrade()) else { return };
        let handler: Handler = this;
        if let Err(error) = buses.mmio.insert(base, BAR_SIZE, handler) {
            // Two BARs at one address: as on a real bus, the second does not answer.
            self.signals.warn(format_args!("its BAR does not answer: {error}"));
            return;
        }
        self.mapped = Some(base);
        self.for_each_doorbell(base, |platform, address, kick| {
            if let Err(error) = platform.attach_doorbell(address, kick) {
                // It still works, through the bus.
                self.signals.warn(format_args!("attaching a doorbell: {error}; it works, but slowly"));
            }
        });
    }

    fn unmap(&mut self) {
        let Some(base) = self.mapped.take() else { return };
        if let Some(buses) = self.buses.upgrade() {
            buses.mmio.remove(base);
        }
        self.for_each_doorbell(base, |platform, address, kick| {
            // Fails for a doorbell that could not be attached.
            drop(platform.detach_doorbell(address, kick));
        });
    }

    fn for_each_doorbell(&self, base: u64, act: impl Fn(&dyn Platform, u64, &EventFd)) {
        let addresses = (base + NOTIFY..).step_by(NOTIFY_MULTIPLIER as usize);
        for (address, kick) in addresses.zip(self.transport.kicks()) {
            act(self.platform.as_ref(), address, kick);
        }
    }

    /// The piece of the BAR that the window of `virtio_pci_cfg_cap` shows, if it is a proper one.
    fn window_target(&self) -> Option<(u64, usize)> {
        let offset = u64::from(self.space.dword(self.window + WINDOW_OFFSET));
        let length = self.space.dword(self.window + WINDOW_LENGTH);
        let in_bar = u64::from(length) <= BAR_SIZE && offset <= BAR_SIZE - u64::from(length);
        let proper = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(u64::from(length)) && in_bar;
        let bar = self.space.dword(self.window + WINDOW_BAR) as u8;
        (proper && bar == 0).then_some((offset, length as usize))
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        if offset == self.window + WINDOW_DATA
            && let Some((target, length)) = self.window_target()
        {
            let mut bytes = [0; 4];
            self.read_bar(target, &mut bytes[..length]);
            data.iter_mut().zip(bytes).for_each(|(data, byte)| *data = byte);
            return;
        }
        self.space.set_interrupt_status(self.signals.intx_pending());
        self.space.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        if offset == self.window + WINDOW_DATA {
            if let Some((target, length)) = self.window_target()
                && data.len() >= length
            {
                self.write_bar(target, &data[..length]);
            }
            return;
        }
        self.space.write(offset, data);
        self.update_mapping();
        let command = self.space.command();
        self.signals.set_intx_disabled(command & COMMAND_INTX_DISABLE != 0);
        let switched = self.msix.update(&self.space);
        let vectors = MsixVectors(&self.msix);
        if switched {
            self.transport.interrupts_switched(&vectors);
        }
        self.transport.set_may_run(command & COMMAND_BUS_MASTER != 0, &vectors);
    }
}

impl BusDevice for VirtioPci {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        self.read_bar(offset, data);
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        self.write_bar(offset, data);
    }
}

struct MsixVectors<'a>(&'a Msix);

impl Vectors for MsixVectors<'_> {
    fn msix_enabled(&self) -> bool {
        self.0.enabled()
    }

    fn event(&self, vector: u16) -> Option<Arc<EventFd>> {
        self.0.event(vector)
    }
}

/// Adds the capabilities of 4.1.4 and returns the offset of the PCI configuration access capability.
fn add_capabilities(space: &mut ConfigSpace, info: &DeviceInfo) -> u16 {
    let capability = |kind: u8, offset: u64, length: u32, extra: &[u8]| {
        // Length of the capability, type, BAR, three bytes of padding.
        let mut body = vec![16 + extra.len() as u8, kind, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(extra);
        body
    };
    let doorbells = info.queue_sizes.len() as u32 * NOTIFY_MULTIPLIER;
    let structures = [
        capability(CFG_COMMON, COMMON, COMMON_LEN, &[]),
        capability(CFG_NOTIFY, NOTIFY, doorbells, &NOTIFY_MULTIPLIER.to_le_bytes()),
        capability(CFG_ISR, ISR, 1, &[]),
        capability(CFG_DEVICE, DEVICE, info.config_len.min(DEVICE_LEN as u32), &[]),
    ];
    for body in structures.iter().filter(|body| body[1] != CFG_DEVICE || info.config_len > 0) {
        space.add_capability(CAPABILITY_VENDOR, body, &[]);
    }
    // BAR, offset and length of the window are the driver's.
    let mut writable = [0xff; 18];
    writable[..2].fill(0);
    writable[3..6].fill(0);
    writable[14..].fill(0);
    space.add_capability(CAPABILITY_VENDOR, &capability(CFG_PCI, 0, 0, &[0; 4]), &writable)
}

/// PCI class codes by virtio device ID; drivers go by the device ID.
fn class(device_type: u32) -> u32 {
    match device_type {
        1 => 0x02_00_00,
        2 => 0x01_80_00,
        _ => 0xff_00_00,
    }
}

/// Locks a function, whatever became of other threads that held it.
pub fn lock(function: &Mutex<VirtioPci>) -> std::sync::MutexGuard<'_, VirtioPci> {
    function.lock().unwrap_or_else(PoisonError::into_inner)
}
