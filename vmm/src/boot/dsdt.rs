//! The DSDT: the parts of the machine that ACPI does not describe in fixed tables. PCI root (PCI Firmware 3.3,
//! chapter 4), serial port, CPUs, the S5 sleep state.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If, Interrupt,
    Memory32Fixed, Method, Name, Or, Package, PackageBuilder, Path, ResourceTemplate, Return, Scope, Uuid, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform};
use crate::arch::x86_64::layout::{AddressMap, ECAM, IRQ_COM1, MMIO32, PORT_CMOS, PORT_COM1, PORT_PCI, pci_irq};
use crate::legacy::acpi::SLEEP_TYPE_S5;
use crate::pci::SLOTS;

/// The _OSC of a PCI host bridge (PCI Firmware 3.3, 4.5.1).
const OSC_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
const OSC_UNRECOGNIZED_UUID: u8 = 1 << 2;
const OSC_MASKED: u8 = 1 << 4;

/// The table.
pub(super) fn build(map: &AddressMap, platform: &Platform) -> Vec<u8> {
    let mut aml = Vec::new();
    let s5 = SLEEP_TYPE_S5;
    Name::new(Path::new("_S5_"), &Package::new(vec![&s5, &ZERO, &ZERO, &ZERO])).to_aml_bytes(&mut aml);
    pci_root(map, &mut aml);
    reserved(&mut aml);
    clock(&mut aml);
    if platform.serial {
        serial(&mut aml);
    }
    cpus(platform.cpus, &mut aml);

    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&aml);
    table.as_slice().to_vec()
}

fn pci_root(map: &AddressMap, aml: &mut Vec<u8>) {
    let not_cacheable = AddressSpaceCacheable::NotCacheable;
    let buses = AddressSpace::new_bus_number(0_u16, 0);
    let config_ports = IO::new(PORT_PCI.start as u16, PORT_PCI.start as u16, 1, 8);
    let low_ports = AddressSpace::new_io(0_u16, PORT_PCI.start as u16 - 1, None);
    let high_ports = AddressSpace::new_io(PORT_PCI.end as u16, 0xffff, None);
    let mmio32 = AddressSpace::new_memory(not_cacheable, true, MMIO32.start as u32, MMIO32.end as u32 - 1, None);
    let mmio64 = AddressSpace::new_memory(not_cacheable, true, map.mmio64.start, map.mmio64.end - 1, None);
    let resources = ResourceTemplate::new(vec![&buses, &config_ports, &low_ports, &high_ports, &mmio32, &mmio64]);

    // Pin A of every slot; functions 0xffff of a slot are all of them, source 0 is a global interrupt.
    let mut routes = PackageBuilder::new();
    for slot in 0..SLOTS as u8 {
        let address = u32::from(slot) << 16 | 0xffff;
        let irq = pci_irq(slot);
        routes.add_element(&Package::new(vec![&address, &ZERO, &ZERO, &irq]));
    }

    Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("PCI0"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
                &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
                &Name::new(Path::new("_SEG"), &ZERO),
                &Name::new(Path::new("_BBN"), &ZERO),
                &Name::new(Path::new("_UID"), &ZERO),
                &Name::new(Path::new("_CCA"), &1_u8),
                &Name::new(Path::new("_CRS"), &resources),
                &Name::new(Path::new("_PRT"), &routes),
                &Encoded(osc()),
            ],
        )],
    )
    .to_aml_bytes(aml);
}

/// Hands out no control: there is no hot-plug, power management or error reporting to take over.
fn osc() -> Vec<u8> {
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let (uuid, masked, unknown, control_offset) = (Uuid::new(OSC_UUID), OSC_MASKED, OSC_UNRECOGNIZED_UUID, 8_u8);
    let mut aml = Vec::new();
    Method::new(
        Path::new("_OSC"),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &Arg(3), &ZERO),
            &If::new(
                &Equal::new(&Arg(0), &uuid),
                vec![
                    &CreateDWordField::new(&control, &Arg(3), &control_offset),
                    &And::new(&control, &control, &ZERO),
                    &Or::new(&status, &status, &masked),
                ],
            ),
            &Else::new(vec![&Or::new(&status, &status, &unknown)]),
            &Return::new(&Arg(3)),
        ],
    )
    .to_aml_bytes(&mut aml);
    aml
}

/// A term that is encoded already.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Claims the ECAM range: the OS uses it only if some device says that it is taken (PCI Firmware 3.3, 4.1.2).
fn reserved(aml: &mut Vec<u8>) {
    let ecam = Memory32Fixed::new(true, ECAM.start as u32, (ECAM.end - ECAM.start) as u32);
    Device::new(
        Path::new("_SB_.MBRD"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ecam])),
        ],
    )
    .to_aml_bytes(aml);
}

fn clock(aml: &mut Vec<u8>) {
    let ports = IO::new(PORT_CMOS.start as u16, PORT_CMOS.start as u16, 1, (PORT_CMOS.end - PORT_CMOS.start) as u8);
    Device::new(
        Path::new("_SB_.RTC_"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&ports])),
        ],
    )
    .to_aml_bytes(aml);
}

fn serial(aml: &mut Vec<u8>) {
    let interrupt = Interrupt::new(true, true, false, false, IRQ_COM1);
    let ports = IO::new(PORT_COM1.start as u16, PORT_COM1.start as u16, 1, (PORT_COM1.end - PORT_COM1.start) as u8);
    Device::new(
        Path::new("_SB_.COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_DDN"), &"COM1"),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt, &ports])),
        ],
    )
    .to_aml_bytes(aml);
}

/// Processor devices; their _UID is that of the MADT.
fn cpus(cpus: u32, aml: &mut Vec<u8>) {
    for cpu in 0..cpus {
        Device::new(
            Path::new(&format!("_SB_.C{cpu:03X}")),
            vec![&Name::new(Path::new("_HID"), &"ACPI0007"), &Name::new(Path::new("_UID"), &cpu)],
        )
        .to_aml_bytes(aml);
    }
}
