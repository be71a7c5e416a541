//! The parts of a daemon's device that the driver sees: features, queues, the configuration space. All code that
//! depends on the kind of device is here.

use ringvm_backends::virtqueue::split::RING_FEATURES;
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_MQ;
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_CONSOLE, VIRTIO_ID_NET, VIRTIO_ID_VSOCK};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_SPEED_DUPLEX, VIRTIO_NET_F_STATUS,
};

use super::Wanted;
use super::link::About;

/// Feature bits of the ring and the transport (virtio 1.3, section 6). Only those that our transport has are taken.
const RESERVED_FEATURES: u64 = ((1 << 42) - 1) & !((1 << 24) - 1);
/// Largest configuration space to ask for: the size that fits a message.
const MAX_CONFIG: u32 = 256;
/// Where `writeback` of a disk lies, the one field of its configuration space that is the driver's.
const BLOCK_WRITEBACK: u32 = 32;

/// The features offered to the driver, out of those that the daemon offers.
pub(super) fn features(device_type: u32, theirs: u64, has_config: bool) -> u64 {
    /// Features that point a driver to the configuration space, and features that come with a control queue.
    const NEED_CONFIG: u64 = 1 << VIRTIO_NET_F_MTU
        | 1 << VIRTIO_NET_F_MAC
        | 1 << VIRTIO_NET_F_STATUS
        | 1 << VIRTIO_NET_F_CTRL_VQ
        | 1 << VIRTIO_NET_F_CTRL_RX
        | 1 << VIRTIO_NET_F_CTRL_VLAN
        | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
        | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
        | 1 << VIRTIO_NET_F_MQ
        | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
        | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
        | 1 << VIRTIO_NET_F_SPEED_DUPLEX;
    let without = if device_type == VIRTIO_ID_NET && !has_config { NEED_CONFIG } else { 0 };
    theirs & (!RESERVED_FEATURES | RING_FEATURES) & !without
}

/// Whether a daemon for this kind of device is asked how many queues it has, rather than its configuration space.
pub(super) fn is_counted(device_type: u32) -> bool {
    !matches!(device_type, VIRTIO_ID_BLOCK | VIRTIO_ID_NET)
}

/// Length of the configuration space of a kind of device.
pub(super) fn config_len(device_type: u32) -> u32 {
    match device_type {
        VIRTIO_ID_BLOCK => 60,
        VIRTIO_ID_NET => 24,
        VIRTIO_ID_CONSOLE => 12,
        VIRTIO_ID_VSOCK => 8,
        _ => MAX_CONFIG,
    }
}

/// The side that decides about a write to the configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    /// Neither: it is read-only, and the daemon need not be asked.
    ReadOnly,
    /// The driver. Its writes stand, even while there is no daemon.
    Drivers,
    /// The daemon, which knows its kind of device better.
    Daemons,
}

/// The fields that a driver of virtio 1 writes to (virtio 1.3, sections 5.1.4 and 5.2.4).
pub(super) fn field(device_type: u32, offset: u32, len: usize) -> Field {
    match device_type {
        VIRTIO_ID_BLOCK if (offset, len) == (BLOCK_WRITEBACK, 1) => Field::Drivers,
        VIRTIO_ID_BLOCK | VIRTIO_ID_NET => Field::ReadOnly,
        _ => Field::Daemons,
    }
}

/// How many queues the driver gets.
pub(super) fn queue_count(wanted: &Wanted, about: &About, config: &[u8], offered: u64) -> Result<u16, String> {
    /// Where `num_queues` of a disk lies, and `max_virtqueue_pairs` of a NIC.
    const BLOCK_QUEUES: std::ops::Range<usize> = 34..36;
    const NET_PAIRS: std::ops::Range<usize> = 8..10;
    let word = |range: std::ops::Range<usize>| {
        let bytes = config.get(range)?.try_into().ok()?;
        Some(u16::from_le_bytes(bytes)).filter(|&count| count > 0)
    };
    let has = |feature: u32| offered & 1 << feature != 0;
    let there = match wanted.device_type {
        VIRTIO_ID_BLOCK if has(VIRTIO_BLK_F_MQ) => word(BLOCK_QUEUES).unwrap_or(1),
        VIRTIO_ID_BLOCK => 1,
        // The control queue follows all pairs (virtio 1.3, 5.1.2), whether or not the daemon counts it.
        VIRTIO_ID_NET => {
            let pairs = if has(VIRTIO_NET_F_MQ) { word(NET_PAIRS).unwrap_or(1) } else { 1 };
            pairs.saturating_mul(2).saturating_add(u16::from(has(VIRTIO_NET_F_CTRL_VQ)))
        }
        _ => about.queues.unwrap_or(1).max(1),
    };
    match wanted.queues {
        Some(0) => Err("it can't have 0 queues".into()),
        Some(wanted) if wanted > there => Err(format!("it has {there} queues, not {wanted}")),
        Some(wanted) => Ok(wanted),
        None => Ok(there),
    }
}
