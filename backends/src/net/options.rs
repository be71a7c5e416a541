//! What a user says of a NIC, and opening its port.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::net::port::link::Link;
use crate::net::port::loopback::Loopback;
use crate::net::port::tap::{self, Tap, TapError};
use crate::net::port::{Offloads, Port};
use crate::options::{Check, Checked};

/// Most queue pairs of a NIC.
pub const MAX_PAIRS: u16 = 32;
/// Most descriptors of a queue.
pub const MAX_QUEUE_SIZE: u16 = 4096;
/// Smallest MTU that IPv4 allows, and the largest of a frame without segmentation.
const MTUS: std::ops::RangeInclusive<u16> = 68..=65520;

/// An Ethernet address of one station.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes = text.split(':').map(|part| {
            let sound = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            sound.then(|| u8::from_str_radix(part, 16).ok()).flatten()
        });
        let bytes: Option<Vec<u8>> = bytes.collect();
        let Some(bytes) = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) else {
            return Err(format!("mac={text} is not six bytes in hex with colons, like 52:54:00:12:34:56"));
        };
        if bytes[0] & 1 != 0 {
            return Err(format!("mac={text} is a multicast address, its first byte must be even"));
        }
        if bytes == [0; 6] {
            return Err(format!("mac={text} is no address, leave it out to have one made"));
        }
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// The abilities of a port whose descriptors another process has lent: asking the port itself would change it.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lent {
    /// Whole frames with their checksums.
    Plain,
    /// Offloads of TCP too.
    Tcp,
    /// All there are.
    All,
}

impl Lent {
    /// As the process that lends a port has found it.
    #[must_use]
    pub fn of(offloads: Offloads) -> Self {
        match offloads {
            Offloads::ALL => Self::All,
            Offloads::TCP => Self::Tcp,
            _ => Self::Plain,
        }
    }

    fn offloads(self) -> Offloads {
        match self {
            Self::Plain => Offloads::default(),
            Self::Tcp => Offloads::TCP,
            Self::All => Offloads::ALL,
        }
    }
}

crate::options! {
    /// A NIC as the command line, a configuration file or a daemon's arguments describe it. One of `tap`, `fds`, `link` and
    /// `loopback` says where its frames go.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct NetOptions {
        /// Tap by its name, created if there is none; or a macvtap by its device file.
        #[key(positional, value("NAME|/dev/tapN"))]
        pub tap: Option<String>,
        /// Open descriptors of a tap's queues, inherited from whoever started this process.
        pub fds: Vec<RawFd>,
        /// Path that two VMs share: their NICs are joined.
        #[key(value("PATH"))]
        pub link: Option<PathBuf>,
        /// Receive whatever is transmitted.
        pub loopback: bool,
        /// The descriptors of `fds` are lent by a process that has opened the port, a link or loopback too (two for each pair
        /// then), and that serves the NIC at other times: the port is changed only while queues run here. `ringvm` says so to its
        /// daemons.
        #[key(value("plain|tcp|all"))]
        pub lent: Option<Lent>,
        /// Address of the NIC. Without it, a random one.
        #[key(value("ADDRESS"))]
        pub mac: Option<Mac>,
        /// Number of queue pairs, 1 to 32.
        #[key(value("PAIRS"))]
        pub queues: u16 = 1,
        /// Descriptors per queue, a power of two from 64 to 4096.
        pub queue_size: u16 = 256,
        /// MTU that the guest is told, and that a tap is given.
        #[key(value("BYTES"))]
        pub mtu: Option<u16>,
    }
}

/// Why a NIC can't be had.
#[derive(Debug, Error)]
pub enum OpenError {
    /// An option that can't be, alone or with another.
    #[error("net {net}: {what}")]
    Option {
        /// The NIC, by its port.
        net: String,
        /// What is wrong and what to do.
        what: String,
    },
    /// The tap can't be used.
    #[error("net: {0}")]
    Tap(#[from] TapError),
    /// Another port can't be used.
    #[error("net {net}: {what}: {source}")]
    Host {
        /// The NIC, by its port.
        net: String,
        /// What was tried.
        what: &'static str,
        /// What came back.
        source: io::Error,
    },
}

impl Check for NetOptions {
    fn check(&self) -> Result<(), String> {
        const PORTS: &str = "give one of tap=, fds=, link= and loopback=on";
        if self.lent.is_some() && (self.fds.is_empty() || self.tap.is_some()) {
            return Err("lent= goes with fds=, the descriptors that are lent, and without tap=".into());
        }
        let lends_sockets = self.lent.is_some() && (self.link.is_some() || self.loopback);
        let fds = !self.fds.is_empty() && !lends_sockets;
        let ports = [self.tap.is_some(), fds, self.link.is_some(), self.loopback];
        match ports.iter().filter(|named| **named).count() {
            1 => {}
            0 => return Err(format!("no port is named: {PORTS}")),
            _ => return Err(format!("more than one port is named: {PORTS}")),
        }
        if let Some(name) = &self.tap {
            tap::check_name(name).map_err(|why| format!("tap {}: {why}", name.escape_debug()))?;
        }
        if self.link.as_deref().is_some_and(|path| path.as_os_str().is_empty()) {
            return Err("link= is empty, give a path that both VMs can reach".into());
        }
        if !(1..=MAX_PAIRS).contains(&self.queues) {
            return Err(format!("queues={} is not from 1 to {MAX_PAIRS}", self.queues));
        }
        let (each, word) = if lends_sockets { (2, "two") } else { (1, "one") };
        if !self.fds.is_empty() && self.fds.len() != each * usize::from(self.queues) {
            return Err(format!(
                "{} descriptors for queues={}, {word} for each is needed",
                self.fds.len(),
                self.queues
            ));
        }
        self.check_queue_size()?;
        if let Some(mtu) = self.mtu
            && !MTUS.contains(&mtu)
        {
            return Err(format!("mtu={mtu} is not from {} to {}", MTUS.start(), MTUS.end()));
        }
        Ok(())
    }
}

impl Checked<NetOptions> {
    /// Opens the port.
    ///
    /// # Errors
    /// Anything that is wrong with the port.
    pub fn open(&self) -> Result<Arc<dyn Port>, OpenError> {
        let pairs = usize::from(self.queues);
        let host = |what, source| OpenError::Host { net: self.name(), what, source };
        if let Some(lent) = self.lent {
            return Ok(match &self.link {
                Some(link) => Arc::new(Link::lent(link, &self.fds).map_err(|e| host("using the lent sockets", e))?),
                None if self.loopback => {
                    Arc::new(Loopback::lent(&self.fds).map_err(|e| host("using the lent sockets", e))?)
                }
                None => Arc::new(Tap::lent(&self.fds, lent.offloads())?),
            });
        }
        Ok(match (&self.tap, &self.link) {
            (Some(tap), _) => Arc::new(Tap::open(tap, pairs, self.mtu)?),
            (_, Some(link)) => Arc::new(Link::new(link, pairs).map_err(|e| host("taking a side of the link", e))?),
            _ if !self.fds.is_empty() => Arc::new(Tap::from_descriptors(&self.fds)?),
            _ => Arc::new(Loopback::new(pairs).map_err(|e| host("making sockets", e))?),
        })
    }
}

impl NetOptions {
    /// Checks the size of the queues.
    ///
    /// # Errors
    /// As [`Check::check`].
    pub fn check_queue_size(&self) -> Result<(), String> {
        if !self.queue_size.is_power_of_two() || !(64..=MAX_QUEUE_SIZE).contains(&self.queue_size) {
            return Err(format!("queue-size={} is not a power of two from 64 to {MAX_QUEUE_SIZE}", self.queue_size));
        }
        Ok(())
    }

    fn name(&self) -> String {
        match (&self.tap, &self.link) {
            (Some(tap), _) if !tap.is_empty() => tap.escape_debug().to_string(),
            (_, Some(link)) if !link.as_os_str().is_empty() => link.display().to_string(),
            _ if !self.fds.is_empty() => format!("fds={:?}", self.fds),
            _ if self.loopback => "loopback".into(),
            _ => "without a port".into(),
        }
    }

    pub(super) fn refuse(&self, what: impl Into<String>) -> OpenError {
        OpenError::Option { net: self.name(), what: what.into() }
    }

    /// The address, or one of the locally administered that is not likely to be met twice.
    ///
    /// # Errors
    /// When the host has no random numbers.
    pub fn mac_or_random(&self) -> io::Result<[u8; 6]> {
        if let Some(Mac(mac)) = self.mac {
            return Ok(mac);
        }
        let mut mac = [0x52, 0x54, 0, 0, 0, 0];
        rustix::rand::getrandom(&mut mac[2..], rustix::rand::GetRandomFlags::empty())?;
        Ok(mac)
    }
}
