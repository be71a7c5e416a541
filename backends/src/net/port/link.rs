//! A port that joins two VMs of one host without a tap: a datagram socket on each side, one datagram per frame, so
//! that frames stay whole and the faster side waits.
//!
//! Both sides are given the same path. The first to come binds it, the other binds the path with `.peer` appended;
//! each sends to the other's socket through a second one. A bound socket that is not connected takes frames from any
//! sender, and a connected one waits for room at its peer. So the descriptors stay the same when a side goes and
//! comes again, and the other side finds it with its next frame.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_send_buffer_size;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, bind, connect, connect_unspec, getpeername,
    getsockname, recv, socket_with,
};

use super::{Ends, Port};
use crate::host::bound::{BoundPath, Claim, suffixed};

/// How long frames to an absent peer are dropped before it is looked for again.
const SEARCH_PAUSE: Duration = Duration::from_millis(50);

/// Access mode of a side: processes of the same user may send to it.
const MODE: u32 = 0o600;

/// Bytes that may wait on one side. The host's limit (net.core.wmem_max) may allow less.
const BUFFER: usize = 4 << 20;

/// One side of a link.
pub struct Link {
    name: String,
    sides: Vec<Side>,
}

struct Side {
    ends: Ends,
    peer: PathBuf,
    searched: Mutex<Option<Instant>>,
    /// This pair's frames go to the peer's first pair, because the peer does not serve a pair of this number.
    astray: AtomicBool,
    /// While this pair is not served: a socket that no other process can reach, and the only one it would take frames
    /// from.
    closed: Mutex<Option<OwnedFd>>,
    /// Not where it is lent: the path then stays with the process that has bound it.
    _mine: Option<BoundPath>,
}

impl Link {
    /// Takes a free side of the link at `path`, with `pairs` queue pairs.
    ///
    /// # Errors
    /// When both sides are taken, or the path can't be bound.
    pub fn new(path: &Path, pairs: usize) -> io::Result<Self> {
        let sides = (0..pairs).map(|pair| Side::new(&suffixed(path, &format!(".{pair}"))));
        let port = Self { name: path.display().to_string(), sides: sides.collect::<io::Result<_>>()? };
        for pair in 0..pairs {
            port.find_peer(pair);
        }
        Ok(port)
    }

    /// The side of the link at `path` that another process has taken, which has lent its sockets: of each pair what is read and
    /// then what is written.
    ///
    /// # Errors
    /// When one is not open, taken already or no socket.
    pub fn lent(path: &Path, fds: &[RawFd]) -> io::Result<Self> {
        let sides = super::lent_ends(fds)?.into_iter().enumerate();
        let sides = sides.map(|(pair, ends)| Side::lent(&suffixed(path, &format!(".{pair}")), ends));
        Ok(Self { name: path.display().to_string(), sides: sides.collect::<io::Result<_>>()? })
    }
}

fn datagram_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?)
}

/// Lets as many bytes queue up at a socket as the host allows.
pub(super) fn grow_buffers(socket: &OwnedFd) {
    // Less room only means that a side waits earlier.
    let _ = set_socket_send_buffer_size(socket, BUFFER);
}

impl Side {
    fn new(path: &Path) -> io::Result<Self> {
        let (first, second) = (path.to_owned(), suffixed(path, ".peer"));
        for (mine, peer) in [(&first, &second), (&second, &first)] {
            let claim = Claim::new(mine)?;
            // A bound path that no live process listens on is the leftover of a side that ended without a chance to
            // clean up.
            match connect(&datagram_socket()?, &SocketAddrUnix::new(mine)?) {
                Ok(()) => continue,
                Err(rustix::io::Errno::CONNREFUSED) => {
                    let removed = claim.remove_stale();
                    removed.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", mine.display())))?;
                }
                Err(_) => {}
            }
            let (rx, tx) = (datagram_socket()?, datagram_socket()?);
            grow_buffers(&tx);
            match claim.bind(&rx, MODE) {
                Ok(bound) => {
                    return Ok(Self {
                        ends: Ends { rx: Arc::new(rx), tx: Arc::new(tx) },
                        peer: peer.clone(),
                        searched: Mutex::new(None),
                        astray: AtomicBool::new(false),
                        closed: Mutex::new(None),
                        _mine: Some(bound),
                    });
                }
                // Another process may have bound it, but can't be reached.
                Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
                Err(e) => return Err(e),
            }
        }
        Err(io::Error::new(io::ErrorKind::AddrInUse, "both sides of the link are taken"))
    }
}

impl Side {
    fn lent(path: &Path, ends: Ends) -> io::Result<Self> {
        let second = suffixed(path, ".peer");
        let mine = SocketAddrUnix::try_from(getsockname(&ends.rx)?)?;
        let peer = if mine == SocketAddrUnix::new(&second)? { path.to_owned() } else { second };
        Ok(Self {
            ends,
            peer,
            searched: Mutex::new(None),
            astray: AtomicBool::new(false),
            closed: Mutex::new(None),
            _mine: None,
        })
    }

    /// Finds out where frames go: another process that has the sockets may have found the peer or lost it.
    fn look(&self) {
        let astray = || {
            let peer = SocketAddrUnix::try_from(getpeername(&self.ends.tx).ok().flatten()?).ok()?;
            Some(peer != SocketAddrUnix::new(&self.peer).ok()?)
        };
        self.astray.store(astray().unwrap_or(false), Ordering::Relaxed);
    }

    /// Takes frames, or refuses them: senders are told at once then, those that wait for room too.
    fn set_open(&self, open: bool) -> io::Result<()> {
        let mut closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        let rx = &self.ends.rx;
        if open {
            connect_unspec(rx)?;
            *closed = None;
            return Ok(());
        }
        let nobody = datagram_socket()?;
        bind(&nobody, &SocketAddrUnix::new_unnamed())?;
        connect(rx, &SocketAddrUnix::try_from(getsockname(&nobody)?)?)?;
        *closed = Some(nobody);
        while recv(rx, &mut [0u8; 1], RecvFlags::DONTWAIT).is_ok() {}
        Ok(())
    }
}

impl Port for Link {
    fn name(&self) -> &str {
        &self.name
    }

    fn pairs(&self) -> usize {
        self.sides.len()
    }

    fn ends(&self, pair: usize) -> Ends {
        self.sides[pair].ends.clone()
    }

    fn find_peer(&self, pair: usize) {
        let side = &self.sides[pair];
        let mut searched = side.searched.lock().unwrap_or_else(PoisonError::into_inner);
        if searched.is_some_and(|at| at.elapsed() < SEARCH_PAUSE) {
            return;
        }
        *searched = Some(Instant::now());
        // A peer may serve fewer pairs, but always the first. Both attempts fail as long as there is no peer.
        for (peer, astray) in [(&side.peer, false), (&self.sides[0].peer, pair > 0)] {
            if SocketAddrUnix::new(peer).and_then(|address| connect(&side.ends.tx, &address)).is_ok() {
                side.astray.store(astray, Ordering::Relaxed);
                return;
            }
        }
    }

    fn is_astray(&self, pair: usize) -> bool {
        self.sides[pair].astray.load(Ordering::Relaxed)
    }

    fn set_pairs(&self, count: usize) -> io::Result<()> {
        self.sides.iter().for_each(Side::look);
        self.sides.iter().enumerate().try_for_each(|(pair, side)| side.set_open(pair < count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_the_way_of_a_link_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("link");
        let file = suffixed(&path, ".0");
        std::fs::write(&file, "bytes").unwrap();
        let error = Link::new(&path, 1).map(drop).unwrap_err();
        assert!(error.to_string().ends_with("link.0: a file that is no socket is there"), "{error}");
        assert_eq!(std::fs::read(&file).unwrap(), b"bytes");
        std::fs::remove_file(&file).unwrap();
        let link = Link::new(&path, 1).unwrap();
        drop(Link::new(&path, 1).unwrap());
        Link::new(&path, 2).map(drop).unwrap();
        drop(link);
        assert!(!file.exists());
    }
}
