//! What an ELF program says of who loads it (ELF-64 object file format, program header PT_INTERP).

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::error::{Error, Result};

const PT_INTERP: u32 = 3;
/// No path is longer.
const LONGEST: u64 = 4096;

/// The dynamic linker of a program; `None` if it is static, or no ELF program (a script) at all.
pub(super) fn interpreter(binary: &Path) -> Result<Option<PathBuf>> {
    File::open(binary).and_then(|file| of(&file)).map_err(Error::file("reading", binary))
}

fn of(file: &File) -> io::Result<Option<PathBuf>> {
    let mut header = [0; 64];
    match file.read_exact_at(&mut header, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    // 64 bits, little endian.
    if !header.starts_with(b"\x7fELF\x02\x01") {
        return Ok(None);
    }
    let (table, size, count) = (number(&header, 32, 8), number(&header, 54, 2), number(&header, 56, 2));
    for index in 0..count {
        let mut entry = [0; 56];
        file.read_exact_at(&mut entry, table.saturating_add(index * size))?;
        if number(&entry, 0, 4) == u64::from(PT_INTERP) {
            let mut path = vec![0; number(&entry, 32, 8).min(LONGEST) as usize];
            file.read_exact_at(&mut path, number(&entry, 8, 8))?;
            path.retain(|&byte| byte != 0);
            return Ok(Some(PathBuf::from(std::ffi::OsString::from_vec(path))));
        }
    }
    Ok(None)
}

fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn programs_scripts_and_nonsense_are_told_apart() {
        let own = interpreter(&std::env::current_exe().unwrap()).unwrap().unwrap();
        assert!(own.is_absolute() && own.exists(), "{}", own.display());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, "#!/bin/sh\n").unwrap();
        assert_eq!(interpreter(&path).unwrap(), None);
        // A header whose table lies beyond the file.
        let mut cut = fs::read(std::env::current_exe().unwrap()).unwrap();
        cut.truncate(64);
        fs::write(&path, cut).unwrap();
        assert!(interpreter(&path).is_err());
    }
}
