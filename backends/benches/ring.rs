//! The data ring: operations pushed, entered with one system call, and reaped. They are short reads from the page cache, so
//! what is seen is what an operation costs beside its data.
#![allow(unsafe_code, reason = "reads into buffers that outlive the ring")]

use std::fmt;
use std::io::Write;
use std::os::fd::AsFd;

use divan::Bencher;
use divan::counter::ItemsCount;
use ringvm_backends::io::ring::{Ring, Token};

fn main() {
    divan::main();
}

/// Operations entered together, and whether the kernel holds their file.
struct Case {
    depth: u32,
    held: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "depth {:2}{}", self.depth, if self.held { ", file held" } else { "" })
    }
}

const CASES: [Case; 4] = [
    Case { depth: 1, held: false },
    Case { depth: 1, held: true },
    Case { depth: 32, held: false },
    Case { depth: 32, held: true },
];

#[divan::bench(args = &CASES)]
fn read_16_bytes(bencher: Bencher<'_, '_>, case: &Case) {
    let mut file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("a file beside the target folder");
    file.write_all(&[7; 4096]).expect("writing a page");
    let mut buffers = vec![[0_u8; 16]; case.depth as usize];
    let pieces: Vec<_> =
        buffers.iter_mut().map(|b| libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: b.len() }).collect();
    let mut ring = Ring::new().expect("a data ring");
    if case.held {
        ring.hold(file.as_fd());
    }
    let mut completions = Vec::new();
    bencher.counter(ItemsCount::new(case.depth)).bench_local(|| {
        for (slot, piece) in (0..).zip(&pieces) {
            // SAFETY: the buffers outlive the ring.
            unsafe { ring.read(Token { task: 0, slot }, file.as_fd(), std::slice::from_ref(piece), 0) };
        }
        while ring.in_flight() > 0 {
            ring.submit().expect("the kernel takes reads");
            if ring.has_completions() {
                ring.reap(&mut completions);
                assert!(completions.iter().all(|(_, result)| *result == 16), "a page is there to be read");
            }
        }
    });
    if case.held {
        ring.release(file.as_fd());
    }
}
