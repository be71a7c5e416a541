//! What was measured: the job of all points, and each point.

use serde::{Deserialize, Serialize};

use super::linux::{LinuxJob, LinuxPoint, LinuxProgram};
use crate::workload::{Direction, Pattern, Storage};

/// What was measured.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Job {
    /// Disks.
    Block(BlockJob),
    /// NICs.
    Net(NetJob),
    /// A guest that does nothing.
    Idle(IdleJob),
    /// A Linux guest.
    Linux(LinuxJob),
}

/// What `block` has done at all points.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct BlockJob {
    /// Queues of the disk.
    pub queues: u16,
    /// vCPUs that drove them.
    pub cpus: u16,
    /// `interrupts` or `polled`.
    pub completions: String,
    /// O_DIRECT.
    pub direct: bool,
    /// Whether guests' memory was allocated beforehand.
    #[serde(default)]
    pub prefault: bool,
    /// What held the bytes.
    pub storage: Storage,
    /// Runs of each contestant at each point.
    pub runs: u32,
    /// How long each measured.
    pub time_ms: u64,
    /// The disk.
    pub disk: Option<String>,
    /// Its bytes, as far as they were used.
    pub disk_bytes: u64,
    /// What it lay on.
    pub disk_file_system: Option<String>,
}

/// What `net` has done at all points.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct NetJob {
    /// Frames in flight per pair.
    pub depth: u32,
    /// Queue pairs.
    pub pairs: u16,
    /// vCPUs that drove them.
    pub cpus: u16,
    /// Whether guests' memory was allocated beforehand.
    #[serde(default)]
    pub prefault: bool,
    /// Runs of each contestant at each point.
    pub runs: u32,
    /// How long each measured.
    pub time_ms: u64,
}

/// What `idle` has done.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct IdleJob {
    /// vCPUs.
    pub cpus: u16,
    /// Runs of each contestant.
    pub runs: u32,
    /// How long each measured.
    pub time_ms: u64,
}

/// Where a series was measured.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Point {
    /// Of a disk.
    Block(BlockPoint),
    /// Of a NIC.
    Net(NetPoint),
    /// Of a guest that does nothing.
    Idle(IdlePoint),
    /// Of a Linux guest.
    Linux(LinuxPoint),
}

/// Requests of one kind and size, so many in flight.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct BlockPoint {
    /// What was done.
    pub rw: Pattern,
    /// Bytes per request.
    pub bs: u64,
    /// Requests in flight per queue.
    pub depth: u32,
}

/// Frames of one size in one direction.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct NetPoint {
    /// As the guest sees it.
    pub direction: Direction,
    /// Bytes of a frame, from its addresses to the end of its payload.
    pub size: usize,
    /// Whether the host cuts them into segments.
    pub tso: bool,
    /// Whether the guest sleeps until an interrupt comes.
    pub irq: bool,
    /// Descriptors per queue.
    pub queue_size: u16,
}

/// Devices that wait.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct IdlePoint {
    /// Disks.
    pub disks: u16,
    /// NICs.
    pub nics: u16,
}

impl Point {
    /// Whether bits per second are what was measured.
    pub fn is_of_streams(&self) -> bool {
        matches!(self, Self::Linux(LinuxPoint { program: LinuxProgram::Iperf3, .. }))
    }
}
