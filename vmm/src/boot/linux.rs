//! The zero page of the Linux 64-bit boot protocol (Documentation/arch/x86/boot of the kernel, protocol 2.12 and later).

use std::ops::Range;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use ringvm_backends::device::GuestMemory;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::kernel::Loaded;
use super::{BootError, memory_error};
use crate::arch::x86_64::layout::{AddressMap, COMMAND_LINE, ZERO_PAGE};
use crate::arch::x86_64::regs::Entry;

/// "No boot loader that has a number of its own."
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const SETUP_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// Values for an ELF kernel, which has no setup header of its own.
const ELF_PROTOCOL: u16 = 0x020c;
const ELF_ALIGNMENT: u32 = 0x100_0000;

/// Writes the zero page.
pub(super) fn write(
    memory: &GuestMemory,
    map: &AddressMap,
    loaded: &Loaded,
    entry: u64,
    cmdline_len: usize,
    initramfs: Option<Range<u64>>,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let mut params = boot_params {
        hdr: loaded.setup.unwrap_or_else(|| setup_header {
            boot_flag: BOOT_FLAG,
            header: SETUP_MAGIC,
            version: ELF_PROTOCOL,
            kernel_alignment: ELF_ALIGNMENT,
            ..Default::default()
        }),
        acpi_rsdp_addr: rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = cmdline_len as u32;
    if let Some(initramfs) = initramfs {
        // Placed below 4 GiB: it never is above 32-bit RAM.
        params.hdr.ramdisk_image = initramfs.start as u32;
        params.hdr.ramdisk_size = (initramfs.end - initramfs.start) as u32;
    }
    let memory_map = map.memory_map();
    for (slot, (range, kind)) in params.e820_table.iter_mut().zip(&memory_map) {
        *slot = boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: *kind as u32 };
    }
    params.e820_entries = memory_map.len() as u8;
    memory.write_slice(params.as_slice(), GuestAddress(ZERO_PAGE)).map_err(memory_error("the zero page"))?;
    Ok(Entry::Linux64 { entry, zero_page: ZERO_PAGE })
}
