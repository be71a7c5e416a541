//! A disk that is driven with one request of one sector at a time, from reset to reset.

use crate::drivers::blk;
use crate::drivers::pci::Function;
use crate::drivers::queue::{Layout, NEXT, Queue, WRITE, write_descriptor};
use crate::drivers::virtio::{self, Transport};
use crate::job::Options;
use crate::machine::mem::{self, Region};
use crate::machine::{clock, smp};
use crate::spec::{RING_EVENT_IDX, SECTOR};

const SIZE: u16 = 16;
/// The device vector of the ring, far behind those of other drivers.
const VECTOR: usize = 120;

/// Memory of the ring and its request. It serves disk after disk.
pub struct Memory {
    layout: Layout,
    header: Region,
    status: Region,
    data: Region,
}

/// A disk that is up.
pub struct Disk<'a> {
    memory: &'a Memory,
    /// The device.
    pub transport: Transport,
    queue: Queue,
}

impl Memory {
    /// Memory for one disk at a time.
    pub fn new() -> Self {
        let memory = mem::dma(2 * 4096, 4096);
        let (header, status) = (memory.sub(0, blk::HEADER), memory.sub(64, 1));
        Self { layout: Layout::new(SIZE), header, status, data: memory.sub(4096, SECTOR) }
    }

    /// Brings a disk up.
    pub fn bring_up(&self, function: Function, options: &Options) -> Disk<'_> {
        let transport = Transport::new(virtio::BLOCK, function);
        let features = transport.negotiate(options.wanted_features());
        let Layout { desc, avail, used, .. } = self.layout;
        [desc, avail, used].iter().for_each(|area| area.fill(0, area.len(), 0));
        if let Some(msix) = transport.msix {
            msix.route(1, smp::apic_id(0), VECTOR);
        }
        let event_idx = features & RING_EVENT_IDX != 0;
        let queue = transport.enable_at(0, self.layout, transport.msix.map(|_| 1), event_idx);
        transport.add_status(virtio::DRIVER_OK);
        Disk { memory: self, transport, queue }
    }
}

impl Disk<'_> {
    /// Fills the data of the next request.
    pub fn fill(&self, value: u8) {
        self.memory.data.fill(0, SECTOR, value);
    }

    /// Where the data has another value, if anywhere.
    pub fn find_other(&self, value: u8) -> Option<usize> {
        self.memory.data.find_other(0, SECTOR, value)
    }

    /// Reads or writes the first sector. Returns the status of the request; nothing if it is not answered in time.
    pub fn request(&mut self, kind: u32, limit_ms: u64) -> Option<u8> {
        let Memory { layout, header, status, data } = self.memory;
        header.copy_in(0, &blk::header(kind, 0));
        status.write::<u8>(0, blk::S_UNSET);
        let direction = if kind == blk::T_OUT { NEXT } else { NEXT | WRITE };
        write_descriptor(layout.desc, 0, header.base(), blk::HEADER as u32, NEXT, 1);
        write_descriptor(layout.desc, 1, data.base(), SECTOR as u32, direction, 2);
        write_descriptor(layout.desc, 2, status.base(), 1, WRITE, 0);
        self.queue.offer(0);
        self.queue.publish();
        let start = clock::ticks();
        while self.queue.next_used().is_none() {
            if clock::ticks().wrapping_sub(start) > clock::from_ms(limit_ms) {
                return None;
            }
        }
        Some(status.read(0))
    }

    /// Resets the disk and waits for that.
    pub fn reset(&self) {
        self.transport.reset();
    }
}
