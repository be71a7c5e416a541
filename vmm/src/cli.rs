//! The command line of `ringvm`. Options override or add to those of the configuration file, and both end up in one
//! [`Config`].

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ringvm_backends::options::Described;
use ringvm_cli::io_options::IoOptions;
use ringvm_cli::{help, keyval, usage};
use serde::de::DeserializeOwned;

use crate::config::{
    BootProtocol, Config, ConfigError, ConsoleDevice, CpuConfig, DiskSpec, FsOptions, MemoryConfig, NetSpec, Serial,
    TripleFault, VhostUserOptions, VsockDevice,
};

const RUN_EXAMPLES: &str = "\
Examples:
  Boot a kernel with an initramfs; the console is this terminal (Ctrl-A x ends it):
    ringvm run --kernel vmlinuz --initramfs initrd.img --memory 1G --cpus 2

  A disk of four queues that bypasses the page cache, and an entropy device:
    ringvm run --kernel vmlinuz --cmdline 'console=ttyS0 root=/dev/vda' \\
        --disk path=disk.img,direct=on,queues=4 --rng on

  Two NICs: one on a tap with two queue pairs, one joined to another VM's:
    ringvm run --kernel vmlinuz --net tap=vm0,queues=2,mac=52:54:00:12:34:56 --net link=/run/ab

  A disk in a daemon of its own, and one that a running daemon serves:
    ringvm run --kernel vmlinuz --disk path=disk.img,place=daemon --disk socket=/run/b.sock

  The same from a file; options given here override it, disks are added:
    ringvm run --config vm.toml --memory size=4G,hugepages=2M

Exit codes:
  0  the guest powered off, or SIGTERM, SIGINT or Ctrl-A x ended it and its disks were flushed
  1  ringvm failed (a bug)
  2  the configuration can't work; nothing was started
  3  the host failed (KVM, io_uring, memory, a disk)
  4  the guest crashed
  5  the guest rebooted under --no-reboot

SIGUSR1 prints the statistics of every device on standard error. SIGUSR2 moves every disk from this process into a daemon, or back.";

/// The command whose help explains the options.
const COMMAND: &str = "ringvm run";

/// An event-driven virtual machine monitor for Linux/KVM.
#[derive(Debug, Parser)]
#[command(name = "ringvm", version, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Say more on standard error: -v what happens, -vv how. RUST_LOG overrides it.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

impl Cli {
    /// Reads the command line of this process. Help and version are printed and end it.
    ///
    /// # Errors
    /// One line about what is wrong.
    pub fn from_process() -> Result<Self, String> {
        usage::parse(COMMAND, described)
    }
}

/// The command line with the keys of each option in its help.
fn described(command: clap::Command) -> clap::Command {
    command.mut_subcommand("run", |run| {
        run.mut_arg("cpus", help::keys::<CpuConfig>)
            .mut_arg("memory", help::keys::<MemoryConfig>)
            .mut_arg("disk", help::keys::<DiskSpec>)
            .mut_arg("net", help::keys::<NetSpec>)
            .mut_arg("fs", help::keys::<FsOptions>)
            .mut_arg("console", help::keys::<ConsoleDevice>)
            .mut_arg("vsock", help::keys::<VsockDevice>)
            .mut_arg("vhost_user", help::keys::<VhostUserOptions>)
    })
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine
    #[command(after_help = RUN_EXAMPLES)]
    Run(Box<RunArgs>),
    /// Say what this host offers and what to do about what is missing
    Check,
}

/// A switch with a value, as `--rng on`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// Yes.
    On,
    /// No.
    Off,
}

/// The options of `ringvm run`.
#[derive(Args, Debug, Default)]
pub struct RunArgs {
    /// Read the configuration from a TOML file; its keys are the names of these options
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Kernel to boot: an ELF vmlinux or a bzImage (vmlinuz)
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub initramfs: Option<PathBuf>,
    /// Kernel command line [default: console=ttyS0]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Boot")]
    pub cmdline: Option<String>,
    /// How the kernel is entered [default: auto]
    #[arg(long, value_name = "PROTOCOL", help_heading = "Boot")]
    pub boot: Option<BootProtocol>,
    /// vCPUs [default: 1]
    #[arg(long, value_name = "OPTIONS", help_heading = "Machine")]
    pub cpus: Option<String>,
    /// Guest memory [default: 512M]
    #[arg(long, value_name = "OPTIONS", help_heading = "Machine")]
    pub memory: Option<String>,
    /// Serial port: stdio, file=PATH or null [default: stdio]. A file is written anew, for its owner only, up to file=PATH,max=SIZE
    /// [default: 64M]; what the guest writes after that is dropped
    #[arg(long, value_name = "WHERE", help_heading = "Machine")]
    pub serial: Option<String>,
    /// Entropy device (virtio-rng) [default: off]
    #[arg(long, value_name = "SWITCH", num_args = 0..=1, default_missing_value = "on", help_heading = "Machine")]
    pub rng: Option<OnOff>,
    /// Add a disk (virtio-blk); may be repeated
    #[arg(long, value_name = "OPTIONS", help_heading = "Devices")]
    pub disk: Vec<String>,
    /// Add a NIC (virtio-net) on one of tap, fds, link and loopback; may be repeated
    #[arg(long, value_name = "OPTIONS", help_heading = "Devices")]
    pub net: Vec<String>,
    /// Share a file system that a vhost-user daemon serves (virtio-fs); may be repeated
    #[arg(long, value_name = "OPTIONS", help_heading = "Devices")]
    pub fs: Vec<String>,
    /// Add a console (virtio-console, hvc0 in the guest); may be repeated
    #[arg(long, value_name = "OPTIONS", help_heading = "Devices")]
    pub console: Vec<String>,
    /// Add sockets between host and guest (virtio-vsock)
    #[arg(long, value_name = "OPTIONS", help_heading = "Devices")]
    pub vsock: Option<String>,
    /// Add a device of any kind that a vhost-user daemon serves; may be repeated
    #[arg(long, value_name = "OPTIONS", help_heading = "Devices")]
    pub vhost_user: Vec<String>,
    /// The I/O threads
    #[command(flatten, next_help_heading = "Devices")]
    pub io: IoOptions,
    /// Exit with code 5 when the guest reboots
    #[arg(long, help_heading = "Ending")]
    pub no_reboot: bool,
    /// What a triple fault does: exit with code 4, or reset as on hardware [default: exit]
    #[arg(long, value_name = "ACTION", help_heading = "Ending")]
    pub on_triple_fault: Option<TripleFault>,
    /// Longest time in seconds that the end takes [default: 5]. Requests in flight are cancelled and disks flushed; what is not
    /// through by then is given up, with exit code 3
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600), help_heading = "Ending")]
    pub stop_timeout: Option<u64>,
    /// Print the statistics of every device on standard error at exit
    #[arg(long, help_heading = "Ending")]
    pub stats: bool,
}

impl RunArgs {
    /// The configuration: the file's, if one is named, with these options over it.
    ///
    /// # Errors
    /// When either says something that can't be.
    pub fn into_config(self) -> Result<Config, ConfigError> {
        let mut config = match &self.config {
            Some(path) => Config::read(path)?,
            None => Config::default(),
        };
        let option = |name: &str, text: &str, reason: String| ConfigError::Option(format!("--{name} {text}: {reason}"));
        config.kernel = self.kernel.or(config.kernel);
        config.initramfs = self.initramfs.or(config.initramfs);
        config.cmdline = self.cmdline.or(config.cmdline);
        set(&mut config.boot, self.boot);
        if let Some(text) = &self.cpus {
            config.cpus = text.parse::<CpuConfig>().map_err(|error| option("cpus", text, error))?;
        }
        if let Some(text) = &self.memory {
            config.memory = text.parse::<MemoryConfig>().map_err(|error| option("memory", text, error))?;
        }
        if let Some(text) = &self.serial {
            config.serial = text.parse::<Serial>().map_err(|error| option("serial", text, error))?;
        }
        set(&mut config.rng, self.rng.map(|rng| rng == OnOff::On));
        config.disk.extend(devices("disk", &self.disk)?);
        config.net.extend(devices("net", &self.net)?);
        config.fs.extend(devices("fs", &self.fs)?);
        config.console.extend(devices("console", &self.console)?);
        if let Some(text) = &self.vsock {
            config.vsock = Some(keyval::read(text).map_err(|error| option("vsock", text, error))?);
        }
        config.vhost_user.extend(devices("vhost-user", &self.vhost_user)?);
        config.io = self.io.or(config.io);
        config.no_reboot |= self.no_reboot;
        set(&mut config.on_triple_fault, self.on_triple_fault);
        config.stats |= self.stats;
        set(&mut config.stop_timeout, self.stop_timeout);
        config.validate()?;
        Ok(config)
    }
}

/// Reads the devices that an option names.
fn devices<T: Described + DeserializeOwned>(name: &str, texts: &[String]) -> Result<Vec<T>, ConfigError> {
    let read =
        |text: &String| keyval::read(text).map_err(|reason| ConfigError::Option(format!("--{name} {text}: {reason}")));
    texts.iter().map(read).collect()
}

fn set<T>(target: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *target = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(args: &[&str]) -> Result<Config, String> {
        let cli = Cli::try_parse_from(["ringvm", "run"].iter().chain(args))
            .map_err(|error| usage::one_line(&error, COMMAND))?;
        let Command::Run(args) = cli.command else { unreachable!("run was given") };
        args.into_config().map_err(|error| error.to_string())
    }

    #[test]
    fn options_override_and_add_to_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.toml");
        std::fs::write(&path, "kernel = \"a\"\ncpus = 4\nmemory = \"1G\"\nrng = true\n[[disk]]\npath = \"x\"\n")
            .unwrap();
        let path = path.to_str().unwrap();
        let merged = config(&["--config", path, "--cpus", "2", "--disk", "y,queues=2", "--rng", "off"]).unwrap();
        assert_eq!((merged.cpus.count, merged.memory.size, merged.rng), (2, 1 << 30, false));
        assert_eq!(
            merged.disk.iter().filter_map(DiskSpec::options).map(|disk| disk.queues).collect::<Vec<_>>(),
            [1, 2]
        );
        assert_eq!(merged.kernel.as_deref(), Some(std::path::Path::new("a")));
    }

    #[test]
    fn the_command_line_says_everything_the_file_can() {
        let config = config(&[
            "--kernel",
            "k",
            "--initramfs",
            "i",
            "--cmdline",
            "-x",
            "--boot",
            "pvh",
            "--cpus",
            "3",
            "--memory",
            "size=1G,hugepages=1G,prefault=on",
            "--serial",
            "null",
            "--rng",
            "--disk",
            "path=/x,direct=on",
            "--net",
            "tap=vm0,mtu=9000",
            "--net",
            "link=/run/ab",
            "--io-threads",
            "2",
            "--io-affinity",
            "0,1",
            "--poll-us",
            "7",
            "--no-reboot",
            "--on-triple-fault",
            "reset",
            "--stats",
        ])
        .unwrap();
        assert!(config.rng && config.no_reboot && config.stats && config.memory.prefault);
        assert!(config.disk[0].options().unwrap().direct);
        assert_eq!((config.net.len(), config.net[0].options().unwrap().mtu), (2, Some(9000)));
        let io = IoOptions { io_threads: Some(2), io_affinity: vec![0, 1], poll_us: Some(7) };
        assert_eq!((config.io, config.cmdline.as_deref()), (io, Some("-x")));
    }

    #[test]
    fn mistakes_are_named() {
        for (args, expected) in [
            (&[][..], "there is no kernel"),
            (&["--kernel", "k", "--memory", "0"], "without memory"),
            (&["--kernel", "k", "--memory", "lots"], "--memory lots: size: `lots` is not a size"),
            (&["--kernel", "k", "--disk", "path=x,dirct=on"], "--disk path=x,dirct=on: there is no key `dirct`"),
            (&["--kernel", "k", "--disk", "queues=2"], "path= is missing"),
            (&["--kernel", "k", "--net", "queues=2"], "no port is named"),
            (&["--kernel", "k", "--net", "tap=a,link=b"], "more than one port is named"),
            (&["--kernel", "k", "--net", "tap=a,mac=01:00:5e:00:00:01"], "is a multicast address"),
            (&["--kernel", "k", "--net", "tap=a,mtu=20"], "mtu=20 is not from 68"),
            (&["--kernel", "k", "--net", "tap=a,speed=1"], "there is no key `speed`"),
            (&["--kernel", "k", "--fs", "tag=a"], "the key `socket` is missing"),
            (&["--kernel", "k", "--fs", "tag=,socket=/s"], "tag= is not a name of 1 to 36 bytes"),
            (&["--kernel", "k", "--fs", "tag=a,socket=/s,queues=64"], "queues=64 is not from 1 to 63"),
            (&["--kernel", "k", "--fs", "tag=a,socket="], "socket= is empty"),
            (
                &["--kernel", "k", "--fs", "tag=a,socket=/s", "--memory", "1G,ksm=on"],
                "drop it, or place=daemon, socket=, --fs",
            ),
            (&["--kernel", "k", "--console", "stdio"], "has the terminal already; give --serial null"),
            (&["--kernel", "k", "--serial", "null", "--console", "stdio,place=daemon"], "a daemon has no terminal"),
            (&["--kernel", "k", "--console", "id=c"], "the console has no end on the host"),
            (&["--kernel", "k", "--vsock", "cid=2,socket=/s"], "cid=2 is the host"),
            (&["--kernel", "k", "--serial", "tty"], "--serial tty: `tty` is not one of"),
            (&["--kernel", "k", "--cpus", "0"], "0 vCPUs"),
            (&["--kernel", "k", "--cpus", "many"], "--cpus many: count: `many`"),
            (&["--kernel", "k", "--cpus", "2,smt=on"], "there is no key `smt`; the keys are count, nested, pmu"),
            (&["--kernel", "k", "--cpus", "nested=on"], "the key `count` is missing"),
            (&["--kernel", "k", "--serial", "file=x,max=lots"], "max: `lots` is not a size"),
            (
                &["--kernel", "k", "--boot", "bios"],
                "invalid value 'bios' for '--boot <PROTOCOL>' [possible values: auto,",
            ),
            (&["--kernel", "k", "--nonsense"], "unexpected argument '--nonsense'"),
            (&["--kernel", "k", "--kernel", "l"], "cannot be used multiple times"),
        ] {
            let error = config(args).unwrap_err();
            assert!(error.contains(expected) && !error.contains('\n'), "{args:?}: {error}");
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        described(Cli::command()).debug_assert();
    }
}
