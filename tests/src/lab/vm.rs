//! A guest of the lab in a line: `vm().cpus(2).disk(disk(&image).queues(2))`, and what that is as ringvm's command line.

use std::env;

use super::payload;
use crate::native::Place;

/// The variable that puts every disk and NIC whose test does not say where it is into daemons: `daemon`.
const PLACE: &str = "RINGVM_LAB_PLACE";

fn usual_place() -> Place {
    match env::var(PLACE).as_deref() {
        Ok("daemon") => Place::Daemon,
        Ok("" | "process") | Err(_) => Place::Process,
        Ok(other) => panic!("{PLACE} is `{other}`; the places are process and daemon"),
    }
}

/// In which form the stock kernel is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// As Debian packs it.
    BzImage,
    /// The ELF image within, entered as ringvm sees fit: by its PVH note.
    Elf,
    /// The ELF image, entered by the Linux 64-bit protocol.
    ElfLinux64,
}

/// An image file on L1's own disk.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its path in L1.
    pub path: String,
}

/// A disk of a guest.
#[derive(Clone, Debug)]
pub struct Disk {
    path: String,
    place: Place,
    options: Vec<(&'static str, String)>,
}

/// A disk that serves this image.
pub fn disk(image: &Image) -> Disk {
    Disk { path: image.path.clone(), place: usual_place(), options: Vec::new() }
}

impl Disk {
    fn with(mut self, key: &'static str, value: impl ToString) -> Disk {
        self.options.push((key, value.to_string()));
        self
    }

    /// Served there.
    pub fn place(self, place: Place) -> Disk {
        Disk { place, ..self }
    }

    /// This many virtqueues.
    pub fn queues(self, count: u16) -> Disk {
        self.with("queues", count)
    }

    /// Virtqueues of this many entries.
    pub fn queue_size(self, entries: u16) -> Disk {
        self.with("queue-size", entries)
    }

    /// Opened with O_DIRECT.
    pub fn direct(self) -> Disk {
        self.with("direct", "on")
    }

    /// Refuses writes.
    pub fn readonly(self) -> Disk {
        self.with("readonly", "on")
    }

    /// What GET_ID answers.
    pub fn serial(self, serial: &str) -> Disk {
        self.with("serial", serial)
    }

    fn option(&self) -> String {
        let options = self.options.iter().map(|(key, value)| format!(",{key}={value}"));
        format!("path={},{}{}", self.path, self.place.option(), options.collect::<String>())
    }

    /// The same as a table of the configuration file.
    fn toml(&self) -> String {
        let place = self.place.option().trim_start_matches("place=");
        let mut text = format!("[[disk]]\npath = {:?}\nplace = {place:?}\n", self.path);
        for (key, value) in &self.options {
            let value = match value.as_str() {
                "on" => "true".to_owned(),
                number if number.parse::<u32>().is_ok() => number.to_owned(),
                other => format!("{other:?}"),
            };
            text.push_str(&format!("{key} = {value}\n"));
        }
        text
    }
}

/// A guest to be started.
#[derive(Clone, Debug)]
pub struct Vm {
    kernel: Kernel,
    initramfs: &'static str,
    by_hand: bool,
    pub(crate) verbose: bool,
    pub(crate) config_file: bool,
    no_reboot: bool,
    cpus: u32,
    memory: String,
    disks: Vec<Disk>,
    extra: Vec<String>,
}

/// A guest with one vCPU, 512 MiB, the bzImage, and no disk.
pub fn vm() -> Vm {
    Vm {
        kernel: Kernel::BzImage,
        initramfs: payload::INITRAMFS,
        by_hand: false,
        verbose: false,
        config_file: false,
        no_reboot: false,
        cpus: 1,
        memory: "512M".into(),
        disks: Vec::new(),
        extra: Vec::new(),
    }
}

impl Vm {
    /// The kernel in this form.
    pub fn kernel(mut self, kernel: Kernel) -> Vm {
        self.kernel = kernel;
        self
    }

    /// This many vCPUs.
    pub fn cpus(mut self, count: u32) -> Vm {
        self.cpus = count;
        self
    }

    /// This much memory, as the command line has it.
    pub fn memory(mut self, size: &str) -> Vm {
        self.memory = size.into();
        self
    }

    /// One more disk: /dev/vda, /dev/vdb, ... in the order of the calls.
    pub fn disk(mut self, disk: Disk) -> Vm {
        self.disks.push(disk);
        self
    }

    /// One more NIC with these options of `--net`: eth0, eth1, ... in the order of the calls.
    pub fn net(self, options: &str) -> Vm {
        self.net_in(usual_place(), options)
    }

    /// [`Vm::net`], served there.
    pub fn net_in(self, place: Place, options: &str) -> Vm {
        self.arg("--net").arg(&format!("{options},{}", place.option()))
    }

    /// With fio in the guest, which takes an initramfs of 80 MB.
    pub fn fio(mut self) -> Vm {
        self.initramfs = payload::INITRAMFS_FIO;
        self
    }

    /// With socat in the guest.
    pub fn socat(mut self) -> Vm {
        self.initramfs = payload::INITRAMFS_SOCAT;
        self
    }

    /// `--no-reboot`.
    pub fn no_reboot(mut self) -> Vm {
        self.no_reboot = true;
        self
    }

    /// One more argument of `ringvm run`.
    pub fn arg(mut self, argument: &str) -> Vm {
        self.extra.push(argument.into());
        self
    }

    /// Described by a file for `--config` instead of options.
    pub fn from_config_file(mut self) -> Vm {
        self.config_file = true;
        self
    }

    /// With a shell for a person on the console, instead of one that the harness drives.
    pub fn by_hand(mut self) -> Vm {
        self.by_hand = true;
        self
    }

    fn kernel_path(&self) -> &'static str {
        match self.kernel {
            Kernel::BzImage => payload::BZIMAGE,
            Kernel::Elf | Kernel::ElfLinux64 => payload::VMLINUX,
        }
    }

    fn cmdline(&self) -> String {
        let loud = if self.verbose { "ignore_loglevel earlyprintk=ttyS0" } else { "quiet" };
        let shell = if self.by_hand { "hand" } else { "driven" };
        format!("console=ttyS0 panic=-1 {loud} lab.shell={shell} lab.disks={}", self.disks.len())
    }

    /// The arguments of `ringvm` for this guest.
    pub fn args(&self) -> Vec<String> {
        let mut args = vec!["run".to_owned()];
        let mut option = |name: &str, value: &str| args.extend([name.to_owned(), value.to_owned()]);
        option("--kernel", self.kernel_path());
        option("--initramfs", self.initramfs);
        option("--cmdline", &self.cmdline());
        option("--cpus", &self.cpus.to_string());
        option("--memory", &self.memory);
        option("--serial", "stdio");
        // An emulated machine takes its time to flush a disk.
        option("--stop-timeout", "60");
        for disk in &self.disks {
            option("--disk", &disk.option());
        }
        if self.kernel == Kernel::ElfLinux64 {
            args.extend(["--boot".into(), "linux".into()]);
        }
        if self.no_reboot {
            args.push("--no-reboot".into());
        }
        args.extend(self.extra.iter().cloned());
        args
    }

    /// The same as a configuration file.
    pub fn toml(&self) -> String {
        let mut text = format!(
            "kernel = {:?}\ninitramfs = {:?}\ncmdline = {:?}\nserial = \"stdio\"\ncpus = {}\nmemory = {:?}\nno-reboot = {}\n",
            self.kernel_path(),
            self.initramfs,
            self.cmdline(),
            self.cpus,
            self.memory,
            self.no_reboot
        );
        if self.kernel == Kernel::ElfLinux64 {
            text.push_str("boot = \"linux\"\n");
        }
        for disk in &self.disks {
            text.push_str(&disk.toml());
        }
        text
    }
}

/// A word for the shell, quoted.
pub(crate) fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
