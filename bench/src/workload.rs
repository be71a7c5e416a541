//! Kinds of load that can be asked for and are told apart in results.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Kinds of load, named as the guest's jobs are.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
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

/// What holds a disk's bytes.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Storage {
    /// A file or a block device.
    File,
    /// Nothing.
    Null,
}

/// Where frames go, as seen by the guest.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From the guest into the tap.
    Out,
    /// From the tap to the guest.
    In,
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
