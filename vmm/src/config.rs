//! The configuration of a machine: one structure behind the command line and the TOML file.

mod devices;
mod hardware;
mod hosted;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ringvm_backends::block::BlockOptions;
use ringvm_backends::io::reactor::ReactorOptions;
use ringvm_backends::options;
use ringvm_backends::options::{Check, Checked};
use ringvm_cli::io_options::IoOptions;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use devices::{Backend, DeviceName, DeviceSpec, DeviceType, DiskSpec, FsOptions, NetSpec, Place, VhostUserOptions};
pub use hardware::{ByteSize, CpuConfig, HugePages, MemoryConfig, Serial};
pub use hosted::{ConsoleDevice, VsockDevice};

options! {
    /// Everything that can be said about a machine.
    #[derive(Clone, Debug, PartialEq)]
    pub struct Config {
        ..pub io: IoOptions,
        /// Kernel: an ELF vmlinux or a bzImage.
        pub kernel: Option<PathBuf>,
        /// Initramfs.
        pub initramfs: Option<PathBuf>,
        /// Command line of the kernel. Without one, the serial port becomes the console, or else the first virtio console.
        pub cmdline: Option<String>,
        /// How the kernel is entered.
        pub boot: BootProtocol,
        /// vCPUs.
        pub cpus: CpuConfig,
        /// Guest memory.
        pub memory: MemoryConfig,
        /// Disks, in the order of their PCI slots.
        pub disk: Vec<DiskSpec>,
        /// NICs, in the order of their slots, behind the disks.
        pub net: Vec<NetSpec>,
        /// File systems that daemons share, behind those.
        pub fs: Vec<Checked<FsOptions>>,
        /// Virtio consoles, behind those.
        pub console: Vec<Checked<ConsoleDevice>>,
        /// Vsock device, behind those.
        pub vsock: Option<Checked<VsockDevice>>,
        /// Devices of any kind that daemons serve, behind those.
        pub vhost_user: Vec<Checked<VhostUserOptions>>,
        /// Serial port.
        pub serial: Serial,
        /// Whether there is an entropy device.
        pub rng: bool,
        /// Exit instead of rebooting.
        pub no_reboot: bool,
        /// What a triple fault of the guest does.
        pub on_triple_fault: TripleFault,
        /// Print statistics at exit.
        pub stats: bool,
        /// Longest time in seconds that the machine's end takes.
        pub stop_timeout: u64 = 5,
    }
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum BootProtocol {
    /// By its PVH entry point if it has one, else by the Linux 64-bit protocol.
    #[default]
    Auto,
    /// By its PVH entry point.
    Pvh,
    /// By the Linux 64-bit protocol.
    Linux,
}

/// What a triple fault does. Hardware resets; a person in front of it rather wants to know.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TripleFault {
    /// It is a crash: ringvm ends with exit code 4.
    #[default]
    Exit,
    /// It is a reset, as on hardware.
    Reset,
}

/// A configuration that can't work.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("configuration {}: reading it: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error that it returned.
        source: std::io::Error,
    },
    /// The file is malformed or says something unknown.
    #[error("configuration {}{}: {message}", .path.display(), .line.map(|line| format!(", line {line}")).unwrap_or_default())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The line, counted from one.
        line: Option<usize>,
        /// What is wrong.
        message: String,
    },
    /// An option that can't be, alone or together with another.
    #[error("{0}")]
    Option(String),
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// When it can't be read, or says something that is not known.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
        toml::from_str(&text).map_err(|error| ConfigError::Parse {
            path: path.to_path_buf(),
            line: error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1),
            message: error.message().replace('\n', " "),
        })
    }

    /// Looks for what can't work, as far as that can be told without the host.
    ///
    /// # Errors
    /// For the first thing found.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |message: String| Err(ConfigError::Option(message));
        if self.kernel.is_none() {
            return refuse(
                "there is no kernel to boot; name one with --kernel, or `kernel = …` in the configuration".into(),
            );
        }
        if self.cpus.count == 0 {
            return refuse("a machine of 0 vCPUs can't run; use --cpus 1 or more".into());
        }
        if self.memory.size == 0 {
            return refuse("a machine without memory can't run; use --memory 512M or so".into());
        }
        if self.memory.ksm && self.memory.hugepages.is_some() {
            return refuse(
                "--memory: ksm=on and hugepages exclude each other, the kernel merges only small pages; drop one"
                    .into(),
            );
        }
        self.io.check().map_err(ConfigError::Option)?;
        self.check_images()?;
        self.check_names()?;
        if self.memory.ksm && self.has_daemons() {
            return refuse(
                "--memory: ksm=on keeps other processes out, so that no daemon can serve this machine; drop it, or \
                 place=daemon, socket=, --fs and --vhost-user"
                    .into(),
            );
        }
        let terminals = self.console.iter().filter(|console| console.is_stdio()).count();
        if terminals + usize::from(self.serial == Serial::Stdio) > 1 {
            return refuse(
                "--console stdio: the serial port or another console has the terminal already; give --serial null (the \
                 kernel's console is hvc0 then), or name another end"
                    .into(),
            );
        }
        let devices = self.disk.len()
            + self.net.len()
            + self.fs.len()
            + self.vhost_user.len()
            + self.console.len()
            + usize::from(self.vsock.is_some())
            + usize::from(self.rng);
        if devices > MAX_DEVICES {
            return refuse(format!("{devices} devices are more than the {MAX_DEVICES} slots of the PCI bus"));
        }
        Ok(())
    }

    /// The command line of the kernel.
    #[must_use]
    pub fn effective_cmdline(&self) -> &str {
        match (&self.cmdline, &self.serial) {
            (Some(cmdline), _) => cmdline,
            (None, Serial::Null) if !self.console.is_empty() => VIRTIO_CONSOLE_CMDLINE,
            (None, Serial::Null) => "",
            (None, _) => DEFAULT_CMDLINE,
        }
    }

    /// Refuses an image that two disks would write to, or one would write to and the other read.
    fn check_images(&self) -> Result<(), ConfigError> {
        let mut seen: Vec<&BlockOptions> = Vec::new();
        for disk in self.disk.iter().filter_map(DiskSpec::options) {
            let Some(path) = &disk.path else { continue };
            let same = |other: &&BlockOptions| other.path.as_ref() == Some(path) && !(other.readonly && disk.readonly);
            if seen.iter().any(same) {
                let path = path.display();
                let what = format!("disk {path}: given twice; give it once, or readonly=on both times");
                return Err(ConfigError::Option(what));
            }
            seen.push(disk);
        }
        Ok(())
    }

    /// Refuses two devices of one name.
    fn check_names(&self) -> Result<(), ConfigError> {
        let disks = self.disk.iter().enumerate().map(|(index, disk)| ("--disk", index, disk.name(index)));
        let nets = self.net.iter().enumerate().map(|(index, net)| ("--net", index, net.name(index)));
        let shared = self.fs.iter().enumerate().map(|(index, fs)| ("--fs", index, fs.name(index)));
        let consoles = self.console.iter().enumerate();
        let consoles = consoles.map(|(index, console)| ("--console", index, console.name(index)));
        let vsock = self.vsock.iter().map(|vsock| ("--vsock", 0, vsock.name()));
        let others = self.vhost_user.iter().enumerate();
        let others = others.map(|(index, device)| ("--vhost-user", index, device.name(index)));
        let rng = self.rng.then(|| ("--rng", 0, RNG.to_owned()));
        let mut seen: BTreeMap<String, String> = BTreeMap::new();
        for (option, index, name) in
            disks.chain(nets).chain(shared).chain(consoles).chain(vsock).chain(others).chain(rng)
        {
            let device = format!("{option} (number {index})");
            if let Some(other) = seen.insert(name.clone(), device.clone()) {
                let what = "is the name of two devices";
                let message = format!("{name} {what}, of {other} and {device}; choose another id= for one of them");
                return Err(ConfigError::Option(message));
            }
        }
        Ok(())
    }

    /// Whether anything is served by another process.
    fn has_daemons(&self) -> bool {
        self.disk.iter().any(|disk| disk.options_here().is_none())
            || self.net.iter().any(|net| net.options_here().is_none())
            || !self.fs.is_empty()
            || self.console.iter().any(|console| console.place == Place::Daemon)
            || self.vsock.iter().any(|vsock| vsock.place == Place::Daemon)
            || !self.vhost_user.is_empty()
    }

    /// How many queues are served in this process.
    #[must_use]
    pub fn queues_here(&self) -> usize {
        let disks = self.disk.iter().filter_map(DiskSpec::options_here);
        let nets = self.net.iter().filter_map(NetSpec::options_here);
        disks.map(|disk| usize::from(disk.queues)).sum::<usize>()
            + nets.map(|net| 2 * usize::from(net.queues)).sum::<usize>()
            + usize::from(self.rng)
    }

    /// The I/O threads, of this process and of each daemon that it starts.
    #[must_use]
    pub fn reactor_options(&self) -> ReactorOptions {
        // Pages that are held can't be merged.
        let hold_memory = if self.memory.prefault && !self.memory.ksm { self.memory.size } else { 0 };
        self.io.reactors(self.queues_here(), hold_memory)
    }
}

/// Name of the entropy device.
pub const RNG: &str = "rng0";
const DEFAULT_CMDLINE: &str = "console=ttyS0";
const VIRTIO_CONSOLE_CMDLINE: &str = "console=hvc0";
/// Slots of bus 0, less the host bridge.
const MAX_DEVICES: usize = crate::pci::SLOTS - 1;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.toml");
        std::fs::write(&path, text).unwrap();
        Config::read(&path).and_then(|config| config.validate().map(|()| config)).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_says_everything_the_command_line_can() {
        let config = parse(
            r#"
            kernel = "vmlinuz"
            initramfs = "initrd"
            cmdline = "console=ttyS0 quiet"
            boot = "linux"
            cpus = 2
            memory = { size = "1G", hugepages = "2M", prefault = true }
            serial = "file=/tmp/console"
            rng = true
            io-threads = 2
            io-affinity = [0, 1]
            poll-us = 0
            no-reboot = true
            on-triple-fault = "reset"
            stats = true
            [[disk]]
            path = "/x.img"
            direct = true
            queues = 4
            [[disk]]
            path = "/y.img"
            readonly = true
            "#,
        )
        .unwrap();
        assert_eq!((config.cpus.count, config.boot, config.disk.len()), (2, BootProtocol::Linux, 2));
        assert_eq!((config.memory.size, config.memory.hugepages), (1 << 30, Some(HugePages::TwoMib)));
        assert_eq!(config.serial, Serial::File { path: "/tmp/console".into(), max: 64 << 20 });
        let disks: Vec<_> = config.disk.iter().filter_map(DiskSpec::options).collect();
        assert!(disks[0].direct && disks[0].queues == 4 && disks[1].readonly);
        let options = config.reactor_options();
        assert_eq!((options.count, options.poll), (2, Duration::ZERO));
        assert_eq!(parse("kernel = \"k\"\nmemory = \"64M\"").unwrap().memory.size, 64 << 20);
        assert_eq!(parse("kernel = \"k\"\nmemory = \"64M\"").unwrap().effective_cmdline(), "console=ttyS0");
        let virtio = "kernel = \"k\"\nserial = \"null\"\n[[console]]\nkind = \"pty\"";
        assert_eq!(parse(virtio).unwrap().effective_cmdline(), "console=hvc0");
    }

    #[test]
    fn a_machine_reads_what_it_has_written() {
        let config = parse(
            r#"
            kernel = "vmlinuz"
            boot = "pvh"
            cpus = { count = 2, pmu = true }
            memory = { size = "1G", hugepages = "2M", prefault = true }
            serial = "file=/tmp/console,max=5K"
            io-affinity = [0, 1]
            poll-us = 0
            on-triple-fault = "reset"
            stop-timeout = 9
            disk = [{ path = "/x.img", id = "root", place = "daemon" }, { socket = "/run/b.sock", queues = 2 }]
            net = [{ tap = "t0", mac = "52:54:00:12:34:56" }]
            vhost-user = [{ type = "26", socket = "/run/fs.sock" }]
            "#,
        )
        .unwrap();
        let text = toml::to_string(&config).unwrap();
        assert_eq!(parse(&text).as_ref(), Ok(&config), "{text}");
        assert!(text.contains("type = \"fs\"") && !text.contains("stats"), "{text}");
    }

    #[test]
    fn vcpus_are_a_number_or_a_table() {
        let cpus = |text: &str| parse(&format!("kernel = \"k\"\n{text}")).unwrap().cpus;
        assert_eq!(cpus("cpus = 3"), CpuConfig { count: 3, nested: false, pmu: false });
        assert_eq!(cpus("cpus = { count = 2, pmu = true }"), CpuConfig { count: 2, nested: false, pmu: true });
        assert_eq!(cpus("[cpus]\ncount = 2\nnested = true"), CpuConfig { count: 2, nested: true, pmu: false });
        assert_eq!("4".parse(), Ok(CpuConfig { count: 4, nested: false, pmu: false }));
        assert_eq!("2,nested=on,pmu=on".parse(), Ok(CpuConfig { count: 2, nested: true, pmu: true }));
        assert_eq!("count=2,nested=off".parse(), Ok(CpuConfig { count: 2, nested: false, pmu: false }));
    }

    #[test]
    fn a_serial_file_has_a_limit() {
        let file = |path: &str, max| Ok(Serial::File { path: path.into(), max });
        assert_eq!("file=/a,b.log".parse(), file("/a,b.log", 64 << 20));
        assert_eq!("file=/a.log,max=1G".parse(), file("/a.log", 1 << 30));
        assert_eq!("file=max=1,max=4096".parse(), file("max=1", 4096));
        for (text, expected) in [
            ("file=", "needs a path"),
            ("file=,max=1M", "needs a path"),
            ("file=a,max=0", "max=0"),
            ("file=a,max=lots", "`lots`"),
        ] {
            let error = text.parse::<Serial>().unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn two_devices_never_have_one_name() {
        let disks = "[[disk]]\npath = \"a\"\nid = \"ID\"\n[[disk]]\npath = \"b\"\n";
        let machine = |id: &str| parse(&format!("kernel = \"k\"\nrng = true\n{}", disks.replace("ID", id)));
        for id in ["root", "disk0", "disk2", "net0", "vhost0"] {
            assert_eq!(machine(id).unwrap().disk[0].id.as_ref(), Some(&DeviceName::try_from(id.to_owned()).unwrap()));
        }
        for (id, other) in [("disk1", "--disk (number 1)"), ("rng0", "--rng (number 0)")] {
            let devices = format!("is the name of two devices, of --disk (number 0) and {other}");
            let expected = format!("{id} {devices}; choose another id= for one of them");
            assert_eq!(machine(id).unwrap_err(), expected);
        }
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        for (text, expected) in [
            ("kernel = \"k\"\ncpu = 2", "line 2: unknown field `cpu`"),
            ("kernel = \"k\"\n\n[[disk]]\npath = \"x\"\ndirct = true", "line 5: unknown field `dirct`"),
            ("kernel = ", "line 1"),
            ("cpus = 1", "there is no kernel"),
            ("kernel = \"k\"\ncpus = 0", "0 vCPUs"),
            ("kernel = \"k\"\ncpus = \"2\"", "a number of vCPUs, or a table with a count"),
            ("kernel = \"k\"\ncpus = -1", "a number of vCPUs"),
            ("kernel = \"k\"\ncpus = { count = 1, smt = true }", "unknown field `smt`"),
            ("kernel = \"k\"\nmemory = \"0\"", "without memory"),
            ("kernel = \"k\"\nmemory = \"1X\"", "`1X` is not a size"),
            ("kernel = \"k\"\nserial = \"com2\"", "`com2` is not one of stdio, file=PATH, null"),
            ("kernel = \"k\"\nmemory = { size = 1048576, ksm = true, hugepages = \"2M\" }", "exclude each other"),
            ("kernel = \"k\"\nio-threads = 0", "--io-threads 0"),
            ("kernel = \"k\"\n[[disk]]\npath = \"x\"\n[[disk]]\npath = \"x\"", "given twice"),
            ("kernel = \"k\"\n[[disk]]\npath = \"x\"\n\n[[disk]]\nqueues = 2", "line 5: path= is missing"),
            ("kernel = \"k\"\n[[disk]]\npath = \"x\"\nqueues = 0", "line 2: queues=0 is not from 1 to 64"),
            ("kernel = \"k\"\n[[disk]]\npath = \"x\"\nid = \"a b\"", "line 4: \"a b\" is not a name"),
            ("kernel = \"k\"\n[[net]]\ntap = \"t\"\nlink = \"l\"", "line 2: more than one port is named"),
            ("kernel = \"k\"\n[[vhost-user]]\ntype = \"fs\"", "line 2: missing field `socket`"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        }
        let error = Config::read(Path::new("/nonexistent/vm.toml")).unwrap_err().to_string();
        assert!(error.contains("No such file"), "{error}");
    }
}
