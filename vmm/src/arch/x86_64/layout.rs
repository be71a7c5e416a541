//! The address map: every fixed address of the machine, and what follows from the size of its memory.

use std::ops::Range;

use thiserror::Error;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

// Below 1 MiB: what the boot protocols need, all in RAM that the kernel may reuse afterwards.

/// The boot vCPU's GDT.
pub const BOOT_GDT: u64 = 0x500;
/// The boot vCPU's (empty) IDT.
pub const BOOT_IDT: u64 = 0x560;
/// `hvm_start_info` (PVH).
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH module list.
pub const PVH_MODULES: u64 = 0x6040;
/// PVH memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6080;
/// `boot_params` (Linux).
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the boot stack.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables of the 64-bit protocol: PML4, PDPT and four directories.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line with its final zero.
pub const COMMAND_LINE_ROOM: u64 = 0x1_0000;
/// Where conventional memory ends; from here to 1 MiB nothing is the kernel's.
pub const EBDA: u64 = 0x9_fc00;
/// ACPI tables, RSDP first, where firmware leaves it (ACPI 6.5, 5.2.5.1).
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_0000;
/// Where a CPU begins after a reset, and where real-mode software jumps to for one.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where RAM goes on above the legacy hole; kernels are loaded from here on.
pub const HIGH_MEMORY: u64 = 0x10_0000;

// The hole below 4 GiB.

/// Where 32-bit RAM ends at the latest.
pub const PCI_HOLE: u64 = 0xc000_0000;
/// 32-bit BARs.
pub const MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI configuration space of bus 0 (ECAM).
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// The I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APICs.
pub const LAPIC: u64 = 0xfee0_0000;
/// One page for KVM on Intel.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM on Intel.
pub const KVM_TSS: u64 = 0xfffb_d000;
/// Where 64-bit RAM begins.
pub const RAM64: u64 = 4 * GIB;

// Ports.

/// CMOS index and data.
pub const PORT_CMOS: Range<u64> = 0x70..0x72;
/// i8042 data and command.
pub const PORT_I8042: Range<u64> = 0x60..0x65;
/// Power-on self test codes.
pub const PORT_POST: Range<u64> = 0x80..0x81;
/// First serial port.
pub const PORT_COM1: Range<u64> = 0x3f8..0x400;
/// ACPI sleep control, sleep status and reset registers.
pub const PORT_ACPI: Range<u64> = 0x600..0x603;
/// PCI configuration address and data.
pub const PORT_PCI: Range<u64> = 0xcf8..0xd00;

// Interrupts.

/// Line of the first serial port.
pub const IRQ_COM1: u32 = 4;
/// First of the lines of PCI.
pub const IRQ_PCI: u32 = 16;
/// Number of lines of PCI.
pub const IRQ_PCI_COUNT: u32 = 8;

/// The interrupt line of pin A of PCI device `slot`.
#[must_use]
pub const fn pci_irq(slot: u8) -> u32 {
    IRQ_PCI + slot as u32 % IRQ_PCI_COUNT
}

/// The size of memory does not fit the machine.
#[derive(Debug, Error)]
pub enum LayoutError {
    /// Too little for any kernel.
    #[error("{0} bytes of memory are too little, the least is 16M")]
    TooSmall(u64),
    /// Memory is counted in pages.
    #[error("{size} bytes of memory are no multiple of the page size, {page}")]
    Unaligned {
        /// Size asked for.
        size: u64,
        /// Size of a page.
        page: u64,
    },
    /// The CPU can't address it.
    #[error("{size} bytes of memory and its PCI devices do not fit into {bits}-bit physical addresses of this CPU")]
    TooLarge {
        /// Size asked for.
        size: u64,
        /// Width of a physical address.
        bits: u32,
    },
}

/// The address map, given the size of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressMap {
    /// RAM, in ascending order: at most one range below the hole and one above.
    pub ram: Vec<Range<u64>>,
    /// 64-bit BARs.
    pub mmio64: Range<u64>,
}

impl AddressMap {
    /// Lays out `size` bytes of memory made of pages of `page` bytes.
    ///
    /// # Errors
    /// When the size can't be laid out.
    pub fn new(size: u64, page: u64, physical_bits: u32) -> Result<Self, LayoutError> {
        if size < 16 * MIB {
            return Err(LayoutError::TooSmall(size));
        }
        if !size.is_multiple_of(page) {
            return Err(LayoutError::Unaligned { size, page });
        }
        let low = size.min(PCI_HOLE);
        let mut ram = Vec::with_capacity(2);
        ram.push(0..low);
        let too_large = || LayoutError::TooLarge { size, bits: physical_bits };
        let limit = 1_u64 << physical_bits.min(52);
        let mut end = RAM64;
        if size > low {
            end = RAM64.checked_add(size - low).filter(|&end| end <= limit).ok_or_else(too_large)?;
            ram.push(RAM64..end);
        }
        let window = end.next_multiple_of(GIB);
        // Enough for every BAR there can be, and within what the CPU can address.
        let mmio64 = window..limit.min(window + 64 * GIB);
        if mmio64.end.saturating_sub(mmio64.start) < GIB {
            return Err(too_large());
        }
        Ok(Self { ram, mmio64 })
    }

    /// The memory map as firmware would report it (ACPI 6.5, 15.1).
    #[must_use]
    pub fn memory_map(&self) -> Vec<(Range<u64>, MemoryKind)> {
        let mut map = vec![(0..EBDA, MemoryKind::Ram), (EBDA..HIGH_MEMORY, MemoryKind::Reserved)];
        map.push((HIGH_MEMORY..self.ram[0].end, MemoryKind::Ram));
        map.push((ECAM, MemoryKind::Reserved));
        map.extend(self.ram.get(1).map(|range| (range.clone(), MemoryKind::Ram)));
        map
    }
}

/// Kinds of memory, with the numbers that e820 and PVH share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// The kernel's.
    Ram = 1,
    /// Nobody's.
    Reserved = 2,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_hole() {
        let small = AddressMap::new(GIB, 4096, 40).unwrap();
        assert_eq!(small.ram, std::slice::from_ref(&(0..GIB)));
        assert_eq!(small.mmio64.start, 4 * GIB);
        assert_eq!(AddressMap::new(3 * GIB, 4096, 40).unwrap().ram, std::slice::from_ref(&(0..PCI_HOLE)));
        let large = AddressMap::new(5 * GIB + MIB, 4096, 40).unwrap();
        assert_eq!(large.ram, [0..PCI_HOLE, RAM64..RAM64 + 2 * GIB + MIB]);
        assert_eq!(large.mmio64.start, 7 * GIB);
        assert_eq!(large.memory_map().last().unwrap().0, large.ram[1]);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(matches!(AddressMap::new(0, 4096, 40), Err(LayoutError::TooSmall(0))));
        assert!(matches!(AddressMap::new(GIB + 1, 4096, 40), Err(LayoutError::Unaligned { .. })));
        assert!(matches!(AddressMap::new(GIB + 4096, 2 * MIB, 40), Err(LayoutError::Unaligned { .. })));
        assert!(matches!(AddressMap::new(64 * GIB, 4096, 36), Err(LayoutError::TooLarge { .. })));
        assert!(matches!(AddressMap::new(!0xfff, 4096, 52), Err(LayoutError::TooLarge { .. })));
    }
}
