//! Registers of the boot vCPU for each boot protocol.
//!
//! PVH: the Xen PVH start-of-day state (32-bit protected mode without paging). Linux 64-bit:
//! Documentation/arch/x86/boot of the kernel, "64-bit boot protocol" (long mode with the first 4 GiB mapped one to
//! one).

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use ringvm_backends::device::GuestMemory;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{BOOT_GDT, BOOT_IDT, BOOT_PAGE_TABLES, BOOT_STACK};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set.
const RFLAGS_RESERVED: u64 = 2;

/// Selectors: the Linux boot protocol asks for 0x10 (code) and 0x18 (data).
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const PAGE_PRESENT: u64 = 1;
const PAGE_WRITABLE: u64 = 1 << 1;
const PAGE_HUGE: u64 = 1 << 7;
const PAGE: u64 = 0x1000;
/// How many page directories of 512 2 MiB pages map the first 4 GiB.
const DIRECTORIES: u64 = 4;

/// Where and how the boot vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A PVH kernel: 32-bit entry, EBX points to the start info.
    Pvh {
        /// Guest-physical entry point.
        entry: u64,
        /// Guest-physical address of `hvm_start_info`.
        start_info: u64,
    },
    /// The Linux 64-bit protocol: RSI points to the zero page.
    Linux64 {
        /// Guest-physical entry point.
        entry: u64,
        /// Guest-physical address of `boot_params`.
        zero_page: u64,
    },
}

/// The tables of the boot vCPU do not fit into guest memory.
#[derive(Debug, Error)]
#[error("writing the boot tables at {address:#x}: {source}")]
pub struct TableError {
    address: u64,
    source: GuestMemoryError,
}

/// The registers that the boot vCPU needs for `entry`, in place of those in `sregs`. Its tables go to guest memory.
///
/// # Errors
/// When the tables do not lie in memory.
pub fn boot_registers(sregs: &mut kvm_sregs, memory: &GuestMemory, entry: Entry) -> Result<kvm_regs, TableError> {
    let long = matches!(entry, Entry::Linux64 { .. });
    let code = Segment { selector: CODE, kind: 0xb, long, data: false };
    let data = Segment { selector: DATA, kind: 0x3, long: false, data: true };
    write_gdt(memory, &code, &data)?;

    sregs.cs = code.kvm();
    for register in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *register = data.kvm();
    }
    sregs.tr = kvm_segment { selector: TASK, type_: 0xb, present: 1, limit: 0x67, ..Default::default() };
    sregs.gdt.base = BOOT_GDT;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = BOOT_IDT;
    sregs.idt.limit = 7;

    let mut regs = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry {
        Entry::Pvh { entry, start_info } => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            regs.rip = entry;
            regs.rbx = start_info;
        }
        Entry::Linux64 { entry, zero_page } => {
            write_page_tables(memory)?;
            sregs.cr3 = BOOT_PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
            regs.rip = entry;
            regs.rsi = zero_page;
            regs.rsp = BOOT_STACK;
            regs.rbp = BOOT_STACK;
        }
    }
    Ok(regs)
}

/// A flat segment of 4 GiB.
struct Segment {
    selector: u16,
    kind: u8,
    long: bool,
    data: bool,
}

impl Segment {
    fn kvm(&self) -> kvm_segment {
        kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: self.selector,
            type_: self.kind,
            present: 1,
            s: 1,
            db: u8::from(!self.long || self.data),
            l: u8::from(self.long),
            g: 1,
            ..Default::default()
        }
    }

    fn descriptor(&self) -> u64 {
        let segment = self.kvm();
        let access = u64::from(segment.type_) | 1 << 4 | 1 << 7;
        let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
        0xffff | access << 40 | 0xf << 48 | flags << 52
    }
}

fn write_gdt(memory: &GuestMemory, code: &Segment, data: &Segment) -> Result<(), TableError> {
    // A busy 32-bit TSS of 0x68 bytes at zero, as TR says.
    let task = 0x0000_8b00_0000_0067_u64;
    write_words(memory, BOOT_GDT, &[0, 0, code.descriptor(), data.descriptor(), task])?;
    write_words(memory, BOOT_IDT, &[0])
}

/// Maps the first 4 GiB one to one, in 2 MiB pages: not every KVM takes 1 GiB pages.
fn write_page_tables(memory: &GuestMemory) -> Result<(), TableError> {
    let table = PAGE_PRESENT | PAGE_WRITABLE;
    let pdpt = BOOT_PAGE_TABLES + PAGE;
    let first_directory = pdpt + PAGE;
    write_words(memory, BOOT_PAGE_TABLES, &[pdpt | table])?;
    let directories: Vec<u64> = (0..DIRECTORIES).map(|n| (first_directory + n * PAGE) | table).collect();
    write_words(memory, pdpt, &directories)?;
    let pages: Vec<u64> = (0..DIRECTORIES * 512).map(|n| n << 21 | PAGE_HUGE | table).collect();
    write_words(memory, first_directory, &pages)
}

fn write_words(memory: &GuestMemory, address: u64, words: &[u64]) -> Result<(), TableError> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(address)).map_err(|source| TableError { address, source })
}
