//! The same requests again and again: a driver that makes chains available by moving an index and does nothing else,
//! for measuring the cost of the device's side of a queue, with next to no cost of the other side in it.
//!
//! It takes nothing back: the caller must make sure that all chains were given back before it offers them again.

use std::io;
use std::sync::Arc;
use std::sync::mpsc;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::block::storage::Geometry;
use crate::block::storage::null::Null;
use crate::block::{BlockDevice, BlockOptions};
use crate::device::Device;
use crate::testing::driver::{Buffer, Driver};
use crate::testing::stepped::Stepped;
use crate::virtqueue::{GuestMemory, QueueParts, RingConfig};

/// Descriptors of a ring.
pub const QUEUE_SIZE: u16 = 1024;
/// Chains on it, the most that can be offered at a time.
pub const CHAINS: u16 = 32;
/// Most pages of data in a chain.
pub const PAGES: u32 = 17;

const PAGE: u64 = 4096;
const HEADERS: u64 = 0x2_0000;
/// Most bytes of a header and the data after it.
const HEADER_ROOM: u64 = 0x2_0000 / CHAINS as u64;
const TABLES: u64 = 0x4_0000;
/// Bytes of an indirect table.
const TABLE: u64 = 16 * (PAGES as u64 + 2);
const STATUS: u64 = 0x6_0000;
const DATA: u64 = 0x10_0000;

/// A block request, valid or not as the measurement needs.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// VIRTIO_BLK_T_*.
    pub kind: u32,
    /// Where, in sectors.
    pub sector: u64,
    /// Bytes of its header that are present; 16 for a valid one. The rest is data, all zeroes.
    pub header: u32,
    /// Pages of data, each a descriptor.
    pub pages: u32,
    /// Whether its descriptors lie in a table of their own.
    pub indirect: bool,
}

impl Request {
    /// A sound one of a direct chain at the beginning of the disk.
    #[must_use]
    pub const fn new(kind: u32, pages: u32) -> Self {
        Self { kind, sector: 0, header: 16, pages, indirect: false }
    }

    /// Writes the header of one of the chains into memory and returns the chain's buffers.
    fn lay(&self, mem: &GuestMemory, slot: u64) -> Vec<Buffer> {
        let at = HEADERS + HEADER_ROOM * slot;
        mem.write_obj(u64::from(self.kind), GuestAddress(at)).expect("headers are in memory");
        mem.write_obj(self.sector, GuestAddress(at + 8)).expect("headers are in memory");
        let writable = self.kind == VIRTIO_BLK_T_IN;
        let header = Buffer { addr: at, len: self.header, writable: false };
        let status = Buffer { addr: STATUS + 64 * slot, len: 1, writable: true };
        std::iter::once(header).chain(pages(slot, self.pages, writable)).chain([status]).collect()
    }
}

/// The first `count` pages of data that one of the chains has for itself.
pub fn pages(slot: u64, count: u32, writable: bool) -> impl Iterator<Item = Buffer> {
    let first = DATA + slot * u64::from(PAGES) * PAGE;
    (0..count.min(PAGES)).map(move |i| Buffer { addr: first + u64::from(i) * PAGE, len: PAGE as u32, writable })
}

/// A virtqueue, its memory, and the chains offered on it.
pub struct Replay {
    mem: GuestMemory,
    driver: Driver,
    offered: u16,
}

impl Replay {
    /// A queue of [`QUEUE_SIZE`] with [`CHAINS`] such requests on it.
    ///
    /// # Panics
    /// If there is no memory for it.
    #[must_use]
    pub fn new(request: &Request, features: u64) -> Self {
        Self::of(features, request.indirect, |mem, slot| request.lay(mem, slot))
    }

    /// A queue of [`QUEUE_SIZE`] with [`CHAINS`] chains of any kind on it, in memory of its own, all of which is
    /// touched.
    ///
    /// # Panics
    /// If there is no memory for it, or a chain has no descriptors or more than [`PAGES`] plus two.
    #[must_use]
    pub fn of(features: u64, indirect: bool, chain: impl Fn(&GuestMemory, u64) -> Vec<Buffer>) -> Self {
        let len = DATA + u64::from(CHAINS) * u64::from(PAGES) * PAGE;
        let ranges = [(GuestAddress(0), len as usize)];
        let mem = Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("some megabytes of memory"));
        mem.write_slice(&vec![0; len as usize], GuestAddress(0)).expect("it is all there");
        let mut driver = Driver::new(Arc::clone(&mem), 0, QUEUE_SIZE, features);
        let heads: Vec<u16> = (0..u64::from(CHAINS))
            .map(|slot| {
                let chain = chain(&mem, slot);
                let table = TABLES + slot * TABLE;
                let head = if indirect { driver.add_indirect(table, &chain) } else { driver.add(&chain) };
                head.expect("all chains fit the ring")
            })
            .collect();
        // Their number divides the ring's size: entries need to be written once only.
        for (entry, head) in (0..QUEUE_SIZE).zip(heads.iter().cycle()) {
            driver.write_avail_entry(entry, *head);
        }
        driver.want_interrupts(false);
        Self { mem, driver, offered: 0 }
    }

    /// The memory that all of it lies in.
    #[must_use]
    pub fn memory(&self) -> GuestMemory {
        Arc::clone(&self.mem)
    }

    /// Where the ring lies.
    #[must_use]
    pub fn ring(&self) -> RingConfig {
        self.driver.ring()
    }

    /// Makes the next `count` chains available.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn offer(&mut self, count: u16) {
        assert!(count <= CHAINS, "there are {CHAINS} chains");
        self.offered = self.offered.wrapping_add(count);
        self.driver.write_avail_index(self.offered);
    }

    /// Whether everything that was offered was given back.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.driver.used_index() == self.offered
    }
}

/// The whole path of a request over storage that does nothing, served by the calling thread: the reactor's turn, the
/// worker, the queue, the request, its answer, statistics, publication.
pub struct NullDisk {
    replay: Replay,
    // The device goes before the memory that its queue lies in.
    stepped: Stepped<BlockDevice>,
}

impl NullDisk {
    /// A disk of a gibibyte, and requests for it.
    ///
    /// # Errors
    /// When the host refuses an io_uring or an eventfd.
    ///
    /// # Panics
    /// If there is no memory.
    pub fn new(request: &Request) -> io::Result<Self> {
        let geometry =
            Geometry { capacity: 1 << 30, logical_block: 512, physical_block: 512, readonly: false, discard: true };
        let options = BlockOptions { queue_size: QUEUE_SIZE, ..BlockOptions::default() };
        let kick = EventFd::new(EFD_NONBLOCK)?;
        let (send, laid) = mpsc::channel();
        let stepped = Stepped::new(move |pool| {
            let mut device = BlockDevice::over("disk0", Null(geometry), &options, pool);
            let features = device.info().features;
            let replay = Replay::new(request, features);
            let parts = QueueParts::new(replay.ring(), replay.memory(), kick);
            let started = device.ack_features(features).and_then(|()| device.start_queue(0, parts));
            drop(send.send(started.map(|()| replay)));
            device
        })?;
        let replay = laid.recv().map_err(io::Error::other)?.map_err(io::Error::other)?;
        Ok(Self { replay, stepped })
    }

    /// Serves `count` requests.
    ///
    /// # Panics
    /// If there are fewer, or the device runs out of work without having answered them.
    pub fn serve(&mut self, count: u16) {
        self.replay.offer(count);
        while self.stepped.turn() {}
        assert!(self.replay.is_done(), "the device has not answered what was offered");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};

    #[test]
    fn a_null_disk_answers_by_turns_alone_and_lets_go_of_its_memory() {
        let cut = Request { header: 15, ..Request::new(VIRTIO_BLK_T_IN, 1) };
        let indirect = Request { indirect: true, ..Request::new(VIRTIO_BLK_T_IN, PAGES) };
        let sound = Request::new(VIRTIO_BLK_T_IN, 1);
        for (request, expected) in [(sound, VIRTIO_BLK_S_OK), (indirect, VIRTIO_BLK_S_OK), (cut, VIRTIO_BLK_S_IOERR)] {
            let mut disk = NullDisk::new(&request).unwrap();
            let mem = disk.replay.memory();
            let status = |slot: u64| GuestAddress(STATUS + 64 * slot);
            // Past the end of the ring and of its index, by a number that divides neither.
            for round in 0..4096_u64 {
                let first = round * 17 % u64::from(CHAINS);
                mem.write_obj(0xee_u8, status(first)).unwrap();
                disk.serve(17);
                assert_eq!(u32::from(mem.read_obj::<u8>(status(first)).unwrap()), expected, "{request:?} in {round}");
            }
            drop(disk);
            assert_eq!(Arc::strong_count(&mem), 1, "{request:?}: somebody still has the memory");
        }
    }
}
