//! The file of `--serial file=PATH`.

use std::fs::File;
use std::io;
use std::path::Path;

use ringvm_backends::host::output_file::{self, OutputFileError};

/// Takes the guest's output.
pub struct SerialFile {
    /// Open for writing. A write to a device whose reader is slow does not wait.
    pub output: File,
    /// Bytes that may be written, if they stay somewhere.
    pub limit: Option<u64>,
}

impl SerialFile {
    /// Opens the file, which is then empty and may take `max` bytes, or a character device, such as a pty or
    /// /dev/null.
    ///
    /// # Errors
    /// The host's error and advice on it.
    pub fn open(path: &Path, max: u64) -> Result<Self, (io::Error, &'static str)> {
        let refused = |error| {
            let advice = advice(&error);
            (error.into(), advice)
        };
        let output = output_file::open(path).map_err(refused)?;
        Ok(Self { output: output.file, limit: output.stays.then_some(max) })
    }
}

fn advice(error: &OutputFileError) -> &'static str {
    match error {
        OutputFileError::Link => "name the file itself",
        OutputFileError::Special => "name a file, a pty, or use --serial stdio and a pipe",
        OutputFileError::Open(_) => "name a file that can be written",
        OutputFileError::Empty(_) => "name a file that can be emptied",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_the_limit_and_a_device_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        assert_eq!(SerialFile::open(&path, 7).unwrap().limit, Some(7));
        assert_eq!(SerialFile::open(Path::new("/dev/null"), 7).unwrap().limit, None);
    }

    #[test]
    fn each_refusal_comes_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        let refused = |path: &Path| {
            let (error, advice) = SerialFile::open(path, 1).err().expect("it is refused");
            format!("{error}; {advice}")
        };
        assert_eq!(refused(&link), "it is a symbolic link; name the file itself");
        assert!(refused(dir.path()).contains("directory"));
        assert!(refused(&dir.path().join("no/file")).ends_with("; name a file that can be written"));
    }
}
