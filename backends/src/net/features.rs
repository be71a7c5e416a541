//! Feature bits of the network device (virtio 1.3, section 5.1.3) and what they mean to a port.

pub(super) use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM as CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS as CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_MAC_ADDR as CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX as CTRL_RX, VIRTIO_NET_F_CTRL_VQ as CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE as GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM as GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN as GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4 as GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6 as GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4 as GUEST_USO4, VIRTIO_NET_F_GUEST_USO6 as GUEST_USO6, VIRTIO_NET_F_HOST_ECN as HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4 as HOST_TSO4, VIRTIO_NET_F_HOST_TSO6 as HOST_TSO6, VIRTIO_NET_F_HOST_USO as HOST_USO,
    VIRTIO_NET_F_MAC as MAC, VIRTIO_NET_F_MQ as MQ, VIRTIO_NET_F_MRG_RXBUF as MRG_RXBUF, VIRTIO_NET_F_MTU as MTU,
    VIRTIO_NET_F_SPEED_DUPLEX as SPEED_DUPLEX, VIRTIO_NET_F_STATUS as STATUS,
};

use crate::net::port::Offloads;

/// The bits by which a driver takes frames unfinished.
pub(super) const GUEST_OFFLOADS: u64 =
    1 << GUEST_CSUM | 1 << GUEST_TSO4 | 1 << GUEST_TSO6 | 1 << GUEST_ECN | 1 << GUEST_USO4 | 1 << GUEST_USO6;

/// The offload bits to offer over a port that can do `can`.
pub(super) fn offered(can: Offloads) -> u64 {
    let bits = [
        (can.csum, 1 << CSUM | 1 << GUEST_CSUM | 1 << CTRL_GUEST_OFFLOADS),
        (can.tso4, 1 << HOST_TSO4 | 1 << GUEST_TSO4),
        (can.tso6, 1 << HOST_TSO6 | 1 << GUEST_TSO6),
        (can.ecn, 1 << HOST_ECN | 1 << GUEST_ECN),
        (can.uso4 && can.uso6, 1 << HOST_USO | 1 << GUEST_USO4 | 1 << GUEST_USO6),
    ];
    bits.into_iter().fold(0, |all, (on, bits)| if on { all | bits } else { all })
}

/// The work on frames that a driver with these features may leave to the host.
pub(super) fn host_offloads(features: u64) -> Offloads {
    let has = |bit: u32| features & 1 << bit != 0;
    Offloads {
        csum: has(CSUM),
        tso4: has(HOST_TSO4),
        tso6: has(HOST_TSO6),
        ecn: has(HOST_ECN),
        uso4: has(HOST_USO),
        uso6: has(HOST_USO),
    }
}

/// The work on frames that a driver with these features lets the host leave to it.
pub(super) fn guest_offloads(features: u64) -> Offloads {
    let has = |bit: u32| features & 1 << bit != 0;
    Offloads {
        csum: has(GUEST_CSUM),
        tso4: has(GUEST_TSO4),
        tso6: has(GUEST_TSO6),
        ecn: has(GUEST_ECN),
        uso4: has(GUEST_USO4),
        uso6: has(GUEST_USO6),
    }
}

/// A feature without one that it presupposes (5.1.3.1).
pub(super) fn missing_premise(features: u64) -> Option<&'static str> {
    let has = |bit: u32| features & 1 << bit != 0;
    let premises: [(&[u32], &[u32], &'static str); 7] = [
        (&[GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6], &[GUEST_CSUM], "guest segmentation needs GUEST_CSUM"),
        (&[GUEST_ECN], &[GUEST_TSO4, GUEST_TSO6], "GUEST_ECN needs GUEST_TSO4 or GUEST_TSO6"),
        (&[HOST_TSO4, HOST_TSO6, HOST_USO], &[CSUM], "host segmentation needs CSUM"),
        (&[HOST_ECN], &[HOST_TSO4, HOST_TSO6], "HOST_ECN needs HOST_TSO4 or HOST_TSO6"),
        (
            &[CTRL_RX, MQ, CTRL_MAC_ADDR, CTRL_GUEST_OFFLOADS, GUEST_ANNOUNCE],
            &[CTRL_VQ],
            "control features need CTRL_VQ",
        ),
        // Taps have one switch for both (`TUNSETOFFLOAD`, EINVAL for one alone).
        (&[GUEST_USO4], &[GUEST_USO6], "GUEST_USO4 needs GUEST_USO6"),
        (&[GUEST_USO6], &[GUEST_USO4], "GUEST_USO6 needs GUEST_USO4"),
    ];
    let broken =
        premises.into_iter().find(|(of, any, _)| of.iter().any(|&bit| has(bit)) && !any.iter().any(|&bit| has(bit)));
    broken.map(|(.., what)| what)
}
