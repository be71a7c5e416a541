//! The Unix socket of a console with `socket=PATH`.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use ringvm_backends::host::bound::{BoundPath, listen};

/// Clients that may wait to be accepted, or refused.
const WAITING: i32 = 8;

/// A socket that listens. Dropped, its path is removed.
#[derive(Debug)]
pub(super) struct Listener {
    socket: UnixListener,
    _path: BoundPath,
}

impl Listener {
    /// Listens at a path, for processes of this user.
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let (socket, bound) = listen(path, 0o600, WAITING)?;
        Ok(Self { socket, _path: bound })
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
