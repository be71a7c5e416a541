//! A stock Debian guest in QEMU verifies what it wrote over two queues of `ringvm-blk`, and keeps a file system, while the daemon
//! is killed and started again.

use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ringvm_tests::host::{self, Need, need, say};
use ringvm_tests::native::{daemon, random};
use ringvm_tests::ongoing;

use crate::qemu::{Guest, machine};
use crate::served::{Daemon, operations};
use crate::{alone, ok, scratch};

/// fio's work takes some five seconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(240);
/// A command that does more than look.
const COPY_LIMIT: Duration = Duration::from_secs(120);
const KILLS: u32 = 3;

#[test]
fn a_debian_guest_in_qemu_verifies_two_queues_and_keeps_a_file_system_through_kills() {
    if !(need(Need::IoUring) && need(Need::Lab)) {
        return;
    }
    let _alone = alone();
    let folder = scratch();
    let (socket, image) = (folder.path().join("b.sock"), folder.path().join("disk.img"));
    ok(std::fs::File::create(&image).and_then(|file| file.set_len(256 << 20)));
    let disk = format!("path={},queues=2,serial=third-party", image.display());
    let path = socket.display().to_string();
    let mut served =
        Daemon::start(move || ok(daemon("ringvm-blk", ["-v", "--stats", "--socket", &path, "--disk", &disk])));

    let begun = Instant::now();
    let mut guest = machine().disk(&socket, 2).boot(true);
    say(&format!("QEMU's guest is up after {:.1} s", begun.elapsed().as_secs_f32()));
    assert_eq!(guest.run("cat /sys/block/vda/size /sys/block/vda/serial"), "524288\nthird-party");
    assert_eq!(guest.run("ls /sys/block/vda/mq | wc -l"), "2", "a queue for each CPU");
    for direct in [0, 1] {
        verify(&mut guest, &mut served, direct);
    }
    let sums = fill(&mut guest, &mut served, &image);
    // The BIOS takes the device over from Linux, and Linux from it.
    guest.reboot();
    guest.run("mount -t ext4 /dev/vda /mnt");
    assert_eq!(guest.run_for(COPY_LIMIT, SUMS), sums, "the tree after a reboot");
    guest.run("umount /mnt");
    guest.power_off();
    let said = served.terminate();
    for queue in ["disk0: queue 0", "disk0: queue 1"] {
        assert!(operations(&said, queue) > 0, "{queue} served nothing: {said}");
    }
    let e2fsck = host::program("e2fsck").expect("a tool of the lab");
    let checked = ok(Command::new(e2fsck).arg("-fn").arg(&image).output());
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}

/// fio writes and verifies by checksum with a job for each CPU, and so for each queue, which own a half of the disk each; the
/// daemon is away several times meanwhile.
fn verify(guest: &mut Guest, served: &mut Daemon, direct: u32) {
    let begun = Instant::now();
    let fio = format!(
        "fio --name=job --filename=/dev/vda --rw=randwrite --bsrange=4k-160k --blockalign=4k --direct={direct} \
         --ioengine=libaio --iodepth=16 --iodepth_batch_submit=4 --iomem_align=4k --thread --numjobs=2 \
         --cpus_allowed=0,1 --cpus_allowed_policy=split --size=64M --offset_increment=128M --fsync=32 \
         --verify=crc32c --do_verify=1 --verify_fatal=1 --randrepeat=0 --output-format=normal"
    );
    guest.run(&ongoing::start(&fio));
    for _ in 0..KILLS {
        sleep(Duration::from_millis(700) + random(Duration::from_millis(300)));
        guest.run(ongoing::GOES_ON);
        served.kill();
        sleep(random(Duration::from_millis(500)));
        served.restart();
    }
    let output = guest.run_for(LIMIT, ongoing::FINISH);
    assert_eq!(output.matches("err= 0").count(), 2, "both jobs without errors:\n{output}");
    assert!(
        !output.contains("verify: bad") && !output.contains("verify failed"),
        "nothing was read back wrong:\n{output}"
    );
    say(&format!("fio with direct={direct} through {KILLS} kills: {:.1} s", begun.elapsed().as_secs_f32()));
}

/// A tree of files and the way to tell whether it is whole.
const SUMS: &str = "cd /mnt/tree && find . -type f -exec md5sum {} + | sort -k 2 | md5sum && find . -type f | wc -l";

/// Makes a file system, fills it while the daemon is killed, and trims it; the sum of what is in it.
fn fill(guest: &mut Guest, served: &mut Daemon, image: &Path) -> String {
    let blocks = || ok(std::fs::metadata(image).map(|data| std::os::unix::fs::MetadataExt::blocks(&data)));
    guest.run_for(COPY_LIMIT, "mkfs.ext4 -q -F /dev/vda && mount -t ext4 /dev/vda /mnt && mkdir /mnt/tree /mnt/big");
    let copy = guest.begin("cp -a /bin /lib /lib64 /modules /init /mnt/tree/ && sync");
    sleep(Duration::from_millis(300));
    served.kill();
    served.restart();
    guest.finish(&copy, COPY_LIMIT);
    let original = guest
        .run_for(COPY_LIMIT, &SUMS.replace("/mnt/tree", "/").replace("find . ", "find bin lib lib64 modules init "));
    guest.run("echo 3 > /proc/sys/vm/drop_caches");
    let copied = guest.run_for(COPY_LIMIT, &SUMS.replace("find . ", "find bin lib lib64 modules init "));
    assert_eq!(copied, original, "the tree after a way over the disk");
    // 48 MiB that no hole can stand for.
    guest.run_for(COPY_LIMIT, "yes ringvm | head -c 50331648 > /mnt/big/file && sync");
    let filled = blocks();
    guest.run_for(COPY_LIMIT, "rm -r /mnt/big && sync && /bin/fstrim -v /mnt");
    let trimmed = blocks();
    assert!(filled - trimmed.min(filled) > (40 << 20) / 512, "fstrim: {filled} blocks, then {trimmed}");
    guest.run("umount /mnt");
    guest.run_for(COPY_LIMIT, "e2fsck -fn /dev/vda");
    guest.run("mount -t ext4 /dev/vda /mnt");
    let sums = guest.run_for(COPY_LIMIT, SUMS);
    guest.run("umount /mnt");
    sums
}
