//! The Unix socket of the device, at which the host's programs connect.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use ringvm_backends::host::bound::{BoundPath, listen};
use rustix::io::Errno;
use rustix::net::SocketFlags;

/// Clients that wait for being accepted.
const BACKLOG: i32 = 128;

/// A listening socket and its path, which is removed with it.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: UnixListener,
    _path: BoundPath,
}

impl Listener {
    /// Listens at a path, for programs of this user and of root.
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let (socket, bound) = listen(path, 0o600, BACKLOG)?;
        Ok(Self { socket, _path: bound })
    }

    /// A client, if one waits.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            match rustix::net::accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(client) => return Ok(Some(client.into())),
                Err(Errno::AGAIN) => return Ok(None),
                // The client has given up, or a signal came.
                Err(Errno::CONNABORTED | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
