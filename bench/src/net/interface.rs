//! The tap that everybody is measured on. It exists before its users come and after they have gone, with its counters.

#![allow(unsafe_code, reason = "an ioctl of tun(4) has no safe wrapper among our dependencies")]

use std::fs;
use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, anyhow, bail};
use ringvm_backends::net::port::Port;
use ringvm_backends::net::port::tap::Tap;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// A tap in the namespace of the calling thread; it goes with that.
#[derive(Debug)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its queue pairs.
    pub pairs: u16,
}

/// Frames so far, as the kernel counts them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Came from the tap's user.
    pub from_user: u64,
    /// Went to the tap's user.
    pub to_user: u64,
}

impl Counters {
    /// Frames since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            from_user: self.from_user.saturating_sub(earlier.from_user),
            to_user: self.to_user.saturating_sub(earlier.to_user),
        }
    }
}

impl Interface {
    /// Makes one that is up and has nobody at either end.
    ///
    /// # Errors
    /// There is no tun driver, or no right to use it.
    pub fn create(name: &str, pairs: u16) -> Result<Self> {
        let interface = Self { name: name.to_owned(), pairs };
        let tap = interface.open()?;
        // SAFETY: the request takes a number and touches no memory.
        if unsafe { libc::ioctl(tap.ends(0).tx.as_raw_fd(), libc::TUNSETPERSIST, 1) } < 0 {
            return Err(io::Error::last_os_error())
                .with_context(|| format!("tap {name}: keeping it while nobody uses it"));
        }
        Ok(interface)
    }

    /// The tap as a VMM has it.
    ///
    /// # Errors
    /// Somebody else does.
    pub fn open(&self) -> Result<Tap> {
        // Its message has the source in it already.
        Tap::open(&self.name, usize::from(self.pairs), None).map_err(|error| anyhow!("{error}"))
    }

    /// Its number.
    ///
    /// # Errors
    /// It is gone.
    pub fn index(&self) -> Result<u32> {
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .context("making a socket")?;
        name_to_index(&socket, &self.name).with_context(|| format!("asking for the index of {}", self.name))
    }

    /// What it has counted.
    ///
    /// # Errors
    /// It is gone.
    pub fn counters(&self) -> Result<Counters> {
        // Of the thread, not of the process: they may be in different namespaces.
        let path = "/proc/thread-self/net/dev";
        let text = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
        match find(&text, &self.name) {
            Some(counters) => Ok(counters),
            None => bail!("{path} has no counters of {}", self.name),
        }
    }
}

/// The counters of an interface in /proc/net/dev: eight of what it has received, of which packets are the second, eight of
/// what it has sent.
fn find(text: &str, name: &str) -> Option<Counters> {
    let (_, line) = text.lines().filter_map(|line| line.split_once(':')).find(|(known, _)| known.trim() == name)?;
    let mut packets = line.split_ascii_whitespace().skip(1).step_by(8).map(str::parse);
    Some(Counters { from_user: packets.next()?.ok()?, to_user: packets.next()?.ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_name() {
        let text = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       1       2    3    4    5     6          7         8        9      10   11   12   13    14      15         16
bench0: 3000 20 0 0 0 0 0 0 6000 40 0 7 0 0 0 0
";
        assert_eq!(find(text, "bench0"), Some(Counters { from_user: 20, to_user: 40 }));
        assert_eq!(find(text, "lo"), Some(Counters { from_user: 2, to_user: 10 }));
        assert_eq!(find(text, "bench"), None);
        assert_eq!(find("bench0: 1 2 3", "bench0"), None);
    }
}
