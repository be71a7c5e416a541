//! What the guest needs of ACPI: the MADT's processors and the FADT's ways to sleep and to reset.
//! ACPI 6.5, sections 5.2.5 to 5.2.12 and 4.8.3.

#![allow(unsafe_code, reason = "tables live wherever the firmware put them")]

use alloc::vec::Vec;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::machine::boot::MAX_CPUS;
use crate::machine::mem::Region;
use crate::machine::paging;

const HEADER: usize = 36;
const HARDWARE_REDUCED: u32 = 1 << 20;
const RESET_SUPPORTED: u32 = 1 << 10;
/// No table that we read is larger; a length beyond it is not a length.
const LARGEST: usize = 1 << 20;

static RSDP: AtomicUsize = AtomicUsize::new(0);

/// A register as a generic address structure gives it.
#[derive(Clone, Copy, Debug)]
pub enum Address {
    /// In I/O space.
    Port(u16),
    /// In memory.
    Memory(Region),
}

/// The parts of the FADT that end or restart a machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fadt {
    /// SLEEP_CONTROL_REG of hardware-reduced ACPI.
    pub sleep_control: Option<Address>,
    /// PM1a_CNT of the full hardware model.
    pub pm1a_control: Option<u16>,
    /// RESET_REG and the value that resets.
    pub reset: Option<(Address, u8)>,
}

/// Remembers where the RSDP is: as the VMM said, or where a BIOS would have put it.
pub fn init(rsdp: u64) {
    let found = if rsdp != 0 { Some(rsdp as usize) } else { (0xe_0000..0x10_0000).step_by(16).find(|&at| is_rsdp(at)) };
    RSDP.store(found.filter(|&at| is_rsdp(at)).unwrap_or(0), Ordering::Relaxed);
}

/// Where the RSDP is; `None` if there is none.
pub fn rsdp() -> Option<usize> {
    Some(RSDP.load(Ordering::Relaxed)).filter(|&at| at != 0)
}

fn is_rsdp(at: usize) -> bool {
    bytes(at as u64, 36).is_some_and(|table| &table.read_unaligned::<u64>(0).to_le_bytes() == b"RSD PTR ")
}

fn bytes(address: u64, len: usize) -> Option<Region> {
    if address < 1 << 32 {
        // SAFETY: the boot tables map the first 4 GiB.
        return Some(unsafe { Region::new(address as usize, len) });
    }
    paging::map(address, len as u64)
}

/// The tables that the XSDT (or, without one, the RSDT) lists.
fn tables() -> impl Iterator<Item = Region> {
    let root = rsdp().and_then(|at| bytes(at as u64, 36)).map(|rsdp| {
        let xsdt = if rsdp.read::<u8>(15) >= 2 { rsdp.read_unaligned::<u64>(24) } else { 0 };
        if xsdt != 0 { (xsdt, 8) } else { (u64::from(rsdp.read_unaligned::<u32>(16)), 4) }
    });
    let listed = root.and_then(|(address, size)| whole(address).map(|table| (table, size)));
    listed.into_iter().flat_map(|(table, size)| {
        (0..(table.len() - HEADER) / size).filter_map(move |index| {
            let at = HEADER + index * size;
            let address =
                if size == 8 { table.read_unaligned::<u64>(at) } else { u64::from(table.read_unaligned::<u32>(at)) };
            whole(address)
        })
    })
}

/// The table at `address`, with the length that its header gives.
fn whole(address: u64) -> Option<Region> {
    let len = bytes(address, HEADER)?.read_unaligned::<u32>(4) as usize;
    if !(HEADER..=LARGEST).contains(&len) {
        return None;
    }
    bytes(address, len)
}

fn find(signature: &[u8; 4]) -> Option<Region> {
    tables().find(|table| &table.read_unaligned::<u32>(0).to_le_bytes() == signature)
}

/// The signatures of all tables.
pub fn signatures() -> Vec<[u8; 4]> {
    tables().map(|table| table.read_unaligned::<u32>(0).to_le_bytes()).collect()
}

/// Reads the FADT; everything is absent if there is none.
pub fn fadt() -> Fadt {
    let Some(table) = find(b"FACP") else { return Fadt::default() };
    let byte = |at: usize| if at < table.len() { table.read::<u8>(at) } else { 0 };
    let flags = if table.len() >= 116 { table.read_unaligned::<u32>(112) } else { 0 };
    let reset = if flags & RESET_SUPPORTED != 0 { generic_address(table, 116) } else { None };
    let reduced = flags & HARDWARE_REDUCED != 0;
    let pm1a = if table.len() >= 68 { table.read_unaligned::<u32>(64) as u16 } else { 0 };
    Fadt {
        sleep_control: if reduced { generic_address(table, 244) } else { None },
        pm1a_control: (!reduced && pm1a != 0).then_some(pm1a),
        reset: reset.map(|register| (register, byte(128))),
    }
}

fn generic_address(table: Region, at: usize) -> Option<Address> {
    if table.len() < at + 12 {
        return None;
    }
    let address = table.read_unaligned::<u64>(at + 4);
    match table.read::<u8>(at) {
        _ if address == 0 => None,
        0 => bytes(address, 8).map(Address::Memory),
        1 => Some(Address::Port(address as u16)),
        _ => None,
    }
}

/// The local APIC ids of the enabled processors, in the MADT's order; `None` without a MADT.
pub fn processors() -> Option<Vec<u32>> {
    const LOCAL_APIC: u8 = 0;
    const LOCAL_X2APIC: u8 = 9;
    const ENABLED: u32 = 1;
    let table = find(b"APIC")?;
    let mut ids = Vec::with_capacity(MAX_CPUS);
    let mut at = HEADER + 8;
    while at + 2 <= table.len() {
        let (kind, len) = (table.read::<u8>(at), usize::from(table.read::<u8>(at + 1)));
        if len < 2 || at + len > table.len() {
            break;
        }
        let id = match kind {
            LOCAL_APIC if len >= 8 && table.read_unaligned::<u32>(at + 4) & ENABLED != 0 => {
                Some(u32::from(table.read::<u8>(at + 3)))
            }
            LOCAL_X2APIC if len >= 16 && table.read_unaligned::<u32>(at + 8) & ENABLED != 0 => {
                Some(table.read_unaligned::<u32>(at + 4))
            }
            _ => None,
        };
        ids.extend(id.filter(|_| ids.len() < MAX_CPUS));
        at += len;
    }
    Some(ids)
}
