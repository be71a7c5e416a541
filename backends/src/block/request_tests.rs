//! Block requests from hostile memory, through a worker and a ring to a real image.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::handler::BlockHandler;
use super::options::SERIAL_LEN;
use super::request::{KINDS, Limits};
use crate::block::storage::Geometry;
use crate::block::storage::raw::Raw;
use crate::device::{GuestMemory, QueueState};
use crate::io::reactor::Task;
use crate::io::ring::Ring;
use crate::io::service::{Service, TaskHandle};
use crate::io::worker::Worker;
use crate::testing::driver::{Buffer, Driver};
use crate::virtqueue::interrupt::Interrupt;
use crate::virtqueue::split::{Queue, RING_FEATURES};

const SECTORS: u64 = 64;
const QUEUE_SIZE: u16 = 16;

/// Memory from 0 to 64 KiB, and an island after a hole.
fn memory() -> GuestMemory {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000), (GuestAddress(0x1_4000), 0x1000)]).unwrap())
}

/// Any request is either answered or breaks the queue; every slot comes back and the image keeps its size.
#[test]
fn fuzz_block_request() {
    let image = tempfile::NamedTempFile::new_in(crate::scratch_dir()).unwrap();
    image.as_file().set_len(SECTORS * 512).unwrap();
    let file = Arc::new(File::options().read(true).write(true).open(image.path()).unwrap());
    let mem = memory();
    bolero::check!().with_type::<(Vec<(u32, u64, Vec<(u32, u16, bool)>)>, Vec<(u64, u32, u32)>, bool)>().for_each(
        |(requests, segments, readonly)| {
            let mut ring = Ring::new().unwrap();
            let mut driver = Driver::new(mem.clone(), 0, QUEUE_SIZE, RING_FEATURES);
            let geometry = Geometry {
                capacity: SECTORS * 512,
                logical_block: 512,
                physical_block: 4096,
                readonly: *readonly,
                discard: true,
            };
            let limits = Limits {
                sectors: SECTORS,
                readonly: *readonly,
                discard: true,
                write_zeroes: true,
                max_segment_sectors: 1 << 22,
                max_segments: 32,
            };
            let handler = BlockHandler {
                storage: Raw::new(Arc::clone(&file), geometry, None),
                limits,
                serial: [b'x'; SERIAL_LEN],
                writeback: Arc::new(AtomicBool::new(true)),
                span: tracing::Span::none(),
                failures: 0,
            };
            let faults = Arc::new(AtomicUsize::new(0));
            let counter = Arc::clone(&faults);
            let fault = Interrupt::Call(Arc::new(move || {
                counter.fetch_add(1, Ordering::Relaxed);
            }));
            let queue =
                Queue::new(mem.clone(), &driver.ring(), RING_FEATURES, QueueState::default(), Interrupt::None).unwrap();
            let service = Service::new(tracing::Span::none(), queue, fault, TaskHandle::unthreaded(0), KINDS);
            let mut worker = Worker::new(service, handler);
            for (i, (sector, count, flags)) in segments.iter().take(64).enumerate() {
                let bytes = [&(sector % 80).to_le_bytes()[..], &(count % 80).to_le_bytes(), &(flags % 3).to_le_bytes()];
                mem.write_slice(&bytes.concat(), GuestAddress(0x8000 + 16 * i as u64)).unwrap();
            }
            let mut offered = 0;
            for (i, (kind, sector, buffers)) in requests.iter().take(8).enumerate() {
                let header = 0x4000 + 32 * i as u64;
                // Mostly kinds that exist and sectors that do, so that more than the first check is reached.
                let kind = if kind % 8 == 7 { *kind } else { [0, 1, 4, 8, 11, 13, 2][*kind as usize % 8 % 7] };
                let sector = if sector % 5 == 4 { *sector } else { sector % (SECTORS + 2) };
                let bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
                mem.write_slice(&bytes, GuestAddress(header)).unwrap();
                let mut chain = vec![Buffer { addr: header, len: 16, writable: false }];
                chain.extend(buffers.iter().take(5).map(|&(addr, len, writable)| {
                    let len = if len % 4 == 3 { u32::from(len) } else { u32::from(len % 8) * 512 };
                    Buffer { addr: u64::from(addr % 0x1_8000), len, writable }
                }));
                // Rings and headers stay as they are: the device may overwrite data only.
                for buffer in &mut chain[1..] {
                    if buffer.writable && buffer.addr < 0x5000 {
                        buffer.addr += 0x5000;
                    }
                }
                offered += usize::from(driver.add(&chain).is_some());
            }
            driver.publish();
            loop {
                let worked = worker.turn(&mut ring);
                ring.submit().unwrap();
                let mut batch = Vec::new();
                if ring.has_completions() {
                    ring.reap(&mut batch);
                }
                for (token, result) in &batch {
                    worker.completed(token.slot, *result, Instant::now(), &mut ring);
                }
                worker.service().publish();
                if !worked && batch.is_empty() && ring.in_flight() == 0 {
                    break;
                }
            }
            assert!(worker.is_idle(), "a slot leaked");
            let answered = std::iter::from_fn(|| driver.next_used()).count();
            let faults = faults.load(Ordering::Relaxed);
            assert!(answered == offered || (answered < offered && faults == 1), "{answered} of {offered}, {faults}");
            assert_eq!(image.as_file().metadata().unwrap().len(), SECTORS * 512);
        },
    );
}
