//! What a user says of a NIC, and opening its port.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::Deserialize;
use thiserror::Error;

use crate::device::Place;
use crate::net::port::link::Link;
use crate::net::port::loopback::Loopback;
use crate::net::port::tap::{self, Tap, TapError};
use crate::net::port::{Offloads, Port};

/// Most queue pairs of a NIC.
pub const MAX_PAIRS: u16 = 32;
/// Most descriptors of a queue.
pub const MAX_QUEUE_SIZE: u16 = 4096;
/// Smallest MTU that IPv4 allows, and the largest of a frame without segmentation.
const MTUS: std::ops::RangeInclusive<u16> = 68..=65520;

/// An Ethernet address of one station.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "String")]
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

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What a port can do whose descriptors another process has lent: asking the port itself would change it.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
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

impl fmt::Display for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Tcp => "tcp",
            Self::All => "all",
        })
    }
}

/// A NIC as the command line or a configuration file describes it. One of `tap`, `fds`, `link` and `loopback` says where its
/// frames go.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NetOptions {
    /// A tap by its name, created if there is none; or a macvtap by its device file.
    pub tap: Option<String>,
    /// Open descriptors of a tap's queues, inherited from whoever started this process.
    #[serde(default)]
    pub fds: Vec<RawFd>,
    /// A path that two VMs share: their NICs are joined.
    pub link: Option<PathBuf>,
    /// Whatever is transmitted is received.
    #[serde(default)]
    pub loopback: bool,
    /// The descriptors of `fds` are lent by a process that has opened the port, a link or loopback too (two for each pair then),
    /// and that serves the NIC at other times: the port is changed only while queues run here. `ringvm` says so to its daemons.
    pub lent: Option<Lent>,
    /// Where the NIC is served. Not looked at here, but by whoever has the guest.
    #[serde(default)]
    pub place: Place,
    /// A daemon that serves the NIC already; everything but the size of its queues is its own then. Likewise.
    pub socket: Option<PathBuf>,
    /// Address of the NIC; one is made if it is left out.
    pub mac: Option<Mac>,
    /// Number of queue pairs, 1 to 32.
    #[serde(default = "default_pairs")]
    pub queues: u16,
    /// Descriptors per queue, a power of two from 64 to 4096.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
    /// MTU that the guest is told, and that a tap is given.
    pub mtu: Option<u16>,
}

fn default_pairs() -> u16 {
    1
}

fn default_queue_size() -> u16 {
    256
}

impl Default for NetOptions {
    fn default() -> Self {
        Self {
            tap: None,
            fds: Vec::new(),
            link: None,
            loopback: false,
            lent: None,
            place: Place::Process,
            socket: None,
            mac: None,
            queues: default_pairs(),
            queue_size: default_queue_size(),
            mtu: None,
        }
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

impl NetOptions {
    fn name(&self) -> String {
        let path = |path: &Option<PathBuf>| path.as_deref().unwrap_or(Path::new("")).display().to_string();
        match (&self.tap, path(&self.link), path(&self.socket)) {
            (Some(tap), ..) if !tap.is_empty() => tap.escape_debug().to_string(),
            (_, link, _) if !link.is_empty() => link,
            (_, _, socket) if !socket.is_empty() => socket,
            _ if !self.fds.is_empty() => format!("fds={:?}", self.fds),
            _ if self.loopback => "loopback".into(),
            _ => "without a port".into(),
        }
    }

    fn refuse(&self, what: impl Into<String>) -> OpenError {
        OpenError::Option { net: self.name(), what: what.into() }
    }

    /// Checks what can be checked without touching the host.
    ///
    /// # Errors
    /// [`OpenError::Option`] for the first thing found.
    pub fn validate(&self) -> Result<(), OpenError> {
        if self.socket.is_some() {
            let daemons = Self { socket: self.socket.clone(), queue_size: self.queue_size, ..Self::default() };
            if *self != daemons {
                return Err(self.refuse("with socket= only queue-size= is said here, the rest to the daemon"));
            }
        }
        if self.lent.is_some() && (self.fds.is_empty() || self.tap.is_some()) {
            return Err(self.refuse("lent= goes with fds=, the descriptors that are lent, and without tap="));
        }
        let lends_sockets = self.lent.is_some() && (self.link.is_some() || self.loopback);
        let ports = [
            self.tap.is_some(),
            !self.fds.is_empty() && !lends_sockets,
            self.link.is_some(),
            self.loopback,
            self.socket.is_some(),
        ];
        match ports.iter().filter(|named| **named).count() {
            1 => {}
            0 => return Err(self.refuse("no port is named: give one of tap=, fds=, link=, loopback=on and socket=")),
            _ => {
                return Err(
                    self.refuse("more than one port is named: give one of tap=, fds=, link=, loopback=on and socket=")
                );
            }
        }
        if let Some(name) = &self.tap {
            tap::check_name(name).map_err(|why| self.refuse(format!("tap {}: {why}", name.escape_debug())))?;
        }
        for (key, path, whose) in [("link", &self.link, "both VMs"), ("socket", &self.socket, "its daemon too")] {
            if path.as_deref().is_some_and(|path| path.as_os_str().is_empty()) {
                return Err(self.refuse(format!("{key}= is empty, give a path that {whose} can reach")));
            }
        }
        if !(1..=MAX_PAIRS).contains(&self.queues) {
            return Err(self.refuse(format!("queues={} is not from 1 to {MAX_PAIRS}", self.queues)));
        }
        let (each, word) = if lends_sockets { (2, "two") } else { (1, "one") };
        if !self.fds.is_empty() && self.fds.len() != each * usize::from(self.queues) {
            let what = format!("{} descriptors for queues={}, {word} for each is needed", self.fds.len(), self.queues);
            return Err(self.refuse(what));
        }
        if !self.queue_size.is_power_of_two() || !(64..=MAX_QUEUE_SIZE).contains(&self.queue_size) {
            let what = format!("queue-size={} is not a power of two from 64 to {MAX_QUEUE_SIZE}", self.queue_size);
            return Err(self.refuse(what));
        }
        if let Some(mtu) = self.mtu
            && !MTUS.contains(&mtu)
        {
            return Err(self.refuse(format!("mtu={mtu} is not from {} to {}", MTUS.start(), MTUS.end())));
        }
        Ok(())
    }

    /// Opens the port.
    ///
    /// # Errors
    /// Anything that is wrong with the options or the port.
    pub fn open(&self) -> Result<Arc<dyn Port>, OpenError> {
        self.validate()?;
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
