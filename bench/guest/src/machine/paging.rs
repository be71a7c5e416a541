//! More mappings than the boot tables hold, made by ring 3: 2 MiB identity pages above 4 GiB (a device's 64-bit BARs,
//! RAM above the PCI hole). The tables are ordinary memory to ring 3. Intel SDM volume 3, section 4.5.

#![allow(unsafe_code, reason = "page tables are raw memory, and mapping is what makes a region valid")]

use core::sync::atomic::{AtomicUsize, Ordering};

use crate::machine::fail;
use crate::machine::mem::{self, Region};

const LARGE: u64 = 2 << 20;
const ENTRIES: usize = 512;
/// Present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// The same, dirty, 2 MiB page.
const PAGE: u64 = 0xe7;
const PRESENT: u64 = 1;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// What four levels can map one to one: the lower half.
const LIMIT: u64 = 1 << 47;

unsafe extern "C" {
    safe static boot_pml4: u8;
}

/// Maps `len` bytes at `address`, if they are not mapped yet; `None` if they do not fit four-level paging.
pub fn map(address: u64, len: u64) -> Option<Region> {
    let end = address.checked_add(len).filter(|&end| end <= LIMIT)?;
    let mut page = address & !(LARGE - 1);
    while page < end {
        map_page(page);
        page += LARGE;
    }
    // SAFETY: mapped just now, or by the boot tables. Physical memory has no owner before this crate decides on one.
    Some(unsafe { Region::new(address as usize, len as usize) })
}

fn map_page(address: u64) {
    // SAFETY: the boot tables' root, 4 KiB.
    let root = unsafe { Region::new(&raw const boot_pml4 as usize, ENTRIES * 8) };
    let pointers = next_table(root, index(address, 39));
    let directory = next_table(pointers, index(address, 30));
    let slot = index(address, 21) * 8;
    if directory.read::<u64>(slot) & PRESENT == 0 {
        directory.write(slot, address | PAGE);
    }
}

fn next_table(table: Region, index: usize) -> Region {
    let entry: u64 = table.read(index * 8);
    if entry & PRESENT == 0 {
        let fresh = mem::dma(ENTRIES * 8, ENTRIES * 8);
        table.write(index * 8, fresh.base() as u64 | TABLE);
        return fresh;
    }
    // SAFETY: a present entry of our tables points at a table of ours.
    unsafe { Region::new((entry & ADDRESS) as usize, ENTRIES * 8) }
}

fn index(address: u64, shift: u32) -> usize {
    (address >> shift) as usize % ENTRIES
}

static HIGH_NEXT: AtomicUsize = AtomicUsize::new(0);
static HIGH_END: AtomicUsize = AtomicUsize::new(0);

/// Says where there is RAM above the PCI hole.
pub fn init_high(start: usize, end: usize) {
    HIGH_NEXT.store(start, Ordering::Relaxed);
    HIGH_END.store(end, Ordering::Relaxed);
}

/// Like [`mem::dma`], from the RAM above the PCI hole: another region to a VMM. The guest ends if there is none.
pub fn dma_high(len: usize, align: usize) -> Region {
    let start = HIGH_NEXT.load(Ordering::Relaxed).next_multiple_of(align);
    let mapped = if start != 0 && start + len <= HIGH_END.load(Ordering::Relaxed) {
        map(start as u64, len as u64)
    } else {
        None
    };
    let Some(region) = mapped else {
        fail(format_args!("memory where=above-4G expected={len} bytes got=less"));
    };
    HIGH_NEXT.store(start + len, Ordering::Relaxed);
    region.fill(0, len, 0);
    region
}
