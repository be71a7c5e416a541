//! Frames and the header in front of them (`struct virtio_net_hdr_v1`, virtio 1.3, section 5.1.6).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};

use crate::net::port::Offloads;

/// Bytes of the header.
pub(crate) const HEADER_LEN: usize = 12;

/// Destination, source and EtherType: the shortest frame we accept.
pub(crate) const MIN_FRAME: u64 = 14;

/// The longest IP packet, plus addresses, type and a VLAN tag.
pub(crate) const MAX_FRAME: u64 = 65535 + 14 + 4;

/// Offset of `num_buffers`.
pub(crate) const NUM_BUFFERS: u64 = 10;

/// Whether a header says nothing but what was agreed to, and nothing that its frame of `len` bytes contradicts.
pub(crate) fn is_sound(header: &[u8; HEADER_LEN], len: u64, agreed: Offloads) -> bool {
    let word = |at: usize| u64::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let (flags, kind) = (u32::from(header[0]), u32::from(header[1]));
    let (header_len, segment, start, offset) = (word(2), word(4), word(6), word(8));
    let open_checksum = flags & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    if open_checksum && (!agreed.csum || start + offset + 2 > len) {
        return false;
    }
    let ecn = kind & VIRTIO_NET_HDR_GSO_ECN != 0;
    let segmented = match kind & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_NONE => return !ecn,
        VIRTIO_NET_HDR_GSO_TCPV4 => agreed.tso4,
        VIRTIO_NET_HDR_GSO_TCPV6 => agreed.tso6,
        VIRTIO_NET_HDR_GSO_UDP_L4 => agreed.uso4 || agreed.uso6,
        _ => false,
    };
    // Segmentation starts after the checksum field, so the header has to say where that is.
    segmented && (!ecn || agreed.ecn) && open_checksum && segment > 0 && header_len <= len
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Offloads = Offloads::ALL;

    fn header(flags: u8, kind: u8, words: [u16; 4]) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        header[0] = flags;
        header[1] = kind;
        for (i, word) in words.iter().enumerate() {
            header[2 + 2 * i..4 + 2 * i].copy_from_slice(&word.to_le_bytes());
        }
        header
    }

    #[test]
    fn pitfall_43_headers_that_lie_are_found_out() {
        let none = Offloads::default();
        assert!(is_sound(&header(0, 0, [0; 4]), 60, none));
        let tcp4 = header(1, 1, [54, 1448, 34, 16]);
        assert!(is_sound(&tcp4, 9000, ALL));
        assert!(!is_sound(&tcp4, 9000, none), "not agreed to");
        assert!(!is_sound(&tcp4, 9000, Offloads { tso4: false, ..ALL }));
        assert!(!is_sound(&tcp4, 51, ALL), "the checksum is behind the end");
        assert!(!is_sound(&header(1, 1, [54, 0, 34, 16]), 9000, ALL), "segments of nothing");
        assert!(!is_sound(&header(0, 1, [54, 1448, 0, 0]), 9000, ALL), "segments without a checksum");
        assert!(!is_sound(&header(1, 1, [9001, 1448, 34, 16]), 9000, ALL), "a header longer than the frame");
        assert!(!is_sound(&header(1, 3, [54, 1448, 34, 16]), 9000, ALL), "UFO was never offered");
        assert!(!is_sound(&header(1, 0x7f, [54, 1448, 34, 16]), 9000, ALL));
        assert!(!is_sound(&header(0, 0x80, [0; 4]), 60, ALL), "ECN of nothing");
        assert!(!is_sound(&header(1, 0x81, [54, 1448, 34, 16]), 9000, Offloads { ecn: false, ..ALL }));
        assert!(is_sound(&header(1, 0x84, [54, 1448, 34, 16]), 9000, ALL));
        assert!(is_sound(&header(1, 5, [42, 1448, 34, 6]), 9000, ALL));
        assert!(!is_sound(&header(1, 0, [0, 0, u16::MAX, u16::MAX]), 9000, ALL));
    }
}
