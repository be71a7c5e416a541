//! The file of `--serial file=PATH`.
//!
//! Other users may be able to write to its directory, and an existing file may be theirs. So opening never waits for
//! another process, follows no link, and empties nothing but a regular file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// What the guest writes goes here.
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
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        let output =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).custom_flags(flags).open(path);
        let output = output.map_err(|source| match source.raw_os_error() {
            Some(libc::ELOOP) => (io::Error::other("it is a symbolic link"), "name the file itself"),
            // A FIFO without a reader, a socket.
            Some(libc::ENXIO) => (special(), ADVICE),
            _ => (source, "name a file that can be written"),
        })?;
        let kind = output.metadata().map_err(|source| (source, ADVICE))?.file_type();
        if kind.is_char_device() {
            return Ok(Self { output, limit: None });
        }
        if !kind.is_file() {
            return Err((special(), ADVICE));
        }
        output.set_len(0).map_err(|source| (source, "name a file that can be emptied"))?;
        Ok(Self { output, limit: Some(max) })
    }
}

const ADVICE: &str = "name a file, a pty, or use --serial stdio and a pipe";

fn special() -> io::Error {
    io::Error::other("it is neither a regular file nor a character device")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use rustix::fs::{CWD, FileType};

    use super::*;

    fn refused(path: &Path) -> String {
        let (error, advice) = SerialFile::open(path, 1).err().expect("it is refused");
        format!("{error}; {advice}")
    }

    #[test]
    fn links_fifos_and_sockets_are_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("precious"), "kept").unwrap();
        symlink(path("precious"), path("link")).unwrap();
        assert!(refused(&path("link")).contains("symbolic link"));
        assert_eq!(std::fs::read(path("precious")).unwrap(), b"kept", "nothing was emptied");
        rustix::fs::mknodat(CWD, path("fifo"), FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(refused(&path("fifo")).contains("neither a regular file"));
        let _reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path("fifo")).unwrap();
        assert!(refused(&path("fifo")).contains("neither a regular file"), "with a reader, too");
        let _listener = UnixListener::bind(path("socket")).unwrap();
        assert!(refused(&path("socket")).contains("neither a regular file"));
        assert!(refused(dir.path()).contains("directory"));
    }

    #[test]
    fn a_file_is_written_anew_and_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let file = SerialFile::open(&path, 7).unwrap();
        assert_eq!(file.limit, Some(7));
        assert_eq!(file.output.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "of the last time").unwrap();
        assert_eq!(SerialFile::open(&path, 7).unwrap().output.metadata().unwrap().len(), 0);
        assert_eq!(SerialFile::open(Path::new("/dev/null"), 7).unwrap().limit, None);
    }
}
