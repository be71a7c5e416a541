//! The Unix socket of a console with `socket=PATH`.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use ringvm_backends::host::bound::{BoundPath, Claim};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, listen, socket_with};

/// Clients that may wait to be accepted, or refused.
const WAITING: i32 = 8;

/// A socket that listens. Dropped, its path is removed.
#[derive(Debug)]
pub(super) struct Listener {
    socket: UnixListener,
    _path: BoundPath,
}

impl Listener {
    /// Listens at a path, for processes of this user. The socket of an ended process is removed.
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let address = SocketAddrUnix::new(path)?;
        // Held until it listens: a socket that is only bound looks like a leftover.
        let claim = Claim::new(path)?;
        match connect(stream_socket()?, &address) {
            Err(rustix::io::Errno::NOENT) => {}
            // No process listens, or it is no socket at all.
            Err(rustix::io::Errno::CONNREFUSED) => claim.remove_stale()?,
            _ => return Err(io::Error::new(ErrorKind::AddrInUse, "another process listens there")),
        }
        let socket = stream_socket()?;
        let bound = claim.bind(&socket, 0o600)?;
        listen(&socket, WAITING)?;
        Ok(Self { socket: socket.into(), _path: bound })
    }

    /// The next client that waits, if any.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((client, _)) => {
                client.set_nonblocking(true)?;
                Ok(Some(client))
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        self.socket.as_fd().try_clone_to_owned()
    }
}

fn stream_socket() -> rustix::io::Result<OwnedFd> {
    socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}
