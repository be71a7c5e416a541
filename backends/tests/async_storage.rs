//! Disks over storage that is written as async code, as their drivers see them.

mod disk;

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use disk::*;
use ringvm_backends::block::storage::Geometry;
use ringvm_backends::block::storage::tasks::AsyncStorage;
use ringvm_backends::block::{BlockDevice, BlockOptions};
use ringvm_backends::device::Device;
use ringvm_backends::io::reactor::ReactorPool;
use ringvm_backends::io::tasks::{read_exact_at, spawn, write_all_at};
use ringvm_backends::testing::driver::Buffer;
use ringvm_backends::virtqueue::End;
use ringvm_backends::virtqueue::buffers::GuestIo;
use tokio::sync::{Semaphore, oneshot};
use tokio_uring::fs::File;
use vm_memory::{Bytes, GuestAddress};

const SECTORS: usize = 64;
/// Bytes of the first file; the second has the rest.
const CUT: u64 = 31 * SECTOR as u64;
/// A read of this sector waits until it may go on.
const GATED: u64 = 50;
/// A read of this sector panics.
const BROKEN: u64 = 51;

/// A disk in two files. A request that lies in both is two operations at once.
struct Halves {
    files: Rc<[File; 2]>,
    gate: Arc<Semaphore>,
    /// Reads that have come to the gate.
    at_gate: Arc<AtomicUsize>,
}

impl Halves {
    fn parts(offset: u64, mut data: GuestIo) -> [(usize, u64, GuestIo); 2] {
        let first = data.split_to(CUT.saturating_sub(offset));
        [(0, offset, first), (1, offset.max(CUT) - CUT, data)]
    }

    /// The outcomes of `call` for both parts, which run side by side.
    async fn both<F: Future<Output = io::Result<()>> + 'static>(
        &self,
        offset: u64,
        data: GuestIo,
        call: impl Fn(Rc<[File; 2]>, usize, u64, GuestIo) -> F,
    ) -> io::Result<()> {
        let ends = Self::parts(offset, data).map(|(half, offset, data)| {
            let (tell, end) = oneshot::channel();
            let operation = call(Rc::clone(&self.files), half, offset, data);
            spawn(async move { drop(tell.send(operation.await)) });
            end
        });
        for end in ends {
            end.await.map_err(io::Error::other)??;
        }
        Ok(())
    }
}

impl AsyncStorage for Halves {
    async fn read(&self, offset: u64, data: GuestIo) -> io::Result<()> {
        if offset == GATED * SECTOR as u64 {
            self.at_gate.fetch_add(1, Ordering::SeqCst);
            self.gate.acquire().await.expect("it is never closed").forget();
        }
        assert!(offset != BROKEN * SECTOR as u64, "a bug, as this test has it");
        let call = |files: Rc<[File; 2]>, half: usize, offset, data| async move {
            read_exact_at(&files[half], data, offset).await
        };
        self.both(offset, data, call).await
    }

    async fn write(&self, offset: u64, data: GuestIo, durable: bool) -> io::Result<()> {
        let call = |files: Rc<[File; 2]>, half: usize, offset, data| async move {
            write_all_at(&files[half], data, offset).await
        };
        self.both(offset, data, call).await?;
        if durable { self.flush().await } else { Ok(()) }
    }

    async fn flush(&self) -> io::Result<()> {
        self.files[0].sync_data().await?;
        self.files[1].sync_data().await
    }

    async fn discard(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }

    async fn write_zeroes(&self, _: u64, _: u64, _: bool, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

struct Disk {
    rig: Rig,
    other: tempfile::NamedTempFile,
    gate: Arc<Semaphore>,
    at_gate: Arc<AtomicUsize>,
}

fn disk(queues: u16, pool: &ReactorPool) -> Disk {
    let (image, other) = (image(CUT as usize / SECTOR), image(SECTORS - CUT as usize / SECTOR));
    let (gate, at_gate) = (Arc::new(Semaphore::new(0)), Arc::<AtomicUsize>::default());
    let paths = [&image, &other].map(|file| file.path().to_owned());
    let (theirs, theirs_at) = (Arc::clone(&gate), Arc::clone(&at_gate));
    let make = move || {
        let open = |path| std::fs::File::options().read(true).write(true).open(path).unwrap();
        let files = Rc::new([&paths[0], &paths[1]].map(|path| File::from_std(open(path))));
        Halves { files, gate: Arc::clone(&theirs), at_gate: Arc::clone(&theirs_at) }
    };
    let geometry = Geometry {
        capacity: (SECTORS * SECTOR) as u64,
        logical_block: 512,
        physical_block: 4096,
        readonly: false,
        discard: true,
    };
    let options = BlockOptions { queues, ..BlockOptions::default() };
    let device = BlockDevice::over_async("disk0", geometry, make, &options, pool);
    Disk { rig: Rig::over(device, image, u64::MAX), other, gate, at_gate }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A disk waits for its operations, also when a test has failed.
        self.gate.add_permits(Semaphore::MAX_PERMITS / 2);
    }
}

impl Disk {
    /// The whole disk as its files have it.
    fn contents(&self) -> Vec<u8> {
        [self.rig.contents(), std::fs::read(self.other.path()).unwrap()].concat()
    }

    /// Offers a read of the sector that waits, and returns once it waits.
    fn read_at_gate(&mut self) {
        let before = self.at_gate.load(Ordering::SeqCst);
        self.rig.write_header(HEADERS, T_IN, GATED);
        let chain = [
            Buffer { addr: HEADERS, len: 16, writable: false },
            Buffer { addr: DATA, len: SECTOR as u32, writable: true },
            Buffer { addr: HEADERS + 16, len: 1, writable: true },
        ];
        self.rig.queues[0].driver.add(&chain).unwrap();
        self.rig.kick(0);
        let start = Instant::now();
        while self.at_gate.load(Ordering::SeqCst) == before {
            assert!(start.elapsed() < PATIENCE, "the read was not started");
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_request_is_several_operations_at_once() {
    let mut disk = disk(1, &pool(1));
    let bytes: Vec<u8> = (0..SECTORS * SECTOR).map(|at| (at % 251) as u8).collect();
    disk.rig.mem.write_slice(&bytes[..8 * SECTOR], GuestAddress(DATA)).unwrap();
    assert_eq!(disk.rig.request(T_OUT, 28, 8 * SECTOR as u32), (OK, 1));
    assert_eq!(disk.contents()[28 * SECTOR..36 * SECTOR], bytes[..8 * SECTOR]);
    disk.rig.fill(0, 8 * SECTOR);
    assert_eq!(disk.rig.request(T_IN, 28, 8 * SECTOR as u32), (OK, 8 * SECTOR as u32 + 1));
    assert_eq!(disk.rig.data(8 * SECTOR), bytes[..8 * SECTOR]);
    assert_eq!(disk.rig.request(T_FLUSH, 0, 0), (OK, 1));
    assert_eq!(disk.rig.segments(T_DISCARD, &[(1, 1, 0), (2, 1, 0)]), OK);
    assert_eq!(disk.rig.segments(T_WRITE_ZEROES, &[(1, 1, 0)]), IOERR, "the storage's error");
    assert_eq!(disk.rig.request(T_IN, SECTORS as u64, SECTOR as u32), (IOERR, 1), "past the end");
    disk.rig.device.flusher()().unwrap();
}

#[test]
fn an_operation_that_panics_fails_its_request_and_no_other() {
    let mut disk = disk(1, &pool(1));
    for _ in 0..3 {
        assert_eq!(disk.rig.request(T_IN, BROKEN, SECTOR as u32), (IOERR, 1));
        assert_eq!(disk.rig.request(T_IN, 0, SECTOR as u32), (OK, SECTOR as u32 + 1));
    }
}

#[test]
fn a_queue_that_stops_waits_for_its_operations_and_is_never_torn() {
    for end in [End::Drained, End::Suspended] {
        let mut disk = disk(1, &pool(1));
        disk.read_at_gate();
        let stopping = disk.rig.device.stop(&[0], end);
        disk.rig.device.stats();
        assert!(disk.rig.queues[0].driver.next_used().is_none(), "{end:?}: the read waits still");
        disk.gate.add_permits(1);
        let ended = stopping.wait().remove(0).expect("it ran");
        assert!(ended.left.is_empty(), "{end:?}");
        assert_eq!(ended.state.next_used, ended.state.next_avail, "{end:?}");
        assert_eq!(disk.rig.next_used(0).1, SECTOR as u32 + 1, "{end:?}");
        assert_eq!(disk.rig.status(HEADERS), OK, "{end:?}");
        disk.rig.start_queue(0, ended.state);
        assert_eq!(disk.rig.request(T_IN, 0, SECTOR as u32), (OK, SECTOR as u32 + 1), "{end:?}");
    }
}

#[test]
fn requests_of_two_queues_end_in_any_order() {
    let mut disk = disk(2, &pool(1));
    disk.read_at_gate();
    for _ in 0..20 {
        // The same thread serves them, and the first waits.
        let at = HEADERS + 64;
        disk.rig.write_header(at, T_IN, 1);
        let chain = [
            Buffer { addr: at, len: 16, writable: false },
            Buffer { addr: DATA + 4096, len: SECTOR as u32, writable: true },
            Buffer { addr: at + 16, len: 1, writable: true },
        ];
        disk.rig.queues[1].driver.add(&chain).unwrap();
        disk.rig.kick(1);
        disk.rig.next_used(1);
        assert_eq!(disk.rig.status(at), OK);
    }
    assert!(disk.rig.queues[0].driver.next_used().is_none());
    disk.gate.add_permits(1);
    disk.rig.next_used(0);
}
