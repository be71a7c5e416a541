//! What one run measures, before it becomes part of a document.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};

use crate::hist::Hist;

/// What one run measured.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// Operations, frames, or mebibytes of streams.
    pub ops: u64,
    /// In this time.
    pub time: Duration,
    /// How long operations took, where that was looked at.
    pub latency: Option<Latency>,
    /// CPU time of the VMM's threads other than vCPUs (of the one thread, without a VM).
    pub cpu: Option<Duration>,
    /// What part of the CPU time that all of the machine wanted meanwhile its host took away, where that is known.
    pub steal: Option<f64>,
    /// What part of the time of all CPUs other programs took, where that is known.
    pub others: Option<f64>,
    /// System calls, of who measures without a VM.
    pub syscalls: Option<u64>,
    /// Bytes that were moved, where operations do not say.
    pub bytes: Option<u64>,
    /// The streams that moved them.
    pub streams: Vec<Stream>,
    /// Frames that the tap has carried by its own count, from before the measurement to after it.
    pub carried: Option<u64>,
    /// What was looked at besides, of a VMM.
    pub vm: Option<VmSample>,
}

/// How long operations took.
#[derive(Clone, Debug)]
pub struct Latency {
    /// Median.
    pub p50: Duration,
    /// 99th percentile.
    pub p99: Duration,
    /// How many took less than so many nanoseconds, but not less than the step before.
    pub steps: Vec<(u64, u64)>,
}

impl Latency {
    /// Of what a histogram in nanoseconds has.
    pub fn of(hist: &Hist) -> Self {
        let percentile = |per_mille| Duration::from_nanos(hist.percentile(per_mille));
        Self { p50: percentile(500), p99: percentile(990), steps: hist.groups().collect() }
    }
}

/// What only a VMM's run has.
#[derive(Clone, Debug)]
pub struct VmSample {
    /// CPU time of the vCPU threads.
    pub vcpu: Option<Duration>,
    /// From before the VMM is started to its guest's first instruction.
    pub to_first_instruction: Option<Duration>,
    /// Resident bytes besides the guest's RAM.
    pub memory: Option<u64>,
    /// Exits of the guest, by KVM's own count.
    pub exits: Option<u64>,
    /// The guest's own line.
    pub line: String,
}

impl VmSample {
    /// A number in the guest's line.
    ///
    /// # Errors
    /// It is not there.
    pub fn number(&self, key: &str) -> Result<u64> {
        fields(&self.line)
            .get(key)
            .and_then(|value| value.parse().ok())
            .ok_or_else(|| anyhow!("the guest's result has no {key}: {}", self.line))
    }
}

impl Sample {
    /// Operations per second.
    pub fn rate(&self) -> f64 {
        self.ops as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

/// One of iperf3's streams.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Stream {
    /// What arrived.
    pub bits_per_second: f64,
    /// Segments of TCP that were sent again, where the sender tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retransmits: Option<u64>,
    /// Datagrams of UDP that did not arrive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost_percent: Option<f64>,
}

/// What was counted in a run of its own, because counting slows it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Counted {
    /// How: `tracepoints` or `strace`.
    pub by: String,
    /// Operations of that run.
    pub ops: u64,
    /// System calls of all threads and daemons.
    pub syscalls: Option<u64>,
    /// Exits of the guest.
    pub exits: Option<u64>,
    /// The system calls by name, the most frequent first, where that is known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<(String, u64)>,
}

impl Counted {
    /// Some count in terms of operations.
    pub fn per_op(&self, count: Option<u64>) -> Option<f64> {
        count.filter(|_| self.ops != 0).map(|count| count as f64 / self.ops as f64)
    }
}

/// The `key=value` words of a line.
pub fn fields(line: &str) -> HashMap<&str, &str> {
    line.split_ascii_whitespace().filter_map(|word| word.split_once('=')).collect()
}
