//! Kernel images: what kind they are, and loading them.
//!
//! Files are opened and looked at before anything of the machine exists, so that a wrong path costs nothing.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use ringvm_backends::device::GuestMemory;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, ReadVolatile};

use super::{BootError, memory_error};
use crate::arch::x86_64::layout::{AddressMap, COMMAND_LINE, COMMAND_LINE_ROOM, HIGH_MEMORY, MIB};
use crate::config::BootProtocol;

const ELF_MAGIC: [u8; 4] = [0x7f, b'E', b'L', b'F'];
const ELF_CLASS_64: u8 = 2;
const ELF_MACHINE_X86_64: u16 = 62;
/// "HdrS" at 0x202 of a bzImage.
const SETUP_MAGIC: [u8; 4] = *b"HdrS";
/// 64-bit entry of a bzImage, after its load address.
const BZIMAGE_ENTRY64: u64 = 0x200;
const XLF_KERNEL_64: u16 = 1;
/// Linux's limit when its image does not say (COMMAND_LINE_SIZE on x86, less the final zero).
const DEFAULT_CMDLINE_LIMIT: usize = 2047;
/// Highest address of an initramfs where the kernel does not say.
const DEFAULT_INITRD_MAX: u64 = 0x37ff_ffff;
const PAGE: u64 = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Elf,
    BzImage,
}

/// An opened kernel image.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    file: File,
    format: Format,
    wanted: BootProtocol,
}

/// How a loaded kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// By its PVH note.
    Pvh {
        /// Entry point.
        entry: u64,
    },
    /// By the Linux 64-bit protocol.
    Linux64 {
        /// Entry point.
        entry: u64,
    },
}

/// A kernel in guest memory.
#[derive(Debug)]
pub(super) struct Loaded {
    pub(super) protocol: Protocol,
    /// The setup header of a bzImage.
    pub(super) setup: Option<setup_header>,
    /// First address after everything the kernel needs before it looks at its memory map.
    pub(super) end: u64,
    /// Highest address an initramfs may occupy.
    pub(super) initrd_max: u64,
    pub(super) cmdline_limit: usize,
}

impl Kernel {
    /// Opens `path` and looks at what it is.
    ///
    /// # Errors
    /// When it can't be read, is no kernel, or does not know the protocol `wanted`.
    pub fn open(path: &Path, wanted: BootProtocol) -> Result<Self, BootError> {
        let mut file = open("kernel", path)?;
        // Enough for both headers; a shorter file is neither.
        let mut head = Vec::with_capacity(0x400);
        (&mut file).take(0x400).read_to_end(&mut head).map_err(read_error("kernel", path, "reading its header"))?;
        let format = classify(&head).map_err(|reason| BootError::NotAKernel { path: path.into(), reason })?;
        if format == Format::BzImage && wanted == BootProtocol::Pvh {
            let reason = "a bzImage has no PVH entry point, only the ELF vmlinux inside of it has one";
            return Err(BootError::Protocol { path: path.into(), wanted: "pvh", reason });
        }
        Ok(Self { path: path.into(), file, format, wanted })
    }

    /// Loads the kernel.
    pub(super) fn load(&self, memory: &GuestMemory, map: &AddressMap) -> Result<Loaded, BootError> {
        let mut file = self.file.try_clone().map_err(read_error("kernel", &self.path, "opening it again"))?;
        let loaded = match self.format {
            Format::Elf => self.load_elf(memory, &mut file)?,
            Format::BzImage => self.load_bzimage(memory, &mut file)?,
        };
        if loaded.end <= HIGH_MEMORY {
            return Err(self.not_a_kernel("it has nothing to load above 1 MiB"));
        }
        // The unpacked kernel and its zeroed data lie after the bytes of the file.
        if !map.ram.iter().any(|ram| ram.contains(&(loaded.end - 1))) {
            let reason = format!("it needs memory up to {} MiB", loaded.end.div_ceil(MIB));
            return Err(self.too_large(memory, reason));
        }
        Ok(loaded)
    }

    fn load_elf(&self, memory: &GuestMemory, file: &mut File) -> Result<Loaded, BootError> {
        let image = Elf::load(memory.as_ref(), None, file, None).map_err(|error| self.loader_error(memory, &error))?;
        let protocol = match (self.wanted, image.pvh_boot_cap) {
            (BootProtocol::Auto | BootProtocol::Pvh, PvhBootCapability::PvhEntryPresent(entry)) => {
                Protocol::Pvh { entry: entry.raw_value() }
            }
            (BootProtocol::Pvh, _) => {
                let reason = "it has no PVH note (XEN_ELFNOTE_PHYS32_ENTRY; Linux has it with CONFIG_PVH=y)";
                return Err(BootError::Protocol { path: self.path.clone(), wanted: "pvh", reason });
            }
            (BootProtocol::Auto | BootProtocol::Linux, _) => {
                let entry = image.kernel_load.raw_value();
                if entry < HIGH_MEMORY {
                    return Err(
                        self.not_a_kernel(&format!("its entry point {entry:#x} is below 1 MiB, where no kernel is"))
                    );
                }
                Protocol::Linux64 { entry }
            }
        };
        Ok(Loaded {
            protocol,
            setup: None,
            end: image.kernel_end,
            initrd_max: DEFAULT_INITRD_MAX,
            cmdline_limit: DEFAULT_CMDLINE_LIMIT,
        })
    }

    fn load_bzimage(&self, memory: &GuestMemory, file: &mut File) -> Result<Loaded, BootError> {
        let image = BzImage::load(memory.as_ref(), None, file, Some(GuestAddress(HIGH_MEMORY)))
            .map_err(|error| self.loader_error(memory, &error))?;
        let setup = image.setup_header.ok_or_else(|| self.not_a_kernel("no setup header"))?;
        // Protocol 2.12 brought xloadflags.
        let (version, xloadflags) = (setup.version, setup.xloadflags);
        if version < 0x020c || xloadflags & XLF_KERNEL_64 == 0 {
            return Err(self.not_a_kernel("its setup header tells of no 64-bit entry point"));
        }
        let size = file.metadata().map_err(read_error("kernel", &self.path, "looking at its size"))?.len();
        let setup_sectors = if setup.setup_sects == 0 { 4 } else { u64::from(setup.setup_sects) };
        // syssize counts paragraphs of 16 bytes; what follows may be a signature.
        let wanted = (setup_sectors + 1) * 512 + u64::from(setup.syssize) * 16;
        if size < wanted {
            return Err(self.not_a_kernel(&format!("the file is cut short, {size} bytes of {wanted}")));
        }
        let load = image.kernel_load.raw_value();
        // It unpacks itself to its preferred address, or to where it lies if that is higher.
        let end = load.max(setup.pref_address).saturating_add(u64::from(setup.init_size)).max(image.kernel_end);
        Ok(Loaded {
            protocol: Protocol::Linux64 { entry: load + BZIMAGE_ENTRY64 },
            setup: Some(setup),
            end,
            initrd_max: u64::from(setup.initrd_addr_max),
            cmdline_limit: setup.cmdline_size as usize,
        })
    }

    fn not_a_kernel(&self, reason: &str) -> BootError {
        BootError::NotAKernel { path: self.path.clone(), reason: reason.into() }
    }

    fn loader_error(&self, memory: &GuestMemory, error: &linux_loader::loader::Error) -> BootError {
        use linux_loader::loader::{Error, bzimage, elf};
        match error {
            Error::MemoryOverflow
            | Error::Elf(elf::Error::ReadKernelImage)
            | Error::Bzimage(bzimage::Error::ReadBzImageCompressedKernel) => {
                self.too_large(memory, "reading its segments into memory failed (or the file is cut short)".into())
            }
            Error::Elf(error) => self.not_a_kernel(plain(&error.to_string())),
            Error::Bzimage(error) => self.not_a_kernel(plain(&error.to_string())),
            _ => self.not_a_kernel(plain(&error.to_string())),
        }
    }

    fn too_large(&self, memory: &GuestMemory, reason: String) -> BootError {
        let memory = memory.iter().map(GuestMemoryRegion::len).sum::<u64>() / MIB;
        BootError::KernelTooLarge { path: self.path.clone(), memory, reason }
    }
}

/// The loader's messages without its name in front.
fn plain(message: &str) -> &str {
    message.trim_start_matches("Kernel Loader: ")
}

/// An opened initramfs.
#[derive(Debug)]
pub struct Initramfs {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Initramfs {
    /// Opens `path`.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn open(path: &Path) -> Result<Self, BootError> {
        let file = open("initramfs", path)?;
        let size = (&file).seek(SeekFrom::End(0)).map_err(read_error("initramfs", path, "looking at its size"))?;
        Ok(Self { path: path.into(), file, size })
    }

    /// Loads it as high as the kernel takes it, out of the way of everything else.
    pub(super) fn load(
        &self,
        memory: &GuestMemory,
        map: &AddressMap,
        kernel: &Loaded,
    ) -> Result<Range<u64>, BootError> {
        let high = map.ram[0].end.min(kernel.initrd_max.saturating_add(1));
        let low = kernel.end.max(HIGH_MEMORY).next_multiple_of(PAGE);
        let start = high
            .checked_sub(self.size)
            .map(|start| start & !(PAGE - 1))
            .filter(|&start| start >= low)
            .ok_or_else(|| BootError::InitramfsTooLarge { path: self.path.clone(), size: self.size, low, high })?;
        let mut file = self.file.try_clone().map_err(read_error("initramfs", &self.path, "opening it again"))?;
        file.rewind().map_err(read_error("initramfs", &self.path, "rewinding it"))?;
        read_exact(memory, start, &mut file, self.size as usize).map_err(read_error(
            "initramfs",
            &self.path,
            "reading it",
        ))?;
        Ok(start..start + self.size)
    }
}

fn read_exact(memory: &GuestMemory, address: u64, file: &mut impl ReadVolatile, len: usize) -> io::Result<()> {
    memory.read_exact_volatile_from(GuestAddress(address), file, len).map_err(io::Error::other)
}

/// Places the command line.
pub(super) fn write_cmdline(memory: &GuestMemory, cmdline: &str, limit: usize) -> Result<(), BootError> {
    let limit = limit.min(COMMAND_LINE_ROOM as usize - 1);
    if cmdline.len() > limit {
        return Err(BootError::CommandLineTooLong { len: cmdline.len(), limit });
    }
    if cmdline.contains('\0') {
        return Err(BootError::CommandLineZero);
    }
    let bytes: Vec<u8> = cmdline.bytes().chain([0]).collect();
    memory.write_slice(&bytes, GuestAddress(COMMAND_LINE)).map_err(memory_error("the command line"))
}

fn open(role: &'static str, path: &Path) -> Result<File, BootError> {
    let file = File::open(path).map_err(read_error(role, path, "opening it"))?;
    let metadata = file.metadata().map_err(read_error(role, path, "looking at it"))?;
    if metadata.is_dir() {
        return Err(read_error(role, path, "opening it")(io::Error::from_raw_os_error(libc::EISDIR)));
    }
    if !metadata.is_file() {
        return Err(read_error(role, path, "opening it")(io::Error::other("not a regular file")));
    }
    Ok(file)
}

fn read_error(role: &'static str, path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> BootError {
    let path = path.to_path_buf();
    move |source| BootError::Read { role, path, what, source }
}

fn classify(head: &[u8]) -> Result<Format, String> {
    if head.starts_with(&ELF_MAGIC) {
        let class = head.get(4).copied().unwrap_or(0);
        let machine = head.get(18..20).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
        return if class == ELF_CLASS_64 && machine == ELF_MACHINE_X86_64 {
            Ok(Format::Elf)
        } else {
            Err(format!("an ELF image, but of class {class} for machine {machine}"))
        };
    }
    if head.get(0x202..0x206) == Some(&SETUP_MAGIC) {
        return Ok(Format::BzImage);
    }
    match head {
        [] => Err("the file is empty".into()),
        [0x1f, 0x8b, ..] => Err("it is compressed with gzip; unpack it first".into()),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Err("it is compressed with zstd; unpack it first".into()),
        [0xfd, b'7', b'z', b'X', ..] => Err("it is compressed with xz; unpack it first".into()),
        _ => Err(format!("it begins with {:02x?}", &head[..head.len().min(4)])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_told_apart() {
        let mut elf = vec![0; 64];
        elf[..5].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2]);
        elf[18] = 62;
        assert_eq!(classify(&elf), Ok(Format::Elf));
        elf[4] = 1;
        assert!(classify(&elf).unwrap_err().contains("class 1"));
        let mut bzimage = vec![0; 0x400];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(classify(&bzimage), Ok(Format::BzImage));
        assert!(classify(&[]).unwrap_err().contains("empty"));
        assert!(classify(&[0x1f, 0x8b, 8, 0]).unwrap_err().contains("gzip"));
        assert!(classify(b"#!/bin/sh").is_err());
    }

    #[test]
    fn a_kernel_that_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, "hello").unwrap();
        let message = Kernel::open(&path, BootProtocol::Auto).unwrap_err().to_string();
        assert!(message.contains("neither an ELF image") && message.contains("/x:"), "{message}");
        let message = Kernel::open(dir.path(), BootProtocol::Auto).unwrap_err().to_string();
        assert!(message.contains("Is a directory"), "{message}");
        let message = Kernel::open(&dir.path().join("none"), BootProtocol::Auto).unwrap_err().to_string();
        assert!(message.contains("No such file"), "{message}");
    }
}

#[cfg(test)]
#[path = "kernel_tests.rs"]
mod fuzz_tests;
