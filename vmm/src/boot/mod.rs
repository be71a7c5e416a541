//! Boot: a kernel, its command line and initramfs, and the firmware tables it looks for, all placed in guest memory.

pub mod acpi;
mod dsdt;
mod kernel;
mod linux;
mod pvh;
mod reset_vector;

use std::path::PathBuf;

use ringvm_backends::device::GuestMemory;
use thiserror::Error;

pub use kernel::{Initramfs, Kernel, Protocol};

use crate::arch::x86_64::layout::AddressMap;
use crate::arch::x86_64::regs::Entry;

/// The maker of the ACPI tables.
const OEM_ID: [u8; 6] = *b"RINGVM";
const OEM_TABLE_ID: [u8; 8] = *b"RINGVM  ";
const OEM_REVISION: u32 = 1;

/// The parts of the machine that the tables describe.
#[derive(Clone, Copy, Debug)]
pub struct Platform {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Whether there is a serial port.
    pub serial: bool,
}

/// A kernel can't be booted. Each tells which file, what of it, and what to do.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file can't be read.
    #[error("{role} {}: {what}: {source}", .path.display())]
    Read {
        /// `kernel` or `initramfs`.
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What came back.
        source: std::io::Error,
    },
    /// A file that is not a kernel.
    #[error(
        "kernel {}: neither an ELF image (vmlinux) nor a Linux bzImage (vmlinuz) for x86_64: {reason}", .path.display()
    )]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What was found instead.
        reason: String,
    },
    /// The protocol asked for is not one of the kernel's.
    #[error("kernel {}: can't be booted with --boot {wanted}: {reason}; use --boot auto", .path.display())]
    Protocol {
        /// The file.
        path: PathBuf,
        /// `pvh` or `linux`.
        wanted: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// The kernel does not fit.
    #[error("kernel {}: does not fit into {memory} MiB of memory: {reason}; give it more with --memory", .path.display())]
    KernelTooLarge {
        /// The file.
        path: PathBuf,
        /// Memory of the guest.
        memory: u64,
        /// The loader's message.
        reason: String,
    },
    /// The initramfs does not fit.
    #[error(
        "initramfs {}: its {size} bytes do not fit between the kernel's end ({low:#x}) and {high:#x}; \
         give the guest more memory with --memory, or a smaller initramfs", .path.display()
    )]
    InitramfsTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// End of the kernel.
        low: u64,
        /// Where it must end.
        high: u64,
    },
    /// The command line does not fit.
    #[error("the command line has {len} bytes, this kernel takes {limit}; shorten --cmdline")]
    CommandLineTooLong {
        /// Its length.
        len: usize,
        /// The kernel's limit.
        limit: usize,
    },
    /// A command line with a zero byte.
    #[error("the command line holds a zero byte; take it out of --cmdline")]
    CommandLineZero,
    /// Something does not fit where it must go.
    #[error("writing {what} to guest memory: {reason}")]
    Memory {
        /// What was written.
        what: &'static str,
        /// Why it failed.
        reason: String,
    },
}

/// The files and the command line to boot.
#[derive(Clone, Debug)]
pub struct BootSource<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// An open initramfs.
    pub initramfs: Option<&'a Initramfs>,
    /// The command line.
    pub cmdline: &'a str,
}

/// Loads everything into guest memory and says where the boot vCPU starts.
///
/// # Errors
/// When something does not fit.
pub fn load(
    source: &BootSource<'_>,
    memory: &GuestMemory,
    map: &AddressMap,
    platform: &Platform,
) -> Result<Entry, BootError> {
    let loaded = source.kernel.load(memory, map)?;
    kernel::write_cmdline(memory, source.cmdline, loaded.cmdline_limit)?;
    let initramfs = source.initramfs.map(|initramfs| initramfs.load(memory, map, &loaded)).transpose()?;
    reset_vector::write(memory)?;
    let rsdp = acpi::write(memory, map, platform)?;
    match loaded.protocol {
        Protocol::Pvh { entry } => pvh::write(memory, map, entry, initramfs, rsdp),
        Protocol::Linux64 { entry } => linux::write(memory, map, &loaded, entry, source.cmdline.len(), initramfs, rsdp),
    }
}

fn memory_error(what: &'static str) -> impl FnOnce(vm_memory::GuestMemoryError) -> BootError {
    move |error| BootError::Memory { what, reason: error.to_string() }
}
