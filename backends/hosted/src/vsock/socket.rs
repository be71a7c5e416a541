//! The Unix sockets of the device: the one at which the host's programs connect, and those at which they listen.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use ringvm_backends::host::bound::{BoundPath, Claim};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::options::OpenError;

/// Clients that wait for being accepted.
const BACKLOG: i32 = 128;

/// A listening socket and its path, which is removed with it.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) socket: UnixListener,
    _path: BoundPath,
}

impl Listener {
    /// Listens at a path, for programs of this user and of root. The socket of an earlier device is removed, but only if no
    /// process serves it.
    pub(super) fn bind(path: &Path) -> Result<Self, OpenError> {
        let failed = |what| move |source| OpenError::Socket { path: path.to_owned(), what, source };
        // Held until it listens: a socket that is only bound looks like a leftover.
        let claim = Claim::new(path).map_err(failed("claiming the path"))?;
        match connect(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            // No process listens, or it is no socket at all.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                claim.remove_stale().map_err(failed("removing what an earlier process has left"))?;
            }
            _ => return Err(OpenError::InUse(path.to_owned())),
        }
        let socket = socket().map_err(failed("making a socket"))?;
        let bound = claim.bind(&socket, 0o600).map_err(failed("binding the socket"))?;
        rustix::net::listen(&socket, BACKLOG).map_err(|errno| failed("listening")(errno.into()))?;
        Ok(Self { socket: socket.into(), _path: bound })
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

fn socket() -> io::Result<std::os::fd::OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Connects to a program that listens at a path, if that is possible without waiting: one that does not accept has room for
/// only so many.
///
/// # Errors
/// When nobody listens, or the path is too long for a socket.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}
