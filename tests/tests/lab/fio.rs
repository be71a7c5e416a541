//! fio verifies by checksum what it wrote over two queues in mixed sizes: the guest's page cache or O_DIRECT, over an image
//! that ringvm opens page-cached or with O_DIRECT.

use std::time::Duration;

use ringvm_tests::lab::{Exit, disk, lab, vm};
use ringvm_tests::native::Place;

/// TCG in TCG: a run takes some ten seconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(120);

#[test]
fn crc32c_verify_over_two_queues() {
    verify(Place::Process, false);
}

#[test]
fn crc32c_verify_over_two_queues_in_a_daemon() {
    verify(Place::Daemon, false);
}

#[test]
fn crc32c_verify_over_two_queues_with_direct_storage() {
    verify(Place::Process, true);
}

#[test]
fn crc32c_verify_over_two_queues_with_direct_storage_in_a_daemon() {
    verify(Place::Daemon, true);
}

fn verify(place: Place, direct_storage: bool) {
    lab(|lab| {
        let image = lab.image("128M")?;
        let served = disk(&image).place(place).queues(2).queue_size(128);
        let served = if direct_storage { served.direct() } else { served };
        let mut guest = lab.boot(&vm().cpus(2).memory("640M").fio().disk(served))?;
        let queues = |text: &str| -> Vec<u64> {
            let lines = text.lines().filter(|line| line.contains("-req."));
            lines
                .map(|line| line.split_whitespace().skip(1).take(2).map(|n| n.parse::<u64>().unwrap_or(0)).sum())
                .collect()
        };
        let before = queues(&guest.run("cat /proc/interrupts")?);
        for direct in [0, 1] {
            // Two jobs of a CPU each, and so a queue each; they own a half of the disk each.
            let output = guest.run_for(
                LIMIT,
                &format!(
                    "fio --name=verify --filename=/dev/vda --rw=randwrite --bsrange=4k-160k --blockalign=4k --direct={direct} \
                     --ioengine=libaio --iodepth=16 --iodepth_batch_submit=4 --iomem_align=4k --thread --numjobs=2 \
                     --cpus_allowed=0,1 --cpus_allowed_policy=split --size=24M --offset_increment=64M --fsync=32 \
                     --verify=crc32c --do_verify=1 --verify_fatal=1 --randrepeat=0 --output-format=normal"
                ),
            )?;
            assert_eq!(output.matches("err= 0").count(), 2, "both jobs without errors:\n{output}");
        }
        let after = queues(&guest.run("cat /proc/interrupts")?);
        assert_eq!((before.len(), after.len()), (2, 2));
        assert!(before.iter().zip(&after).all(|(b, a)| a > b), "both queues served requests: {before:?} {after:?}");
        assert_eq!(guest.power_off()?, Exit::Code(0));
        Ok(())
    });
}
