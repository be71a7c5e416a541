//! Unix domain sockets at paths. One process at a time binds a path, only the intended peers can connect, and only
//! the process that bound a socket removes it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use crate::host::retry::outwait;

/// The path with a suffix appended.
#[must_use]
pub fn suffixed(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Listens at a path with the access mode `mode`, with room for `backlog` clients that wait. The socket of an earlier
/// process is removed, but only if no process serves it. Accepting does not wait.
///
/// # Errors
/// `AddrInUse` if a process listens there; else the host's error, also that another user's socket can't be looked at.
pub fn listen(path: &Path, mode: u32, backlog: i32) -> io::Result<(UnixListener, BoundPath)> {
    // Before anything is made: a path that no socket can have gets no lock either.
    SocketAddrUnix::new(path)?;
    // Held until it listens: a socket that is only bound looks like a leftover.
    let claim = Claim::new(path)?;
    match connect_now(path) {
        Ok(_) => return Err(in_use()),
        // It listens, and its backlog is full.
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(in_use()),
        // No process listens, or it is no socket at all, or a link that leads nowhere.
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {
            claim.remove_stale()?;
        }
        Err(error) => return Err(error),
    }
    let socket = stream_socket()?;
    let bound = claim.bind(&socket, mode)?;
    rustix::net::listen(&socket, backlog)?;
    Ok((socket.into(), bound))
}

fn in_use() -> io::Error {
    io::Error::new(io::ErrorKind::AddrInUse, "another process listens there")
}

/// Connects to the process that listens at a path, if that is possible without waiting: one that does not accept has room
/// for only so many. Nor does the stream wait.
///
/// # Errors
/// `NotFound` or `ConnectionRefused` if nobody listens, `WouldBlock` if there is no room; else the host's error.
pub fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let socket = stream_socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

fn stream_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// The right to look at a path, to remove what is there and to bind a socket, which one process has at a time.
/// Without it, a path found stale could have been bound by another process before it is removed.
#[derive(Debug)]
pub struct Claim<'a> {
    path: &'a Path,
    _lock: File,
}

impl<'a> Claim<'a> {
    /// Waits three seconds for another holder to let go. The claim is a lock on the file at the same path with
    /// `.lock` appended.
    ///
    /// # Errors
    /// When another process keeps the lock, or the file can't be opened.
    pub fn new(path: &'a Path) -> io::Result<Self> {
        let beside = suffixed(path, ".lock");
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => error,
            kind => io::Error::new(kind, format!("locking {}: {error}", beside.display())),
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let lock = options.open(&beside).map_err(failed)?;
        let locked = || Ok(rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)?);
        outwait(&[libc::EWOULDBLOCK], locked).map_err(failed)?;
        Ok(Self { path, _lock: lock })
    }

    /// Removes the socket that an earlier process has left here.
    ///
    /// # Errors
    /// When it is no socket, hence not a leftover.
    pub fn remove_stale(&self) -> io::Result<()> {
        match std::fs::symlink_metadata(self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(found) if found.file_type().is_socket() => std::fs::remove_file(self.path),
            Ok(_) => Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file that is no socket is there")),
        }
    }

    /// Binds a socket to the path with the access mode `mode`, whatever the umask is. The socket never allows more
    /// than that.
    ///
    /// # Errors
    /// `AddrInUse` if the path exists; else the host's error.
    pub fn bind(&self, socket: impl AsFd, mode: u32) -> io::Result<BoundPath> {
        let mode = Mode::from_raw_mode(mode);
        // The file gets the mode that the socket has when it is bound, less the umask.
        rustix::fs::fchmod(&socket, mode)?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(self.path)?)?;
        let bound = BoundPath::new(self.path)?;
        // Restore the bits that the umask took. By descriptor, because the path may lead elsewhere now.
        let file = rustix::fs::open(self.path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let file = File::from(file);
        if identity(&file.metadata()?) == bound.identity && file.metadata()?.mode() & 0o777 != mode.as_raw_mode() {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode.as_raw_mode()))?;
        }
        Ok(bound)
    }
}

/// A path that a socket of this process is bound to. Dropped, it is removed.
#[derive(Debug)]
pub struct BoundPath {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

fn identity(meta: &std::fs::Metadata) -> (u64, u64) {
    (meta.dev(), meta.ino())
}

impl BoundPath {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(&std::fs::symlink_metadata(path)?) })
    }
}

impl Drop for BoundPath {
    /// Another process may have removed it, and bound a socket of its own since.
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == self.identity);
        if ours {
            // It may be gone already, or in a directory that may no longer be changed: nothing can be done about
            // either.
            drop(std::fs::remove_file(&self.path));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use rustix::net::socket;

    use super::*;

    fn bind(path: &Path, mode: u32) -> io::Result<BoundPath> {
        Claim::new(path)?.bind(socket(AddressFamily::UNIX, SocketType::DGRAM, None)?, mode)
    }

    #[test]
    fn a_socket_has_the_mode_that_it_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        for mode in [0o600, 0o660, 0o666] {
            let bound = bind(&path, mode).unwrap();
            assert_eq!(path.metadata().unwrap().mode() & 0o777, mode);
            assert_eq!(suffixed(&path, ".lock").metadata().unwrap().mode() & 0o777, 0o600);
            drop(bound);
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_lock_that_leads_elsewhere_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, precious) = (dir.path().join("s"), dir.path().join("precious"));
        std::fs::write(&precious, "bytes").unwrap();
        std::os::unix::fs::symlink(&precious, suffixed(&path, ".lock")).unwrap();
        let error = Claim::new(&path).unwrap_err();
        assert_eq!(error.raw_os_error().or(Some(libc::ELOOP)), Some(libc::ELOOP), "{error}");
        assert_eq!(std::fs::read(&precious).unwrap(), b"bytes");
        // If the lock is an existing file, its contents stay.
        std::fs::remove_file(suffixed(&path, ".lock")).unwrap();
        std::fs::write(suffixed(&path, ".lock"), "bytes").unwrap();
        drop(Claim::new(&path).unwrap());
        assert_eq!(std::fs::read(suffixed(&path, ".lock")).unwrap(), b"bytes");
    }

    #[test]
    fn a_lock_that_somebody_keeps_is_not_waited_for_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let claim = Claim::new(&path).unwrap();
        let error = Claim::new(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
        drop(claim);
        Claim::new(&path).unwrap();
    }

    #[test]
    fn only_sockets_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::fs::write(&path, "bytes").unwrap();
        let claim = Claim::new(&path).unwrap();
        claim.remove_stale().unwrap_err();
        assert_eq!(std::fs::read(&path).unwrap(), b"bytes");
        std::fs::remove_file(&path).unwrap();
        drop(UnixDatagram::bind(&path).unwrap());
        claim.remove_stale().unwrap();
        assert!(!path.exists());
        claim.remove_stale().unwrap();
    }

    #[test]
    fn a_socket_that_somebody_else_has_bound_meanwhile_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let bound = bind(&path, 0o600).unwrap();
        std::fs::rename(&path, dir.path().join("kept")).unwrap();
        let _other = UnixDatagram::bind(&path).unwrap();
        drop(bound);
        assert!(path.exists());
    }

    #[test]
    fn a_listener_takes_the_place_of_a_leftover_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let refused = || listen(&path, 0o600, 1).unwrap_err();
        let (listener, bound) = listen(&path, 0o660, 1).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o660);
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "nobody has come");
        assert_eq!(refused().kind(), io::ErrorKind::AddrInUse);
        listener.accept().unwrap();
        // A listener without room listens all the same.
        let mut waiting = Vec::new();
        let full = (0..1000).find_map(|_| connect_now(&path).map(|stream| waiting.push(stream)).err());
        assert_eq!(full.expect("it is full some time").kind(), io::ErrorKind::WouldBlock);
        let error = refused();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert_eq!(error.to_string(), "another process listens there");
        drop((listener, bound));
        drop(UnixListener::bind(&path).unwrap());
        drop(listen(&path, 0o600, 1).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn what_does_not_listen_is_not_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let refused = || listen(&path, 0o600, 1).unwrap_err();
        std::fs::write(&path, "bytes").unwrap();
        assert_eq!(refused().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"bytes");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &path).unwrap();
        assert_eq!(refused().kind(), io::ErrorKind::AlreadyExists);
        std::fs::remove_file(&path).unwrap();
        // A socket of another type.
        let datagrams = UnixDatagram::bind(&path).unwrap();
        assert_eq!(refused().raw_os_error(), Some(libc::EPROTOTYPE));
        drop(datagrams);
        drop(listen(&path, 0o600, 1).unwrap());
        let nowhere = listen(&dir.path().join("no/s"), 0o600, 1).unwrap_err();
        assert_eq!(nowhere.kind(), io::ErrorKind::NotFound);
        let long = dir.path().join("x".repeat(108));
        listen(&long, 0o600, 1).unwrap_err();
        assert!(!suffixed(&long, ".lock").exists());
    }
}
