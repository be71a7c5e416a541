//! Where a device's clients come from: a socket that we listen on, one that we connect to, or one that was inherited.

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ringvm_backends::inherited;
use rustix::event::PollFlags;
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use thiserror::Error;
use tracing::info;

use crate::mailbox::{Mailbox, Woken};

/// Time between two attempts to connect, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Why a source can't be had.
#[derive(Debug, Error)]
pub(crate) enum SourceError {
    #[error("--socket {}: another process serves it, stop that one or name another socket", .0.display())]
    InUse(PathBuf),
    #[error("--socket {}: {source}", path.display())]
    Bind { path: PathBuf, source: io::Error },
    #[error("--fd {fd}: {source}")]
    Inherited { fd: RawFd, source: io::Error },
    #[error("--fd {0}: it is not a stream socket of the Unix domain")]
    NoSocket(RawFd),
}

/// A source of clients.
#[derive(Debug)]
pub(crate) enum Source {
    /// A socket to accept clients from; its path is ours to remove.
    Listen { listener: UnixListener, name: String, path: Option<PathBuf> },
    /// A frontend that listens.
    Connect(PathBuf),
    /// A client that is there already, the only one.
    Connected(Option<UnixStream>),
}

impl Source {
    /// Listens at a path. What an earlier daemon has left there is removed, but only if nobody serves it.
    pub(crate) fn listen(path: &Path) -> Result<Self, SourceError> {
        let failed = |source| SourceError::Bind { path: path.to_owned(), source };
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                let is_socket = std::fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket();
                if !is_socket {
                    return Err(failed(io::Error::new(ErrorKind::AlreadyExists, "a file that is no socket is there")));
                }
                match UnixStream::connect(path) {
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                    _ => return Err(SourceError::InUse(path.to_owned())),
                }
                std::fs::remove_file(path).map_err(failed)?;
                UnixListener::bind(path).map_err(failed)?
            }
            other => other.map_err(failed)?,
        };
        listener.set_nonblocking(true).map_err(failed)?;
        Ok(Self::Listen { listener, name: path.display().to_string(), path: Some(path.to_owned()) })
    }

    /// Takes an inherited socket, which listens or is connected.
    pub(crate) fn inherited(fd: RawFd) -> Result<Self, SourceError> {
        let failed = |source| SourceError::Inherited { fd, source };
        let socket: OwnedFd = inherited::take(fd).map_err(failed)?;
        if socket_domain(&socket) != Ok(AddressFamily::UNIX) || socket_type(&socket) != Ok(SocketType::STREAM) {
            return Err(SourceError::NoSocket(fd));
        }
        if socket_acceptconn(&socket).map_err(|error| failed(error.into()))? {
            let listener = UnixListener::from(socket);
            listener.set_nonblocking(true).map_err(failed)?;
            return Ok(Self::Listen { listener, name: format!("descriptor {fd}"), path: None });
        }
        Ok(Self::Connected(Some(socket.into())))
    }

    /// The next client; `None` if there is none any more, or whenever the letter box has something.
    pub(crate) fn next(&mut self, mailbox: &Mailbox) -> io::Result<Next> {
        match self {
            Self::Listen { listener, .. } => loop {
                if mailbox.wait(Some((listener.as_fd(), PollFlags::IN)), None, None)? == Woken::Mail {
                    return Ok(Next::Mail);
                }
                match listener.accept() {
                    Ok((stream, _)) => return Ok(Next::Client(stream)),
                    // It has given up while it waited.
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => {}
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            },
            Self::Connect(path) => connect(path, mailbox),
            Self::Connected(stream) => Ok(stream.take().map_or(Next::End, Next::Client)),
        }
    }
}

/// What a source has.
#[derive(Debug)]
pub(crate) enum Next {
    Client(UnixStream),
    /// Nothing, but the letter box has.
    Mail,
    /// Nothing, for ever.
    End,
}

/// Connects to a frontend, for as long as it takes.
fn connect(path: &Path, mailbox: &Mailbox) -> io::Result<Next> {
    let mut pause = FIRST_PAUSE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(Next::Client(stream)),
            Err(error) if pause == FIRST_PAUSE => {
                info!("connecting to {}: {error}; trying on", path.display());
            }
            Err(_) => {}
        }
        if mailbox.wait(None, None, Some(Instant::now() + pause))? == Woken::Mail {
            return Ok(Next::Mail);
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Listen { name, .. } => f.write_str(name),
            Self::Connect(path) => write!(f, "{} (connecting)", path.display()),
            Self::Connected(_) => f.write_str("an inherited connection"),
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Self::Listen { path: Some(path), .. } = self {
            // Gone already, or in a directory that is: nothing is left to remove.
            drop(std::fs::remove_file(path));
        }
    }
}
