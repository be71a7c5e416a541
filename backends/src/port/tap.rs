//! Taps and macvtaps of Linux (Documentation/networking/tuntap.rst): one descriptor per queue pair, a virtio-net header of 12
//! bytes in front of each frame, offloads and filters by ioctl.
#![allow(unsafe_code, reason = "ioctls of tun(4) and netdevice(7) have no safe wrapper among our dependencies")]

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use thiserror::Error;

use super::{Ends, Filter, Offloads, Port};
use crate::afterlife::outwait;

/// Bytes of the header in front of each frame (`struct virtio_net_hdr_v1`).
const HEADER_LEN: libc::c_int = 12;

/// Why a tap can't be had.
#[derive(Debug, Error)]
#[error("tap {name}: {what}: {source}{hint}")]
pub struct TapError {
    /// The interface, device file or descriptor.
    pub name: String,
    /// What was tried.
    pub what: &'static str,
    /// What came back.
    pub source: io::Error,
    /// What to do, with its own punctuation in front.
    pub hint: &'static str,
}

/// A tap with its queues.
pub struct Tap {
    name: String,
    ends: Vec<Ends>,
    offloads: Offloads,
    mtu: Option<u16>,
    /// Whether what is sent may find no room: a macvtap's buffer is bounded, a tap's only if somebody bounded it.
    may_block: bool,
    /// How many queues are attached, where there are several.
    attached: Mutex<usize>,
}

impl Tap {
    /// Opens the tap `name` with `pairs` queues, creating it if there is none, and sets it up; or the macvtap behind a device
    /// file if `name` is a path. With `mtu`, that of the interface is set.
    ///
    /// # Errors
    /// When the name is none, the host has no tun driver, or the rights are missing; when the interface is no tap, has other
    /// flags, is in use or does not take the MTU.
    pub fn open(name: &str, pairs: usize, mtu: Option<u16>) -> Result<Self, TapError> {
        let error = |what, source: io::Error, hint| TapError { name: name.to_owned(), what, source, hint };
        let files = if name.starts_with('/') {
            let open = || open_device(Path::new(name));
            (0..pairs).map(|_| open()).collect::<io::Result<Vec<_>>>().map_err(|e| {
                error("opening the device file", e, "; it is /dev/tapN with the index of the macvtap interface")
            })?
        } else {
            check_name(name).map_err(|why| error("using the name", io::Error::other(why), ""))?;
            (0..pairs).map(|_| attach(name, pairs > 1)).collect::<Result<Vec<_>, _>>()?
        };
        let tap = Self::over(name, files.into_iter().map(OwnedFd::from).collect())?;
        if !name.starts_with('/') {
            if let Some(mtu) = mtu {
                set_mtu(name, mtu).map_err(|e| {
                    let hint = match e.raw_os_error() {
                        Some(libc::EPERM | libc::EACCES) => {
                            "; set it beforehand: ip link set NAME mtu MTU, or run with CAP_NET_ADMIN, or leave mtu= out"
                        }
                        _ => "; give an mtu= that the interface takes, or leave it out",
                    };
                    error("setting the MTU", e, hint)
                })?;
            }
            bring_up(name).map_err(|e| {
                error(
                    "bringing the interface up",
                    e,
                    "; do it beforehand: ip link set NAME up, or run with CAP_NET_ADMIN",
                )
            })?;
        }
        Ok(Self { mtu: mtu.or_else(|| interface_mtu(name)), ..tap })
    }

    /// A tap over descriptors that were opened by somebody with more rights, one per queue.
    ///
    /// # Errors
    /// When one is not open or no tap.
    pub fn from_descriptors(fds: &[RawFd]) -> Result<Self, TapError> {
        let owned = fds.iter().map(|&fd| {
            let error = |what, source: io::Error| TapError { name: format!("fd {fd}"), what, source, hint: "" };
            if fd <= 2 {
                return Err(error(
                    "using the descriptor",
                    io::Error::other("0, 1 and 2 are for input, output and errors"),
                ));
            }
            // SAFETY: F_DUPFD_CLOEXEC only looks the number up; a number that is not open is an error.
            let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
            if copy < 0 {
                return Err(error("using the descriptor", io::Error::last_os_error()));
            }
            // SAFETY: the descriptor was made just now and nobody else knows it.
            let copy = unsafe { OwnedFd::from_raw_fd(copy) };
            rustix::io::ioctl_fionbio(&copy, true).map_err(|e| error("making it non-blocking", e.into()))?;
            Ok(copy)
        });
        let owned = owned.collect::<Result<Vec<_>, _>>()?;
        let name = format!("fd {}", fds.iter().map(ToString::to_string).collect::<Vec<_>>().join(","));
        if owned.len() > 1 {
            for fd in &owned {
                // Whoever used it before may have left with queues detached; one that is attached says EINVAL.
                let _ = set_queue(fd, libc::IFF_ATTACH_QUEUE);
            }
        }
        let interface = owned.first().and_then(|fd| interface_of(fd).ok());
        let tap = Self::over(&name, owned)?;
        Ok(Self { mtu: interface.as_deref().and_then(interface_mtu), ..tap })
    }

    fn over(name: &str, files: Vec<OwnedFd>) -> Result<Self, TapError> {
        let error = |what, source: io::Error, hint| TapError { name: name.to_owned(), what, source, hint };
        for file in &files {
            let mut header_len = HEADER_LEN;
            ioctl(file, libc::TUNSETVNETHDRSZ, &raw mut header_len as usize)
                .map_err(|e| error("setting the header length", e, "; it is no tap, or one without IFF_VNET_HDR"))?;
        }
        let first = files.first().ok_or_else(|| error("opening", io::ErrorKind::InvalidInput.into(), ""))?;
        let offloads = probe_offloads(first)
            .map_err(|e| error("asking for its offloads", e, "; it has to be created with IFF_VNET_HDR"))?;
        let mut buffer: libc::c_int = 0;
        let known = ioctl(first, libc::TUNGETSNDBUF, &raw mut buffer as usize).is_ok();
        let may_block = !known || buffer != libc::c_int::MAX;
        let attached = Mutex::new(files.len());
        let ends = files.into_iter().map(|file| {
            let file = Arc::new(file);
            Ends { rx: Arc::clone(&file), tx: file }
        });
        Ok(Self { name: name.to_owned(), ends: ends.collect(), offloads, mtu: None, may_block, attached })
    }
}

impl Port for Tap {
    fn name(&self) -> &str {
        &self.name
    }

    fn pairs(&self) -> usize {
        self.ends.len()
    }

    fn ends(&self, pair: usize) -> Ends {
        self.ends[pair].clone()
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    fn may_block(&self) -> bool {
        self.may_block
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // One setting for all queues of the interface; detached queues refuse it.
        ioctl(&self.ends[0].tx, libc::TUNSETOFFLOAD, flags(offloads) as usize)
    }

    fn set_pairs(&self, count: usize) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        while *attached != count {
            let (pair, flag) = if *attached < count {
                (*attached, libc::IFF_ATTACH_QUEUE)
            } else {
                (*attached - 1, libc::IFF_DETACH_QUEUE)
            };
            set_queue(&self.ends[pair].tx, flag)?;
            *attached = if flag == libc::IFF_ATTACH_QUEUE { pair + 1 } else { pair };
        }
        Ok(())
    }

    fn set_filter(&self, filter: &Filter) -> io::Result<()> {
        /// `struct tun_filter` with room for as many addresses as it takes.
        #[repr(C)]
        struct TunFilter {
            flags: u16,
            count: u16,
            addresses: [[u8; 6]; MAX_FILTER],
        }
        const ALL_MULTICAST: u16 = 1;
        let mut tun = TunFilter { flags: 0, count: 0, addresses: [[0; 6]; MAX_FILTER] };
        // No addresses: no filter.
        if !filter.promiscuous && filter.addresses.len() < MAX_FILTER {
            tun.flags = if filter.all_multicast { ALL_MULTICAST } else { 0 };
            let wanted = std::iter::once(&[0xff; 6]).chain(&filter.addresses);
            for (place, address) in tun.addresses.iter_mut().zip(wanted) {
                *place = *address;
                tun.count += 1;
            }
        }
        ioctl(&self.ends[0].tx, libc::TUNSETTXFILTER, &raw mut tun as usize)
    }
}

/// Attaches a queue to its interface, or detaches it.
fn set_queue(file: &OwnedFd, flag: libc::c_int) -> io::Result<()> {
    let mut request = request("");
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    ioctl(file, libc::TUNSETQUEUE, &raw mut request as usize)
}

/// Addresses in a filter; with more, everything is brought.
const MAX_FILTER: usize = 64;

fn flags(offloads: Offloads) -> libc::c_uint {
    // Segmentation presupposes open checksums, and the kernel refuses one without the other.
    if !offloads.csum {
        return 0;
    }
    [
        (true, libc::TUN_F_CSUM),
        (offloads.tso4, libc::TUN_F_TSO4),
        (offloads.tso6, libc::TUN_F_TSO6),
        (offloads.ecn && (offloads.tso4 || offloads.tso6), libc::TUN_F_TSO_ECN),
        (offloads.uso4, libc::TUN_F_USO4),
        (offloads.uso6, libc::TUN_F_USO6),
    ]
    .into_iter()
    .fold(0, |all, (on, flag)| if on { all | flag } else { all })
}

/// What the interface can do, found out by asking for it; leaves all off.
fn probe_offloads(file: &OwnedFd) -> io::Result<Offloads> {
    let tcp = Offloads { csum: true, tso4: true, tso6: true, ecn: true, ..Offloads::default() };
    let all = Offloads { uso4: true, uso6: true, ..tcp };
    let can = |offloads| ioctl(file, libc::TUNSETOFFLOAD, flags(offloads) as usize).is_ok();
    // Kernels before 6.2 know no USO.
    let best = if can(all) {
        all
    } else if can(tcp) {
        tcp
    } else {
        Offloads::default()
    };
    ioctl(file, libc::TUNSETOFFLOAD, 0)?;
    Ok(best)
}

fn open_device(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
}

fn attach(name: &str, many: bool) -> Result<File, TapError> {
    let error = |what, source: io::Error, hint| TapError { name: name.to_owned(), what, source, hint };
    let file = open_device(Path::new("/dev/net/tun")).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            error("opening /dev/net/tun", e, "; load the driver: modprobe tun")
        }
        _ => error("opening /dev/net/tun", e, "; check its permissions, or pass open descriptors with fds="),
    })?;
    let queues = if many { libc::IFF_MULTI_QUEUE } else { 0 };
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues) as libc::c_short;
    // One that is about to go may have had the other kind of queues.
    let passing = [libc::EBUSY, libc::EINVAL];
    let attached = outwait(&passing, || ioctl(&file, libc::TUNSETIFF, &raw mut request as usize));
    attached.map_err(|e| {
        let hint = match e.raw_os_error() {
            Some(libc::EPERM) => {
                "; create it for this user: ip tuntap add NAME mode tap user USER vnet_hdr multi_queue"
            }
            Some(libc::EBUSY) => "; another process uses it",
            Some(libc::EINVAL) => {
                "; it is no tap, or one with other flags: with queues=2 or more it must be multi_queue, with queues=1 it must not"
            }
            _ => "",
        };
        error("attaching to the interface", e, hint)
    })?;
    Ok(file)
}

/// Whether a name can be that of an interface, or is a path and so that of a device file.
///
/// # Errors
/// What it is not, and how it should be.
pub(crate) fn check_name(name: &str) -> Result<(), &'static str> {
    let sound = if name.starts_with('/') {
        !name.chars().any(char::is_control)
    } else {
        // The kernel takes `%` for a place to put a number in.
        let characters = name.bytes().all(|b| b.is_ascii_graphic() && !b"/:%".contains(&b));
        (1..libc::IFNAMSIZ).contains(&name.len()) && characters && name != "." && name != ".."
    };
    if !sound {
        return Err("an interface has a name of 1 to 15 printable characters without / : and %, \
                    a macvtap is named by its device file, /dev/tapN");
    }
    Ok(())
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: all of it is plain bytes and numbers, for which zero is valid.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *place = byte as libc::c_char;
    }
    request
}

/// The interface that a descriptor is attached to.
fn interface_of(file: &OwnedFd) -> io::Result<String> {
    let mut request = request("");
    ioctl(file, libc::TUNGETIFF, &raw mut request as usize)?;
    let bytes = request.ifr_name.iter().take_while(|&&byte| byte != 0).map(|&byte| byte as u8);
    Ok(String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned())
}

/// Any socket serves for asking after interfaces.
fn control_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

fn interface_mtu(name: &str) -> Option<u16> {
    let mut request = request(name);
    ioctl(&control_socket().ok()?, libc::SIOCGIFMTU, &raw mut request as usize).ok()?;
    // SAFETY: the kernel filled this member in.
    u16::try_from(unsafe { request.ifr_ifru.ifru_mtu }).ok()
}

/// Sets the MTU if it is another, which needs rights.
fn set_mtu(name: &str, mtu: u16) -> io::Result<()> {
    if interface_mtu(name) == Some(mtu) {
        return Ok(());
    }
    let mut request = request(name);
    request.ifr_ifru.ifru_mtu = mtu.into();
    ioctl(&control_socket()?, libc::SIOCSIFMTU, &raw mut request as usize)
}

/// Sets the interface up if it is down, which needs rights.
fn bring_up(name: &str) -> io::Result<()> {
    let socket = control_socket()?;
    let mut request = request(name);
    ioctl(&socket, libc::SIOCGIFFLAGS, &raw mut request as usize)?;
    // SAFETY: the kernel filled this member in.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    if flags & libc::IFF_UP as libc::c_short != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    ioctl(&socket, libc::SIOCSIFFLAGS, &raw mut request as usize)
}

/// Every ioctl here takes a number or the address of a structure of ours that the kernel reads or fills in, of the size that
/// the request stands for, alive across the call.
fn ioctl(file: &impl AsRawFd, request: libc::c_ulong, argument: usize) -> io::Result<()> {
    // SAFETY: as said above of all callers.
    if unsafe { libc::ioctl(file.as_raw_fd(), request, argument) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
