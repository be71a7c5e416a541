//! The parser of block requests. A request is consumed as it is parsed, so each time includes what `pop` says: the chain
//! taken and given back, with nothing looked at.

use divan::Bencher;
use divan::counter::ItemsCount;
use ringvm_backends::block::request::{Header, IOERR, Kind, Limits, Refusal};
use ringvm_backends::device::QueueState;
use ringvm_backends::testing::replay::{CHAINS, Replay, Request};
use ringvm_backends::virtqueue::buffers::Chain;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use ringvm_backends::virtqueue::split::{Queue, RING_FEATURES};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES};

fn main() {
    divan::main();
}

const LIMITS: Limits = Limits {
    sectors: 1 << 21,
    readonly: false,
    discard: true,
    write_zeroes: true,
    max_segment_sectors: 1 << 22,
    max_segments: 32,
};

const READ: Request = Request::new(VIRTIO_BLK_T_IN, 1);
const WRITE: Request = Request::new(VIRTIO_BLK_T_OUT, 1);

/// Pops such requests on and on, and hands each to `look`.
fn run(bencher: Bencher<'_, '_>, request: Request, mut look: impl FnMut(&mut Chain)) {
    let mut replay = Replay::new(&request, RING_FEATURES);
    let from = QueueState::default();
    let queue = Queue::new(replay.memory(), &replay.ring(), RING_FEATURES, from, Interrupt::None);
    let mut queue = queue.expect("a sound ring");
    let mut chain = Chain::default();
    bencher.counter(ItemsCount::new(CHAINS)).bench_local(|| {
        replay.offer(CHAINS);
        while matches!(queue.pop(&mut chain), Ok(true)) {
            look(&mut chain);
            queue.complete(chain.head, 1);
        }
        queue.notify();
    });
    assert!(replay.is_done(), "all that was offered was popped");
}

/// What a device does with a transfer before it turns to its storage.
fn transfer(chain: &mut Chain) -> Result<u64, Refusal> {
    assert!(chain.writable.take_last(), "there is room for a status");
    let header = Header::take(&mut chain.readable).ok_or(IOERR)?;
    let data = if header.kind == Kind::Read { &chain.writable } else { &chain.readable };
    LIMITS.transfer(header.sector, data.len())
}

#[divan::bench]
fn pop(bencher: Bencher<'_, '_>) {
    run(bencher, READ, |chain| _ = divan::black_box(chain));
}

#[divan::bench]
fn read(bencher: Bencher<'_, '_>) {
    run(bencher, READ, |chain| assert!(transfer(chain).is_ok()));
}

#[divan::bench]
fn write(bencher: Bencher<'_, '_>) {
    run(bencher, WRITE, |chain| assert!(transfer(chain).is_ok()));
}

#[divan::bench]
fn flush(bencher: Bencher<'_, '_>) {
    run(bencher, Request::new(VIRTIO_BLK_T_FLUSH, 0), |chain| {
        assert!(chain.writable.take_last(), "there is room for a status");
        assert!(Header::take(&mut chain.readable).is_some_and(|header| header.kind == Kind::Flush));
    });
}

#[divan::bench(args = [1, 32])]
fn write_zeroes(bencher: Bencher<'_, '_>, segments: u64) {
    let mut list = Vec::new();
    let header = 16 + 16 * segments as u32;
    run(bencher, Request { header, ..Request::new(VIRTIO_BLK_T_WRITE_ZEROES, 0) }, |chain| {
        assert!(chain.writable.take_last(), "there is room for a status");
        let header = Header::take(&mut chain.readable).expect("a header");
        assert_eq!(LIMITS.segments(header.kind, &mut chain.readable, &mut list), Ok(()));
    });
}

#[divan::bench]
fn malformed_header_cut_short(bencher: Bencher<'_, '_>) {
    let request = Request { header: 15, ..READ };
    run(bencher, request, |chain| assert_eq!(transfer(chain), Err(IOERR)));
}

#[divan::bench]
fn malformed_beyond_the_end(bencher: Bencher<'_, '_>) {
    let request = Request { sector: u64::MAX, ..WRITE };
    run(bencher, request, |chain| assert_eq!(transfer(chain), Err(IOERR)));
}
