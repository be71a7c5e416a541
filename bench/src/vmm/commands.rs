//! The command line of each VMM.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{Contestant, Daemon, Disk, END_BY_REBOOT, Launch, Vm};

fn words<const N: usize>(words: [&str; N]) -> Vec<OsString> {
    words.into_iter().map(OsString::from).collect()
}

fn on(flag: bool) -> &'static str {
    if flag { "on" } else { "off" }
}

/// The memory as ringvm and Cloud Hypervisor have it.
fn memory(vm: &Vm<'_>) -> String {
    format!("size={}M{}", vm.memory, if vm.prefault { ",prefault=on" } else { "" })
}

/// ringvm with its devices in `place`.
pub(super) fn ringvm(vm: &Vm<'_>, place: &str) -> Vec<OsString> {
    let mut all = ringvm_alone(vm);
    for disk in vm.disks {
        let what = match disk.path {
            Some(path) => format!("path={},direct={}", path.display(), on(disk.direct)),
            None => format!("storage=null,size={}", disk.size),
        };
        let disk = format!("{what},place={place},queues={},queue-size={}", disk.queues, disk.queue_size);
        all.extend(words(["--disk", &disk]));
    }
    for nic in vm.nics {
        let nic = format!("tap={},place={place},queues={},queue-size={}", nic.tap, nic.pairs, nic.queue_size);
        all.extend(words(["--net", &nic]));
    }
    all
}

fn ringvm_alone(vm: &Vm<'_>) -> Vec<OsString> {
    let mut all = words([
        "run",
        "--kernel",
        &vm.kernel.to_string_lossy(),
        "--cmdline",
        vm.command_line,
        "--cpus",
        &vm.cpus.to_string(),
        "--memory",
        &memory(vm),
        "--serial",
        "stdio",
    ]);
    if let Some(initramfs) = vm.initramfs {
        // A kernel that panics reboots: once is enough.
        all.extend(words(["--initramfs", &initramfs.to_string_lossy(), "--no-reboot"]));
    }
    all
}

/// qemu-storage-daemon, and ringvm as the frontend of its export.
pub(super) fn storage_daemon(contestant: &Contestant, vm: &Vm<'_>, dir: &Path) -> Result<Launch> {
    let Some(ringvm) = &contestant.frontend else {
        bail!("qemu-storage-daemon serves a disk to ringvm, and there is none: give --ringvm PATH");
    };
    if !vm.nics.is_empty() {
        bail!("qemu-storage-daemon has no NICs: leave it out");
    }
    let socket = dir.join("storage-daemon.sock");
    let [disk] = vm.disks else { bail!("qemu-storage-daemon is measured with one disk: leave it out") };
    let (queues, size) = (disk.queues, disk.queue_size);
    let (node, export) = (
        qemu_node(disk, 0),
        format!(
            "type=vhost-user-blk,id=export,node-name=disk0,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
            socket.display()
        ),
    );
    let mut daemon = vec![contestant.path.clone().into_os_string()];
    daemon.extend(words([
        "--object",
        "iothread,id=io0",
        "--blockdev",
        &node,
        "--export",
        &format!("{export},iothread=io0"),
    ]));
    let mut vmm = vec![ringvm.clone().into_os_string()];
    vmm.extend(ringvm_alone(vm));
    vmm.extend(words(["--disk", &format!("socket={},queues={queues},queue-size={size}", socket.display())]));
    Ok(Launch { daemon: Some(Daemon { words: daemon, socket }), vmm })
}

/// A disk as the block layer of QEMU has it, named `diskN`.
fn qemu_node(disk: &Disk<'_>, index: usize) -> String {
    let Some(path) = disk.path else {
        return format!("driver=null-co,node-name=disk{index},size={},read-zeroes=off", disk.size);
    };
    // QEMU doubles commas in option values.
    let path = path.to_string_lossy().replace(',', ",,");
    let is_device = fs::metadata(path.as_str()).is_ok_and(|found| {
        use std::os::unix::fs::FileTypeExt;
        found.file_type().is_block_device()
    });
    let driver = if is_device { "host_device" } else { "file" };
    format!(
        "driver=raw,node-name=disk{index},discard=unmap,file.driver={driver},file.filename={path},file.aio=io_uring,\
         file.cache.direct={},file.discard=unmap",
        on(disk.direct)
    )
}

/// Cloud Hypervisor.
pub(super) fn cloud_hypervisor(vm: &Vm<'_>) -> Result<Vec<OsString>> {
    let mut all = words([
        "--kernel",
        &vm.kernel.to_string_lossy(),
        "--cmdline",
        vm.command_line,
        "--cpus",
        &format!("boot={}", vm.cpus),
        "--memory",
        &memory(vm),
        "--serial",
        "tty",
        "--console",
        "off",
    ]);
    if let Some(initramfs) = vm.initramfs {
        all.extend(words(["--initramfs", &initramfs.to_string_lossy()]));
    }
    let mut disks = Vec::new();
    for disk in vm.disks {
        let Some(path) = disk.path else { bail!("Cloud Hypervisor has no null storage: leave it out") };
        let (path, direct) = (path.display(), on(disk.direct));
        let (queues, size) = (disk.queues, disk.queue_size);
        disks.push(format!("path={path},image_type=raw,direct={direct},num_queues={queues},queue_size={size}"));
    }
    let nic =
        |nic: &super::Nic<'_>| format!("tap={},num_queues={},queue_size={}", nic.tap, nic.pairs * 2, nic.queue_size);
    // One option takes all of them.
    for (option, values) in [("--disk", disks), ("--net", vm.nics.iter().map(nic).collect())] {
        if !values.is_empty() {
            all.extend(words([option]));
            all.extend(values.into_iter().map(OsString::from));
        }
    }
    Ok(all)
}

/// Firecracker with one of its block engines.
pub(super) fn firecracker(vm: &Vm<'_>, dir: &Path, engine: &str) -> Result<Vec<OsString>> {
    let mut drives = Vec::new();
    for (index, disk) in vm.disks.iter().enumerate() {
        let Some(path) = disk.path else { bail!("Firecracker has no null storage: leave it out") };
        drives.push(json!({
            "drive_id": format!("disk{index}"),
            "path_on_host": path,
            "is_root_device": false,
            "is_read_only": false,
            "io_engine": engine,
        }));
    }
    if let Some(nic) = vm.nics.iter().find(|nic| nic.pairs > 1) {
        bail!("Firecracker's NICs have one queue pair, not {}: leave it out, or measure with --pairs 1", nic.pairs);
    }
    let nics = vm.nics.iter().enumerate();
    let nics = nics.map(|(index, nic)| json!({ "iface_id": format!("nic{index}"), "host_dev_name": nic.tap }));
    let kernel = vm.elf.unwrap_or(vm.kernel);
    let mut boot = json!({ "kernel_image_path": kernel, "boot_args": vm.command_line });
    if let Some(initramfs) = vm.initramfs {
        boot["initrd_path"] = json!(initramfs);
        // It ends when its guest resets it by the keyboard controller, and at nothing else.
        boot["boot_args"] = json!(format!("{} reboot=k {END_BY_REBOOT}", vm.command_line));
    }
    let config = json!({
        "boot-source": boot,
        "machine-config": { "vcpu_count": vm.cpus, "mem_size_mib": vm.memory },
        "drives": drives,
        "network-interfaces": nics.collect::<Vec<_>>(),
    });
    let path = dir.join(format!("firecracker-{engine}.json"));
    fs::write(&path, config.to_string()).with_context(|| format!("writing {}", path.display()))?;
    // Its log goes to stdout otherwise, before the guest's first byte.
    let log = dir.join(format!("firecracker-{engine}.log"));
    fs::write(&log, "").with_context(|| format!("making {}", log.display()))?;
    let (path, log) = (path.to_string_lossy(), log.to_string_lossy());
    Ok(words(["--no-api", "--enable-pci", "--level", "Error", "--log-path", &log, "--config-file", &path]))
}

/// QEMU's name for the host's CPU. On AMD, KVM may offer ARCH_CAPABILITIES, an MSR of Intel's, and refuse it when it is set; QEMU
/// then aborts. No guest misses it there.
pub(super) fn qemu_host_cpu(is_amd: bool) -> &'static str {
    if is_amd { "host,-arch-capabilities" } else { "host" }
}

/// QEMU with an accelerator.
pub(super) fn qemu(vm: &Vm<'_>, accelerator: &str, cpu: &str) -> Vec<OsString> {
    let mut all = words([
        "-M",
        "q35",
        "-accel",
        accelerator,
        "-cpu",
        cpu,
        "-smp",
        &vm.cpus.to_string(),
        "-m",
        &vm.memory.to_string(),
        "-nodefaults",
        "-no-user-config",
        // Names threads, so that vCPUs can be told from the others.
        "-name",
        "bench,debug-threads=on",
        "-no-reboot",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-kernel",
        &vm.kernel.to_string_lossy(),
        "-append",
        vm.command_line,
    ]);
    if let Some(initramfs) = vm.initramfs {
        all.extend(words(["-initrd", &initramfs.to_string_lossy()]));
    }
    if vm.prefault {
        all.push("-mem-prealloc".into());
    }
    for (index, disk) in vm.disks.iter().enumerate() {
        let (node, queues, size) = (qemu_node(disk, index), disk.queues, disk.queue_size);
        let device = format!(
            "virtio-blk-pci,drive=disk{index},iothread=io{index},disable-legacy=on,num-queues={queues},queue-size={size}"
        );
        let thread = format!("iothread,id=io{index}");
        all.extend(words(["-object", &thread, "-blockdev", &node, "-device", &device]));
    }
    for (index, nic) in vm.nics.iter().enumerate() {
        let netdev = format!("tap,id=net{index},ifname={},script=no,downscript=no,queues={}", nic.tap, nic.pairs);
        // Most that it takes.
        let (mq, size) = (on(nic.pairs > 1), nic.queue_size.min(1024));
        // Without a ROM: it is for booting from the network only, and not always installed.
        let device = format!(
            "virtio-net-pci,netdev=net{index},disable-legacy=on,romfile=,mq={mq},rx_queue_size={size},tx_queue_size={}",
            // All that it takes where frames go out to a tap.
            size.min(256)
        );
        all.extend(words(["-netdev", &netdev, "-device", &device]));
    }
    all
}
