//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::vmm::Contestant;

/// Measures ringvm with the embedded guest, beside what a plain io_uring ring reaches on the host with the same file.
#[derive(Debug, Parser)]
#[command(version, about, after_help = "Without a command: `block` with its defaults, in about two minutes.")]
pub struct Cli {
    /// What to measure.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The block device: IOPS, latency, and what the VMM's threads cost
    #[command(after_help = BLOCK_EXAMPLES)]
    Block(Box<BlockOptions>),
    /// The NIC: frames per second into and out of a tap, and what the VMM's threads cost
    #[command(after_help = NET_EXAMPLES)]
    Net(Box<NetOptions>),
}

const BLOCK_EXAMPLES: &str = "Examples:
  ringvm-bench block --depth 32 --runs 9
  ringvm-bench block --rw rand-write --direct --size 4G --file /mnt/fast/scratch.img
  ringvm-bench block --against qemu=/usr/bin/qemu-system-x86_64 --json result.json";

const NET_EXAMPLES: &str = "The tap lies in a network namespace of this program's own: no interface of the host is touched. This takes root, or a
kernel that lets everybody have user namespaces.

Examples:
  ringvm-bench net --only out --size 64,1500 --runs 9
  ringvm-bench net --pairs 2 --cpus 2
  ringvm-bench net --only in --irq=none
  ringvm-bench net --against firecracker=/usr/bin/firecracker --json result.json";

impl Default for Command {
    fn default() -> Self {
        // The defaults are those of the arguments below: said once.
        match Cli::try_parse_from(["ringvm-bench", "block"]).map(|cli| cli.command) {
            Ok(Some(command)) => command,
            other => unreachable!("`block` has defaults for all of its options: {other:?}"),
        }
    }
}

/// How `block` measures.
#[derive(Args, Clone, Debug)]
pub struct BlockOptions {
    /// Requests in flight, per queue; several are measured one after the other
    #[arg(long, value_delimiter = ',', default_value = "1,32,64", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub depth: Vec<u32>,
    /// Bytes per request
    #[arg(long, default_value = "4k", value_parser = block_size)]
    pub bs: u64,
    /// What is done to the disk
    #[arg(long, value_enum, default_value_t = Pattern::RandRead)]
    pub rw: Pattern,
    /// Queues of the disk, all of them used
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,
    /// vCPUs that drive the queues
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub cpus: u16,
    /// Completions by interrupts; without this the guest polls
    #[arg(long)]
    pub irq: bool,
    /// Runs of each contestant at each depth; the table shows medians
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// How long one run measures, e.g. 500ms or 2s
    #[arg(long, default_value = "2s", value_parser = duration)]
    pub time: Duration,
    /// Bytes of the disk that are used
    #[arg(long, default_value = "1G", value_parser = bytes)]
    pub size: u64,
    /// The disk: a file (made if it does not exist) or a block device; a temporary file if not given
    #[arg(long, value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Let jobs that write do so to a disk that existed before
    #[arg(long, requires = "file")]
    pub overwrite: bool,
    /// Past the page cache (O_DIRECT)
    #[arg(long)]
    pub direct: bool,
    /// The ringvm to measure; the one beside this program if not given
    #[arg(long, value_name = "PATH")]
    pub ringvm: Option<PathBuf>,
    /// Other VMMs, as KIND=PATH; KIND is ringvm, cloud-hypervisor, firecracker, firecracker-async, qemu or qemu-tcg
    #[arg(long, value_name = "KIND=PATH", value_delimiter = ',', value_parser = Contestant::parse)]
    pub against: Vec<Contestant>,
    /// Measure the backend alone too, driven from this process; where there is no /dev/kvm that is done anyway
    #[arg(long)]
    pub backend: bool,
    /// Write all results, the machine and the commands to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// How `net` measures.
#[derive(Args, Clone, Debug)]
pub struct NetOptions {
    /// Bytes of the frames that go out, without their check sequence; those of more than 1514 are TCP for the host to cut
    /// into segments (TSO)
    #[arg(long, value_delimiter = ',', default_value = "64,1500,65000", value_parser = clap::value_parser!(u32).range(60..=65_535))]
    pub size: Vec<u32>,
    /// Bytes of the frames that come in
    #[arg(long, value_delimiter = ',', default_value = "1500", value_parser = clap::value_parser!(u32).range(60..=1_514))]
    pub receive_size: Vec<u32>,
    /// One direction only
    #[arg(long, value_enum)]
    pub only: Option<Direction>,
    /// Where the guest sleeps until an interrupt comes, as the drivers of other guests do; it polls where it does not. Without
    /// a value: both
    #[arg(long, value_enum, value_name = "DIRECTION", default_value_t = Sleeps::In, num_args = 0..=1, require_equals = true, default_missing_value = "both")]
    pub irq: Sleeps,
    /// Frames in flight per pair on the way out, and per system call of the plain process
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub depth: u32,
    /// Queue pairs of the NIC, all of them used
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub pairs: u16,
    /// vCPUs that drive the pairs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub cpus: u16,
    /// Runs of each contestant at each size; the table shows medians
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// How long one run measures, e.g. 500ms or 2s
    #[arg(long, default_value = "2s", value_parser = duration)]
    pub time: Duration,
    /// The ringvm to measure; the one beside this program if not given
    #[arg(long, value_name = "PATH")]
    pub ringvm: Option<PathBuf>,
    /// Other VMMs, as KIND=PATH; KIND is ringvm, cloud-hypervisor, firecracker, qemu or qemu-tcg
    #[arg(long, value_name = "KIND=PATH", value_delimiter = ',', value_parser = Contestant::parse)]
    pub against: Vec<Contestant>,
    /// Measure the plain process alone, no VM; where there is no /dev/kvm that is done anyway
    #[arg(long, conflicts_with_all = ["against", "ringvm"])]
    pub plain: bool,
    /// Write all results, the machine and the commands to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Where frames go, as seen by the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Direction {
    /// From the guest into the tap.
    Out,
    /// From the tap to the guest.
    In,
}

/// In which directions the guest has interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sleeps {
    /// Where frames come in.
    In,
    /// Wherever frames go.
    Both,
    /// Nowhere.
    None,
}

impl Sleeps {
    /// Whether it has in this one.
    pub fn is_in(self, direction: Direction) -> bool {
        match self {
            Self::In => direction == Direction::In,
            Self::Both => true,
            Self::None => false,
        }
    }
}

impl Direction {
    /// In tables and reports.
    pub fn words(self) -> &'static str {
        match self {
            Self::Out => "out",
            Self::In => "in",
        }
    }
}

/// Kinds of load, named as the guest's jobs are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pattern {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random reads.
    RandRead,
    /// Random writes.
    RandWrite,
    /// Random, 70 % reads.
    Mixed,
}

impl Pattern {
    /// The guest's name for it.
    pub fn job(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::RandRead => "rand-read",
            Self::RandWrite => "rand-write",
            Self::Mixed => "mixed",
        }
    }

    /// For people.
    pub fn words(self) -> &'static str {
        match self {
            Self::Read => "sequential reads",
            Self::Write => "sequential writes",
            Self::RandRead => "random reads",
            Self::RandWrite => "random writes",
            Self::Mixed => "random reads and writes (70 % reads)",
        }
    }

    /// Whether the disk's content changes.
    pub fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::RandRead)
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (&text[..text.len() - 1], 10),
        Some(b'm' | b'M') => (&text[..text.len() - 1], 20),
        Some(b'g' | b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits.parse().map_err(|_| "expected bytes, e.g. 4096, 4k, 64M or 1G".to_owned())?;
    number.checked_mul(1 << shift).filter(|&n| n > 0).ok_or_else(|| "expected 1 to 2^64-1 bytes".to_owned())
}

fn block_size(text: &str) -> Result<u64, String> {
    bytes(text)?;
    match bytes(text)? {
        size if size % 512 == 0 && size <= 1 << 20 => Ok(size),
        _ => Err("expected a multiple of 512 up to 1M".to_owned()),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let (digits, unit) = match text.strip_suffix("ms") {
        Some(digits) => (digits, 1),
        None => (text.strip_suffix('s').unwrap_or(text), 1_000),
    };
    let number: u64 = digits.parse().map_err(|_| "expected a time, e.g. 500ms or 2s".to_owned())?;
    match number.checked_mul(unit) {
        Some(ms @ 10..=3_600_000) => Ok(Duration::from_millis(ms)),
        _ => Err("expected 10ms to 3600s".to_owned()),
    }
}
