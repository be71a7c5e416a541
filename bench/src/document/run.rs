//! One run in a document.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::sample::{Sample, Stream};

/// What one run measured. Times are in nanoseconds, memory in bytes.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Run {
    /// Operations, frames, or mebibytes of streams.
    pub ops: u64,
    /// In this time.
    pub time_ns: u64,
    /// Operations per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iops: Option<f64>,
    /// Frames per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fps: Option<f64>,
    /// Bytes that were moved, where operations do not say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// The streams that moved them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub streams: Vec<Stream>,
    /// Median of what operations took.
    pub p50_ns: Option<u64>,
    /// 99th percentile.
    pub p99_ns: Option<u64>,
    /// Frames that the tap has carried.
    pub carried: Option<u64>,
    /// CPU time of the threads other than vCPUs.
    pub cpu_ns: Option<u64>,
    /// CPU time of the vCPU threads.
    pub vcpu_ns: Option<u64>,
    /// What part of the CPU time that all of the machine wanted meanwhile its host took away, in per cent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steal_percent: Option<f64>,
    /// What part of the time of all CPUs other programs of the machine took, in per cent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub others_percent: Option<f64>,
    /// Exits of the guest, by KVM's own count.
    pub exits: Option<u64>,
    /// Notifications that the guest has sent.
    pub kicks: Option<u64>,
    /// Interrupts that the guest has taken.
    pub irqs: Option<u64>,
    /// System calls of who measures without a VM, by its own count.
    pub syscalls: Option<u64>,
    /// From exec to the guest's first instruction.
    pub to_first_instruction_ns: Option<u64>,
    /// Resident besides the guest's RAM.
    pub memory_beyond_ram: Option<u64>,
    /// The guest's own line.
    pub guest: Option<String>,
}

impl Run {
    pub(super) fn of(sample: &Sample) -> Self {
        let nanoseconds = |time: Duration| time.as_nanos() as u64;
        let vm = sample.vm.as_ref();
        let number = |key| vm.and_then(|vm| vm.number(key).ok());
        Self {
            ops: sample.ops,
            time_ns: nanoseconds(sample.time),
            iops: None,
            fps: None,
            bytes: sample.bytes,
            streams: sample.streams.clone(),
            p50_ns: sample.latency.as_ref().map(|latency| nanoseconds(latency.p50)),
            p99_ns: sample.latency.as_ref().map(|latency| nanoseconds(latency.p99)),
            carried: sample.carried,
            cpu_ns: sample.cpu.map(nanoseconds),
            vcpu_ns: vm.and_then(|vm| vm.vcpu).map(nanoseconds),
            steal_percent: sample.steal.map(percent),
            others_percent: sample.others.map(percent),
            exits: vm.and_then(|vm| vm.exits),
            kicks: number("kicks"),
            irqs: number("irqs"),
            syscalls: sample.syscalls,
            to_first_instruction_ns: vm.and_then(|vm| vm.to_first_instruction).map(nanoseconds),
            memory_beyond_ram: vm.and_then(|vm| vm.memory),
            guest: vm.map(|vm| vm.line.clone()),
        }
    }

    /// Operations per second.
    pub fn rate(&self) -> f64 {
        self.ops as f64 / (self.time_ns.max(1) as f64 / 1e9)
    }

    /// Bits per second, where the bytes are known.
    pub fn bits_per_second(&self) -> Option<f64> {
        Some(self.bytes? as f64 * 8.0 / (self.time_ns.max(1) as f64 / 1e9))
    }

    /// Segments that were sent again, of all streams whose senders tell.
    pub fn retransmits(&self) -> Option<u64> {
        let told = self.streams.iter().filter_map(|stream| stream.retransmits);
        told.reduce(u64::saturating_add)
    }

    /// Some count in terms of operations; `None` if there is none, or there were no operations.
    pub fn per_op(&self, count: Option<u64>) -> Option<f64> {
        count.filter(|_| self.ops != 0).map(|count| count as f64 / self.ops as f64)
    }

    /// CPU time per operation in microseconds.
    pub fn cpu_per_op(&self) -> Option<f64> {
        self.per_op(self.cpu_ns).map(|ns| ns / 1e3)
    }

    /// Per cent of a CPU that all threads took.
    pub fn cpu_percent(&self) -> Option<f64> {
        let all = self.cpu_ns?.saturating_add(self.vcpu_ns.unwrap_or(0));
        Some(all as f64 * 100.0 / self.time_ns.max(1) as f64)
    }
}

/// A part in per cent, with two digits.
fn percent(part: f64) -> f64 {
    (part * 1e4).round() / 1e2
}
