//! The results: samples of each contestant at each depth, their medians, and the JSON file with everything.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cli::BlockOptions;
use crate::host::Machine;
use crate::run::Sample;
use crate::scratch::Scratch;

/// All runs of one contestant at one depth.
#[derive(Clone, Debug)]
pub struct Series {
    /// Who.
    pub name: String,
    /// Requests in flight per queue.
    pub depth: u32,
    /// The command line, for a VMM.
    pub command: Vec<String>,
    /// The runs.
    pub samples: Vec<Sample>,
}

impl Series {
    /// Without runs yet.
    pub fn new(name: &str, depth: u32, command: Vec<std::ffi::OsString>) -> Self {
        let command = command.into_iter().map(|word| word.to_string_lossy().into_owned()).collect();
        Self { name: name.to_owned(), depth, command, samples: Vec::new() }
    }

    /// Median, least and most of a figure over the runs that have it.
    pub fn spread(&self, figure: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.samples.iter().filter_map(figure).collect())
    }

    /// Of the operations per second.
    pub fn iops(&self) -> Option<Spread> {
        self.spread(|sample| Some(sample.iops()))
    }
}

/// A figure over several runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spread {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// Of some values; `None` if there are none.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            *values.get(middle)?
        } else {
            f64::midpoint(*values.get(middle.checked_sub(1)?)?, *values.get(middle)?)
        };
        Some(Self { median, least: *values.first()?, most: *values.last()? })
    }
}

/// Writes the JSON file.
///
/// # Errors
/// It can't be written.
pub fn write(
    path: &Path,
    options: &BlockOptions,
    scratch: &Scratch,
    machine: &Machine,
    series: &[Series],
) -> Result<()> {
    let report = json!({
        "format": 1,
        "machine": machine,
        "job": {
            "rw": options.rw.job(),
            "bs": options.bs,
            "queues": options.queues,
            "cpus": options.cpus,
            "completions": if options.irq { "interrupts" } else { "polled" },
            "direct": options.direct,
            "time_ms": options.time.as_millis() as u64,
            "disk": scratch.path,
            "disk_bytes": scratch.size,
            "disk_file_system": scratch.file_system,
        },
        "series": series.iter().map(describe).collect::<Vec<_>>(),
    });
    let mut text = serde_json::to_string_pretty(&report).context("putting the report together")?;
    text.push('\n');
    fs::write(path, text).with_context(|| format!("writing the report to {}", path.display()))
}

fn describe(series: &Series) -> Value {
    json!({
        "name": series.name,
        "depth": series.depth,
        "command": series.command,
        "median_iops": series.iops().map(|iops| iops.median),
        "runs": series.samples.iter().map(|sample| json!({
            "ops": sample.ops,
            "time_ns": sample.time.as_nanos() as u64,
            "iops": sample.iops(),
            "p50_ns": sample.p50.as_nanos() as u64,
            "p99_ns": sample.p99.as_nanos() as u64,
            "cpu_ns": sample.cpu.map(|time| time.as_nanos() as u64),
            "vcpu_ns": sample.vcpu.map(|time| time.as_nanos() as u64),
            "to_first_instruction_ns": sample.to_first_instruction.map(|time| time.as_nanos() as u64),
            "memory_beyond_ram": sample.memory,
            "guest": sample.line,
        })).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Spread::of(vec![]), None);
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Some(Spread { median: 2.0, least: 1.0, most: 3.0 }));
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]), Some(Spread { median: 2.5, least: 1.0, most: 4.0 }));
    }
}
