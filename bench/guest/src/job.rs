//! The command line: one or more jobs, each a `job=` and the `key=value` words that follow it, like an fio job file.
//! Words before the first `job=` hold for all of them, and a later job starts from the one before it.

use alloc::string::String;
use alloc::vec::Vec;

use crate::machine::boot::MAX_CPUS;
use crate::machine::{fail, serial};
use crate::{say, spec};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: says hello and powers off.
    None,
    /// Says what the machine has.
    Info,
    /// Requests of one kind, measured.
    Load(Load),
    /// Random operations, checked against a model.
    Verify,
    /// The same, with a device reset in the middle of each round.
    Reset,
    /// A malicious driver.
    Hostile,
    /// One disk verified beside another that is brought up and reset all the time, whoever serves it.
    Beside,
    /// A disk that comes and goes.
    Hotplug,
    /// A disk that is reset while a request is never answered, and configuration spaces meanwhile.
    Drained,
    /// Reads from an entropy device.
    Entropy,
    /// Frames through a NIC.
    Net(Traffic),
    /// Nothing, with all devices up.
    Idle,
    /// Restarts the machine.
    Reboot,
    /// Triple-faults.
    Crash,
}

/// What a measured job asks the device for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Sequential or random reads.
    Read,
    /// Sequential or random writes.
    Write,
    /// Random reads and writes.
    Mixed,
    /// Flushes.
    Flush,
    /// Discards.
    Discard,
    /// Write-zeroes.
    WriteZeroes,
}

/// What a NIC is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// Sends as fast as it goes, measured.
    Transmit,
    /// Counts what comes, measured.
    Receive,
    /// Sends numbered frames over a port that is looped, and checks each that comes back.
    Echo,
    /// Exchanges numbered frames with another such guest.
    Peer,
    /// Sends what no sound driver does over a port that is looped.
    Hostile,
}

/// How verify lays requests out in descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Header, data and status in descriptors of their own, as old devices want it.
    Plain,
    /// Anything that the specification allows.
    Any,
}

/// One job with all its options.
#[derive(Clone, Debug)]
pub struct Options {
    /// As given after `job=`.
    pub name: String,
    /// What that means.
    pub kind: Kind,
    /// Whether offsets are random.
    pub random: bool,
    /// Which block device, beside which the next one is churned if that is the job; of an idle guest, how many there are.
    pub disk: usize,
    /// Bytes per request; of a NIC, per receive buffer that frames may span.
    pub bs: usize,
    /// Requests or frames in flight, per queue.
    pub depth: usize,
    /// How many queues are used; all that the device has if not given. Of a NIC, how many pairs; one if not given.
    pub queues: Option<u16>,
    /// How many vCPUs drive them.
    pub cpus: usize,
    /// How long a measurement lasts.
    pub time_ms: Option<u64>,
    /// How many operations are done, or frames sent.
    pub ops: Option<u64>,
    /// Whether the operations, rounds or time are a minimum, and the job goes on until a byte comes in over the serial port:
    /// verify, beside, net-tx, net-echo, and reset, whose rounds are limited to some thousands by the memory of their rings.
    pub until_told: bool,
    /// How long is run before a measurement.
    pub warm_ms: u64,
    /// Interrupts rather than polling.
    pub irq: bool,
    /// Bytes of the disk that are used; all if not given. Bytes of a frame; random if not given.
    pub size: Option<u64>,
    /// Where the random sequences start.
    pub seed: u64,
    /// Data descriptors per request; random if not given (verify) or one (measured jobs).
    pub segs: Option<usize>,
    /// Measured jobs: whether written blocks say where they belong, and read ones are checked for it.
    pub verify: bool,
    /// Per cent of reads in a mixed job.
    pub rw: u64,
    /// Queue size; the device's own if 0.
    pub queue_size: u16,
    /// Whether EVENT_IDX may be negotiated.
    pub event_idx: bool,
    /// Whether INDIRECT_DESC may be negotiated; if not given, it may, and measured jobs use it only when they must.
    pub indirect: Option<bool>,
    /// Block features that are not to be negotiated.
    pub without: u64,
    /// How verify lays requests out.
    pub framing: Framing,
    /// What the lengths of data descriptors are multiples of.
    pub align: usize,
    /// The largest request of verify, in bytes.
    pub max: usize,
    /// How often the reset job resets, and how many rounds of verifying the beside job does.
    pub rounds: u64,
    /// Whether the used length must be exactly what the specification says.
    pub used_len: bool,
    /// Whether every other request of verify lies in RAM above 4 GiB.
    pub high: bool,
    /// Verify with interrupts: whether vectors are masked and unmasked on the way.
    pub mask: bool,
    /// How long a request may take.
    pub stall_ms: u64,
    /// A result per queue too.
    pub per_queue: bool,
    /// How latencies were distributed, too.
    pub hist: bool,
    /// How many NICs an idle guest has.
    pub nics: usize,
    /// NIC: whether frames of random size may be longer than Ethernet's usual 1514 bytes.
    pub jumbo: bool,
    /// NIC: whether MRG_RXBUF may be negotiated.
    pub mrg: bool,
    /// NIC: whether frames are left to the device to be cut into TCP segments.
    pub tso: bool,
    /// How to reboot, which hostile act, and which of two peers.
    pub word: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            name: String::from("none"),
            kind: Kind::None,
            random: false,
            disk: 0,
            bs: 4096,
            depth: 32,
            queues: None,
            cpus: 1,
            time_ms: None,
            ops: None,
            until_told: false,
            warm_ms: 0,
            irq: false,
            size: None,
            seed: 1,
            segs: None,
            verify: false,
            rw: 70,
            queue_size: 0,
            event_idx: true,
            indirect: None,
            without: 0,
            framing: Framing::Any,
            align: 1,
            max: 160 << 10,
            rounds: 8,
            used_len: true,
            high: false,
            mask: true,
            stall_ms: 20_000,
            per_queue: false,
            hist: false,
            nics: 0,
            jumbo: false,
            mrg: true,
            tso: false,
            word: String::new(),
        }
    }
}

impl Options {
    /// The features to accept if they are offered.
    pub fn wanted_features(&self) -> u64 {
        let mut wanted = spec::F_SIZE_MAX
            | spec::F_SEG_MAX
            | spec::F_RO
            | spec::F_BLK_SIZE
            | spec::F_FLUSH
            | spec::F_TOPOLOGY
            | spec::F_CONFIG_WCE
            | spec::F_MQ
            | spec::F_DISCARD
            | spec::F_WRITE_ZEROES;
        if self.event_idx {
            wanted |= spec::RING_EVENT_IDX;
        }
        if self.indirect != Some(false) {
            wanted |= spec::RING_INDIRECT_DESC;
        }
        wanted & !self.without
    }

    /// Whether a job that has done what was asked has to go on.
    pub fn goes_on(&self) -> bool {
        self.until_told && !serial::heard()
    }

    /// Applies one word; `None` if it is not one of ours.
    fn apply(&mut self, key: &str, value: &str) -> Option<Result<(), ()>> {
        let feature = |bit: u64, without: u64| flag(value).map(|on| if on { without & !bit } else { without | bit });
        let result = match key {
            "job" => self.set_job(value),
            "disk" | "disks" => number(value).map(|n| self.disk = n as usize),
            "bs" => bytes(value).filter(|&n| n > 0 && n % spec::SECTOR as u64 == 0).map(|n| self.bs = n as usize),
            "depth" => number(value).filter(|n| (1..=32_768).contains(n)).map(|n| self.depth = n as usize),
            "queues" | "pairs" => number(value).filter(|n| (1..=64).contains(n)).map(|n| self.queues = Some(n as u16)),
            "cpus" => number(value).filter(|n| (1..=MAX_CPUS as u64).contains(n)).map(|n| self.cpus = n as usize),
            "time" => milliseconds(value).map(|n| self.time_ms = Some(n)),
            "ops" | "frames" => number(value).map(|n| self.ops = Some(n)),
            "until" => (value == "told").then(|| self.until_told = true),
            "warm" => milliseconds(value).map(|n| self.warm_ms = n),
            "poll" => flag(value).map(|on| self.irq = !on),
            "irq" => flag(value).map(|on| self.irq = on),
            "size" if value == "random" => {
                self.size = None;
                Some(())
            }
            "size" => bytes(value).map(|n| self.size = Some(n)),
            "seed" => number(value).map(|n| self.seed = n),
            "segs" if value == "random" => {
                self.segs = None;
                Some(())
            }
            "segs" => number(value).filter(|n| (1..=1024).contains(n)).map(|n| self.segs = Some(n as usize)),
            "verify" => flag(value).map(|on| self.verify = on),
            "rw" => number(value).filter(|&n| n <= 100).map(|n| self.rw = n),
            "qsize" => number(value).filter(|&n| n <= 32_768).map(|n| self.queue_size = n as u16),
            "event_idx" => flag(value).map(|on| self.event_idx = on),
            "indirect" => flag(value).map(|on| self.indirect = Some(on)),
            "mq" => feature(spec::F_MQ, self.without).map(|bits| self.without = bits),
            "flush" => feature(spec::F_FLUSH, self.without).map(|bits| self.without = bits),
            "discard" => feature(spec::F_DISCARD, self.without).map(|bits| self.without = bits),
            "write_zeroes" => feature(spec::F_WRITE_ZEROES, self.without).map(|bits| self.without = bits),
            "config_wce" => feature(spec::F_CONFIG_WCE, self.without).map(|bits| self.without = bits),
            "seg_max" => feature(spec::F_SEG_MAX, self.without).map(|bits| self.without = bits),
            "ro" => feature(spec::F_RO, self.without).map(|bits| self.without = bits),
            "framing" => match value {
                "plain" => Some(Framing::Plain),
                "any" => Some(Framing::Any),
                _ => None,
            }
            .map(|framing| self.framing = framing),
            "align" => bytes(value).filter(|&n| n.is_power_of_two() && n <= 4096).map(|n| self.align = n as usize),
            "max" => bytes(value).filter(|&n| (512..=8 << 20).contains(&n)).map(|n| self.max = n as usize),
            "rounds" => number(value).map(|n| self.rounds = n),
            "used_len" => flag(value).map(|on| self.used_len = on),
            "high" => flag(value).map(|on| self.high = on),
            "mask" => flag(value).map(|on| self.mask = on),
            "stall" => milliseconds(value).map(|n| self.stall_ms = n),
            "hist" => flag(value).map(|on| self.hist = on),
            "nics" => number(value).filter(|&n| n <= 32).map(|n| self.nics = n as usize),
            "per_queue" => flag(value).map(|on| self.per_queue = on),
            "jumbo" => flag(value).map(|on| self.jumbo = on),
            "mrg" => flag(value).map(|on| self.mrg = on),
            "tso" => flag(value).map(|on| self.tso = on),
            "via" | "kind" | "role" => {
                self.word = String::from(value);
                Some(())
            }
            _ => return None,
        };
        Some(result.ok_or(()))
    }

    fn set_job(&mut self, value: &str) -> Option<()> {
        (self.kind, self.random) = match value {
            "none" => (Kind::None, false),
            "idle" => (Kind::Idle, false),
            "info" => (Kind::Info, false),
            "read" => (Kind::Load(Load::Read), false),
            "write" => (Kind::Load(Load::Write), false),
            "rand-read" => (Kind::Load(Load::Read), true),
            "rand-write" => (Kind::Load(Load::Write), true),
            "mixed" => (Kind::Load(Load::Mixed), true),
            "flush" => (Kind::Load(Load::Flush), false),
            "discard" => (Kind::Load(Load::Discard), true),
            "write-zeroes" => (Kind::Load(Load::WriteZeroes), true),
            "verify" => (Kind::Verify, true),
            "reset" => (Kind::Reset, true),
            "hostile" => (Kind::Hostile, true),
            "beside" => (Kind::Beside, true),
            "hotplug" => (Kind::Hotplug, false),
            "drained" => (Kind::Drained, false),
            "rng" => (Kind::Entropy, false),
            "net-tx" => (Kind::Net(Traffic::Transmit), false),
            "net-rx" => (Kind::Net(Traffic::Receive), false),
            "net-echo" => (Kind::Net(Traffic::Echo), true),
            "net-hostile" => (Kind::Net(Traffic::Hostile), false),
            "net-peer" => (Kind::Net(Traffic::Peer), true),
            "reboot" => (Kind::Reboot, false),
            "crash" => (Kind::Crash, false),
            _ => return None,
        };
        self.name = String::from(value);
        Some(())
    }
}

/// Reads the command line. A value that makes no sense ends the run; keys of others (VMMs add some) are passed over.
pub fn parse(command_line: &str) -> Vec<Options> {
    let mut jobs: Vec<Options> = Vec::new();
    let mut common = Options::default();
    for word in command_line.split_ascii_whitespace() {
        let (key, value) = word.split_once('=').unwrap_or((word, "1"));
        if key == "job" {
            jobs.push(jobs.last().unwrap_or(&common).clone());
        }
        match jobs.last_mut().unwrap_or(&mut common).apply(key, value) {
            Some(Ok(())) => {}
            Some(Err(())) => fail(format_args!("command-line where={key} expected=a-known-value got={value}")),
            None => say!("note ignoring {word}"),
        }
    }
    if jobs.is_empty() {
        jobs.push(common);
    }
    for job in jobs.iter().filter(|job| job.until_told) {
        if !matches!(job.kind, Kind::Verify | Kind::Reset | Kind::Beside | Kind::Net(Traffic::Transmit | Traffic::Echo))
        {
            fail(format_args!(
                "command-line where=until expected=verify,reset,beside,net-tx,net-echo got={}",
                job.name
            ));
        }
    }
    jobs
}

fn number(text: &str) -> Option<u64> {
    text.parse().ok()
}

fn flag(text: &str) -> Option<bool> {
    match text {
        "1" | "on" | "yes" | "true" => Some(true),
        "0" | "off" | "no" | "false" => Some(false),
        _ => None,
    }
}

/// `4096`, `4k`, `64M`, `1G`.
fn bytes(text: &str) -> Option<u64> {
    let shift = match text.as_bytes().last()? {
        b'k' | b'K' => 10,
        b'm' | b'M' => 20,
        b'g' | b'G' => 30,
        _ => return number(text),
    };
    number(&text[..text.len() - 1])?.checked_mul(1 << shift)
}

/// `500ms`, `2s`, `2`.
fn milliseconds(text: &str) -> Option<u64> {
    match text.strip_suffix("ms") {
        Some(number_of_ms) => number(number_of_ms),
        None => number(text.strip_suffix('s').unwrap_or(text))?.checked_mul(1_000),
    }
}
