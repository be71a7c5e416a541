//! The example of the documentation, as its reader would use it: a disk whose sectors hold their own numbers.
#![allow(unsafe_code, reason = "blkio reads and writes memory by pointer")]

mod common;

use std::mem::MaybeUninit;
use std::path::PathBuf;
use std::process::Command;

use blkio::{Blkio, Completion, ReqFlags};
use common::{Daemon, PATIENCE, scratch};

/// Cargo builds the examples with all tests, one folder above these (with one only by `--examples`).
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.ancestors().nth(2).unwrap().join("examples").join(name)
}

#[test]
fn the_pattern_disk_says_the_number_of_each_sector() {
    let dir = scratch();
    let socket = dir.path().join("pattern");
    let mut command = Command::new(example("pattern"));
    let daemon = Daemon::spawn(command.arg("--socket").arg(&socket).args(["--disk", "size=1T"]));
    daemon.wait_for("is ready", 1);

    let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
    blkio.set_str("path", socket.to_str().unwrap()).unwrap();
    blkio.set_bool("read-only", true).unwrap();
    blkio.connect().unwrap();
    assert_eq!(blkio.get_u64("capacity").unwrap(), 1 << 40);
    let mut queue = blkio.start().unwrap().queues.remove(0);
    let buffer = blkio.alloc_mem_region(1 << 16).unwrap();
    blkio.map_mem_region(&buffer).unwrap();
    for first in [0, 7, (1 << 31) - 8] {
        queue.read(first * 512, buffer.addr as *mut u8, 8 * 512, 0, ReqFlags::empty());
        let mut room = [const { MaybeUninit::<Completion>::uninit() }; 1];
        let mut patience = PATIENCE;
        assert_eq!(queue.do_io(&mut room, 1, Some(&mut patience), None).unwrap(), 1);
        // SAFETY: one was filled in.
        assert_eq!(unsafe { room[0].assume_init_ref() }.ret, 0);
        // SAFETY: nobody writes to the region any more.
        let read = unsafe { std::slice::from_raw_parts(buffer.addr as *const u8, 8 * 512) };
        for (at, number) in read.chunks_exact(8).enumerate() {
            let sector = first + at as u64 / 64;
            assert_eq!(u64::from_le_bytes(number.try_into().unwrap()), sector, "sector {sector}");
        }
    }
}
