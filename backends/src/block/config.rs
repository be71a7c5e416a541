//! The configuration space of a block device (`struct virtio_blk_config`, virtio 1.3, section 5.2.4).

use crate::block::storage::Geometry;
use crate::virtqueue::buffers::MAX_PIECES;

use super::request::{Limits, MAX_TRANSFER, SECTOR};

/// Bytes of the configuration space, up to and with the write-zeroes fields.
pub(crate) const CONFIG_LEN: usize = 60;

/// The one field that a driver may write.
pub(crate) const WRITEBACK: usize = 32;

/// Longest single buffer that a driver should use, in bytes. A request with as many of them as it may have moves no
/// more than we serve.
const SIZE_MAX: u32 = 1 << 20;
/// Most sectors of a discard or write-zeroes segment: 32 MiB. The host can't cancel one once it has begun, and may
/// have to write zeroes.
pub(super) const MAX_SEGMENT_SECTORS: u32 = 1 << 16;
/// Most segments of a discard or write-zeroes request.
pub(super) const MAX_SEGMENTS: u32 = 32;

const _: () = assert!(SIZE_MAX as u64 * MAX_PIECES as u64 <= MAX_TRANSFER);
const _: () = assert!(MAX_SEGMENT_SECTORS as u64 * SECTOR * MAX_SEGMENTS as u64 <= MAX_TRANSFER);

/// The configuration space at reset.
pub(crate) fn config_space(geometry: &Geometry, limits: &Limits, seg_max: u32, queues: u16) -> [u8; CONFIG_LEN] {
    let mut space = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    let per_physical = geometry.physical_block / geometry.logical_block;
    let alignment = (u64::from(geometry.physical_block) / SECTOR) as u32;
    put(0, &limits.sectors.to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &seg_max.to_le_bytes());
    put(20, &geometry.logical_block.to_le_bytes());
    // Topology: blocks per physical block as a power of two, offset of the first, smallest and best size in blocks.
    put(24, &[per_physical.ilog2() as u8, 0]);
    put(26, &(per_physical as u16).to_le_bytes());
    put(28, &0u32.to_le_bytes());
    put(WRITEBACK, &[1]);
    put(34, &queues.to_le_bytes());
    for at in [36, 48] {
        put(at, &limits.max_segment_sectors.to_le_bytes());
        put(at + 4, &limits.max_segments.to_le_bytes());
    }
    put(44, &alignment.to_le_bytes());
    put(56, &[u8::from(geometry.discard)]);
    space
}
