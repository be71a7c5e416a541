//! The file of a console with `file=PATH`.
//!
//! Other users may be able to write to its directory, and an existing file may be theirs. So opening never waits for
//! another process, follows no link, and empties nothing but a regular file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Opens the file, which is then empty, or a character device. Says whether what is written there stays.
pub(super) fn open(path: &Path) -> io::Result<(File, bool)> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let output = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).custom_flags(flags).open(path);
    let output = output.map_err(|source| match source.raw_os_error() {
        Some(libc::ELOOP) => io::Error::other("it is a symbolic link, name the file itself"),
        // A FIFO without a reader, a socket.
        Some(libc::ENXIO) => special(),
        _ => source,
    })?;
    let kind = output.metadata()?.file_type();
    if kind.is_char_device() {
        return Ok((output, false));
    }
    if !kind.is_file() {
        return Err(special());
    }
    output.set_len(0)?;
    Ok((output, true))
}

fn special() -> io::Error {
    io::Error::other("it is neither a regular file nor a character device")
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
        std::fs::write(path("precious"), "kept").unwrap();
        symlink(path("precious"), path("link")).unwrap();
        assert!(open(&path("link")).unwrap_err().to_string().contains("symbolic link"));
        assert_eq!(std::fs::read(path("precious")).unwrap(), b"kept", "nothing was emptied");
        rustix::fs::mknodat(CWD, path("fifo"), FileType::Fifo, 0o600.into(), 0).unwrap();
        let _listener = UnixListener::bind(path("socket")).unwrap();
        for name in ["fifo", "socket"] {
            assert!(open(&path(name)).unwrap_err().to_string().contains("neither a regular file"), "{name}");
        }
    }

    #[test]
    fn a_file_is_written_anew_and_for_its_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let (file, stays) = open(&path).unwrap();
        assert!(stays);
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "of the last time").unwrap();
        assert_eq!(open(&path).unwrap().0.metadata().unwrap().len(), 0);
        assert!(!open(Path::new("/dev/null")).unwrap().1);
    }
}
