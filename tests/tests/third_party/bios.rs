//! SeaBIOS drives the disk first, with one queue of two and without interrupts; its reset leaves the device for the next start.

use std::time::Duration;

use ringvm_tests::host::{Need, need, say};
use ringvm_tests::native::daemon;

use crate::qemu::machine;
use crate::served::{Daemon, operations};
use crate::{alone, ok, scratch};

const LIMIT: Duration = Duration::from_secs(60);
const SAID: &str = "read by the BIOS\r\n";

/// A boot sector that reads 64 sectors from the second one on, prints the text at the start of the last of them, and resets the
/// machine.
const BOOT: [u8; 64] = [
    0x31, 0xc0, // xor ax, ax
    0x8e, 0xd8, // mov ds, ax
    0x8e, 0xc0, // mov es, ax
    0x8e, 0xd0, // mov ss, ax
    0xbc, 0x00, 0x7c, // mov sp, 0x7c00
    0xb4, 0x42, // mov ah, 0x42 (extended read)
    0xbe, 0x30, 0x7c, // mov si, 0x7c30 (the packet below)
    0xcd, 0x13, // int 0x13
    0x72, 0x12, // jc +18 (hlt)
    0xbe, 0x00, 0xfe, // mov si, 0x8000 + 63 * 512
    0xba, 0xf8, 0x03, // mov dx, 0x3f8 (COM1)
    0xac, // lodsb
    0x84, 0xc0, // test al, al
    0x74, 0x03, // jz +3
    0xee, // out dx, al
    0xeb, 0xf8, // jmp -8 (lodsb)
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al (reset)
    0xf4, // hlt
    0xeb, 0xfd, // jmp -3 (hlt)
    0, 0, 0, 0, 0, 0, 0, // up to 0x30
    0x10, 0x00, // the packet's size
    0x40, 0x00, // sectors
    0x00, 0x80, 0x00, 0x00, // to 0:0x8000
    1, 0, 0, 0, 0, 0, 0, 0, // from this sector
];

#[test]
fn the_bios_reads_the_disk_at_every_start() {
    if !(need(Need::IoUring) && need(Need::Lab)) {
        return;
    }
    let _alone = alone();
    let folder = scratch();
    let (socket, image) = (folder.path().join("b.sock"), folder.path().join("disk.img"));
    let mut bytes = vec![0; 1 << 20];
    bytes[..BOOT.len()].copy_from_slice(&BOOT);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes[64 * 512..][..SAID.len()].copy_from_slice(SAID.as_bytes());
    ok(std::fs::write(&image, &bytes));
    let disk = format!("path={},queues=2", image.display());
    let path = socket.display().to_string();
    let served = Daemon::start(move || ok(daemon("ringvm-blk", ["-v", "--stats", "--socket", &path, "--disk", &disk])));
    // Two machines one after the other, three starts of each.
    for _ in 0..2 {
        let mut running = machine().disk(&socket, 2).power_on();
        ok(running.expect_count(SAID, 3, LIMIT));
    }
    let said = served.terminate();
    let reads = operations(&said, "disk0: read");
    assert!(reads >= 6 * 2, "a boot sector and 64 more at each start: {said}");
    say(&format!("{reads} reads by the BIOS"));
}
