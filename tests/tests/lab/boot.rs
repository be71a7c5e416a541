//! The stock Debian kernel boots as bzImage and as ELF, and finds the machine that was described to it.

use ringvm_tests::Result;
use ringvm_tests::lab::{Exit, Guest, Kernel, disk, lab, vm};

/// What no boot of a sound machine leaves in the kernel's log.
const COMPLAINTS: &str =
    "BUG:|WARNING: CPU|Call Trace|unchecked MSR access|ACPI Error|ACPI BIOS Error|can't claim BAR|no space for";

#[test]
fn bzimage_with_1_cpu() {
    boots(Kernel::BzImage, 1, false);
}

#[test]
fn bzimage_with_2_cpus() {
    boots(Kernel::BzImage, 2, false);
}

#[test]
fn bzimage_with_4_cpus_from_a_config_file() {
    boots(Kernel::BzImage, 4, true);
}

#[test]
fn elf_with_1_cpu_from_a_config_file() {
    boots(Kernel::Elf, 1, true);
}

#[test]
fn elf_by_the_linux_protocol_with_2_cpus() {
    boots(Kernel::ElfLinux64, 2, false);
}

#[test]
fn elf_with_4_cpus() {
    boots(Kernel::Elf, 4, false);
}

fn boots(kernel: Kernel, cpus: u32, config_file: bool) {
    lab(|lab| {
        let queues = u16::try_from(cpus).expect("a small number");
        let (first, second) = (lab.image("64M")?, lab.image("96M")?);
        // The guest has no more memory than it was given and not much less: 384 MiB, or 640 to tell one from the other.
        let mebibytes = if cpus == 2 { 640 } else { 384 };
        let machine = vm()
            .kernel(kernel)
            .cpus(cpus)
            .memory(&format!("{mebibytes}M"))
            .disk(disk(&first).queues(queues).serial("first-disk"))
            .disk(disk(&second).queue_size(128).direct().serial("2nd"));
        let machine = if config_file { machine.from_config_file() } else { machine };
        let mut guest = lab.boot(&machine)?;

        assert_eq!(guest.run("nproc")?, cpus.to_string());
        let total: u64 = number(&guest.run("awk '/MemTotal/ {print $2}' /proc/meminfo")?);
        assert!((mebibytes * 1024 * 85 / 100..mebibytes * 1024).contains(&total), "{total} kB of {mebibytes} MiB");
        disks(&mut guest, cpus)?;
        cpu_description(&mut guest, cpus)?;
        let (code, complaints) = guest.status(&format!("dmesg | grep -E \"{COMPLAINTS}\""))?;
        assert_eq!((code, complaints.as_str()), (1, ""), "the kernel complained");
        assert_eq!(guest.power_off()?, Exit::Code(0));
        Ok(())
    });
}

fn disks(guest: &mut Guest, cpus: u32) -> Result<()> {
    let listed = guest.run("lsblk -dbno NAME,SIZE,RO,SERIAL")?;
    let rows: Vec<Vec<_>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows, [["vda", "67108864", "0", "first-disk"], ["vdb", "100663296", "0", "2nd"]]);
    assert_eq!(guest.run("ls /sys/block/vda/mq | wc -l")?, cpus.to_string(), "hardware queues of vda");
    assert_eq!(guest.run("ls /sys/block/vdb/mq | wc -l")?, "1", "hardware queues of vdb");

    // One MSI-X vector per queue, each in use once its queue has seen a request from its CPU.
    let reads: String = (0..cpus)
        .map(|cpu| format!("taskset -c {cpu} dd if=/dev/vda of=/dev/null bs=4k count=4 skip={cpu}00 iflag=direct; "))
        .collect();
    guest.run(&format!("({reads}) 2>/dev/null; dd if=/dev/vdb of=/dev/null bs=4k count=1"))?;
    let interrupts = guest.run("cat /proc/interrupts")?;
    let of_queues: Vec<_> = interrupts.lines().filter(|line| line.contains("-req.")).collect();
    assert_eq!(of_queues.len(), cpus as usize + 1, "vectors of queues:\n{interrupts}");
    for line in of_queues {
        let mut words = line.split_whitespace();
        let vector = words.next();
        let taken: u64 = words.by_ref().take(cpus as usize).map(number).sum();
        assert!(line.contains("MSI") && taken > 0, "vector {vector:?} was never raised:\n{interrupts}");
    }
    Ok(())
}

/// Topology and caches as sysfs shows them: fio, the scheduler and libnuma read them.
fn cpu_description(guest: &mut Guest, cpus: u32) -> Result<()> {
    let cpu = "/sys/devices/system/cpu";
    let online = if cpus == 1 { "0".to_owned() } else { format!("0-{}", cpus - 1) };
    assert_eq!(guest.run(&format!("cat {cpu}/online"))?, online);
    let cores = guest.run(&format!("cat {cpu}/cpu[0-9]*/topology/core_cpus_list | sort -u | wc -l"))?;
    let packages = guest.run(&format!("cat {cpu}/cpu[0-9]*/topology/physical_package_id | sort -u | wc -l"))?;
    assert_eq!((cores, packages.as_str()), (cpus.to_string(), "1"), "a core for each vCPU, all in one package");

    let lines = guest.run(&format!("cat {cpu}/cpu[0-9]*/cache/index*/coherency_line_size"))?;
    let lines: Vec<u64> = lines.lines().map(number).collect();
    assert!(!lines.is_empty() && lines.len().is_multiple_of(cpus as usize), "{lines:?}");
    assert!(lines.iter().all(|size| size.is_power_of_two() && (16..=256).contains(size)), "{lines:?}");
    let shared = guest.run(&format!(
        "for i in {cpu}/cpu0/cache/index*; do echo $(cat $i/level) $(cat $i/type) $(cat $i/shared_cpu_list); done"
    ))?;
    let first_level = shared.lines().filter(|line| line.starts_with("1 "));
    assert!(first_level.clone().count() >= 1, "no first-level cache: {shared}");
    for line in first_level {
        assert!(line.ends_with(" 0"), "cpu0's first-level cache is its own: {shared}");
    }
    assert!(guest.run("cat /sys/devices/system/clocksource/clocksource0/available_clocksource")?.contains("kvm-clock"));
    Ok(())
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or_else(|e| panic!("`{text}` is not a number: {e}"))
}
