//! Parsing of block requests (virtio 1.3, section 5.2.6): a header of 16 bytes, data, and a status byte at the very end,
//! split over descriptors in any way.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::virtqueue::buffers::GuestIo;
use crate::virtqueue::dirty::MOST_WRITTEN;

/// Unit of addresses and lengths in requests, in bytes, whatever the block size.
pub const SECTOR: u64 = 512;

/// Most bytes that one request moves, discards or zeroes. Without a limit it would be every byte of the disk once for each
/// descriptor. Drivers that honour the configuration space stay below it (`super::config`); firmware does not look there: OVMF
/// reads a boot image in one piece of up to this size, which is where it draws the line itself.
pub const MAX_TRANSFER: u64 = 1 << 30;

const _: () = assert!(MAX_TRANSFER <= MOST_WRITTEN, "all that a read writes is marked in a log");

const HEADER_LEN: usize = 16;
const SEGMENT_LEN: usize = 16;
/// Flag of a write-zeroes segment: its space may be given back.
const SEGMENT_UNMAP: u32 = 1;

/// What a request wants; statistics count by it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(usize)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_DISCARD.
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    WriteZeroes,
    /// VIRTIO_BLK_T_GET_ID.
    GetId,
    /// Anything else, or no header.
    #[default]
    Other,
}

/// Names of [`Kind`]s, in their order.
pub const KINDS: &[&str] = &["read", "write", "flush", "discard", "write_zeroes", "get_id", "other"];

/// A request that can't be served, as the status to answer with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal(pub u8);

/// Something is wrong with the request.
pub const IOERR: Refusal = Refusal(VIRTIO_BLK_S_IOERR as u8);
/// The device does not do this.
pub const UNSUPP: Refusal = Refusal(VIRTIO_BLK_S_UNSUPP as u8);

/// The fixed limits that a request is held against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of the disk in sectors.
    pub sectors: u64,
    /// Whether writes are refused, accepted by the driver or not.
    pub readonly: bool,
    /// Whether discard was negotiated.
    pub discard: bool,
    /// Whether write-zeroes was negotiated.
    pub write_zeroes: bool,
    /// Most sectors of one discard or write-zeroes segment.
    pub max_segment_sectors: u32,
    /// Most segments of one discard or write-zeroes request.
    pub max_segments: u32,
}

/// The header's fields that matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The kind of request.
    pub kind: Kind,
    /// Where, in sectors.
    pub sector: u64,
}

impl Header {
    /// Takes the header off the front of a request; `None` if it is not all there.
    #[inline]
    pub fn take(readable: &mut GuestIo) -> Option<Self> {
        let bytes = readable.take::<HEADER_LEN>()?;
        let kind = match u32_at(&bytes, 0) {
            VIRTIO_BLK_T_IN => Kind::Read,
            VIRTIO_BLK_T_OUT => Kind::Write,
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_DISCARD => Kind::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
            VIRTIO_BLK_T_GET_ID => Kind::GetId,
            _ => Kind::Other,
        };
        Some(Self { kind, sector: u64_at(&bytes, 8) })
    }
}

/// One range of a discard or write-zeroes request, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// Whether the space may be given back.
    pub unmap: bool,
}

impl Limits {
    /// The byte offset of a read or write of `len` bytes.
    ///
    /// # Errors
    /// When it is not whole sectors, more than [`MAX_TRANSFER`] or reaches beyond the end.
    pub fn transfer(&self, sector: u64, len: u64) -> Result<u64, Refusal> {
        if !len.is_multiple_of(SECTOR) || len > MAX_TRANSFER {
            return Err(IOERR);
        }
        self.range(sector, len / SECTOR).map(|(offset, _)| offset)
    }

    fn range(&self, sector: u64, count: u64) -> Result<(u64, u64), Refusal> {
        match sector.checked_add(count) {
            // The capacity in bytes fits 64 bits, so does everything within.
            Some(end) if end <= self.sectors => Ok((sector * SECTOR, count * SECTOR)),
            _ => Err(IOERR),
        }
    }

    /// Takes all segments of a discard or write-zeroes request off its data.
    ///
    /// # Errors
    /// When any of them can't be served; nothing is done then.
    pub fn segments(&self, kind: Kind, data: &mut GuestIo, into: &mut Vec<Segment>) -> Result<(), Refusal> {
        let len = data.len();
        if len == 0
            || !len.is_multiple_of(SEGMENT_LEN as u64)
            || len / SEGMENT_LEN as u64 > u64::from(self.max_segments)
        {
            return Err(IOERR);
        }
        into.clear();
        while let Some(bytes) = data.take::<SEGMENT_LEN>() {
            let (sector, count, flags) = (u64_at(&bytes, 0), u32_at(&bytes, 8), u32_at(&bytes, 12));
            // Unmap says nothing for a discard, which the specification (5.2.6.2) has answered with UNSUPP.
            let known = if kind == Kind::WriteZeroes { SEGMENT_UNMAP } else { 0 };
            if flags & !known != 0 {
                return Err(UNSUPP);
            }
            if count > self.max_segment_sectors {
                return Err(IOERR);
            }
            let (offset, len) = self.range(sector, u64::from(count))?;
            into.push(Segment { offset, len, unmap: flags & SEGMENT_UNMAP != 0 });
        }
        Ok(())
    }
}

fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        sectors: 100,
        readonly: false,
        discard: true,
        write_zeroes: true,
        max_segment_sectors: 50,
        max_segments: 2,
    };

    fn io(bytes: &mut [u8]) -> GuestIo {
        let mut io = GuestIo::default();
        #[allow(unsafe_code)]
        // SAFETY: the bytes outlive the list in these tests.
        unsafe {
            io.push(bytes.as_mut_ptr(), bytes.len());
        }
        io
    }

    fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    fn parse(kind: Kind, mut bytes: Vec<u8>) -> Result<Vec<Segment>, Refusal> {
        let mut segments = Vec::new();
        LIMITS.segments(kind, &mut io(&mut bytes), &mut segments).map(|()| segments)
    }

    #[test]
    fn pitfall_19_the_total_is_held_against_the_capacity() {
        assert_eq!(LIMITS.transfer(99, 512), Ok(99 * 512));
        assert_eq!(LIMITS.transfer(99, 1024), Err(IOERR));
        assert_eq!(LIMITS.transfer(100, 0), Ok(100 * 512));
        assert_eq!(LIMITS.transfer(u64::MAX, 512), Err(IOERR));
        assert_eq!(LIMITS.transfer(0, 511), Err(IOERR));
    }

    #[test]
    fn pitfall_20_discard_and_write_zeroes_are_bounded() {
        let unmapped = Segment { offset: 512, len: 1024, unmap: true };
        assert_eq!(parse(Kind::WriteZeroes, segment(1, 2, 1)), Ok(vec![unmapped]));
        assert_eq!(parse(Kind::Discard, segment(1, 2, 1)), Err(UNSUPP));
        assert_eq!(parse(Kind::WriteZeroes, segment(1, 2, 2)), Err(UNSUPP));
        assert_eq!(parse(Kind::Discard, segment(u64::MAX / 512, 2, 0)), Err(IOERR));
        assert_eq!(parse(Kind::Discard, segment(0, 51, 0)), Err(IOERR));
        assert_eq!(parse(Kind::Discard, segment(60, 41, 0)), Err(IOERR));
        assert_eq!(parse(Kind::Discard, segment(0, 1, 0).repeat(3)), Err(IOERR));
        assert_eq!(parse(Kind::Discard, Vec::new()), Err(IOERR));
        assert_eq!(parse(Kind::Discard, vec![0; 17]), Err(IOERR));
    }

    #[test]
    fn a_header_is_all_there_or_none() {
        let mut bytes = [VIRTIO_BLK_T_OUT.to_le_bytes(), [0; 4], 7u32.to_le_bytes(), [0; 4]].concat();
        assert_eq!(Header::take(&mut io(&mut bytes)), Some(Header { kind: Kind::Write, sector: 7 }));
        assert_eq!(Header::take(&mut io(&mut bytes[..15])), None);
        bytes[0] = 2; // SCSI passthrough: never.
        assert_eq!(Header::take(&mut io(&mut bytes)).map(|h| h.kind), Some(Kind::Other));
    }
}
