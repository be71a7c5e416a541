//! Serves block requests of one kind on one thread, each in the same way, for callgrind to count the instructions of.
//! The table of requests in flight is not among them: rustix can't find the page size under valgrind, and ends.
//!
//! `instructions` names the kinds; `instructions KIND COUNT` serves that many of one.

use std::io;
use std::process::ExitCode;

use ringvm_backends::block::request::{Header, Limits};
use ringvm_backends::device::QueueState;
use ringvm_backends::testing::replay::{CHAINS, NullDisk, Replay, Request};
use ringvm_backends::virtqueue::buffers::Chain;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use ringvm_backends::virtqueue::split::{Queue, RING_FEATURES};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

/// What is counted.
#[derive(Clone, Copy)]
enum Part {
    /// The virtqueue: popped, given back, published.
    Queue,
    /// The virtqueue, and the request looked at.
    Parser,
    /// All that there is, over storage that does nothing; so many requests at a time.
    Disk { depth: u16 },
}

const READ: Request = Request::new(VIRTIO_BLK_T_IN, 1);
const WRITE: Request = Request::new(VIRTIO_BLK_T_OUT, 1);
const FLUSH: Request = Request::new(VIRTIO_BLK_T_FLUSH, 0);

const KINDS: [(&str, Part, Request); 8] = [
    ("queue", Part::Queue, READ),
    ("queue-indirect", Part::Queue, Request { indirect: true, ..READ }),
    ("request", Part::Parser, READ),
    ("read-depth-1", Part::Disk { depth: 1 }, READ),
    ("read-depth-32", Part::Disk { depth: CHAINS }, READ),
    ("read-60k-depth-32", Part::Disk { depth: CHAINS }, Request::new(VIRTIO_BLK_T_IN, 15)),
    ("write-depth-32", Part::Disk { depth: CHAINS }, WRITE),
    ("flush-depth-32", Part::Disk { depth: CHAINS }, FLUSH),
];

const LIMITS: Limits = Limits {
    sectors: 1 << 21,
    readonly: false,
    discard: true,
    write_zeroes: true,
    max_segment_sectors: 1 << 22,
    max_segments: 32,
};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let served = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => {
            KINDS.iter().for_each(|(name, ..)| println!("{name}"));
            return ExitCode::SUCCESS;
        }
        [name, count] => KINDS.iter().find(|kind| kind.0 == name).zip(count.parse().ok()),
        _ => None,
    };
    let Some((&(_, part, request), count)) = served else {
        eprintln!("usage: instructions [KIND COUNT]; without arguments it names the kinds");
        return ExitCode::from(2);
    };
    if let Err(e) = run(part, &request, count) {
        eprintln!("instructions: {e}");
        return ExitCode::from(3);
    }
    ExitCode::SUCCESS
}

fn run(part: Part, request: &Request, count: u32) -> io::Result<()> {
    match part {
        Part::Queue => {
            let (mut replay, mut queue) = queue(request)?;
            let mut chains: Vec<_> = (0..CHAINS).map(|_| Chain::default()).collect();
            counted(count / u32::from(CHAINS), || {
                replay.offer(CHAINS);
                for chain in &mut chains {
                    queue.pop(chain).map_err(io::Error::other)?;
                }
                chains.iter().for_each(|chain| queue.complete(chain.head, 1));
                queue.notify();
                Ok(())
            })
        }
        Part::Parser => {
            let (mut replay, mut queue) = queue(request)?;
            let mut chain = Chain::default();
            counted(count / u32::from(CHAINS), || {
                replay.offer(CHAINS);
                while queue.pop(&mut chain).map_err(io::Error::other)? {
                    let status = chain.writable.take_last();
                    let header = Header::take(&mut chain.readable).filter(|_| status);
                    let header = header.ok_or_else(|| io::Error::other("a request without header or status"))?;
                    let offset = LIMITS.transfer(header.sector, chain.writable.len());
                    std::hint::black_box(offset).map_err(|_| io::Error::other("a request beyond the end"))?;
                    queue.complete(chain.head, 1);
                }
                queue.notify();
                Ok(())
            })
        }
        Part::Disk { depth } => {
            let mut disk = NullDisk::new(request)?;
            counted(count / u32::from(depth), || {
                disk.serve(depth);
                Ok(())
            })
        }
    }
}

fn queue(request: &Request) -> io::Result<(Replay, Queue)> {
    let replay = Replay::new(request, RING_FEATURES);
    let from = QueueState::default();
    let queue = Queue::new(replay.memory(), &replay.ring(), RING_FEATURES, from, Interrupt::None);
    Ok((replay, queue.map_err(io::Error::other)?))
}

/// The function by whose name callgrind is told what to count.
#[inline(never)]
fn counted(rounds: u32, mut round: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    (0..rounds).try_for_each(|_| round())
}
