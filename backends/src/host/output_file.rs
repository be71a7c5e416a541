//! Files that take the output of a guest.
//!
//! Other users may be able to write to the file's directory, and an existing file may be theirs. So opening never waits for
//! another process, follows no link, and empties nothing but a regular file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use thiserror::Error;

/// A file that is open for writing. A write to a device whose reader is slow does not wait.
#[derive(Debug)]
pub struct OutputFile {
    /// The file.
    pub file: File,
    /// Whether what is written stays there, so that it needs a limit.
    pub stays: bool,
}

/// Why a file can't take output.
#[derive(Debug, Error)]
pub enum OutputFileError {
    /// Its owner says where output goes, not the user who named it.
    #[error("it is a symbolic link")]
    Link,
    /// A FIFO, a socket, a block device.
    #[error("it is neither a regular file nor a character device")]
    Special,
    /// The host does not open it.
    #[error(transparent)]
    Open(io::Error),
    /// The host does not empty it.
    #[error(transparent)]
    Empty(io::Error),
}

impl From<OutputFileError> for io::Error {
    fn from(error: OutputFileError) -> Self {
        match error {
            OutputFileError::Open(source) | OutputFileError::Empty(source) => source,
            other => Self::other(other),
        }
    }
}

/// Opens a file, which is then empty, or a character device, such as a pty or /dev/null. A new file is for its owner only.
///
/// # Errors
/// When it is something else, or the host refuses.
pub fn open(path: &Path) -> Result<OutputFile, OutputFileError> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).custom_flags(flags).open(path);
    let file = file.map_err(|source| match source.raw_os_error() {
        Some(libc::ELOOP) => OutputFileError::Link,
        // A FIFO without a reader, a socket.
        Some(libc::ENXIO) => OutputFileError::Special,
        _ => OutputFileError::Open(source),
    })?;
    let kind = file.metadata().map_err(OutputFileError::Open)?.file_type();
    if kind.is_char_device() {
        return Ok(OutputFile { file, stays: false });
    }
    if !kind.is_file() {
        return Err(OutputFileError::Special);
    }
    file.set_len(0).map_err(OutputFileError::Empty)?;
    Ok(OutputFile { file, stays: true })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use rustix::fs::{CWD, FileType};

    use super::*;

    #[test]
    fn links_fifos_and_sockets_are_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let refused = |name: &str| open(&path(name)).unwrap_err().to_string();
        std::fs::write(path("precious"), "kept").unwrap();
        symlink(path("precious"), path("link")).unwrap();
        assert!(refused("link").contains("symbolic link"));
        assert_eq!(std::fs::read(path("precious")).unwrap(), b"kept", "nothing was emptied");
        rustix::fs::mknodat(CWD, path("fifo"), FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(refused("fifo").contains("neither a regular file"));
        let _reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path("fifo")).unwrap();
        assert!(refused("fifo").contains("neither a regular file"), "with a reader, too");
        let _listener = UnixListener::bind(path("socket")).unwrap();
        assert!(refused("socket").contains("neither a regular file"));
        assert!(refused("").contains("directory"));
        assert!(refused("no/file").contains("No such file"));
    }

    #[test]
    fn a_file_is_written_anew_and_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let output = open(&path).unwrap();
        assert!(output.stays);
        assert_eq!(output.file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "of the last time").unwrap();
        assert_eq!(open(&path).unwrap().file.metadata().unwrap().len(), 0);
        assert!(!open(Path::new("/dev/null")).unwrap().stays);
    }
}
