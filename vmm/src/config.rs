//! The configuration of a machine: one structure behind the command line and the TOML file.

mod hardware;

use std::path::{Path, PathBuf};
use std::time::Duration;

use ringvm_backends::block::BlockOptions;
use ringvm_backends::device::Place;
use ringvm_backends::io::reactor::ReactorOptions;
use ringvm_backends::net::NetOptions;
use serde::Deserialize;
use thiserror::Error;

pub use hardware::{ByteSize, CpuConfig, HugePages, MemoryConfig, Serial};

/// Everything that can be said about a machine.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Config {
    /// Kernel: an ELF vmlinux or a bzImage.
    pub kernel: Option<PathBuf>,
    /// Initramfs.
    pub initramfs: Option<PathBuf>,
    /// Command line of the kernel; without one, the serial port becomes the console.
    pub cmdline: Option<String>,
    /// How the kernel is entered.
    pub boot: BootProtocol,
    /// vCPUs.
    pub cpus: CpuConfig,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// Disks, in the order of their PCI slots.
    pub disk: Vec<BlockOptions>,
    /// NICs, in the order of their slots, behind the disks.
    #[serde(default)]
    pub net: Vec<NetOptions>,
    /// Devices of any kind that daemons serve, behind those.
    pub vhost_user: Vec<VhostUserOptions>,
    /// Serial port.
    pub serial: Serial,
    /// Whether there is an entropy device.
    pub rng: bool,
    /// Number of I/O threads; without one, as many as there are queues, at most one per host CPU.
    pub io_threads: Option<usize>,
    /// Host CPUs of the I/O threads.
    pub io_affinity: Vec<usize>,
    /// Longest time in microseconds that an I/O thread polls before it sleeps; 0 never polls.
    pub poll_us: Option<u64>,
    /// Exit instead of rebooting.
    pub no_reboot: bool,
    /// What a triple fault of the guest does.
    pub on_triple_fault: TripleFault,
    /// Print statistics at exit.
    pub stats: bool,
    /// Longest time in seconds that the machine's end takes.
    pub stop_timeout: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            kernel: None,
            initramfs: None,
            cmdline: None,
            boot: BootProtocol::Auto,
            cpus: CpuConfig::default(),
            memory: MemoryConfig::default(),
            disk: Vec::new(),
            net: Vec::new(),
            vhost_user: Vec::new(),
            serial: Serial::Stdio,
            rng: false,
            io_threads: None,
            io_affinity: Vec::new(),
            poll_us: None,
            no_reboot: false,
            on_triple_fault: TripleFault::Exit,
            stats: false,
            stop_timeout: 5,
        }
    }
}

/// A device of any kind that a daemon serves.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VhostUserOptions {
    /// What it is: `net`, `blk`, `console`, `rng`, `scsi`, `9p`, `gpu`, `input`, `vsock`, `fs`, `pmem`, or a virtio device ID.
    #[serde(rename = "type")]
    pub kind: String,
    /// Where the daemon listens.
    pub socket: PathBuf,
    /// Queues that the driver gets; all that the daemon has, if left out.
    pub queues: Option<u16>,
    /// Descriptors per queue, a power of two of at most 32768.
    #[serde(default = "default_queue_size")]
    pub queue_size: u16,
}

fn default_queue_size() -> u16 {
    256
}

impl VhostUserOptions {
    /// The virtio device ID.
    ///
    /// # Errors
    /// One line about what is wrong with the options.
    pub fn device_type(&self) -> Result<u32, String> {
        /// Virtio 1.3, section 5.
        const KINDS: [(&str, u32); 11] = [
            ("net", 1),
            ("blk", 2),
            ("console", 3),
            ("rng", 4),
            ("scsi", 8),
            ("9p", 9),
            ("gpu", 16),
            ("input", 18),
            ("vsock", 19),
            ("fs", 26),
            ("pmem", 27),
        ];
        if !self.queue_size.is_power_of_two() || self.queue_size > 1 << 15 {
            return Err(format!("queue-size={} is not a power of two from 1 to 32768", self.queue_size));
        }
        let known = KINDS.iter().find(|(name, _)| *name == self.kind).map(|(_, id)| *id);
        let number = || self.kind.parse().ok().filter(|id| (1..64).contains(id));
        known.or_else(number).ok_or_else(|| {
            let names: Vec<_> = KINDS.iter().map(|(name, _)| *name).collect();
            format!("type={} is not one of {}, or a virtio device ID from 1 to 63", self.kind, names.join(", "))
        })
    }
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, clap::ValueEnum)]
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
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, clap::ValueEnum)]
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
        /// What came back.
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
        if self.io_threads == Some(0) {
            return refuse(
                "--io-threads 0 would leave nobody to serve the devices; use 1 or more, or leave it out".into(),
            );
        }
        if let Some(threads) = self.io_threads
            && threads > MAX_IO_THREADS
        {
            return refuse(format!("--io-threads {threads} is more than {MAX_IO_THREADS}, one per CPU is enough"));
        }
        if let Some(poll) = self.poll_us
            && poll > MAX_POLL_US
        {
            return refuse(format!("--poll-us {poll} is more than {MAX_POLL_US}, a second; 0 never polls"));
        }
        for (index, disk) in self.disk.iter().enumerate() {
            check_disk(disk).map_err(ConfigError::Option)?;
            let same = |other: &&BlockOptions| {
                other.path.is_some() && other.path == disk.path && !(other.readonly && disk.readonly)
            };
            if let Some(other) = self.disk[..index].iter().find(same) {
                let path = other.path.as_deref().unwrap_or(Path::new("")).display();
                return refuse(format!("disk {path}: given twice; give it once, or readonly=on both times"));
            }
        }
        for net in &self.net {
            net.validate().map_err(|error| ConfigError::Option(error.to_string()))?;
        }
        for device in &self.vhost_user {
            device.device_type().map_err(ConfigError::Option)?;
        }
        if self.memory.ksm && self.has_daemons() {
            return refuse(
                "--memory: ksm=on keeps other processes out, so that no daemon can serve this machine; drop it, or \
                 place=daemon, socket= and --vhost-user"
                    .into(),
            );
        }
        let devices = self.disk.len() + self.net.len() + self.vhost_user.len() + usize::from(self.rng);
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
            (None, Serial::Null) => "",
            (None, _) => DEFAULT_CMDLINE,
        }
    }

    /// Whether anything is served by another process.
    fn has_daemons(&self) -> bool {
        self.disk.iter().any(|disk| disk.place == Place::Daemon || disk.socket.is_some())
            || self.net.iter().any(|net| net.place == Place::Daemon || net.socket.is_some())
            || !self.vhost_user.is_empty()
    }

    /// How many queues are served in this process.
    #[must_use]
    pub fn queues_here(&self) -> usize {
        let here = |place, socket: &Option<PathBuf>| place == Place::Process && socket.is_none();
        let disks = self.disk.iter().filter(|disk| here(disk.place, &disk.socket));
        let nets = self.net.iter().filter(|net| here(net.place, &net.socket));
        disks.map(|disk| usize::from(disk.queues)).sum::<usize>()
            + nets.map(|net| 2 * usize::from(net.queues)).sum::<usize>()
            + usize::from(self.rng)
    }

    /// The I/O threads, of this process and of each daemon that it starts.
    #[must_use]
    pub fn reactor_options(&self) -> ReactorOptions {
        let default = ReactorOptions::default();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        ReactorOptions {
            count: self.io_threads.unwrap_or(self.queues_here().clamp(1, cpus)),
            affinity: self.io_affinity.clone(),
            poll: self.poll_us.map_or(default.poll, Duration::from_micros),
            // Pages that are held can't be merged.
            hold_memory: if self.memory.prefault && !self.memory.ksm { self.memory.size } else { 0 },
            ..default
        }
    }
}

/// Looks for what can't work about one disk, without the host.
///
/// # Errors
/// One line about the first thing found.
pub fn check_disk(disk: &BlockOptions) -> Result<(), String> {
    if disk.path.as_deref() == Some(Path::new("")) {
        return Err("the path of a disk is empty; name an image file or a block device".into());
    }
    disk.validate().map_err(|error| error.to_string())
}

const DEFAULT_CMDLINE: &str = "console=ttyS0";
const MAX_IO_THREADS: usize = 256;
const MAX_POLL_US: u64 = 1_000_000;
/// Slots of bus 0, less the host bridge.
const MAX_DEVICES: usize = crate::pci::SLOTS - 1;

#[cfg(test)]
mod tests {
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
        assert!(config.disk[0].direct && config.disk[0].queues == 4 && config.disk[1].readonly);
        let options = config.reactor_options();
        assert_eq!((options.count, options.poll), (2, Duration::ZERO));
        assert_eq!(parse("kernel = \"k\"\nmemory = \"64M\"").unwrap().memory.size, 64 << 20);
        assert_eq!(parse("kernel = \"k\"\nmemory = \"64M\"").unwrap().effective_cmdline(), "console=ttyS0");
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
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        }
        let error = Config::read(Path::new("/nonexistent/vm.toml")).unwrap_err().to_string();
        assert!(error.contains("No such file"), "{error}");
    }
}
