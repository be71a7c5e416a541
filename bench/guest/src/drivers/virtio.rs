//! A virtio device over PCI, whatever its type: finding it, its status, its features and its queues.
//! Virtio 1.3, sections 3.1 and 4.1.

use alloc::vec::Vec;

use crate::drivers::pci::{self, Function, Msix};
use crate::drivers::queue::{Layout, Queue};
use crate::machine::mem::Region;
use crate::machine::{clock, fail};
use crate::spec::VERSION_1;

const VENDOR: u16 = 0x1af4;
const MODERN: u16 = 0x1040;
const TRANSITIONAL: core::ops::RangeInclusive<u16> = 0x1000..=0x103f;
const SUBSYSTEM_ID: u8 = 0x2e;

/// virtio-net.
pub const NET: u16 = 1;
/// virtio-blk.
pub const BLOCK: u16 = 2;
/// virtio-rng.
pub const ENTROPY: u16 = 4;

/// ACKNOWLEDGE.
pub const ACKNOWLEDGE: u8 = 1;
/// DRIVER.
pub const DRIVER: u8 = 2;
/// DRIVER_OK.
pub const DRIVER_OK: u8 = 4;
/// FEATURES_OK.
pub const FEATURES_OK: u8 = 8;
/// DEVICE_NEEDS_RESET.
pub const NEEDS_RESET: u8 = 64;

/// "No vector" in config_msix_vector and queue_msix_vector.
pub const NO_VECTOR: u16 = 0xffff;

/// Offsets in `struct virtio_pci_common_cfg`.
pub mod common {
    /// Selects 32 bits of the device's features.
    pub const DEVICE_FEATURE_SELECT: usize = 0x00;
    /// Those bits.
    pub const DEVICE_FEATURE: usize = 0x04;
    /// Selects 32 bits of the driver's features.
    pub const DRIVER_FEATURE_SELECT: usize = 0x08;
    /// Those bits.
    pub const DRIVER_FEATURE: usize = 0x0c;
    /// The vector of configuration changes.
    pub const CONFIG_MSIX_VECTOR: usize = 0x10;
    /// How many queues there are.
    pub const NUM_QUEUES: usize = 0x12;
    /// Device status.
    pub const DEVICE_STATUS: usize = 0x14;
    /// Changes with the configuration.
    pub const CONFIG_GENERATION: usize = 0x15;
    /// Selects the queue that the fields below are about.
    pub const QUEUE_SELECT: usize = 0x16;
    /// Its size.
    pub const QUEUE_SIZE: usize = 0x18;
    /// Its vector.
    pub const QUEUE_MSIX_VECTOR: usize = 0x1a;
    /// Whether it runs.
    pub const QUEUE_ENABLE: usize = 0x1c;
    /// Where it is notified.
    pub const QUEUE_NOTIFY_OFF: usize = 0x1e;
    /// Descriptor area.
    pub const QUEUE_DESC: usize = 0x20;
    /// Driver area.
    pub const QUEUE_DRIVER: usize = 0x28;
    /// Device area.
    pub const QUEUE_DEVICE: usize = 0x30;
    /// How much of it every device has.
    pub const LEN: usize = 0x38;
}

const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;

/// How long a device may take over a change of its status.
const PATIENCE_MS: u64 = 10_000;

/// A virtio device of any type.
pub struct Transport {
    /// Where it sits.
    pub function: Function,
    /// Its type: [`BLOCK`], …
    pub kind: u16,
    /// `struct virtio_pci_common_cfg`.
    pub common: Region,
    /// The device-specific configuration.
    pub config: Region,
    /// Its interrupts; `None` if it has no MSI-X.
    pub msix: Option<Msix>,
    notify: Region,
    notify_multiplier: u32,
}

/// The type of the virtio device that a function is; `None` if it is none.
pub fn kind(function: Function) -> Option<u16> {
    match function.ids() {
        (VENDOR, id) if TRANSITIONAL.contains(&id) => Some(function.read16(SUBSYSTEM_ID)),
        (VENDOR, id @ MODERN..=0x107f) => Some(id - MODERN),
        _ => None,
    }
}

/// All virtio devices on the bus.
pub fn devices() -> Vec<(u16, Function)> {
    pci::functions().into_iter().filter_map(|function| kind(function).map(|kind| (kind, function))).collect()
}

impl Transport {
    /// Finds the parts of a device's BARs that its capabilities name, and switches MSI-X on. Ends the run if one is missing.
    pub fn new(kind: u16, function: Function) -> Self {
        function.enable();
        let mut parts = [None; 5];
        let mut notify_multiplier = 0;
        for (_, at) in function.capabilities().into_iter().filter(|&(id, _)| id == pci::VENDOR_SPECIFIC) {
            let (cfg_type, bar) = (function.read8(at + 3), function.read8(at + 4));
            if !(COMMON_CFG..=DEVICE_CFG).contains(&cfg_type) || parts[usize::from(cfg_type)].is_some() {
                continue;
            }
            let (offset, len) = (function.read32(at + 8), function.read32(at + 12));
            parts[usize::from(cfg_type)] = function.window(bar, offset, len as usize);
            if cfg_type == NOTIFY_CFG {
                notify_multiplier = function.read32(at + 16);
            }
        }
        let (Some(common), Some(notify), Some(_isr)) =
            (parts[usize::from(COMMON_CFG)], parts[usize::from(NOTIFY_CFG)], parts[usize::from(ISR_CFG)])
        else {
            fail(format_args!(
                "capabilities where=pci:{:02x}.{} expected=common,notify,isr got=fewer",
                function.device, function.function
            ))
        };
        if common.len() < common::LEN {
            fail(format_args!("capabilities where=common-cfg expected=at-least-{} got={}", common::LEN, common.len()));
        }
        let config = parts[usize::from(DEVICE_CFG)].unwrap_or(Region::EMPTY);
        Self { function, kind, common, config, msix: function.msix(), notify, notify_multiplier }
    }

    /// The device's status.
    pub fn status(&self) -> u8 {
        self.common.read(common::DEVICE_STATUS)
    }

    /// Sets bits of the status.
    pub fn add_status(&self, bits: u8) {
        self.common.write(common::DEVICE_STATUS, self.status() | bits);
    }

    /// Resets the device and waits until it says that it has.
    pub fn reset(&self) {
        self.common.write::<u8>(common::DEVICE_STATUS, 0);
        let start = clock::ticks();
        while self.status() != 0 {
            if clock::ticks().wrapping_sub(start) > clock::from_ms(PATIENCE_MS) {
                fail(format_args!("reset where=device-status expected=0 got={:#x}", self.status()));
            }
        }
    }

    /// The features that the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.common.write(common::DEVICE_FEATURE_SELECT, select);
            u64::from(self.common.read::<u32>(common::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    /// From reset to FEATURES_OK with the offered features among `wanted`; returns them.
    pub fn negotiate(&self, wanted: u64) -> u64 {
        self.reset();
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        let offered = self.offered();
        if offered & VERSION_1 == 0 {
            fail(format_args!("features where=device expected=VERSION_1 got={offered:#x}"));
        }
        let features = offered & (wanted | VERSION_1);
        self.accept(features);
        self.add_status(FEATURES_OK);
        if self.status() & FEATURES_OK == 0 {
            fail(format_args!("features where=device expected=FEATURES_OK got=refused features={features:#x}"));
        }
        features
    }

    /// Says which features the driver accepts.
    pub fn accept(&self, features: u64) {
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.common.write::<u32>(common::DRIVER_FEATURE_SELECT, select);
            self.common.write(common::DRIVER_FEATURE, half);
        }
    }

    /// How many queues the device has.
    pub fn queues(&self) -> u16 {
        self.common.read(common::NUM_QUEUES)
    }

    /// The largest size that the device takes for a queue; 0 if it has no such queue.
    pub fn queue_size(&self, index: u16) -> u16 {
        self.common.write(common::QUEUE_SELECT, index);
        self.common.read(common::QUEUE_SIZE)
    }

    /// Lays out and enables a queue. `size` of 0 means the device's own. `vector` is an MSI-X entry.
    pub fn enable_queue(&self, index: u16, size: u16, vector: Option<u16>, event_idx: bool) -> Queue {
        let largest = self.queue_size(index);
        let size = if size == 0 { largest } else { size };
        if size == 0 || size > largest || !size.is_power_of_two() {
            fail(format_args!("queue-size where=queue:{index} expected=a-power-of-two-up-to-{largest} got={size}"));
        }
        self.enable_at(index, Layout::new(size), vector, event_idx)
    }

    /// Enables a queue in memory that is zeroed, with the size that it is laid out for.
    pub fn enable_at(&self, index: u16, layout: Layout, vector: Option<u16>, event_idx: bool) -> Queue {
        self.common.write(common::QUEUE_SELECT, index);
        let notify_off = usize::from(self.common.read::<u16>(common::QUEUE_NOTIFY_OFF));
        let doorbell = self.notify.sub(notify_off * self.notify_multiplier as usize, 2);
        self.common.write(common::QUEUE_SIZE, layout.size);
        let vector = vector.unwrap_or(NO_VECTOR);
        if self.msix.is_some() {
            self.common.write(common::QUEUE_MSIX_VECTOR, vector);
            let got: u16 = self.common.read(common::QUEUE_MSIX_VECTOR);
            if got != vector {
                fail(format_args!("msix where=queue:{index} expected={vector:#x} got={got:#x}"));
            }
        }
        self.write_address(common::QUEUE_DESC, layout.desc.base());
        self.write_address(common::QUEUE_DRIVER, layout.avail.base());
        self.write_address(common::QUEUE_DEVICE, layout.used.base());
        self.common.write::<u16>(common::QUEUE_ENABLE, 1);
        Queue::new(index, layout, doorbell, event_idx)
    }

    /// Writes a 64-bit field as its two halves, which every device takes.
    pub fn write_address(&self, offset: usize, address: usize) {
        self.common.write(offset, address as u32);
        self.common.write(offset + 4, (address >> 32) as u32);
    }

    /// The last step: the device may use its queues.
    pub fn start(&self) {
        self.add_status(DRIVER_OK);
        let status = self.status();
        if status & (DRIVER_OK | NEEDS_RESET) != DRIVER_OK {
            fail(format_args!("start where=device-status expected=DRIVER_OK got={status:#x}"));
        }
    }
}
