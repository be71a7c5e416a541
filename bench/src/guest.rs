//! The embedded guest: a PVH ELF image that any VMM of this kind boots, carried inside this library.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The ELF image of the guest, as `bench/guest` builds it.
pub const ELF: &[u8] = include_bytes!(env!("RINGVM_GUEST_ELF"));

/// Writes the guest's image into `dir` as `ringvm-guest.elf` and returns its path.
///
/// # Errors
/// What the file system says when the file can't be written.
pub fn write_to(dir: &Path) -> io::Result<PathBuf> {
    let path = dir.join("ringvm-guest.elf");
    fs::write(&path, ELF)?;
    Ok(path)
}
