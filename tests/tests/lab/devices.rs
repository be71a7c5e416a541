//! virtio-rng, a read-only disk, statistics on demand.

use ringvm_tests::lab::{Exit, disk, lab, vm};

/// Bytes of 64 reads of 64 KiB.
const COUNTED: u64 = 4 << 20;

#[test]
fn the_entropy_device_gives_random_bytes() {
    lab(|lab| {
        let mut guest = lab.boot(&vm().arg("--rng").arg("on").no_reboot())?;
        assert!(guest.run("cat /sys/class/misc/hw_random/rng_current")?.starts_with("virtio_rng"));
        let read = "head -c 4096 /dev/hwrng | od -An -v -tx1 -w4096";
        let (first, second) = (guest.run(read)?, guest.run(read)?);
        assert_eq!(first.split_whitespace().count(), 4096);
        assert_ne!(first, second);
        let distinct: std::collections::BTreeSet<_> = first.split_whitespace().collect();
        assert!(distinct.len() > 200, "{} distinct bytes in 4,096", distinct.len());
        assert_eq!(guest.power_off()?, Exit::Code(0), "--no-reboot is about reboots alone");
        Ok(())
    });
}

#[test]
fn a_read_only_disk_is_read_and_refuses_writes() {
    lab(|lab| {
        let image = lab.image("64M")?;
        lab.run(&format!("echo what the host wrote | dd of={} conv=sync,notrunc", image.path))?;
        let sum = lab.run(&format!("md5sum {}", image.path))?;
        let mut guest = lab.boot(&vm().disk(disk(&image).readonly()))?;
        assert_eq!(guest.run("cat /sys/block/vda/ro")?, "1");
        assert_eq!(guest.run("head -n 1 /dev/vda")?, "what the host wrote");
        let (code, output) = guest.status("dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync")?;
        assert_ne!(code, 0, "{output}");
        // Flushing a disk that is never written succeeds.
        guest.run("sync && blockdev --flushbufs /dev/vda")?;
        assert_eq!(guest.power_off()?, Exit::Code(0));
        assert_eq!(lab.run(&format!("md5sum {}", image.path))?, sum);
        Ok(())
    });
}

#[test]
fn sigusr1_prints_what_each_disk_did() {
    lab(|lab| {
        let image = lab.image("64M")?;
        let mut guest = lab.boot(&vm().disk(disk(&image).serial("counted")).arg("--stats"))?;
        guest.run("dd if=/dev/vda of=/dev/null bs=64k count=64 iflag=direct")?;
        let read = |text: &str| -> u64 {
            let bytes = text.lines().rev().find_map(|line| line.split_once("read: ")?.1.split_once(" operations, "));
            let bytes = bytes.and_then(|(_, rest)| rest.split_once(" bytes"));
            bytes.and_then(|(number, _)| number.parse().ok()).unwrap_or_else(|| panic!("no bytes read in: {text}"))
        };
        let statistics = guest.statistics("read")?;
        for word in ["p50", "p99", "kicks", "interrupts", "errors", "polls"] {
            assert!(statistics.contains(word), "{word} in {statistics}");
        }
        let first = read(&statistics);
        assert!(first >= COUNTED, "{statistics}");
        guest.run("dd if=/dev/vda of=/dev/null bs=64k count=64 skip=64 iflag=direct")?;
        assert_eq!(guest.power_off()?, Exit::Code(0));
        let at_exit = &guest.stderr()[statistics.len()..];
        assert!(read(at_exit) >= first + COUNTED, "a summary at exit, by --stats: {at_exit}");
        Ok(())
    });
}
