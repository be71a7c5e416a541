//! Where a device's clients come from: a socket that we listen on, one that we connect to, or one that was inherited.

use std::fmt;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ringvm_backends::host::bound::{self, BoundPath};
use ringvm_backends::host::inherited;
use rustix::event::PollFlags;
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_peercred, socket_type};
use rustix::net::{AddressFamily, SocketType};
use thiserror::Error;
use tracing::{info, warn};

use crate::mailbox::{Mailbox, Woken};

/// Time between two attempts to connect, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Clients that may wait to be served.
const BACKLOG: i32 = 128;

/// Why a source can't be opened.
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

/// The users whose processes may be at the other end, besides root and the daemon's own: the peer gets the device,
/// and the daemon the guest's memory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Peers(pub(crate) Vec<u32>);

impl Peers {
    /// The user of the process at the other end, if it may not be there: for a listening socket, of the process that
    /// made it listen.
    fn refuse(&self, stream: &UnixStream) -> io::Result<Option<u32>> {
        let uid = socket_peercred(stream)?.uid;
        let own = rustix::process::geteuid();
        Ok((!uid.is_root() && uid != own && !self.0.contains(&uid.as_raw())).then(|| uid.as_raw()))
    }
}

/// A source of clients.
#[derive(Debug)]
pub(crate) enum Source {
    /// A socket to accept clients from; its path is ours to remove.
    Listen { listener: UnixListener, name: String, peers: Peers, _path: Option<BoundPath> },
    /// A frontend that listens.
    Connect { path: PathBuf, peers: Peers },
    /// A client that is there already, the only one.
    Connected(Option<UnixStream>),
}

impl Source {
    /// Listens at a path. The socket of an earlier daemon is removed, but only if no process serves it.
    pub(crate) fn listen(path: &Path, mode: u32, peers: Peers) -> Result<Self, SourceError> {
        let (listener, bound) = match bound::listen(path, mode, BACKLOG) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => return Err(SourceError::InUse(path.to_owned())),
            result => result.map_err(|source| SourceError::Bind { path: path.to_owned(), source })?,
        };
        Ok(Self::Listen { listener, name: path.display().to_string(), peers, _path: Some(bound) })
    }

    /// Takes an inherited socket, which listens or is connected.
    pub(crate) fn inherited(fd: RawFd, peers: Peers) -> Result<Self, SourceError> {
        let failed = |source| SourceError::Inherited { fd, source };
        let socket: OwnedFd = inherited::take(fd).map_err(failed)?;
        if socket_domain(&socket) != Ok(AddressFamily::UNIX) || socket_type(&socket) != Ok(SocketType::STREAM) {
            return Err(SourceError::NoSocket(fd));
        }
        if socket_acceptconn(&socket).map_err(|error| failed(error.into()))? {
            let listener = UnixListener::from(socket);
            listener.set_nonblocking(true).map_err(failed)?;
            return Ok(Self::Listen { listener, name: format!("descriptor {fd}"), peers, _path: None });
        }
        Ok(Self::Connected(Some(socket.into())))
    }

    /// The next client; `None` if no more can come, or whenever the letter box has something.
    pub(crate) fn next(&mut self, mailbox: &Mailbox) -> io::Result<Next> {
        match self {
            Self::Listen { listener, peers, name, .. } => loop {
                if mailbox.wait(Some((listener.as_fd(), PollFlags::IN)), None, None)? == Woken::Mail {
                    return Ok(Next::Mail);
                }
                match listener.accept() {
                    Ok((stream, _)) => match peers.refuse(&stream)? {
                        None => return Ok(Next::Client(stream)),
                        Some(uid) => {
                            warn!("{name}: a client of user {uid} is refused; --peer-uid {uid} would let it in");
                        }
                    },
                    // It has given up while it waited.
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => {}
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            },
            Self::Connect { path, peers } => connect(path, peers, mailbox),
            Self::Connected(stream) => Ok(stream.take().map_or(Next::End, Next::Client)),
        }
    }
}

/// The outcome of a wait at a source.
#[derive(Debug)]
pub(crate) enum Next {
    Client(UnixStream),
    /// Nothing, but the letter box has.
    Mail,
    /// Nothing, for ever.
    End,
}

/// Connects to a frontend, for as long as it takes.
fn connect(path: &Path, peers: &Peers, mailbox: &Mailbox) -> io::Result<Next> {
    let mut pause = FIRST_PAUSE;
    loop {
        let first = pause == FIRST_PAUSE;
        match bound::connect_now(path) {
            Ok(stream) => match peers.refuse(&stream)? {
                None => {
                    stream.set_nonblocking(false)?;
                    return Ok(Next::Client(stream));
                }
                Some(uid) if first => {
                    let path = path.display();
                    warn!(
                        "{path}: user {uid} listens, who may not have the device; --peer-uid {uid} would let them; trying on"
                    );
                }
                Some(_) => {}
            },
            Err(error) if first => info!("connecting to {}: {error}; trying on", path.display()),
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
            Self::Connect { path, .. } => write!(f, "{} (connecting)", path.display()),
            Self::Connected(_) => f.write_str("an inherited connection"),
        }
    }
}
