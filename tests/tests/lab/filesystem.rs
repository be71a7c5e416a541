//! A file system in the guest: made, filled, trimmed, left clean.

use ringvm_tests::lab::{Exit, Lab, disk, lab, vm};
use ringvm_tests::native::Place;

#[test]
fn ext4_holds_a_tree_trims_and_is_clean_after_power_off() {
    ext4(Place::Process);
}

#[test]
fn ext4_in_a_daemon_holds_a_tree_trims_and_is_clean_after_power_off() {
    ext4(Place::Daemon);
}

fn ext4(place: Place) {
    lab(|lab| {
        let image = lab.image("256M")?;
        let blocks = |lab: &Lab| -> ringvm_tests::Result<u64> {
            let output = lab.run(&format!("sync {0}; stat -c %b {0}", image.path))?;
            Ok(output.parse().unwrap_or_else(|e| panic!("`{output}`: {e}")))
        };
        let machine = vm().cpus(2).disk(disk(&image).place(place).queues(2));
        let mut guest = lab.boot(&machine)?;
        guest.run("mkfs.ext4 -q /dev/vda && mount -t ext4 /dev/vda /mnt")?;
        guest.run("mkdir /mnt/tree /mnt/big && cp -a /bin /lib /lib64 /modules /init /mnt/tree/")?;
        let sums = "find . -type f -exec md5sum {} + | sort -k 2 | md5sum";
        let whole = guest
            .run(&format!("(cd /mnt/tree && {sums}) && (cd / && find bin lib lib64 modules init -type f | wc -l)"))?;
        // 48 MiB that no hole can stand for.
        guest.run("yes ringvm | head -c 50331648 > /mnt/big/file && sync")?;
        guest.run("echo 3 > /proc/sys/vm/drop_caches")?;
        let again = guest.run(&format!("(cd /mnt/tree && {sums}) && (cd /mnt/tree && find * -type f | wc -l)"))?;
        assert_eq!(whole, again, "the tree after a way over the disk");

        let filled = blocks(lab)?;
        assert!(filled * 512 > 48 << 20, "{filled} blocks");
        guest.run("rm -r /mnt/big && sync && /bin/fstrim -v /mnt")?;
        let trimmed = blocks(lab)?;
        assert!(filled - trimmed.min(filled) > (40 << 20) / 512, "fstrim: {filled} blocks, then {trimmed}");
        guest.run("umount /mnt")?;
        assert_eq!(guest.power_off()?, Exit::Code(0));
        lab.run(&format!("e2fsck -fn {}", image.path))?;

        let mut guest = lab.boot(&machine)?;
        guest.run("mount -t ext4 -o ro /dev/vda /mnt")?;
        let later = guest.run(&format!("(cd /mnt/tree && {sums}) && (cd /mnt/tree && find * -type f | wc -l)"))?;
        assert_eq!(whole, later, "the tree after a power-off");
        assert_eq!(guest.power_off()?, Exit::Code(0));
        Ok(())
    });
}
