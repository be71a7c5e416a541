//! A port whose two ends are joined: each pair receives the frames that it transmits. For tests and for measuring a
//! device alone.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::{Ends, Port};

/// A loop per queue pair.
pub struct Loopback {
    ends: Vec<Ends>,
}

impl Loopback {
    /// The loopback of another process that has lent its sockets.
    ///
    /// # Errors
    /// When one is not open, or taken already.
    pub fn lent(fds: &[RawFd]) -> io::Result<Self> {
        Ok(Self { ends: super::lent_ends(fds)? })
    }

    /// A port of `pairs` queue pairs.
    ///
    /// # Errors
    /// When the host has no sockets left.
    pub fn new(pairs: usize) -> io::Result<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let ends = (0..pairs).map(|_| {
            let (rx, tx) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
            super::link::grow_buffers(&tx);
            Ok(Ends { rx: Arc::new(rx), tx: Arc::new(tx) })
        });
        Ok(Self { ends: ends.collect::<io::Result<_>>()? })
    }
}

impl Port for Loopback {
    fn name(&self) -> &str {
        "loopback"
    }

    fn pairs(&self) -> usize {
        self.ends.len()
    }

    fn ends(&self, pair: usize) -> Ends {
        self.ends[pair].clone()
    }
}
