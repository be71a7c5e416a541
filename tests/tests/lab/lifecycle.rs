//! Power-off ends the process, a reboot builds the machine anew in it, `--no-reboot` exits instead; the codes tell which.

use ringvm_tests::lab::{Exit, disk, lab, vm};

/// `ringvm run`'s code for a reboot that was not wanted.
const REBOOT: Exit = Exit::Code(5);

#[test]
fn a_reboot_builds_the_machine_anew_and_power_off_ends_it() {
    lab(|lab| {
        let image = lab.image("64M")?;
        let mut guest = lab.boot(&vm().cpus(2).disk(disk(&image).queues(2).serial("kept")))?;
        let boot = guest.run("cat /proc/sys/kernel/random/boot_id")?;
        guest.run("echo before > /tmp/file; echo written before the reboot | dd of=/dev/vda conv=sync,fsync")?;
        for _ in 0..2 {
            guest.reboot()?;
            assert_ne!(guest.run("cat /proc/sys/kernel/random/boot_id")?, boot);
            assert_eq!(guest.run("ls /tmp")?, "", "memory of the machine before");
            assert_eq!(guest.run("head -n 1 /dev/vda")?, "written before the reboot");
            assert_eq!(guest.run("nproc; lsblk -dno SERIAL; ls /sys/block/vda/mq | wc -l")?, "2\nkept\n2");
        }
        assert_eq!(guest.power_off()?, Exit::Code(0));
        Ok(())
    });
}

#[test]
fn no_reboot_exits_with_a_code_of_its_own() {
    lab(|lab| {
        let image = lab.image("64M")?;
        let machine = vm().disk(disk(&image)).no_reboot();
        let mut guest = lab.boot(&machine)?;
        guest.start("reboot -f")?;
        assert_eq!(guest.exit()?, REBOOT);
        Ok(())
    });
}

#[test]
fn a_second_vmm_on_the_same_image_is_refused_by_name() {
    lab(|lab| {
        let image = lab.image("64M")?;
        let machine = vm().disk(disk(&image));
        let mut guest = lab.boot(&machine)?;
        let mut second = lab.launch(&machine, "second")?;
        assert_ne!(second.exit()?, Exit::Code(0));
        let said = second.stderr();
        assert!(said.contains(&image.path) && said.contains("lock"), "{said}");
        assert_eq!(said.lines().count(), 1, "one line: {said}");
        assert_eq!(guest.run("cat /proc/uptime | wc -l")?, "1", "the first goes on");
        assert_eq!(guest.power_off()?, Exit::Code(0));
        Ok(())
    });
}
