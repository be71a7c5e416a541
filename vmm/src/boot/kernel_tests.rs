//! Kernel images that are damaged: the right headers for the most part, with some of their fields overwritten.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use bolero::TypeGenerator;
use rustix::fs::MemfdFlags;
use vm_memory::GuestMemoryMmap;

use super::super::{BootSource, Platform, load};
use super::*;
use crate::arch::x86_64::regs::Entry;

const MEMORY: u64 = 16 << 20;

/// The change made to a field.
#[derive(Clone, Copy, Debug, TypeGenerator)]
struct Damage {
    at: u16,
    width: u8,
    value: u64,
    /// One of those values that arithmetic goes wrong with.
    known: u8,
}

impl Damage {
    fn to(self, image: &mut [u8]) {
        const KNOWN: [u64; 16] = [
            0,
            1,
            0xff,
            0xffff,
            0x7fff_ffff,
            0xffff_ffff,
            0x1_0000_0000,
            i64::MAX as u64,
            1 << 63,
            u64::MAX,
            u64::MAX - 0xfff,
            HIGH_MEMORY,
            HIGH_MEMORY - 1,
            MEMORY,
            MEMORY - 1,
            MEMORY - 0x1000,
        ];
        let value = KNOWN.get(usize::from(self.known % 32)).copied().unwrap_or(self.value);
        let width = 1 << (self.width % 4);
        let at = usize::from(self.at) % image.len();
        image[at..].iter_mut().zip(&value.to_le_bytes()[..width]).for_each(|(byte, new)| *byte = *new);
    }
}

/// A 64-bit ELF image: its header, a segment to load and a note with a PVH entry point.
fn elf() -> Vec<u8> {
    let mut image = vec![0; 0x200];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x7f, b'E', b'L', b'F', ELF_CLASS_64, 1, 1]);
    put(16, &2u16.to_le_bytes());
    put(18, &ELF_MACHINE_X86_64.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(24, &(HIGH_MEMORY + 0x10).to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &3u16.to_le_bytes());
    let segments: [(u32, u64, u64, u64, u64); 3] = [
        (1, 0x180, HIGH_MEMORY, 0x40, 0x1000),
        (4, 0x140, 0, 0x18, 0x18),
        (1, 0x1c0, HIGH_MEMORY + 0x2000, 0x40, 0x40),
    ];
    for (i, (kind, offset, address, in_file, in_memory)) in segments.into_iter().enumerate() {
        let at = 64 + 56 * i;
        put(at, &kind.to_le_bytes());
        put(at + 4, &5u32.to_le_bytes());
        for (field, value) in [offset, address, address, in_file, in_memory, 4].into_iter().enumerate() {
            put(at + 8 + 8 * field, &value.to_le_bytes());
        }
    }
    // XEN_ELFNOTE_PHYS32_ENTRY.
    put(0x140, &[4u32, 8, 18].map(u32::to_le_bytes).concat());
    put(0x14c, b"Xen\0");
    put(0x150, &(HIGH_MEMORY + 0x20).to_le_bytes());
    image
}

/// A bzImage of protocol 2.15: one setup sector, a header, and a little to load.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x400 + 0x100];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &0x10u32.to_le_bytes());
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, &SETUP_MAGIC);
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x214, &(HIGH_MEMORY as u32).to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1, 21]);
    put(0x236, &XLF_KERNEL_64.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &HIGH_MEMORY.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    image
}

/// A file of these bytes, and a path to it.
fn place(file: &OwnedFd, bytes: &[u8]) -> PathBuf {
    rustix::fs::ftruncate(file, bytes.len() as u64).unwrap();
    assert_eq!(rustix::io::pwrite(file, bytes, 0), Ok(bytes.len()));
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Any image, however broken, is booted within memory or refused in a line.
#[test]
fn fuzz_kernel_image() {
    let map = AddressMap::new(MEMORY, 4096, 40).unwrap();
    let memory: GuestMemory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap());
    let [file, initramfs] = [(); 2].map(|()| rustix::fs::memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    let images = [elf(), bzimage()];
    let entries = images.each_ref().map(|image| boot(&place(&file, image), BootProtocol::Auto, None, &memory, &map));
    assert_eq!(entries[0].as_ref().ok(), Some(&HIGH_MEMORY.wrapping_add(0x20)), "undamaged, by its PVH note");
    assert_eq!(entries[1].as_ref().ok(), Some(&(HIGH_MEMORY + BZIMAGE_ENTRY64)), "undamaged");
    bolero::check!().with_type::<(bool, Vec<Damage>, Option<u16>, Vec<u8>, u8)>().for_each(
        |(is_elf, damage, cut, behind, wanted)| {
            let mut image = images[usize::from(!*is_elf)].clone();
            damage.iter().take(6).for_each(|damage| damage.to(&mut image));
            if let Some(cut) = cut.filter(|cut| cut % 4 == 3) {
                image.truncate(usize::from(cut / 4));
            } else {
                image.extend(behind);
            }
            let protocol = match wanted % 3 {
                0 => BootProtocol::Auto,
                1 => BootProtocol::Pvh,
                _ => BootProtocol::Linux,
            };
            let initramfs = (wanted % 2 == 1).then(|| place(&initramfs, &vec![7; usize::from(*wanted) << 8]));
            if let Err(reason) = boot(&place(&file, &image), protocol, initramfs.as_deref(), &memory, &map) {
                let reason = reason.to_string();
                assert!(!reason.is_empty() && !reason.contains('\n'), "{reason}");
            }
        },
    );
}

/// Loads an image and all that goes with it: its entry point.
fn boot(
    kernel: &Path,
    wanted: BootProtocol,
    initramfs: Option<&Path>,
    memory: &GuestMemory,
    map: &AddressMap,
) -> Result<u64, BootError> {
    let kernel = Kernel::open(kernel, wanted)?;
    let initramfs = initramfs.map(Initramfs::open).transpose()?;
    let source = BootSource { kernel: &kernel, initramfs: initramfs.as_ref(), cmdline: "console=ttyS0" };
    Ok(match load(&source, memory, map, &Platform { cpus: 1, serial: true })? {
        Entry::Pvh { entry, .. } | Entry::Linux64 { entry, .. } => entry,
    })
}
