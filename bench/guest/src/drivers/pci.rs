//! PCI functions through configuration mechanism 1 (ports 0xcf8 and 0xcfc): finding them, their capabilities, BARs and
//! MSI-X. PCI Local Bus 3.0, sections 3.2.2.3, 6.2 and 6.8.

use alloc::vec::Vec;

use crate::machine::interrupts::FIRST_VECTOR;
use crate::machine::mem::Region;
use crate::machine::port::{in32, out16, out32};
use crate::machine::{fail, paging};

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const COMMAND: u8 = 0x04;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const COMMAND_MEMORY_AND_MASTER: u16 = 0x06;
const HEADER_TYPE: u8 = 0x0e;
const BARS: u8 = 0x10;
const CAPABILITIES: u8 = 0x34;
/// MSI-X capability id.
pub const MSIX: u8 = 0x11;
const MSIX_ENABLE: u16 = 1 << 15;
/// Vendor-specific capability id.
pub const VENDOR_SPECIFIC: u8 = 0x09;

/// One function on bus 0: VMMs of this kind have one bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Device number.
    pub device: u8,
    /// Function number.
    pub function: u8,
}

impl Function {
    /// Reads 32 bits of configuration space at an offset that is a multiple of 4.
    pub fn read32(self, offset: u8) -> u32 {
        self.select(offset);
        in32(CONFIG_DATA)
    }

    /// Reads 16 bits at an even offset.
    pub fn read16(self, offset: u8) -> u16 {
        (self.read32(offset) >> (u32::from(offset & 2) * 8)) as u16
    }

    /// Reads a byte.
    pub fn read8(self, offset: u8) -> u8 {
        (self.read32(offset) >> (u32::from(offset & 3) * 8)) as u8
    }

    /// Writes 16 bits at an even offset.
    pub fn write16(self, offset: u8, value: u16) {
        self.select(offset);
        out16(CONFIG_DATA + u16::from(offset & 2), value);
    }

    /// Writes 32 bits at an offset that is a multiple of 4.
    pub fn write32(self, offset: u8, value: u32) {
        self.select(offset);
        out32(CONFIG_DATA, value);
    }

    fn select(self, offset: u8) {
        let function = u32::from(self.device) << 11 | u32::from(self.function) << 8;
        out32(CONFIG_ADDRESS, 1 << 31 | function | u32::from(offset & !3));
    }

    /// Vendor and device id.
    pub fn ids(self) -> (u16, u16) {
        let word = self.read32(0);
        (word as u16, (word >> 16) as u16)
    }

    /// Lets the function answer to its BARs and use DMA.
    pub fn enable(self) {
        self.write16(COMMAND, self.read16(COMMAND) | COMMAND_MEMORY_AND_MASTER);
    }

    /// Id and offset of each capability.
    pub fn capabilities(self) -> Vec<(u8, u8)> {
        let mut found = Vec::new();
        if self.read16(COMMAND + 2) & STATUS_CAPABILITIES == 0 {
            return found;
        }
        let mut at = self.read8(CAPABILITIES) & !3;
        // A list that loops ends here: no more than these fit behind the header.
        while at >= 0x40 && found.len() < 48 {
            let word = self.read16(at);
            found.push((word as u8, at));
            at = (word >> 8) as u8 & !3;
        }
        found
    }

    /// The address in a memory BAR; `None` for an I/O BAR, one that is missing or has no address.
    pub fn bar(self, index: u8) -> Option<u64> {
        if index > 5 {
            return None;
        }
        let low = self.read32(BARS + index * 4);
        if low & 1 != 0 {
            return None;
        }
        let wide = low & 0x06 == 0x04 && index < 5;
        let high = if wide { self.read32(BARS + (index + 1) * 4) } else { 0 };
        let address = u64::from(high) << 32 | u64::from(low & !0xf);
        (address != 0).then_some(address)
    }

    /// A part of a memory BAR, mapped.
    pub fn window(self, bar: u8, offset: u32, len: usize) -> Option<Region> {
        let start = self.bar(bar)?.checked_add(u64::from(offset))?;
        paging::map(start, len as u64)
    }

    /// Switches MSI-X on or off, if the function has it.
    pub fn switch_msix(self, on: bool) {
        if let Some((_, at)) = self.capabilities().into_iter().find(|&(id, _)| id == MSIX) {
            let control = self.read16(at + 2);
            self.write16(at + 2, if on { control | MSIX_ENABLE } else { control & !MSIX_ENABLE });
        }
    }

    /// The function's MSI-X table, MSI-X being switched on; `None` if it has none.
    pub fn msix(self) -> Option<Msix> {
        let (_, at) = self.capabilities().into_iter().find(|&(id, _)| id == MSIX)?;
        let control = self.read16(at + 2);
        let entries = (control & 0x7ff) + 1;
        let location = self.read32(at + 4);
        let table = self.window((location & 7) as u8, location & !7, usize::from(entries) * ENTRY)?;
        for entry in 0..entries {
            table.write::<u32>(usize::from(entry) * ENTRY + 12, MASKED);
        }
        // Enabled, the function mask off.
        self.write16(at + 2, control & !(1 << 14) | MSIX_ENABLE);
        Some(Msix { table, entries })
    }
}

/// All functions of bus 0.
pub fn functions() -> Vec<Function> {
    let mut found = Vec::new();
    for device in 0..32 {
        let first = Function { device, function: 0 };
        if first.ids().0 == 0xffff {
            continue;
        }
        found.push(first);
        if first.read8(HEADER_TYPE) & 0x80 != 0 {
            found.extend((1..8).map(|function| Function { device, function }).filter(|other| other.ids().0 != 0xffff));
        }
    }
    found
}

const ENTRY: usize = 16;
const MASKED: u32 = 1;
const MESSAGE_ADDRESS: u32 = 0xfee0_0000;

/// A table of message-signalled interrupts.
#[derive(Clone, Copy, Debug)]
pub struct Msix {
    table: Region,
    entries: u16,
}

impl Msix {
    /// How many entries the table has.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Points an entry at the device vector `index` of a vCPU, and unmasks it.
    pub fn route(&self, entry: u16, apic_id: u32, index: usize) {
        if entry >= self.entries {
            fail(format_args!("msix where=entry:{entry} expected=below-{} got={entry}", self.entries));
        }
        let at = usize::from(entry) * ENTRY;
        self.table.write::<u32>(at, MESSAGE_ADDRESS | apic_id << 12);
        self.table.write::<u32>(at + 4, 0);
        self.table.write::<u32>(at + 8, (FIRST_VECTOR + index) as u32);
        self.table.write::<u32>(at + 12, 0);
    }

    /// Masks or unmasks an entry: a masked one keeps its message pending.
    pub fn mask(&self, entry: u16, masked: bool) {
        self.table.write::<u32>(usize::from(entry) * ENTRY + 12, u32::from(masked));
    }
}
