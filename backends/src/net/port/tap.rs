//! Taps and macvtaps of Linux (Documentation/networking/tuntap.rst): one descriptor per queue pair, a virtio-net header of 12
//! bytes in front of each frame, offloads and filters by ioctl.
#![allow(unsafe_code, reason = "ioctls of tun(4) and netdevice(7) have no safe wrapper among our dependencies")]

use std::fs::{File, OpenOptions};
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use thiserror::Error;

use super::{Ends, Filter, Offloads, Port};
use crate::host::inherited;
use crate::host::retry::outwait;

/// Bytes of the header in front of each frame (`struct virtio_net_hdr_v1`).
const HEADER_LEN: libc::c_int = 12;

/// An ioctl, and what it takes: the address of a `T` that the kernel reads or fills in.
struct Request<T>(libc::c_ulong, PhantomData<T>);

impl<T> Request<T> {
    /// # Safety
    /// The kernel must access no more than a `T` for it, and must leave a valid `T`.
    const unsafe fn new(number: libc::c_ulong) -> Self {
        Self(number, PhantomData)
    }

    fn call(&self, file: &impl AsRawFd, argument: &mut T) -> io::Result<()> {
        // SAFETY: the argument is what the request takes, and borrowed across the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), self.0, std::ptr::from_mut(argument)) })
    }
}

// SAFETY: tun(4) takes an int for these (`get_user`, `put_user` in drivers/net/tun.c and tap.c).
const SET_HEADER_LEN: Request<libc::c_int> = unsafe { Request::new(libc::TUNSETVNETHDRSZ) };
// SAFETY: likewise.
const GET_SEND_BUFFER: Request<libc::c_int> = unsafe { Request::new(libc::TUNGETSNDBUF) };
// SAFETY: tun(4) and netdevice(7) take a `struct ifreq` for these, every bit pattern of which is one.
const SET_INTERFACE: Request<libc::ifreq> = unsafe { Request::new(libc::TUNSETIFF) };
// SAFETY: likewise.
const GET_INTERFACE: Request<libc::ifreq> = unsafe { Request::new(libc::TUNGETIFF) };
// SAFETY: likewise.
const SET_QUEUE: Request<libc::ifreq> = unsafe { Request::new(libc::TUNSETQUEUE) };
// SAFETY: likewise.
const GET_MTU: Request<libc::ifreq> = unsafe { Request::new(libc::SIOCGIFMTU) };
// SAFETY: likewise.
const SET_MTU: Request<libc::ifreq> = unsafe { Request::new(libc::SIOCSIFMTU) };
// SAFETY: likewise.
const GET_FLAGS: Request<libc::ifreq> = unsafe { Request::new(libc::SIOCGIFFLAGS) };
// SAFETY: likewise.
const SET_FLAGS: Request<libc::ifreq> = unsafe { Request::new(libc::SIOCSIFFLAGS) };
// SAFETY: tun(4) reads the two numbers and as many addresses as `count` says, of which there are never more than places.
const SET_FILTER: Request<TunFilter> = unsafe { Request::new(libc::TUNSETTXFILTER) };

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
    /// Whether a frame may find no room: a macvtap's buffer is bounded, a tap's only if an administrator bounded it.
    may_block: bool,
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

    /// A tap over inherited descriptors that a process with more rights has opened, one per queue.
    ///
    /// # Errors
    /// When one is not open, taken already, or no tap.
    pub fn from_descriptors(fds: &[RawFd]) -> Result<Self, TapError> {
        let owned = fds.iter().map(|&fd| take(fd)).collect::<Result<Vec<_>, _>>()?;
        let name = format!("fd {}", fds.iter().map(ToString::to_string).collect::<Vec<_>>().join(","));
        if owned.len() > 1 {
            for fd in &owned {
                // The previous user may have left with queues detached. EINVAL means that the queue is attached.
                let _ = set_queue(fd, libc::IFF_ATTACH_QUEUE);
            }
        }
        let interface = owned.first().and_then(|fd| interface_of(fd).ok());
        let tap = Self::over(&name, owned)?;
        Ok(Self { mtu: interface.as_deref().and_then(interface_mtu), ..tap })
    }

    /// The tap of another process that has set it up, can do so much, and has lent its queues. Nothing is changed.
    ///
    /// # Errors
    /// When a descriptor is not open, or taken already.
    pub fn lent(fds: &[RawFd], offloads: Offloads) -> Result<Self, TapError> {
        let files = fds.iter().map(|&fd| take(fd)).collect::<Result<Vec<_>, _>>()?;
        let interface = files.first().and_then(|fd| interface_of(fd).ok());
        let mtu = interface.as_deref().and_then(interface_mtu);
        Ok(Self { mtu, ..Self::of(interface.as_deref().unwrap_or("lent"), files, offloads) })
    }

    fn over(name: &str, files: Vec<OwnedFd>) -> Result<Self, TapError> {
        let error = |what, source: io::Error, hint| TapError { name: name.to_owned(), what, source, hint };
        for file in &files {
            let mut header_len = HEADER_LEN;
            SET_HEADER_LEN
                .call(file, &mut header_len)
                .map_err(|e| error("setting the header length", e, "; it is no tap, or one without IFF_VNET_HDR"))?;
        }
        let first = files.first().ok_or_else(|| error("opening", io::ErrorKind::InvalidInput.into(), ""))?;
        let offloads = probe_offloads(first)
            .map_err(|e| error("asking for its offloads", e, "; it has to be created with IFF_VNET_HDR"))?;
        Ok(Self::of(name, files, offloads))
    }

    fn of(name: &str, files: Vec<OwnedFd>, offloads: Offloads) -> Self {
        let mut buffer: libc::c_int = 0;
        let known = files.first().is_some_and(|first| GET_SEND_BUFFER.call(first, &mut buffer).is_ok());
        let may_block = !known || buffer != libc::c_int::MAX;
        let ends = files.into_iter().map(|file| {
            let file = Arc::new(file);
            Ends { rx: Arc::clone(&file), tx: file }
        });
        Self { name: name.to_owned(), ends: ends.collect(), offloads, mtu: None, may_block }
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
        set_offloads(&self.ends[0].tx, offloads)
    }

    fn set_pairs(&self, count: usize) -> io::Result<()> {
        if self.ends.len() == 1 {
            return Ok(());
        }
        let (attached, detached) = self.ends.split_at(count.min(self.ends.len()));
        let set = |ends: &Ends, flag| match set_queue(&ends.tx, flag) {
            // It is so already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            result => result,
        };
        attached.iter().try_for_each(|ends| set(ends, libc::IFF_ATTACH_QUEUE))?;
        detached.iter().rev().try_for_each(|ends| set(ends, libc::IFF_DETACH_QUEUE))
    }

    fn set_filter(&self, filter: &Filter) -> io::Result<()> {
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
        SET_FILTER.call(&self.ends[0].tx, &mut tun)
    }
}

/// Attaches a queue to its interface, or detaches it.
fn set_queue(file: &OwnedFd, flag: libc::c_int) -> io::Result<()> {
    let mut request = request("");
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    SET_QUEUE.call(file, &mut request)
}

/// Addresses in a filter; with more, everything is brought.
const MAX_FILTER: usize = 64;

/// `struct tun_filter` with room for as many addresses as it takes.
#[repr(C)]
struct TunFilter {
    flags: u16,
    count: u16,
    addresses: [[u8; 6]; MAX_FILTER],
}

/// Says what may come unfinished from the interface.
fn set_offloads(file: &OwnedFd, offloads: Offloads) -> io::Result<()> {
    // SAFETY: the argument is a number.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags(offloads))) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn flags(offloads: Offloads) -> libc::c_uint {
    // Segmentation presupposes open checksums, and the kernel refuses one without the other.
    if !offloads.csum {
        return 0;
    }
    // It likewise refuses USO of one IP version alone.
    let uso = offloads.uso4 && offloads.uso6;
    [
        (true, libc::TUN_F_CSUM),
        (offloads.tso4, libc::TUN_F_TSO4),
        (offloads.tso6, libc::TUN_F_TSO6),
        (offloads.ecn && (offloads.tso4 || offloads.tso6), libc::TUN_F_TSO_ECN),
        (uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ]
    .into_iter()
    .fold(0, |all, (on, flag)| if on { all | flag } else { all })
}

/// Finds out which offloads the interface has by asking for them; leaves all off.
fn probe_offloads(file: &OwnedFd) -> io::Result<Offloads> {
    let can = |offloads| set_offloads(file, offloads).is_ok();
    let best = if can(Offloads::ALL) {
        Offloads::ALL
    } else if can(Offloads::TCP) {
        Offloads::TCP
    } else {
        Offloads::default()
    };
    set_offloads(file, Offloads::default())?;
    Ok(best)
}

/// Takes an inherited descriptor, never to wait for.
fn take(fd: RawFd) -> Result<OwnedFd, TapError> {
    let error = |what, source: io::Error| TapError { name: format!("fd {fd}"), what, source, hint: "" };
    let owned = inherited::take(fd).map_err(|e| error("using the descriptor", e))?;
    rustix::io::ioctl_fionbio(&owned, true).map_err(|e| error("making it non-blocking", e.into()))?;
    Ok(owned)
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
    let attached = outwait(&passing, || SET_INTERFACE.call(&file, &mut request));
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
/// Why it can be neither, and what it should look like.
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
    GET_INTERFACE.call(file, &mut request)?;
    let bytes = request.ifr_name.iter().take_while(|&&byte| byte != 0).map(|&byte| byte as u8);
    Ok(String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned())
}

/// Any socket serves for asking after interfaces.
fn control_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

fn interface_mtu(name: &str) -> Option<u16> {
    let mut request = request(name);
    GET_MTU.call(&control_socket().ok()?, &mut request).ok()?;
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
    SET_MTU.call(&control_socket()?, &mut request)
}

/// Sets the interface up if it is down, which needs rights.
fn bring_up(name: &str) -> io::Result<()> {
    let socket = control_socket()?;
    let mut request = request(name);
    GET_FLAGS.call(&socket, &mut request)?;
    // SAFETY: the kernel filled this member in.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    if flags & libc::IFF_UP as libc::c_short != 0 {
        return Ok(());
    }
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    SET_FLAGS.call(&socket, &mut request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_never_asked_for_half_of_uso() {
        let half = Offloads { csum: true, uso4: true, ..Offloads::default() };
        assert_eq!(flags(half), libc::TUN_F_CSUM);
        assert_eq!(flags(Offloads { uso4: false, uso6: true, ..half }), libc::TUN_F_CSUM);
        let both = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        assert_eq!(flags(Offloads { uso6: true, ..half }), both);
        assert_eq!(flags(Offloads { csum: false, ..Offloads::ALL }), 0);
    }
}
