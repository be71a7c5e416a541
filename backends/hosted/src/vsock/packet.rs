//! The header of a packet (virtio 1.3, section 5.10.6). `VsockPacket` of the `virtio-vsock` crate wants the header in one
//! descriptor and the data in one more; drivers may split both as they like, and Linux does. So the bytes are read
//! through `virtio-queue`'s reader, and only the layout is that crate's.

use std::io::{self, Read};

use virtio_vsock::packet::PKT_HEADER_SIZE;

/// Bytes of a header.
pub(super) const HEADER_LEN: usize = PKT_HEADER_SIZE;

/// CID of the host.
pub(super) const HOST_CID: u64 = 2;

/// VIRTIO_VSOCK_TYPE_STREAM.
pub(super) const TYPE_STREAM: u16 = 1;

/// VIRTIO_VSOCK_OP_*.
pub(super) mod op {
    /// Opens a connection.
    pub(in super::super) const REQUEST: u16 = 1;
    /// Accepts it.
    pub(in super::super) const RESPONSE: u16 = 2;
    /// Ends or refuses it.
    pub(in super::super) const RST: u16 = 3;
    /// Says what the sender will not do any more.
    pub(in super::super) const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub(in super::super) const RW: u16 = 5;
    /// Carries nothing but the sender's credit.
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    /// Asks for the receiver's credit.
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// VIRTIO_VSOCK_SHUTDOWN_F_*.
pub(super) mod shut {
    /// The sender receives no more.
    pub(in super::super) const RECEIVE: u32 = 1;
    /// The sender sends no more.
    pub(in super::super) const SEND: u32 = 2;
    /// The sender is done.
    pub(in super::super) const BOTH: u32 = RECEIVE | SEND;
}

/// A header, in the host's byte order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Takes a header from the beginning of a packet, all at once: each read of a chain has its cost.
    ///
    /// # Errors
    /// When the packet is shorter.
    pub(super) fn read(packet: &mut impl Read) -> io::Result<Self> {
        let mut bytes = [0; HEADER_LEN];
        packet.read_exact(&mut bytes)?;
        Ok(Self {
            src_cid: u64::from_le_bytes(field(&bytes, 0)),
            dst_cid: u64::from_le_bytes(field(&bytes, 8)),
            src_port: u32::from_le_bytes(field(&bytes, 16)),
            dst_port: u32::from_le_bytes(field(&bytes, 20)),
            len: u32::from_le_bytes(field(&bytes, 24)),
            kind: u16::from_le_bytes(field(&bytes, 28)),
            op: u16::from_le_bytes(field(&bytes, 30)),
            flags: u32::from_le_bytes(field(&bytes, 32)),
            buf_alloc: u32::from_le_bytes(field(&bytes, 36)),
            fwd_cnt: u32::from_le_bytes(field(&bytes, 40)),
        })
    }

    /// The bytes of the header.
    pub(super) fn bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The RST that answers this packet. It has the packet's type, also an unknown one.
    pub(super) fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

/// The bytes of the field at an offset.
fn field<const N: usize>(header: &[u8; HEADER_LEN], at: usize) -> [u8; N] {
    std::array::from_fn(|i| header[at + i])
}
