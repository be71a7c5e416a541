//! The root bus and the two ways to its configuration space: ports 0xcf8 and 0xcfc, and ECAM.

use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

use super::PciFunction;
use crate::bus::BusDevice;

/// Slots of a bus.
pub const SLOTS: usize = 32;

/// A device can't be put on the bus.
#[derive(Debug, Error)]
pub enum PciError {
    /// All slots are taken.
    #[error("the PCI bus has {SLOTS} slots, and all are taken")]
    Full,
}

/// Bus 0.
#[derive(Default)]
pub struct PciBus {
    slots: [Option<Arc<Mutex<dyn PciFunction>>>; SLOTS],
}

impl PciBus {
    /// The first free slot.
    ///
    /// # Errors
    /// When there is none.
    pub fn free_slot(&self) -> Result<u8, PciError> {
        self.slots.iter().position(Option::is_none).map(|slot| slot as u8).ok_or(PciError::Full)
    }

    /// Puts a function into `slot`.
    pub fn insert(&mut self, slot: u8, function: Arc<Mutex<dyn PciFunction>>) {
        self.slots[usize::from(slot)] = Some(function);
    }

    fn function(&self, address: Address) -> Option<&Arc<Mutex<dyn PciFunction>>> {
        if address.bus != 0 || address.function != 0 {
            return None;
        }
        self.slots.get(usize::from(address.slot))?.as_ref()
    }

    fn read(&self, address: Address, data: &mut [u8]) {
        match self.function(address) {
            Some(function) if address.within_dword(data.len()) => {
                function.lock().unwrap_or_else(PoisonError::into_inner).read_config(address.register, data);
            }
            _ => data.fill(0xff),
        }
    }

    fn write(&self, address: Address, data: &[u8]) {
        if let Some(function) = self.function(address)
            && address.within_dword(data.len())
        {
            function.lock().unwrap_or_else(PoisonError::into_inner).write_config(address.register, data);
        }
    }
}

/// A place in configuration space.
#[derive(Clone, Copy, Debug)]
struct Address {
    bus: u8,
    slot: u8,
    function: u8,
    register: u16,
}

impl Address {
    fn within_dword(self, len: usize) -> bool {
        usize::from(self.register % 4) + len <= 4
    }
}

/// Configuration mechanism #1 (PCI 3.0, 3.2.2.3.2): an address port and a data port.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    address: u32,
}

const ENABLE: u32 = 1 << 31;
/// The data port, after the address port.
const DATA: u64 = 4;

impl ConfigPorts {
    /// Ports to `bus`.
    #[must_use]
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus, address: 0 }
    }

    fn target(&self, offset: u64) -> Option<Address> {
        (self.address & ENABLE != 0 && offset >= DATA).then(|| Address {
            bus: (self.address >> 16) as u8,
            slot: (self.address >> 11) as u8 & 0x1f,
            function: (self.address >> 8) as u8 & 7,
            register: (self.address & 0xfc) as u16 + (offset - DATA) as u16,
        })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        match (self.target(offset), offset, data) {
            (_, 0, data @ [_, _, _, _]) => data.copy_from_slice(&self.address.to_le_bytes()),
            (Some(address), _, data) => self.bus.read(address, data),
            (_, _, data) => data.fill(0xff),
        }
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        match (self.target(offset), offset, data) {
            (_, 0, &[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]),
            (Some(address), _, data) => self.bus.write(address, data),
            _ => {}
        }
    }
}

/// The enhanced configuration access mechanism: 4 KiB of memory per function.
pub struct Ecam {
    bus: Arc<PciBus>,
}

impl Ecam {
    /// A window to `bus`.
    #[must_use]
    pub fn new(bus: Arc<PciBus>) -> Self {
        Self { bus }
    }

    fn target(offset: u64) -> Address {
        Address {
            bus: (offset >> 20) as u8,
            slot: (offset >> 15) as u8 & 0x1f,
            function: (offset >> 12) as u8 & 7,
            register: offset as u16 & 0xfff,
        }
    }
}

impl BusDevice for Ecam {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        self.bus.read(Self::target(offset), data);
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        self.bus.write(Self::target(offset), data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::HostBridge;

    fn bus() -> Arc<PciBus> {
        let mut bus = PciBus::default();
        bus.insert(0, Arc::new(Mutex::new(HostBridge::default())));
        assert_eq!(bus.free_slot().unwrap(), 1);
        Arc::new(bus)
    }

    fn read(device: &mut dyn BusDevice, offset: u64) -> u32 {
        let mut data = [0; 4];
        device.read(0, offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn both_ways_lead_to_the_same_space() {
        let bus = bus();
        let (mut ports, mut ecam) = (ConfigPorts::new(Arc::clone(&bus)), Ecam::new(bus));
        assert_eq!(read(&mut ports, 4), 0xffff_ffff, "disabled");
        ports.write(0, 0, &(ENABLE | 8).to_le_bytes());
        assert_eq!(read(&mut ports, 0), ENABLE | 8);
        assert_eq!(read(&mut ports, 4), 0x0600_0000);
        assert_eq!(read(&mut ecam, 8), 0x0600_0000);
        let mut class = [0];
        ports.read(0, 7, &mut class);
        assert_eq!(class, [6]);
    }

    #[test]
    fn absent_functions_and_crooked_accesses_read_as_ones() {
        let bus = bus();
        let (mut ports, mut ecam) = (ConfigPorts::new(Arc::clone(&bus)), Ecam::new(bus));
        for address in [ENABLE | 1 << 11, ENABLE | 1 << 8, ENABLE | 1 << 16] {
            ports.write(0, 0, &address.to_le_bytes());
            assert_eq!(read(&mut ports, 4), 0xffff_ffff, "{address:#x}");
        }
        assert_eq!(read(&mut ecam, 0x1000), 0xffff_ffff);
        assert_eq!(read(&mut ecam, 0x8000), 0xffff_ffff);
        assert_eq!(read(&mut ecam, 2), 0xffff_ffff, "across two dwords");
        assert_eq!(read(&mut ecam, 0x100), 0xffff_ffff, "no extended space");
    }
}
