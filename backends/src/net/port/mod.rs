//! The source and sink of packets, as one trait.
//!
//! On the data path a port is two descriptors per queue pair: reading one brings one frame, writing the other takes
//! one, each with a virtio-net header in front, and neither ever waits. The trait adds control, off the data path.

pub mod link;
pub mod loopback;
pub mod tap;

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;

use crate::host::inherited;

/// The frames that a port can take besides plain ones: checksums left open, segments left uncut. These are the bits
/// of VIRTIO_NET_F_* for the same thing seen from the guest, in both directions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums may be left to the other side.
    pub csum: bool,
    /// TCP over IPv4 may be left uncut.
    pub tso4: bool,
    /// TCP over IPv6 may be left uncut.
    pub tso6: bool,
    /// Uncut TCP may carry ECN.
    pub ecn: bool,
    /// UDP over IPv4 may be left uncut.
    pub uso4: bool,
    /// UDP over IPv6 may be left uncut.
    pub uso6: bool,
}

impl Offloads {
    /// Without UDP, which taps of kernels before 6.2 can't leave uncut.
    pub const TCP: Self = Self { csum: true, tso4: true, tso6: true, ecn: true, uso4: false, uso6: false };

    /// All of them.
    pub const ALL: Self = Self { csum: true, tso4: true, tso6: true, ecn: true, uso4: true, uso6: true };

    /// Whether frames may be longer than the MTU.
    #[must_use]
    pub fn any_segmentation(self) -> bool {
        self.tso4 || self.tso6 || self.uso4 || self.uso6
    }
}

/// The descriptors of one queue pair.
#[derive(Clone, Debug)]
pub struct Ends {
    /// Reading it brings a frame, or EAGAIN.
    pub rx: Arc<OwnedFd>,
    /// Writing it takes a frame, or EAGAIN.
    pub tx: Arc<OwnedFd>,
}

/// The pairs that another process has lent: of each, what is read and then what is written.
fn lent_ends(fds: &[RawFd]) -> io::Result<Vec<Ends>> {
    let take = |fd: RawFd| {
        let taken = inherited::take(fd)?;
        rustix::io::ioctl_fionbio(&taken, true)?;
        io::Result::Ok(Arc::new(taken))
    };
    let (pairs, _) = fds.as_chunks();
    pairs.iter().map(|&[rx, tx]| Ok(Ends { rx: take(rx)?, tx: take(tx)? })).collect()
}

/// The frames that the guest wants besides broadcasts (virtio 1.3, 5.1.6.5.1 and 5.1.6.5.2).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// All of them.
    pub promiscuous: bool,
    /// All multicasts.
    pub all_multicast: bool,
    /// Those to any of these addresses.
    pub addresses: Vec<[u8; 6]>,
}

/// A packet source and sink. The defaults are those of two joined sockets, where a frame arrives as it was sent: all
/// offloads are available as long as both sides agree to them, and a sender waits for a slow receiver.
pub trait Port: Send + Sync {
    /// Its name in logs and errors.
    fn name(&self) -> &str;

    /// How many queue pairs it has.
    fn pairs(&self) -> usize;

    /// The descriptors of a pair. They stay the same for the port's life.
    fn ends(&self, pair: usize) -> Ends;

    /// The offloads that it takes from the guest, and can give to it.
    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    /// Largest payload of an Ethernet frame, in bytes, if the port has a limit.
    fn mtu(&self) -> Option<u16> {
        None
    }

    /// Whether a write may find no room, so that frames must go one at a time to stay in order.
    fn may_block(&self) -> bool {
        true
    }

    /// Sets the offloads that the port may give to the guest from now on.
    ///
    /// # Errors
    /// The host's error; nothing has changed then.
    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    /// Spreads frames over the first `count` pairs and none over the others, whichever number was set before, by this
    /// or by another process that has the descriptors. The other pairs can still be polled; reading them finds
    /// nothing (EAGAIN, taps of today's kernels) or fails with EBADFD (taps that have disappeared, or kernels that
    /// detach a disabled queue from its interface).
    ///
    /// # Errors
    /// The host's error.
    fn set_pairs(&self, _count: usize) -> io::Result<()> {
        Ok(())
    }

    /// Brings only what passes the filter, as far as the port can.
    ///
    /// # Errors
    /// `Unsupported` where it can't: more is brought then.
    fn set_filter(&self, _filter: &Filter) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Looks for a peer after a write on a pair found none at the other end. Does not wait.
    fn find_peer(&self, _pair: usize) {}

    /// Whether this pair's frames are redirected to another pair because the peer serves fewer pairs.
    /// [`Self::find_peer`] may find that the peer serves this one now.
    fn is_astray(&self, _pair: usize) -> bool {
        false
    }
}
