//! The whole path of a request over storage that does nothing, on one thread: neither doorbell nor wake-up is in it.

use std::fmt;

use divan::Bencher;
use divan::counter::ItemsCount;
use ringvm_backends::testing::replay::{NullDisk, Request};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

fn main() {
    divan::main();
}

/// What is asked for, and how many such requests there are at a time.
struct Case {
    name: &'static str,
    request: Request,
    depth: u16,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, depth {:2}", self.name, self.depth)
    }
}

const READ: Request = Request::new(VIRTIO_BLK_T_IN, 1);

const CASES: [Case; 7] = [
    Case { name: "read", request: READ, depth: 1 },
    Case { name: "read", request: READ, depth: 16 },
    Case { name: "read", request: READ, depth: 32 },
    Case { name: "read of 15 pages", request: Request::new(VIRTIO_BLK_T_IN, 15), depth: 32 },
    Case { name: "write", request: Request::new(VIRTIO_BLK_T_OUT, 1), depth: 32 },
    Case { name: "flush", request: Request::new(VIRTIO_BLK_T_FLUSH, 0), depth: 32 },
    Case { name: "malformed", request: Request { header: 15, ..READ }, depth: 32 },
];

#[divan::bench(args = &CASES)]
fn null(bencher: Bencher<'_, '_>, case: &Case) {
    let mut disk = NullDisk::new(&case.request).expect("an io_uring");
    bencher.counter(ItemsCount::new(case.depth)).bench_local(|| disk.serve(case.depth));
}
