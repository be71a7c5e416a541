//! The examples of the documentation, as their readers would use them.
#![allow(unsafe_code, reason = "blkio reads and writes memory by pointer")]

mod common;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use common::client::{Client, Memory, PROTOCOL_FEATURES, Ring};
use common::{Daemon, PATIENCE, scratch};
use ringvm_backends::testing::driver::Buffer;
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::FrontendReq;
use vm_memory::{Bytes, GuestAddress};

/// Cargo builds the examples with all tests, one folder above these (with one only by `--examples`).
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().join("examples").join(name)
}

/// An example that serves a disk, and a client of it.
fn served(name: &str, disk: &str, dir: &Path, readonly: bool) -> (Daemon, Blkio) {
    let socket = dir.join("socket");
    let mut command = Command::new(example(name));
    let daemon = Daemon::spawn(command.arg("--socket").arg(&socket).args(["--disk", disk]));
    daemon.wait_for("is ready", 1);
    let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
    blkio.set_str("path", socket.to_str().unwrap()).unwrap();
    blkio.set_bool("read-only", readonly).unwrap();
    blkio.connect().unwrap();
    (daemon, blkio)
}

/// Waits for the one request in flight.
fn finish(queue: &mut Blkioq) {
    let mut room = [const { MaybeUninit::<Completion>::uninit() }; 1];
    let mut patience = PATIENCE;
    assert_eq!(queue.do_io(&mut room, 1, Some(&mut patience), None).unwrap(), 1);
    // SAFETY: one was filled in.
    assert_eq!(unsafe { room[0].assume_init_ref() }.ret, 0);
}

#[test]
fn the_pattern_disk_says_the_number_of_each_sector() {
    let dir = scratch();
    let (_daemon, mut blkio) = served("pattern", "size=1T", dir.path(), true);
    assert_eq!(blkio.get_u64("capacity").unwrap(), 1 << 40);
    let mut queue = blkio.start().unwrap().queues.remove(0);
    let buffer = blkio.alloc_mem_region(1 << 16).unwrap();
    blkio.map_mem_region(&buffer).unwrap();
    for first in [0, 7, (1 << 31) - 8] {
        queue.read(first * 512, buffer.addr as *mut u8, 8 * 512, 0, ReqFlags::empty());
        finish(&mut queue);
        // SAFETY: nobody writes to the region any more.
        let read = unsafe { std::slice::from_raw_parts(buffer.addr as *const u8, 8 * 512) };
        for (at, number) in read.chunks_exact(8).enumerate() {
            let sector = first + at as u64 / 64;
            assert_eq!(u64::from_le_bytes(number.try_into().unwrap()), sector, "sector {sector}");
        }
    }
}

#[test]
fn the_disk_in_chunks_keeps_what_is_written_across_their_borders() {
    const CHUNK: u64 = 64 << 20;
    const LEN: usize = 1 << 20;
    let dir = scratch();
    let chunks = dir.path().join("chunks");
    std::fs::create_dir(&chunks).unwrap();
    let disk = format!("path={},size=1T", chunks.display());
    let at = 5 * CHUNK - LEN as u64 / 2;
    let bytes: Vec<u8> = (0..LEN).map(|at| (at % 251) as u8).collect();
    for round in 0..2 {
        let (_daemon, mut blkio) = served("chunks", &disk, dir.path(), false);
        assert_eq!(blkio.get_u64("capacity").unwrap(), 1 << 40);
        let mut queue = blkio.start().unwrap().queues.remove(0);
        let buffer = blkio.alloc_mem_region(LEN).unwrap();
        blkio.map_mem_region(&buffer).unwrap();
        // SAFETY: the region has so many bytes, and no request is in flight while they are looked at.
        let memory = || unsafe { std::slice::from_raw_parts_mut(buffer.addr as *mut u8, LEN) };
        if round == 0 {
            memory().copy_from_slice(&bytes);
            queue.write(at, buffer.addr as *const u8, LEN, 0, ReqFlags::empty());
            finish(&mut queue);
            queue.flush(0, ReqFlags::empty());
            finish(&mut queue);
            let names: BTreeSet<_> =
                std::fs::read_dir(&chunks).unwrap().map(|file| file.unwrap().file_name()).collect();
            assert_eq!(names, ["4.chunk", "5.chunk"].map(OsString::from).into());
        }
        memory().fill(1);
        queue.read(at, buffer.addr as *mut u8, LEN, 0, ReqFlags::empty());
        finish(&mut queue);
        assert!(memory() == bytes, "in round {round}");
        queue.read(9 * CHUNK - 512, buffer.addr as *mut u8, 1024, 0, ReqFlags::empty());
        finish(&mut queue);
        assert_eq!(memory()[..1024], [0; 1024], "what was never written");
        if round == 1 {
            queue.write_zeroes(at + 512, LEN as u64 - 1024, 0, ReqFlags::empty());
            finish(&mut queue);
            queue.read(at, buffer.addr as *mut u8, LEN, 0, ReqFlags::empty());
            finish(&mut queue);
            assert!(memory()[..512] == bytes[..512] && memory()[LEN - 512..] == bytes[LEN - 512..]);
            assert!(memory()[512..LEN - 512].iter().all(|byte| *byte == 0));
        }
    }
}

/// The first bytes of an entropy device with this seed.
fn seeded(seed: &str) -> [u8; 64] {
    /// Behind the ring.
    const BYTES: u64 = common::client::DATA;
    let dir = scratch();
    let socket = dir.path().join("socket");
    let mut command = Command::new(example("seeded"));
    let daemon = Daemon::spawn(command.arg("--socket").arg(&socket).args(["--rng", seed]));
    daemon.wait_for("is ready", 1);
    let mut client = Client::connect(&socket);
    client.negotiate(1 << 32 | PROTOCOL_FEATURES);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::ADD_MEM_REG, &memory.region(), &[memory.file.as_fd()]);
    let mut ring = Ring::new(&memory, 0);
    ring.start(&mut client);
    ring.driver.add(&[Buffer { addr: BYTES, len: 64, writable: true }]).unwrap();
    ring.driver.publish();
    ring.kick();
    ring.used();
    let mut bytes = [0; 64];
    memory.mem.read_slice(&mut bytes, GuestAddress(BYTES)).unwrap();
    daemon.terminate();
    bytes
}

#[test]
fn the_seeded_device_repeats_itself() {
    let first = seeded("42");
    assert_eq!(first, seeded("42"));
    assert_ne!(first, seeded("43"));
    assert_ne!(first[..32], first[32..]);
}
