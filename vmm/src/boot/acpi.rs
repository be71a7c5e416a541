//! ACPI tables (ACPI 6.5, chapter 5): RSDP, XSDT, FADT, MADT, MCFG, and the DSDT of `dsdt.rs`.
//!
//! The platform is hardware-reduced: no SCI, no PM timer, no legacy interrupt controllers; sleep and reset are
//! registers in I/O space.

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use ringvm_backends::device::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform, dsdt, memory_error};
use crate::arch::x86_64::layout::{ACPI_TABLES, AddressMap, ECAM, IOAPIC, LAPIC};
use crate::legacy::acpi::{PORT_RESET, PORT_SLEEP_CONTROL, PORT_SLEEP_STATUS, RESET_VALUE};

/// IA-PC boot architecture flags: no VGA to be probed. The CMOS clock is there, the i8042 keyboard is not.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// An NMI of every local APIC arrives at LINT1 (MADT structure type 4).
const LAPIC_NMI: [u8; 6] = [4, 6, 0xff, 0, 0, 1];

/// Writes all tables and returns the address of the RSDP.
pub(super) fn write(memory: &GuestMemory, map: &AddressMap, platform: &Platform) -> Result<u64, BootError> {
    // The RSDP comes first, where a kernel without a pointer to it looks.
    let mut tables = Tables { memory, next: ACPI_TABLES.start + Rsdp::len().next_multiple_of(16) as u64 };
    let dsdt = tables.place(&dsdt::build(map, platform))?;
    let fadt = tables.place(&bytes(&fadt(dsdt)))?;
    let madt = tables.place(&madt(platform))?;
    let mcfg = tables.place(&bytes(&mcfg()))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = tables.place(&bytes(&xsdt))?;
    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    memory.write_slice(&rsdp, GuestAddress(ACPI_TABLES.start)).map_err(memory_error("the ACPI RSDP"))?;
    Ok(ACPI_TABLES.start)
}

/// Places tables one after the other.
struct Tables<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Tables<'_> {
    fn place(&mut self, table: &[u8]) -> Result<u64, BootError> {
        let address = self.next;
        let end = address + table.len() as u64;
        if end > ACPI_TABLES.end {
            let reason = format!("they need more than {} KiB", (ACPI_TABLES.end - ACPI_TABLES.start) >> 10);
            return Err(BootError::Memory { what: "the ACPI tables", reason });
        }
        self.memory.write_slice(table, GuestAddress(address)).map_err(memory_error("the ACPI tables"))?;
        self.next = end.next_multiple_of(16);
        Ok(address)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(address: u64) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH_NO_VGA.into();
    fadt.reset_reg = port(PORT_RESET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(PORT_SLEEP_CONTROL);
    fadt.sleep_status_reg = port(PORT_SLEEP_STATUS);
    fadt.finalize()
}

fn madt(platform: &Platform) -> Vec<u8> {
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(LAPIC as u32));
    for cpu in 0..platform.cpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IOAPIC as u32, 0));
    // The crate has no local APIC NMI structure: take its bytes and append one.
    let madt = bytes(&madt);
    let mut table = Sdt::new(*b"APIC", 36, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&madt[36..]);
    table.append_slice(&LAPIC_NMI);
    table.as_slice().to_vec()
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::GuestMemoryMmap;

    use super::*;

    fn read(memory: &GuestMemory, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let len = u32::from_le_bytes(read(memory, address + 4, 4).try_into().unwrap());
        let table = read(memory, address, len as usize);
        assert_eq!(table.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0, "checksum of {:?}", &table[..4]);
        table
    }

    #[test]
    fn tables_are_found_from_the_rsdp_and_add_up_to_zero() {
        for cpus in [1, 64, 254] {
            let map = AddressMap::new(1 << 30, 4096, 40).unwrap();
            let memory: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap());
            let rsdp = write(&memory, &map, &Platform { cpus, serial: true }).unwrap();
            assert_eq!(rsdp, 0xe_0000);
            let root = read(&memory, rsdp, 36);
            assert_eq!(&root[..8], b"RSD PTR ");
            assert_eq!(root.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            let xsdt = table(&memory, u64::from_le_bytes(root[24..32].try_into().unwrap()));
            let entries: Vec<_> = xsdt[36..]
                .chunks(8)
                .map(|entry| table(&memory, u64::from_le_bytes(entry.try_into().unwrap())))
                .collect();
            let names: Vec<_> = entries.iter().map(|entry| &entry[..4]).collect();
            assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
            assert_eq!(
                entries[1].iter().skip(44).step_by(8).take(cpus as usize).filter(|&&kind| kind == 0).count(),
                cpus as usize
            );
            let dsdt = table(&memory, u64::from_le_bytes(entries[0][140..148].try_into().unwrap()));
            assert_eq!(&dsdt[..4], b"DSDT");
        }
    }
}
