//! What measured frames look like: IPv4 over Ethernet, UDP, or TCP that is left to the device to be cut into segments, with
//! the virtio-net header that belongs to it (virtio 1.3, 5.1.6). One file for the guest and for the harness on the host, so
//! that both send the same.

/// Bytes of `struct virtio_net_hdr`.
pub const HEADER: usize = 12;
/// Addresses and type of an Ethernet frame.
pub const ETHERNET: usize = 14;
/// The shortest frame, without its check sequence.
pub const SHORTEST: usize = 60;
/// What frames are filled with behind their headers.
pub const FILLER: u8 = 0x5a;
/// A station that frames are for; not the host, which so drops them early.
pub const NOBODY: [u8; 6] = [0x52, 0x54, 0, 0xff, 0xff, 0xff];
/// The discard service.
pub const DISCARD: u16 = 9;

const IPV4: [u8; 2] = [0x08, 0x00];
const IP_HEADER: usize = 20;
const TCP: u8 = 6;
const TCP_HEADER: usize = 20;
const UDP: u8 = 17;
/// TEST-NET-1 (RFC 5737).
const FROM: [u8; 4] = [192, 0, 2, 1];
const TO: [u8; 4] = [192, 0, 2, 2];

/// VIRTIO_NET_HDR_F_NEEDS_CSUM.
const NEEDS_CSUM: u8 = 1;
/// VIRTIO_NET_HDR_GSO_TCPV4.
const GSO_TCPV4: u8 = 1;
/// Bytes per TCP segment, as of Linux with timestamps at an MTU of 1500.
const SEGMENT: u16 = 1_448;
const CHECKSUM_IN_TCP: u16 = 16;

/// How a frame starts.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// What stands in front of it on a virtio queue or a tap.
    pub header: [u8; HEADER],
    bytes: [u8; ETHERNET + IP_HEADER + TCP_HEADER],
    len: usize,
}

impl Start {
    /// The protocol headers.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The start of a frame of `size` bytes (60 or more) from the station `mac`: UDP from `port`, or with `segments` TCP that is
/// to be cut.
pub fn start(size: usize, mac: [u8; 6], segments: bool, port: u16) -> Start {
    const IP: usize = ETHERNET;
    const L4: usize = ETHERNET + IP_HEADER;
    let mut start = Start { header: [0; HEADER], bytes: [0; L4 + TCP_HEADER], len: L4 };
    let bytes = &mut start.bytes;
    bytes[..6].copy_from_slice(&NOBODY);
    bytes[6..12].copy_from_slice(&mac);
    bytes[12..IP].copy_from_slice(&IPV4);
    // A frame may be longer than any IP packet by a VLAN tag: what is behind the packet is padding then.
    let packet = (size - ETHERNET).min(u16::MAX as usize) as u16;
    bytes[IP] = 0x45;
    bytes[IP + 2..IP + 4].copy_from_slice(&packet.to_be_bytes());
    bytes[IP + 8] = 64;
    bytes[IP + 9] = if segments { TCP } else { UDP };
    bytes[IP + 12..IP + 16].copy_from_slice(&FROM);
    bytes[IP + 16..L4].copy_from_slice(&TO);
    let sum: u32 = bytes[IP..L4].chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    bytes[IP + 10..IP + 12].copy_from_slice(&sum.to_be_bytes());
    let ([from_high, from_low], [high, low]) = (port.to_be_bytes(), DISCARD.to_be_bytes());
    if segments {
        // Ports, numbers, a header of five words, ACK, a window; the checksum's field is the device's to fill.
        let tcp = [from_high, from_low, high, low, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0];
        bytes[L4..].copy_from_slice(&tcp);
        start.len = L4 + TCP_HEADER;
        start.header[..2].copy_from_slice(&[NEEDS_CSUM, GSO_TCPV4]);
        let lengths = [(L4 + TCP_HEADER) as u16, SEGMENT, L4 as u16, CHECKSUM_IN_TCP];
        for (place, value) in start.header[2..10].chunks_exact_mut(2).zip(lengths) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    } else {
        let [long, short] = (packet - IP_HEADER as u16).to_be_bytes();
        let udp = [from_high, from_low, high, low, long, short, 0, 0];
        bytes[L4..L4 + udp.len()].copy_from_slice(&udp);
        start.len = L4 + udp.len();
    }
    start
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    fn word(bytes: &[u8], at: usize) -> u16 {
        u16::from_be_bytes([bytes[at], bytes[at + 1]])
    }

    #[test]
    fn lengths_and_checksum_fit_the_frame() {
        for (size, segments) in [(60, false), (1_500, false), (1_515, true), (65_535, true)] {
            let start = start(size, MAC, segments, 4_000);
            let bytes = start.bytes();
            assert_eq!((&bytes[..6], &bytes[6..12], word(bytes, 12)), (&NOBODY[..], &MAC[..], 0x0800));
            assert_eq!(usize::from(word(bytes, 16)), size - ETHERNET);
            let sum: u32 = (ETHERNET..ETHERNET + IP_HEADER).step_by(2).map(|at| u32::from(word(bytes, at))).sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff, "a sound header adds up to ones");
            assert_eq!((word(bytes, 34), word(bytes, 36)), (4_000, DISCARD));
            if !segments {
                assert_eq!(usize::from(word(bytes, 38)), size - ETHERNET - IP_HEADER);
            }
        }
    }

    #[test]
    fn only_segments_ask_something_of_the_device() {
        assert_eq!(start(1_500, MAC, false, DISCARD).header, [0; HEADER]);
        // Needs a checksum, TCP over IPv4, 54 bytes of headers, 1448 in a segment, the checksum at 16 behind 34.
        let expected = [1, 1, 54, 0, 0xa8, 0x05, 34, 0, 16, 0, 0, 0];
        assert_eq!(start(65_000, MAC, true, DISCARD).header, expected);
    }
}
