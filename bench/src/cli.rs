//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::vmm::{Against, Kind};
use crate::workload::{Direction, Pattern, Storage};

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
    /// A guest that does nothing: the CPU time that its VM takes
    #[command(after_help = IDLE_EXAMPLES)]
    Idle(Box<IdleOptions>),
    /// A Linux guest with a stock kernel: job files of fio on its disk, iperf3 over its NIC, and both on the host beside it
    #[command(after_help = LINUX_EXAMPLES)]
    Linux(Box<LinuxOptions>),
    /// Compare two results that --json has written
    #[command(after_help = COMPARE_EXAMPLES)]
    Compare(CompareOptions),
    /// Print the table of a result that --json has written, or make its report
    Report(ReportOptions),
}

const BLOCK_EXAMPLES: &str = "Examples:
  ringvm-bench block --depth 32 --runs 9
  ringvm-bench block --rw rand-write --direct --size 4G --file /mnt/fast/scratch.img
  ringvm-bench block --rw rand-read,rand-write --bs 4k,128k --depth 1,8,32 --html report.html
  ringvm-bench block --against qemu=/usr/bin/qemu-system-x86_64 --json result.json
  ringvm-bench block --against found --syscalls --html report.html
  ringvm-bench block --storage null --depth 64";

const NET_EXAMPLES: &str = "The tap lies in a network namespace of this program's own: no interface of the host is touched. This takes root, or a
kernel that lets everybody have user namespaces.

Examples:
  ringvm-bench net --only out --size 64,1500 --runs 9
  ringvm-bench net --pairs 2 --cpus 2
  ringvm-bench net --only in --irq=none
  ringvm-bench net --against firecracker=/usr/bin/firecracker --json result.json";

const IDLE_EXAMPLES: &str = "The NICs' taps lie in a network namespace of this program's own, which takes root or a kernel that lets everybody have
user namespaces; --nics 0 does without.

Examples:
  ringvm-bench idle --time 30s --against found
  ringvm-bench idle --disks 8 --nics 0";

const LINUX_EXAMPLES: &str = "Without --fio and --iperf3: random reads and writes of 4 KiB, sequential ones of 128 KiB, and one stream each way.

A job file is fio's own; its disk is /dev/vda, which needs not be named. On the host fio runs the same file on the same disk,
past the page cache if --direct is given; iperf3 runs over the loopback interface with the MTU of the guest's NIC. The tap lies in
a network namespace of this program's own, which takes root or a kernel that lets everybody have user namespaces.
fio, iperf3 and a static busybox of this host go into the guest: apt-get install fio iperf3 busybox-static.

Examples:
  ringvm-bench linux --kernel /boot/vmlinuz-6.12.1 --html report.html
  ringvm-bench linux --fio bench/jobs/disk.fio --fio my.fio --direct --size 4G --against found
  ringvm-bench linux --iperf3 '-t 5 -P 2' --iperf3 '-t 5 -P 2 -R' --pairs 2 --cpus 2
  ringvm-bench linux --iperf3 bench/jobs/iperf3.txt --vmm ringvm,qemu";

const COMPARE_EXAMPLES: &str = "Exit code 1 if --fail-below is given and some ratio is less.

Examples:
  ringvm-bench compare before.json after.json
  ringvm-bench compare before.json after.json --fail-below 0.97";

impl Default for Command {
    fn default() -> Self {
        // The defaults are those of the arguments below: said once.
        match Cli::try_parse_from(["ringvm-bench", "block"]).map(|cli| cli.command) {
            Ok(Some(command)) => command,
            other => unreachable!("`block` has defaults for all of its options: {other:?}"),
        }
    }
}

/// Who is measured.
#[derive(Args, Clone, Debug)]
pub struct Others {
    /// The ringvm to measure; the one beside this program if not given
    #[arg(long, value_name = "PATH")]
    pub ringvm: Option<PathBuf>,
    /// Other VMMs, as KIND=PATH; KIND is ringvm, cloud-hypervisor, firecracker, firecracker-async, qemu, qemu-tcg, or
    /// qemu-storage-daemon, which serves its disk to ringvm. `found`: those of them that are on the PATH
    #[arg(long, value_name = "KIND=PATH|found", value_delimiter = ',', value_parser = Against::parse)]
    pub against: Vec<Against>,
    /// Allocate the guest's memory before it starts, under those that can: all but Firecracker. The kernel holds such memory for
    /// ringvm's I/O, and for that of a second plain ring (registered buffers)
    #[arg(long)]
    pub prefault: bool,
    /// Count system calls and exits per operation too, in one more run of each contestant: counting slows it. By the kernel's
    /// tracepoints, or where these are out of reach by strace
    #[arg(long, value_enum, value_name = "HOW", num_args = 0..=1, require_equals = true, default_missing_value = "auto")]
    pub syscalls: Option<Counting>,
}

/// How system calls are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Counting {
    /// By tracepoints if they can be had, else by strace.
    Auto,
    /// By tracepoints.
    Tracepoints,
    /// By strace.
    Strace,
}

/// What is left behind besides the table.
#[derive(Args, Clone, Debug, Default)]
pub struct Output {
    /// Write all results, the machine and the commands to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write a report with plots to this file, which needs no other
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// How `block` measures.
#[derive(Args, Clone, Debug)]
pub struct BlockOptions {
    /// Requests in flight, per queue; several are measured one after the other
    #[arg(long, value_delimiter = ',', default_value = "1,32,64", value_parser = clap::value_parser!(u32).range(1..=256))]
    pub depth: Vec<u32>,
    /// Bytes per request; several are measured one after the other, each with all depths
    #[arg(long, value_delimiter = ',', default_value = "4k", value_parser = block_size)]
    pub bs: Vec<u64>,
    /// What is done to the disk; several are measured one after the other, each with all sizes, those that only read first
    #[arg(long, value_enum, value_delimiter = ',', default_value = "rand-read")]
    pub rw: Vec<Pattern>,
    /// What holds the disk's bytes. With `null` nothing does, requests succeed at once, and the plain ring's are NOPs
    #[arg(long, value_enum, default_value_t = Storage::File, conflicts_with_all = ["file", "direct"], conflicts_with = "overwrite")]
    pub storage: Storage,
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
    /// Who
    #[command(flatten)]
    pub others: Others,
    /// Measure the backend alone too, driven from this process; where there is no /dev/kvm that is done anyway
    #[arg(long)]
    pub backend: bool,
    /// Where to
    #[command(flatten)]
    pub output: Output,
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
    /// Who
    #[command(flatten)]
    pub others: Others,
    /// Measure the plain process alone, no VM; where there is no /dev/kvm that is done anyway
    #[arg(long, conflicts_with_all = ["against", "ringvm", "syscalls"])]
    pub plain: bool,
    /// Where to
    #[command(flatten)]
    pub output: Output,
}

/// How `idle` measures.
#[derive(Args, Clone, Debug)]
pub struct IdleOptions {
    /// Disks of the VM
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(0..=8))]
    pub disks: u16,
    /// NICs of the VM
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(0..=8))]
    pub nics: u16,
    /// vCPUs of the VM; all but the first are never started
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub cpus: u16,
    /// Runs of each contestant; the table shows medians
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// How long one run measures, e.g. 500ms or 30s
    #[arg(long, default_value = "10s", value_parser = duration)]
    pub time: Duration,
    /// Who
    #[command(flatten)]
    pub others: Others,
    /// Where to
    #[command(flatten)]
    pub output: Output,
}

/// How `linux` measures.
#[derive(Args, Clone, Debug)]
pub struct LinuxOptions {
    /// A job file of fio; several are run one after the other
    #[arg(long, value_name = "FILE")]
    pub fio: Vec<PathBuf>,
    /// Options of iperf3's client in one word, as '-t 5 -P 2', or a file with a line of them for each measurement
    #[arg(long, value_name = "OPTIONS|FILE", allow_hyphen_values = true)]
    pub iperf3: Vec<String>,
    /// The guest's kernel, a bzImage or an ELF image; if not given, that of this host, or the one of the tests' lab
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Its modules: the folder that modules.dep is in. If not given, they are looked for in /lib/modules
    #[arg(long, value_name = "DIR", requires = "kernel")]
    pub modules: Option<PathBuf>,
    /// vCPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub cpus: u16,
    /// The guest's RAM; its initramfs, with fio some 90 MB, is in there
    #[arg(long, default_value = "512M", value_parser = memory)]
    pub memory: u64,
    /// Queues of the disk
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,
    /// Queue pairs of the NIC
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub pairs: u16,
    /// Runs of each contestant, each with a boot of its own; the table shows medians
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Bytes of the disk, if it is made here
    #[arg(long, default_value = "1G", value_parser = bytes)]
    pub size: u64,
    /// The disk: a file (made if it does not exist) or a block device; a temporary file if not given
    #[arg(long, value_name = "PATH")]
    pub file: Option<PathBuf>,
    /// Let jobs that write do so to a disk that existed before
    #[arg(long, requires = "file")]
    pub overwrite: bool,
    /// Past the host's page cache (O_DIRECT). Whether the guest's is used is for the jobs to say: it is not if they don't
    #[arg(long)]
    pub direct: bool,
    /// How long the guest may take to come up
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub boot_limit: Duration,
    /// How long one job of fio, or one line of iperf3, may take
    #[arg(long, value_name = "TIME", default_value = "300s", value_parser = duration)]
    pub limit: Duration,
    /// Only these of the contestants: `host`, `daemon` for ringvm with its devices in daemons, or a KIND as with --against;
    /// one that --against does not name is looked for on the PATH
    #[arg(long, value_name = "WHO", value_delimiter = ',', value_parser = Who::parse)]
    pub vmm: Vec<Who>,
    /// Who
    #[command(flatten)]
    pub others: Others,
    /// Where to
    #[command(flatten)]
    pub output: Output,
}

/// A contestant by its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The host itself.
    Host,
    /// A VMM.
    Vmm(Kind),
}

impl Who {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "host" { Ok(Self::Host) } else { Kind::parse(text).map(Self::Vmm) }
    }
}

/// What `compare` compares.
#[derive(Args, Clone, Debug)]
pub struct CompareOptions {
    /// What was measured before
    pub a: PathBuf,
    /// What was measured after
    pub b: PathBuf,
    /// Fail if some median in B is less than this part of that in A
    #[arg(long, value_name = "RATIO", value_parser = part)]
    pub fail_below: Option<f64>,
}

/// What `report` makes.
#[derive(Args, Clone, Debug)]
pub struct ReportOptions {
    /// A result
    pub result: PathBuf,
    /// Write the report with plots to this file; without this the table is printed
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
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

impl BlockOptions {
    /// Bytes of the largest request.
    pub fn largest_bs(&self) -> u64 {
        self.bs.iter().copied().max().unwrap_or(0)
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

fn memory(text: &str) -> Result<u64, String> {
    match bytes(text)? {
        size if size % (1 << 20) == 0 && (128 << 20..=1 << 40).contains(&size) => Ok(size),
        _ => Err("expected whole mebibytes, 128M or more, e.g. 512M".to_owned()),
    }
}

fn block_size(text: &str) -> Result<u64, String> {
    bytes(text)?;
    match bytes(text)? {
        size if size % 512 == 0 && size <= 1 << 20 => Ok(size),
        _ => Err("expected a multiple of 512 up to 1M".to_owned()),
    }
}

fn part(text: &str) -> Result<f64, String> {
    let part: f64 = text.parse().map_err(|_| "expected a ratio, e.g. 0.95".to_owned())?;
    if part.is_finite() && part > 0.0 { Ok(part) } else { Err("expected a ratio above 0, e.g. 0.95".to_owned()) }
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
