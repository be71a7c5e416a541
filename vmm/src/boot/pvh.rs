//! The PVH start-of-day structures (Xen, public/arch-x86/hvm/start_info.h).

use std::ops::Range;

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use ringvm_backends::device::GuestMemory;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{BootError, memory_error};
use crate::arch::x86_64::layout::{AddressMap, COMMAND_LINE, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO};
use crate::arch::x86_64::regs::Entry;

/// Writes the start info and the data that it points to.
pub(super) fn write(
    memory: &GuestMemory,
    map: &AddressMap,
    entry: u64,
    initramfs: Option<Range<u64>>,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let mut memory_map = Vec::new();
    for (range, kind) in map.memory_map() {
        let entry = hvm_memmap_table_entry {
            addr: range.start,
            size: range.end - range.start,
            type_: kind as u32,
            reserved: 0,
        };
        memory_map.push(entry);
    }
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: PVH_MEMORY_MAP,
        memmap_entries: memory_map.len() as u32,
        ..Default::default()
    };
    if let Some(initramfs) = initramfs {
        info.nr_modules = 1;
        info.modlist_paddr = PVH_MODULES;
        let module =
            hvm_modlist_entry { paddr: initramfs.start, size: initramfs.end - initramfs.start, ..Default::default() };
        memory
            .write_slice(module.as_slice(), GuestAddress(PVH_MODULES))
            .map_err(memory_error("the PVH module list"))?;
    }
    let bytes: Vec<u8> = memory_map.iter().flat_map(ByteValued::as_slice).copied().collect();
    memory.write_slice(&bytes, GuestAddress(PVH_MEMORY_MAP)).map_err(memory_error("the PVH memory map"))?;
    memory.write_slice(info.as_slice(), GuestAddress(PVH_START_INFO)).map_err(memory_error("the PVH start info"))?;
    Ok(Entry::Pvh { entry, start_info: PVH_START_INFO })
}
