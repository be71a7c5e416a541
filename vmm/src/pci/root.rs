//! The root bus and the two ways to its configuration space: ports 0xcf8 and 0xcfc, and ECAM.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

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

/// Where a function is, among all buses of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bdf {
    /// PCI segment group. The ways to configuration space here lead to group 0.
    pub segment: u16,
    /// Bus.
    pub bus: u8,
    /// Device on the bus, 0 to 31.
    pub slot: u8,
    /// Function of the device, 0 to 7.
    pub function: u8,
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { segment, bus, slot, function } = self;
        write!(f, "{segment:04x}:{bus:02x}:{slot:02x}.{function}")
    }
}

/// A function, shared with the memory bus that its BARs are on.
pub type SharedFunction = Arc<Mutex<dyn PciFunction>>;

/// All functions of a machine. They come and go while it runs.
#[derive(Default)]
pub struct PciBus {
    /// `None` where a place is claimed and nothing answers yet.
    functions: RwLock<BTreeMap<Bdf, Option<SharedFunction>>>,
}

impl PciBus {
    /// Claims the first free slot of bus 0 for a device of one function.
    ///
    /// # Errors
    /// When no slot is free.
    pub fn claim(&self) -> Result<Bdf, PciError> {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        let slots = (0..SLOTS as u8).map(|slot| Bdf { slot, ..Bdf::default() });
        let is_free = |bdf: &Bdf| functions.range(*bdf..=Bdf { function: 7, ..*bdf }).next().is_none();
        let bdf = { slots }.find(is_free).ok_or(PciError::Full)?;
        functions.insert(bdf, None);
        Ok(bdf)
    }

    /// Has a function answer at a place that was claimed.
    pub fn insert(&self, bdf: Bdf, function: SharedFunction) {
        self.functions.write().unwrap_or_else(PoisonError::into_inner).insert(bdf, Some(function));
    }

    /// Gives a place up. Nothing answers there any more.
    pub fn remove(&self, bdf: Bdf) {
        self.functions.write().unwrap_or_else(PoisonError::into_inner).remove(&bdf);
    }

    fn function(&self, bdf: Bdf) -> Option<SharedFunction> {
        self.functions.read().unwrap_or_else(PoisonError::into_inner).get(&bdf)?.clone()
    }

    fn read(&self, address: Address, data: &mut [u8]) {
        match self.function(address.bdf) {
            // Looked up first and locked after: a function may take its time, and others are not to wait for it.
            Some(function) if address.within_dword(data.len()) => {
                function.lock().unwrap_or_else(PoisonError::into_inner).read_config(address.register, data);
            }
            _ => data.fill(0xff),
        }
    }

    fn write(&self, address: Address, data: &[u8]) {
        if let Some(function) = self.function(address.bdf)
            && address.within_dword(data.len())
        {
            function.lock().unwrap_or_else(PoisonError::into_inner).write_config(address.register, data);
        }
    }
}

/// A place in configuration space.
#[derive(Clone, Copy, Debug)]
struct Address {
    bdf: Bdf,
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
            bdf: Bdf {
                segment: 0,
                bus: (self.address >> 16) as u8,
                slot: (self.address >> 11) as u8 & 0x1f,
                function: (self.address >> 8) as u8 & 7,
            },
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
            bdf: Bdf {
                segment: 0,
                bus: (offset >> 20) as u8,
                slot: (offset >> 15) as u8 & 0x1f,
                function: (offset >> 12) as u8 & 7,
            },
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
        let bus = PciBus::default();
        bus.insert(bus.claim().unwrap(), Arc::new(Mutex::new(HostBridge::default())));
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

    #[test]
    fn slots_are_claimed_and_given_back() {
        let bus = PciBus::default();
        let all: Vec<Bdf> = (0..SLOTS).map(|_| bus.claim().unwrap()).collect();
        assert_eq!(all[31].to_string(), "0000:00:1f.0");
        assert!(matches!(bus.claim(), Err(PciError::Full)));
        bus.remove(all[7]);
        assert_eq!(bus.claim().unwrap(), all[7]);
    }

    #[test]
    fn functions_of_other_numbers_and_buses_answer() {
        let bus = Arc::new(PciBus::default());
        let bdf = Bdf { bus: 3, slot: 2, function: 5, ..Bdf::default() };
        bus.insert(bdf, Arc::new(Mutex::new(HostBridge::default())));
        let mut ports = ConfigPorts::new(Arc::clone(&bus));
        ports.write(0, 0, &(ENABLE | 3 << 16 | 2 << 11 | 5 << 8 | 8).to_le_bytes());
        assert_eq!(read(&mut ports, 4), 0x0600_0000);
        assert_eq!(read(&mut Ecam::new(bus), 3 << 20 | 2 << 15 | 5 << 12 | 8), 0x0600_0000);
    }
}
