//! `ringvm-blk` with a client that is not ours: the `blkio` crate. What is read is what a model says was written.
#![allow(unsafe_code, reason = "blkio reads and writes memory by pointer")]

mod common;

use std::mem::MaybeUninit;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use common::{Daemon, Random, image, scratch, wait};

const BLOCK: usize = 4096;
const DISK: u64 = 16 << 20;
const QUEUES: usize = 2;
const DEPTH: usize = 32;

/// A connected disk, with a buffer for each request that may be in flight.
struct Disk {
    queues: Vec<Blkioq>,
    buffers: MemoryRegion,
    _blkio: Blkio,
}

impl Disk {
    fn connect(socket: &Path, queues: usize) -> Self {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").expect("the driver is built in");
        blkio.set_str("path", socket.to_str().unwrap()).unwrap();
        blkio.connect().unwrap();
        assert_eq!(blkio.get_u64("capacity").unwrap(), DISK);
        blkio.set_i32("num-queues", queues as i32).unwrap();
        blkio.set_i32("queue-size", 256).unwrap();
        let started = blkio.start().unwrap();
        // No multiple of a page, as blkio's own region is none.
        let buffers = blkio.alloc_mem_region(queues * DEPTH * BLOCK * 4 + 512).unwrap();
        blkio.map_mem_region(&buffers).unwrap();
        Self { queues: started.queues, buffers, _blkio: blkio }
    }

    /// The buffer of a request.
    fn buffer(&self, queue: usize, slot: usize) -> *mut u8 {
        let index = queue * DEPTH + slot;
        assert!((index + 1) * BLOCK * 4 <= self.buffers.len);
        (self.buffers.addr + index * BLOCK * 4) as *mut u8
    }

    /// Takes at least one completion.
    fn reap(&mut self, queue: usize) -> Vec<(usize, i32)> {
        let mut room = [const { MaybeUninit::<Completion>::uninit() }; DEPTH];
        let mut patience = Duration::from_secs(20);
        let count = self.queues[queue].do_io(&mut room, 1, Some(&mut patience), None).expect("requests end");
        // SAFETY: so many were filled in.
        room[..count].iter().map(|room| unsafe { room.assume_init_ref() }).map(|end| (end.user_data, end.ret)).collect()
    }
}

/// What a request in flight will have done.
enum Pending {
    Write,
    Read(Vec<u8>),
    Flush,
}

/// Random operations over both queues at full depth, each block in one request at a time; every read is compared.
fn verify(disk: &mut Disk, model: &mut [u8], operations: usize, seed: u64) {
    let mut random = Random(seed);
    let queues = disk.queues.len();
    let mut free: Vec<Vec<usize>> = vec![(0..DEPTH).collect(); queues];
    let mut pending: Vec<Vec<Option<(Pending, u64, usize)>>> =
        (0..queues).map(|_| (0..DEPTH).map(|_| None).collect()).collect();
    let mut busy = vec![false; DISK as usize / BLOCK];
    let (mut begun, mut ended) = (0, 0);
    while ended < operations {
        for queue in 0..queues {
            while begun < operations {
                let Some(slot) = free[queue].pop() else { break };
                let blocks = 1 + random.below(4);
                let first = random.below(DISK / BLOCK as u64 - blocks + 1);
                let range = first as usize..(first + blocks) as usize;
                if busy[range.clone()].contains(&true) {
                    free[queue].push(slot);
                    if free[queue].len() == DEPTH { continue } else { break }
                }
                let (start, len) = (first * BLOCK as u64, blocks as usize * BLOCK);
                let buffer = disk.buffer(queue, slot);
                // SAFETY: the buffer is that of this slot, which nobody uses now.
                let bytes = unsafe { std::slice::from_raw_parts_mut(buffer, len) };
                let place = start as usize..start as usize + len;
                let none = ReqFlags::empty();
                let what = match random.below(10) {
                    0 => {
                        disk.queues[queue].flush(slot, none);
                        Pending::Flush
                    }
                    1..5 => {
                        bytes.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&random.next().to_le_bytes()));
                        model[place].copy_from_slice(bytes);
                        disk.queues[queue].write(start, buffer, len, slot, none);
                        Pending::Write
                    }
                    5 => {
                        model[place].fill(0);
                        disk.queues[queue].write_zeroes(start, len as u64, slot, none);
                        Pending::Write
                    }
                    _ => {
                        bytes.fill(0xa5);
                        disk.queues[queue].read(start, buffer, len, slot, none);
                        Pending::Read(model[place].to_vec())
                    }
                };
                busy[range].fill(true);
                pending[queue][slot] = Some((what, first, blocks as usize));
                begun += 1;
            }
        }
        for queue in 0..queues {
            if free[queue].len() == DEPTH {
                continue;
            }
            for (slot, result) in disk.reap(queue) {
                assert_eq!(result, 0, "request {slot} of queue {queue}");
                let (what, first, blocks) = pending[queue][slot].take().expect("each ends once");
                if let Pending::Read(expected) = what {
                    // SAFETY: the request has ended.
                    let bytes = unsafe { std::slice::from_raw_parts(disk.buffer(queue, slot), expected.len()) };
                    assert!(bytes == expected, "block {first}, {blocks} blocks");
                }
                busy[first as usize..first as usize + blocks].fill(false);
                free[queue].push(slot);
                ended += 1;
            }
        }
    }
}

#[test]
fn blkio_verifies_five_thousand_random_operations_over_two_queues_at_depth_32() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    let path = image(dir.path(), DISK);
    let daemon = Daemon::blk(&socket, &format!("path={},queues=2", path.display()));
    let mut model = vec![0; DISK as usize];
    let mut disk = Disk::connect(&socket, QUEUES);
    verify(&mut disk, &mut model, 5000, 0x5eed);
    drop(disk);
    let said = daemon.terminate();
    assert!(said.iter().all(|line| line.contains("is ready")), "{}", said.join("\n"));
    assert!(!socket.exists(), "its socket is gone");
    assert!(std::fs::read(path).unwrap() == model, "the image holds what the model does");
}

#[test]
fn a_disk_outlives_its_daemon_and_its_clients() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    let disk = format!("path={},queues=2", image(dir.path(), DISK).display());
    let mut model = vec![0; DISK as usize];
    for round in 1..=3 {
        // The socket that the killed one has left is taken over.
        let mut daemon = Daemon::blk(&socket, &disk);
        for client in 1..=3 {
            let mut disk = Disk::connect(&socket, QUEUES);
            verify(&mut disk, &mut model, 300, round * 16 + client);
        }
        daemon.child.kill().unwrap();
        daemon.child.wait().unwrap();
    }
}

/// Not a test of its own: the client that is killed below.
#[test]
#[ignore = "started by another test"]
fn client_that_writes_for_ever() {
    let socket = std::env::var("CLIENT_SOCKET").expect("the other test says where");
    let mut disk = Disk::connect(Path::new(&socket), QUEUES);
    let mut model = vec![0; DISK as usize];
    println!("connected");
    for seed in 1.. {
        verify_nothing(&mut disk, &mut model, seed);
    }
}

/// Writes at full depth and compares nothing: what was there before is not known.
fn verify_nothing(disk: &mut Disk, model: &mut [u8], seed: u64) {
    let mut random = Random(seed);
    for queue in 0..disk.queues.len() {
        for slot in 0..DEPTH {
            let start = random.below(DISK / BLOCK as u64) * BLOCK as u64;
            let buffer = disk.buffer(queue, slot);
            disk.queues[queue].write(start, buffer, BLOCK, slot, ReqFlags::empty());
        }
    }
    for queue in 0..disk.queues.len() {
        let mut left = DEPTH;
        while left > 0 {
            left -= disk.reap(queue).len();
        }
    }
    model[0] = model[0].wrapping_add(1);
}

#[test]
fn clients_killed_at_any_moment_leave_nothing_behind() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    let daemon = Daemon::blk(&socket, &format!("path={},queues=2", image(dir.path(), DISK).display()));
    let before = (daemon.descriptors(), daemon.mappings());
    for round in 0..12 {
        let mut client = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "client_that_writes_for_ever", "--ignored", "--nocapture"])
            .env("CLIENT_SOCKET", &socket)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // From before it has connected until well into its work.
        std::thread::sleep(Duration::from_millis(round * 9));
        client.kill().unwrap();
        client.wait().unwrap();
    }
    // The image is what the killed ones made of it; a model starts with what is there.
    let mut disk = Disk::connect(&socket, QUEUES);
    let mut model = std::fs::read(dir.path().join("disk.img")).unwrap();
    verify(&mut disk, &mut model, 500, 77);
    drop(disk);
    wait("all descriptors and mappings to be gone", || (daemon.descriptors(), daemon.mappings()) == before);
    daemon.terminate();
}
