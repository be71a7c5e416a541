//! The part of a document that is about a Linux guest.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What `linux` has run.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct LinuxJob {
    /// The guest's kernel, as `uname -r` says it.
    pub kernel: String,
    /// vCPUs.
    pub cpus: u16,
    /// The guest's RAM in bytes.
    pub memory: u64,
    /// Queues of the disk.
    pub queues: u16,
    /// Queue pairs of the NIC.
    pub pairs: u16,
    /// Whether the VMMs, and fio on the host, open the disk with O_DIRECT.
    pub direct: bool,
    /// Runs of each contestant.
    pub runs: u32,
    /// The disk, if there was one.
    pub disk: Option<String>,
    /// Its bytes.
    pub disk_bytes: u64,
    /// What it lay on.
    pub disk_file_system: Option<String>,
    /// fio's job files, as the guest had them.
    pub fio: Vec<String>,
    /// Lines of options of iperf3's client.
    pub iperf3: Vec<String>,
}

/// What a program in a Linux guest was told to do.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct LinuxPoint {
    /// Which program.
    pub program: LinuxProgram,
    /// Its job, or its options.
    pub load: String,
}

/// What runs in a Linux guest.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinuxProgram {
    /// fio, on the disk.
    Fio,
    /// iperf3, over the NIC.
    Iperf3,
}

impl fmt::Display for LinuxProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fio => "fio",
            Self::Iperf3 => "iperf3",
        })
    }
}

impl fmt::Display for LinuxPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.program, self.load)
    }
}
