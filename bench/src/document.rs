//! What a measurement leaves behind: one document with the machine, the job, every run of every contestant and the commands,
//! written as JSON. Tables, HTML reports and comparisons are made from it and from nothing else, so that an old one serves as
//! well as one that was measured just now.

mod job;
mod linux;
mod run;
mod trouble;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use self::job::{BlockJob, BlockPoint, IdleJob, IdlePoint, Job, NetJob, NetPoint, Point};
pub use self::linux::{LinuxJob, LinuxPoint, LinuxProgram};
pub use self::run::Run;
pub use self::trouble::{Lost, Removed, Steal};
use crate::host::Machine;
use crate::sample::{Counted, Sample};
use crate::stats::Spread;
use crate::steal::Ticks;

/// What tells these documents from others.
const FORMAT: &str = "ringvm-bench";
/// Changes when a reader of the old kind would misread the new one.
const VERSION: u64 = 2;

/// A measurement.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Document {
    /// `ringvm-bench`.
    pub format: String,
    /// Of the format: 2.
    pub version: u64,
    /// The program that measured.
    pub tool: String,
    /// When it began.
    pub date: String,
    /// Why it ended early; `None` if all that was planned was measured.
    pub incomplete: Option<String>,
    /// Contestants that failed, in that order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<Removed>,
    /// What was done about CPU time that the host took away; `None` if nobody looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steal: Option<Steal>,
    /// How to measure the same again.
    pub command: Vec<String>,
    /// Where.
    pub machine: Machine,
    /// The programs that took part.
    pub programs: Vec<Program>,
    /// What was measured.
    pub job: Job,
    /// The results.
    pub series: Vec<Series>,
}

/// A program that took part.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Program {
    /// Its name in tables.
    pub name: String,
    /// Its file.
    pub path: String,
    /// What it says of its version.
    pub version: Option<String>,
}

/// All runs of one contestant at one point.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Series {
    /// Who.
    pub name: String,
    /// Whether the others are measured by it.
    #[serde(default)]
    pub reference: bool,
    /// The command line, for a VMM.
    pub command: Vec<String>,
    /// The command line of the daemon that served its disk, if there was one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub daemon: Vec<String>,
    /// Where.
    #[serde(flatten)]
    pub point: Point,
    /// Median of the operations per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub median_iops: Option<f64>,
    /// Median of the frames per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub median_fps: Option<f64>,
    /// Median of the bits per second of streams.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub median_bits_per_second: Option<f64>,
    /// The runs.
    pub runs: Vec<Run>,
    /// How long operations of all runs took: those that took less than the first number of nanoseconds, and not less than
    /// that of the pair before, are counted by the second.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub latency_ns: Vec<(u64, u64)>,
    /// What was counted in a run of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counted: Option<Counted>,
}

impl Document {
    /// Without results yet.
    pub fn new(job: Job, programs: Vec<Program>) -> Self {
        let command = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            tool: concat!("ringvm-bench ", env!("CARGO_PKG_VERSION")).to_owned(),
            date: crate::date::now(),
            incomplete: None,
            removed: Vec::new(),
            steal: Ticks::now().map(|_| Steal::none_yet()),
            command,
            machine: Machine::look(),
            programs,
            job,
            series: Vec::new(),
        }
    }

    /// Reads one.
    ///
    /// # Errors
    /// A file that can't be read, is none of ours, or is of another version; in one line.
    pub fn read(path: &Path) -> Result<Self> {
        let name = path.display();
        let text = fs::read(path).with_context(|| format!("reading {name}"))?;
        let value: Value = serde_json::from_slice(&text)
            .map_err(|error| anyhow!("{name} is no JSON, so no result of ringvm-bench: {error}"))?;
        Self::from_value(value).with_context(|| format!("{name} can't be used"))
    }

    fn from_value(value: Value) -> Result<Self> {
        match (value.get("format"), value.get("version").and_then(Value::as_u64)) {
            (Some(Value::String(format)), Some(VERSION)) if format == FORMAT => {}
            (Some(Value::String(format)), Some(other)) if format == FORMAT => {
                bail!("it is a result of version {other}, and this ringvm-bench knows version {VERSION}: measure again")
            }
            (Some(Value::Number(_)), None) if value.get("series").is_some() => {
                bail!("it is a result of an older ringvm-bench, and this one knows version {VERSION}: measure again")
            }
            _ => bail!("it is no result of ringvm-bench: give a file that --json has written"),
        }
        let document: Self = serde_json::from_value(value).context("it is damaged")?;
        let fits = |point: &Point| {
            matches!(
                (&document.job, point),
                (Job::Block(_), Point::Block(_))
                    | (Job::Net(_), Point::Net(_))
                    | (Job::Idle(_), Point::Idle(_))
                    | (Job::Linux(_), Point::Linux(_))
            )
        };
        if !document.series.iter().all(|series| fits(&series.point)) {
            bail!("it is damaged: there are series of another kind than its job");
        }
        Ok(document)
    }

    /// Writes it.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(self).context("putting the result together")?;
        text.push('\n');
        fs::write(path, text).with_context(|| format!("writing the result to {}", path.display()))
    }

    /// The series that others at this point are measured by.
    pub fn reference(&self, point: &Point) -> Option<&Series> {
        self.series.iter().find(|series| series.point == *point && series.reference)
    }

    /// The series of a contestant at a point.
    pub fn series_at(&mut self, name: &str, point: &Point) -> Option<&mut Series> {
        self.series.iter_mut().find(|series| series.name == name && series.point == *point)
    }

    /// The names of all contestants, in the order of their first appearance.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = Vec::new();
        for series in &self.series {
            if !names.contains(&series.name.as_str()) {
                names.push(&series.name);
            }
        }
        names
    }

    /// A figure of one contestant over all its runs.
    pub fn spread_of(&self, name: &str, figure: impl Fn(&Run) -> Option<f64>) -> Option<Spread> {
        let runs = self.series.iter().filter(|series| series.name == name).flat_map(|series| &series.runs);
        Spread::of(runs.filter_map(figure).collect())
    }
}

impl Series {
    /// Without runs yet.
    pub fn new(name: &str, point: Point, command: Vec<String>, daemon: Vec<String>) -> Self {
        Self {
            name: name.to_owned(),
            reference: false,
            command,
            daemon,
            point,
            median_iops: None,
            median_fps: None,
            median_bits_per_second: None,
            runs: Vec::new(),
            latency_ns: Vec::new(),
            counted: None,
        }
    }

    /// Adds a run.
    pub fn add(&mut self, sample: &Sample) {
        let rate = Some(sample.rate());
        let mut run = Run::of(sample);
        let streams = self.point.is_of_streams();
        match self.point {
            Point::Block(_) => run.iops = rate,
            Point::Linux(_) if !streams => run.iops = rate,
            Point::Net(_) => run.fps = rate,
            Point::Linux(_) | Point::Idle(_) => {}
        }
        self.runs.push(run);
        let median = self.rate().map(|rate| rate.median);
        match self.point {
            Point::Block(_) => self.median_iops = median,
            Point::Linux(_) if !streams => self.median_iops = median,
            Point::Linux(_) => {
                self.median_bits_per_second = self.spread(Run::bits_per_second).map(|rate| rate.median);
            }
            Point::Net(_) => self.median_fps = median,
            Point::Idle(_) => {}
        }
        for &(end, count) in sample.latency.iter().flat_map(|latency| &latency.steps) {
            let end = three_digits(end);
            match self.latency_ns.binary_search_by_key(&end, |&(end, _)| end) {
                Ok(at) => self.latency_ns[at].1 += count,
                Err(at) => self.latency_ns.insert(at, (end, count)),
            }
        }
    }

    /// Median, least and most of a figure over the runs that have it.
    pub fn spread(&self, figure: impl Fn(&Run) -> Option<f64>) -> Option<Spread> {
        Spread::of(self.runs.iter().filter_map(figure).collect())
    }

    /// Of the operations per second.
    pub fn rate(&self) -> Option<Spread> {
        self.spread(|run| Some(run.rate()))
    }

    /// Exits per operation: KVM's own count in these runs, or of the run that was counted.
    pub fn exits_per_op(&self) -> Option<f64> {
        let own = self.spread(|run| run.per_op(run.exits)).map(|spread| spread.median);
        own.or_else(|| self.counted.as_ref().and_then(|counted| counted.per_op(counted.exits)))
    }

    /// System calls per operation: this process's own count in these runs, or of the run that was counted.
    pub fn syscalls_per_op(&self) -> Option<f64> {
        let own = self.spread(|run| run.per_op(run.syscalls)).map(|spread| spread.median);
        own.or_else(|| self.counted.as_ref().and_then(|counted| counted.per_op(counted.syscalls)))
    }
}

/// The steps of guests are ticks of a TSC whose rate is measured at each boot: rounded, those of all runs are the same.
fn three_digits(value: u64) -> u64 {
    let mut unit = 1;
    while value / unit >= 1_000 {
        unit *= 10;
    }
    (value + unit / 2) / unit * unit
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::sample::{Latency, VmSample};
    use crate::workload::{Pattern, Storage};

    /// A document of one disk with two contestants, for tests of what is made from it.
    pub(crate) fn sample_document() -> Document {
        let job = BlockJob {
            queues: 1,
            cpus: 1,
            completions: "polled".to_owned(),
            direct: false,
            prefault: false,
            storage: Storage::File,
            runs: 3,
            time_ms: 1_000,
            disk: Some("/d/<x>&.img".to_owned()),
            disk_bytes: 1 << 30,
            disk_file_system: Some("ext4".to_owned()),
        };
        let mut document = Document::new(Job::Block(job), Vec::new());
        for depth in [1, 32] {
            for (name, base) in [("plain ring", 900_000), ("ringvm", 450_000), ("ringvm, daemon", 440_000)] {
                let point = Point::Block(BlockPoint { rw: Pattern::RandRead, bs: 4096, depth });
                let mut series = Series::new(name, point, vec!["/bin/vmm".to_owned(), "a b".to_owned()], Vec::new());
                series.reference = name == "plain ring";
                for run in 0..3 {
                    series.add(&sample(base * u64::from(depth.min(2)) + run * 1_000, !series.reference));
                }
                document.series.push(series);
            }
        }
        document
    }

    fn sample(ops: u64, vm: bool) -> Sample {
        let micros = Duration::from_micros;
        let steps = vec![(1_001, ops / 2), (2_003, ops / 2 - ops / 100), (90_012, ops / 100)];
        Sample {
            ops,
            time: Duration::from_secs(1),
            latency: Some(Latency { p50: micros(1), p99: micros(2), steps }),
            cpu: Some(Duration::from_millis(900)),
            steal: Some(0.005),
            vm: vm.then(|| VmSample {
                vcpu: Some(Duration::from_secs(1)),
                to_first_instruction: Some(Duration::from_millis(9)),
                memory: Some(5 << 20),
                exits: None,
                line: "job=rand-read kicks=45 irqs=0".to_owned(),
            }),
            ..Sample::default()
        }
    }

    #[test]
    fn a_document_survives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let document = sample_document();
        document.write(&path).unwrap();
        let value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let first = &value["series"][1];
        assert_eq!((&first["depth"], &first["rw"], &first["bs"]), (&1.into(), &"rand-read".into(), &4096.into()));
        assert_eq!((&first["median_iops"], &first["runs"][0]["iops"]), (&451_000.0.into(), &450_000.0.into()));
        assert_eq!(first["runs"][0]["kicks"], 45);
        assert_eq!(first["latency_ns"][0], serde_json::json!([1_000, 450_000 / 2 + 451_000 / 2 + 452_000 / 2]));
        let again = Document::read(&path).unwrap();
        assert_eq!(serde_json::to_value(&again).unwrap(), value);
        assert_eq!(again.names(), ["plain ring", "ringvm", "ringvm, daemon"]);
        assert_eq!(again.reference(&again.series[2].point).unwrap().name, "plain ring");
    }

    #[test]
    fn a_document_of_before_steal_was_counted_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("old.json");
        let mut value = serde_json::to_value(sample_document()).unwrap();
        value.as_object_mut().unwrap().remove("steal").unwrap();
        assert!(value.get("removed").is_none());
        for run in
            value["series"].as_array_mut().unwrap().iter_mut().flat_map(|one| one["runs"].as_array_mut().unwrap())
        {
            run.as_object_mut().unwrap().remove("steal_percent").unwrap();
        }
        fs::write(&path, value.to_string()).unwrap();
        let old = Document::read(&path).unwrap();
        assert!(old.steal.is_none() && old.removed.is_empty() && old.most_lost(3.0, |run| run.steal_percent).is_none());
        assert_eq!(serde_json::to_value(&old).unwrap(), value);
    }

    #[test]
    fn what_runs_lost_to_the_host_is_found() {
        let mut document = sample_document();
        let lost = document.most_lost(3.0, |run| run.steal_percent).unwrap();
        assert_eq!((lost.above, lost.most), (0, 0.5));
        document.series[2].runs[1].steal_percent = Some(40.0);
        document.series[4].runs[0].steal_percent = Some(3.01);
        document.series[4].runs[1].steal_percent = None;
        let lost = document.most_lost(3.0, |run| run.steal_percent).unwrap();
        assert_eq!((lost.above, lost.most, lost.worst.name.as_str()), (2, 40.0, "ringvm, daemon"));
    }

    #[test]
    fn what_is_not_ours_is_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |text: &str, expected: &str| {
            let path = dir.path().join("x.json");
            fs::write(&path, text).unwrap();
            let error = format!("{:#}", Document::read(&path).unwrap_err());
            assert!(error.contains(expected) && !error.contains('\n') && error.contains("x.json"), "{error}");
        };
        refused("{", "no JSON");
        refused("[1]", "no result of ringvm-bench");
        refused("{\"format\":1,\"series\":[]}", "an older ringvm-bench");
        refused("{\"format\":\"ringvm-bench\",\"version\":3}", "version 3");
        refused("{\"format\":\"ringvm-bench\",\"version\":2}", "damaged");
        assert!(format!("{:#}", Document::read(&dir.path().join("none")).unwrap_err()).contains("none"));
    }

    #[test]
    fn steps_of_two_boots_are_the_same_steps() {
        assert_eq!([0, 7, 999, 1_001, 12_349, 12_351].map(three_digits), [0, 7, 999, 1_000, 12_300, 12_400]);
    }

    #[test]
    fn idle_is_per_cent_of_a_cpu() {
        let run = Run { time_ns: 1_000_000, cpu_ns: Some(500), vcpu_ns: Some(1_500), ..Run::default() };
        assert!((run.cpu_percent().unwrap() - 0.2).abs() < 1e-9 && run.cpu_per_op().is_none());
    }
}
