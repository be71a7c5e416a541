//! The results: samples of each contender at each point, their medians, and the JSON file with everything.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::host::Machine;
use crate::run::Sample;

/// All runs of one contender at one point: a depth, a size.
#[derive(Clone, Debug)]
pub struct Series<P> {
    /// Who.
    pub name: String,
    /// Where.
    pub point: P,
    /// The command line, for a VMM.
    pub command: Vec<String>,
    /// The runs.
    pub samples: Vec<Sample>,
}

impl<P> Series<P> {
    /// Without runs yet.
    pub fn new(name: &str, point: P, command: Vec<std::ffi::OsString>) -> Self {
        let command = command.into_iter().map(|word| word.to_string_lossy().into_owned()).collect();
        Self { name: name.to_owned(), point, command, samples: Vec::new() }
    }

    /// Median, least and most of a figure over the runs that have it.
    pub fn spread(&self, figure: impl Fn(&Sample) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.samples.iter().filter_map(figure).collect())
    }

    /// Of the operations per second.
    pub fn rate(&self) -> Option<Spread> {
        self.spread(|sample| Some(sample.rate()))
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

/// Writes the JSON file: the machine, the job, and what [`describe`] makes of each series.
///
/// # Errors
/// It can't be written.
pub fn write(path: &Path, job: Value, machine: &Machine, series: Vec<Value>) -> Result<()> {
    let report = json!({ "format": 1, "machine": machine, "job": job, "series": series });
    let mut text = serde_json::to_string_pretty(&report).context("putting the report together")?;
    text.push('\n');
    fs::write(path, text).with_context(|| format!("writing the report to {}", path.display()))
}

/// A series for the file. `point` is an object that says where it was measured; `rate` names operations per second.
pub fn describe<P>(series: &Series<P>, point: Value, rate: &str) -> Value {
    let mut all = json!({
        "name": series.name,
        "command": series.command,
        format!("median_{rate}"): series.rate().map(|rate| rate.median),
        "runs": series.samples.iter().map(|sample| run(sample, rate)).collect::<Vec<_>>(),
    });
    if let (Value::Object(all), Value::Object(point)) = (&mut all, point) {
        all.extend(point);
    }
    all
}

fn run(sample: &Sample, rate: &str) -> Value {
    let nanoseconds = |time: std::time::Duration| time.as_nanos() as u64;
    let vm = sample.vm.as_ref();
    json!({
        "ops": sample.ops,
        "time_ns": nanoseconds(sample.time),
        rate: sample.rate(),
        "p50_ns": sample.latency.map(|latency| nanoseconds(latency.p50)),
        "p99_ns": sample.latency.map(|latency| nanoseconds(latency.p99)),
        "carried": sample.carried,
        "cpu_ns": sample.cpu.map(nanoseconds),
        "vcpu_ns": vm.and_then(|vm| vm.vcpu).map(nanoseconds),
        "to_first_instruction_ns": vm.and_then(|vm| vm.to_first_instruction).map(nanoseconds),
        "memory_beyond_ram": vm.and_then(|vm| vm.memory),
        "guest": vm.map(|vm| &vm.line),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Spread::of(vec![]), None);
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Some(Spread { median: 2.0, least: 1.0, most: 3.0 }));
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]), Some(Spread { median: 2.5, least: 1.0, most: 4.0 }));
    }

    #[test]
    fn a_series_is_described_with_its_point_and_its_unit() {
        let mut series = Series::new("it", (), vec!["/bin/vmm".into()]);
        let cpu = Some(Duration::from_millis(500));
        series.samples.push(Sample {
            ops: 300,
            time: Duration::from_secs(2),
            latency: None,
            cpu,
            carried: None,
            vm: None,
        });
        let all = describe(&series, json!({ "size": 64 }), "fps");
        assert_eq!(
            (&all["size"], &all["median_fps"], &all["runs"][0]["fps"]),
            (&64.into(), &150.0.into(), &150.0.into())
        );
        assert_eq!((&all["runs"][0]["cpu_ns"], &all["command"][0]), (&500_000_000.into(), &"/bin/vmm".into()));
    }
}
