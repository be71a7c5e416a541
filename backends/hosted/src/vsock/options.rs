//! A user's description of a vsock device.

use std::io;
use std::path::{Path, PathBuf};

use ringvm_backends::host::bound::suffixed;
use ringvm_backends::options::Check;
use thiserror::Error;

use crate::hosted::HostedError;
use crate::socket_path;

/// Bytes that the path of a port has more: `_4294967295`.
const LONGEST_SUFFIX: usize = 11;

/// CIDs that a guest can have. Those below are the hypervisor's, of loopback and the host's; that above means any.
const CIDS: std::ops::RangeInclusive<u32> = 3..=0xffff_fffe;

ringvm_backends::options! {
    /// A vsock device as the command line, a configuration file or a daemon's arguments describe it.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct VsockOptions {
        /// Address (CID) of the guest, 3 to 4294967294.
        #[key(required)]
        pub cid: u32,
        /// Path of the Unix socket at which the host's programs connect to the guest. Those that the guest connects to listen
        /// at the same path with `_` and the port appended.
        #[key(required, value("PATH"))]
        pub socket: PathBuf,
    }
}

impl Check for VsockOptions {
    fn check(&self) -> Result<(), String> {
        match self.cid {
            0 => return Err("no cid= is given, or cid=0; a guest has a CID from 3 on, e.g. cid=3".into()),
            1 => return Err("cid=1 is for loopback; a guest has a CID from 3 on".into()),
            2 => return Err("cid=2 is the host; a guest has a CID from 3 on".into()),
            cid if !CIDS.contains(&cid) => {
                return Err(format!("cid={cid} means any CID; give one from 3 to {}", CIDS.end()));
            }
            _ => {}
        }
        if self.socket.as_os_str().is_empty() {
            return Err("no socket= is given, name a path for the host's programs to connect to".into());
        }
        socket_path::check(&self.socket, LONGEST_SUFFIX)
    }
}

/// Why a vsock device can't be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Another process listens at the path.
    #[error("{device}: {}: another process listens there; end it, or give another socket=", path.display())]
    InUse {
        /// Name of the device.
        device: String,
        /// The path.
        path: PathBuf,
    },
    /// The host refuses a socket at the path.
    #[error("{device}: {}: {source}; give another socket=", path.display())]
    Socket {
        /// Name of the device.
        device: String,
        /// The path.
        path: PathBuf,
        /// The error that it returned.
        source: io::Error,
    },
    /// The host refuses something else.
    #[error("{device}: {what}: {source}")]
    Host {
        /// Name of the device.
        device: String,
        /// The operation that failed.
        what: &'static str,
        /// The error that it returned.
        source: io::Error,
    },
    /// The backend can't be made a device.
    #[error(transparent)]
    Hosted(#[from] HostedError),
}

/// The path at which a program of the host listens for connections of the guest to `port`.
pub(super) fn path_of_port(socket: &Path, port: u32) -> PathBuf {
    suffixed(socket, &format!("_{port}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(cid: u32, socket: &str) -> Result<(), String> {
        VsockOptions { cid, socket: socket.into() }.check()
    }

    #[test]
    fn reserved_cids_and_impossible_paths_are_refused() {
        for cid in [0, 1, 2, u32::MAX] {
            assert!(check(cid, "/run/v.sock").unwrap_err().contains("cid"), "{cid}");
        }
        for cid in [3, 4, 0xffff_fffe] {
            check(cid, "/run/v.sock").unwrap();
        }
        assert!(check(3, "").unwrap_err().contains("socket="));
        assert!(check(3, "a\0b").unwrap_err().contains("zero"));
        // With the path of every port.
        check(3, &"x".repeat(96)).unwrap();
        assert!(check(3, &"x".repeat(97)).unwrap_err().contains("97 bytes"));
    }

    #[test]
    fn each_port_has_a_path() {
        assert_eq!(path_of_port(Path::new("/run/v.sock"), 52), Path::new("/run/v.sock_52"));
    }
}
