//! What the VMM hands over: `struct hvm_start_info` of the x86/HVM direct boot ABI.

#![allow(unsafe_code, reason = "the start info lies where the VMM put it")]

use alloc::string::String;
use alloc::vec::Vec;

use crate::machine::mem::{self, Region};
use crate::machine::{boot, paging};

const MAGIC: u32 = 0x336e_c578;
/// Memory map entry of type RAM.
pub const RAM: u32 = 1;
const COMMAND_LINE_MAX: usize = 4096;
/// The boot tables map this much.
const MAPPED: u64 = 4 << 30;

/// An entry of the memory map.
#[derive(Clone, Copy, Debug)]
pub struct MemoryEntry {
    /// Physical address.
    pub start: u64,
    /// In bytes.
    pub size: u64,
    /// As in an E820 map; 1 is RAM.
    pub kind: u32,
}

/// The start info, copied out of the VMM's memory.
pub struct StartInfo {
    /// The kernel command line.
    pub command_line: String,
    /// The memory map.
    pub memory: Vec<MemoryEntry>,
    /// Physical address of the RSDP; 0 if not given.
    pub rsdp: u64,
}

impl StartInfo {
    /// Checks the start info, gives the allocator the RAM behind the image, and copies what is wanted.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read() -> Result<Self, &'static str> {
        let at = boot::start_info();
        // SAFETY: the boot tables map the first 4 GiB, and EBX was a 32-bit address.
        let info = unsafe { Region::new(at, 56) };
        if at == 0 || info.read::<u32>(0) != MAGIC {
            return Err("magic of hvm_start_info in ebx");
        }
        if info.read::<u32>(4) < 1 {
            return Err("version 1 of hvm_start_info, which has a memory map");
        }
        let entries = info.read::<u32>(48) as usize;
        let map_at = info.read::<u64>(40);
        if map_at == 0 || map_at >= MAPPED || entries == 0 || entries > 128 {
            return Err("memory map of hvm_start_info");
        }
        // SAFETY: below 4 GiB, as checked; at most 3 KiB.
        let map = unsafe { Region::new(map_at as usize, entries * 24) };
        let entry = |index: usize| MemoryEntry {
            start: map.read(index * 24),
            size: map.read(index * 24 + 8),
            kind: map.read(index * 24 + 16),
        };
        let image_end = boot::end_of_image() as u64;
        let Some(ram) = (0..entries)
            .map(entry)
            .find(|e| e.kind == RAM && e.start <= image_end && e.start.saturating_add(e.size) > image_end)
        else {
            return Err("memory map with the RAM that the image is in");
        };
        if let Some(high) = (0..entries).map(entry).find(|e| e.kind == RAM && e.start >= MAPPED) {
            paging::init_high(high.start as usize, high.start.saturating_add(high.size) as usize);
        }
        mem::init(image_end as usize, ram.start.saturating_add(ram.size).min(MAPPED) as usize);
        Ok(Self {
            command_line: command_line(info.read(24)),
            memory: (0..entries).map(entry).collect(),
            rsdp: info.read(32),
        })
    }
}

fn command_line(at: u64) -> String {
    if at == 0 || at >= MAPPED - COMMAND_LINE_MAX as u64 {
        return String::new();
    }
    // SAFETY: below 4 GiB, as checked.
    let text = unsafe { Region::new(at as usize, COMMAND_LINE_MAX) };
    (0..COMMAND_LINE_MAX).map(|index| text.read::<u8>(index)).take_while(|&byte| byte != 0).map(char::from).collect()
}
