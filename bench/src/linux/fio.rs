//! fio(1): job files, read as far as is needed to have them run on the guest's disk and on the host's file alike, and its
//! results (`--output-format=json+`).

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::shell::quote;
use crate::sample::Latency;

/// The guest's disk.
pub const DISK: &str = "/dev/vda";
/// What the target decides, not the job: it is set for all jobs, and left out wherever else it stands.
const OF_THE_TARGET: [&str; 1] = ["filename"];
/// On the host these too: past the page cache or not is decided by how the VMMs open the disk, and what they find in the page
/// cache the host's run is to find there as well.
const OF_THE_HOST: [&str; 3] = ["direct", "buffered", "invalidate"];
/// What needs a file system, or other files.
const WITHOUT_A_PLACE: [&str; 4] = ["directory", "opendir", "filename_format", "include"];

/// A job file.
#[derive(Clone, Debug)]
pub struct JobFile {
    /// Its lines, without comments.
    lines: Vec<String>,
    /// The jobs that run at once, by name; each of these groups waits for the end of that before it.
    pub groups: Vec<Vec<String>>,
    /// The first job that changes the disk, and what it does.
    pub writer: Option<String>,
}

impl JobFile {
    /// Reads one.
    ///
    /// # Errors
    /// A line that can't be understood, or a job that needs more than a disk; with the line.
    pub fn parse(text: &str) -> Result<Self> {
        let mut file = Self { lines: Vec::new(), groups: Vec::new(), writer: None };
        let mut section: Option<String> = None;
        // What [global] says of it is so for the jobs that follow.
        let (mut all_wait, mut all_write) = (false, None);
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with(['#', ';']) {
                continue;
            }
            file.line(line, &mut section, &mut all_wait, &mut all_write)
                .with_context(|| format!("line {} (`{line}`)", number + 1))?;
            file.lines.push(line.to_owned());
        }
        ensure!(!file.groups.is_empty(), "there is no job in it: a job begins with its name in brackets");
        Ok(file)
    }

    fn line(
        &mut self,
        line: &str,
        section: &mut Option<String>,
        all_wait: &mut bool,
        all_write: &mut Option<String>,
    ) -> Result<()> {
        if let Some(name) = line.strip_prefix('[') {
            let name = name.strip_suffix(']').context("a job's name ends with a bracket")?.to_owned();
            if name != "global" {
                ensure!(!self.groups.iter().flatten().any(|known| *known == name), "there are two jobs of this name");
                if self.groups.is_empty() || *all_wait {
                    self.groups.push(Vec::new());
                }
                if let Some(group) = self.groups.last_mut() {
                    group.push(name.clone());
                }
                if let Some(kind) = all_write {
                    self.writer.get_or_insert_with(|| format!("{name} (rw={kind})"));
                }
            }
            *section = Some(name);
            return Ok(());
        }
        let section = section.as_deref().context("options stand below a job's name in brackets, or below [global]")?;
        let (key, value) = line.split_once('=').map_or((line, ""), |(key, value)| (key.trim(), value.trim()));
        let key = key.split_whitespace().next().unwrap_or(key);
        ensure!(
            !WITHOUT_A_PLACE.contains(&key),
            "there is no file system in the guest, and no other files: jobs use the disk, {DISK}"
        );
        match key {
            "filename" => ensure!(value == DISK, "the guest has one disk, {DISK}: name that, or none"),
            "stonewall" | "wait_for_previous" if value != "0" => match section {
                "global" => *all_wait = true,
                name => self.part(name),
            },
            "rw" | "readwrite" => {
                let kind = value.split(':').next().unwrap_or(value).trim();
                let writes = !matches!(kind, "read" | "randread");
                if section == "global" {
                    *all_write = writes.then(|| kind.to_owned());
                } else if writes {
                    self.writer.get_or_insert_with(|| format!("{section} (rw={kind})"));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Has the last job begin a group.
    fn part(&mut self, name: &str) {
        if let Some(last) = self.groups.last_mut()
            && last.len() > 1
        {
            last.retain(|job| job != name);
            self.groups.push(vec![name.to_owned()]);
        }
    }

    /// The file for the guest: past its page cache, which is not what is measured, unless a job says otherwise.
    pub fn for_guest(&self) -> String {
        self.for_target(&format!("filename={DISK}\ndirect=1"), &[])
    }

    /// The file for the host, on what is the guest's disk there.
    pub fn for_host(&self, disk: &Path, direct: bool) -> String {
        // A colon parts names.
        let disk = disk.display().to_string().replace(':', "\\:");
        self.for_target(&format!("filename={disk}\ndirect={}\ninvalidate=0", u8::from(direct)), &OF_THE_HOST)
    }

    /// Threads and aligned buffers everywhere: without, fio needs shared memory, and fails with O_DIRECT on some disks.
    fn for_target(&self, head: &str, besides: &[&str]) -> String {
        let mut text = format!("[global]\nthread=1\niomem_align=4k\n{head}\n");
        for line in &self.lines {
            let key = line.split('=').next().unwrap_or(line).trim();
            if !OF_THE_TARGET.contains(&key) && !besides.contains(&key) {
                text += line;
                text.push('\n');
            }
        }
        text
    }
}

/// The shell's command that runs one group of a job file.
pub fn command(group: &[String], file: &str) -> String {
    let sections: String = group.iter().map(|name| format!(" {}", quote(&format!("--section={name}")))).collect();
    format!("fio --output-format=json+ --eta=never{sections} {}", quote(file))
}

/// What one job, or one direction of it, has reached.
#[derive(Clone, Debug)]
pub struct Figures {
    /// The job, and the direction if it has several.
    pub name: String,
    /// Operations.
    pub ops: u64,
    /// Bytes moved.
    pub bytes: u64,
    /// In this time.
    pub time: Duration,
    /// Of completion, where the job asks for it.
    pub latency: Option<Latency>,
}

#[derive(Deserialize)]
struct Output {
    jobs: Vec<JobOutput>,
}

#[derive(Deserialize)]
struct JobOutput {
    jobname: String,
    #[serde(default)]
    error: i64,
    read: Option<Way>,
    write: Option<Way>,
    trim: Option<Way>,
    mixed: Option<Way>,
}

#[derive(Deserialize)]
struct Way {
    total_ios: u64,
    #[serde(default)]
    io_bytes: u64,
    iops: f64,
    #[serde(default)]
    clat_ns: Clat,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Clat {
    bins: BTreeMap<String, u64>,
}

/// Several workers of one job, added up.
#[derive(Default)]
struct Sum {
    ops: u64,
    bytes: u64,
    iops: f64,
    bins: BTreeMap<u64, u64>,
}

/// Reads what fio has printed, which may begin with its remarks.
///
/// # Errors
/// It is none of its results, one of the jobs has failed, or has done nothing.
pub fn parse(text: &str) -> Result<Vec<Figures>> {
    let start = if text.starts_with('{') { Some(0) } else { text.find("\n{").map(|at| at + 1) };
    let Some(start) = start else { bail!("fio printed no result") };
    let mut values = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Output>();
    let output = values.next().context("fio printed no result")?.context("fio's result is damaged")?;
    let mut sums: Vec<((String, &str), Sum)> = Vec::new();
    for job in output.jobs {
        ensure!(job.error == 0, "fio's job {} failed with error {}", job.jobname, job.error);
        let ways = [("read", job.read), ("write", job.write), ("trim", job.trim), ("mixed", job.mixed)];
        for (way, found) in
            ways.into_iter().filter_map(|(name, way)| Some((name, way.filter(|way| way.total_ios > 0)?)))
        {
            let key = (job.jobname.clone(), way);
            let at = sums.iter().position(|(known, _)| *known == key).unwrap_or_else(|| {
                sums.push((key, Sum::default()));
                sums.len() - 1
            });
            sums[at].1.add(&found);
        }
    }
    ensure!(!sums.is_empty(), "fio's jobs have moved nothing");
    let several = |name: &str| sums.iter().filter(|((known, _), _)| known == name).count() > 1;
    sums.iter()
        .map(|((name, way), sum)| {
            ensure!(sum.iops.is_finite() && sum.iops > 0.0, "fio says that its job {name} ran at {} IOPS", sum.iops);
            let name = if several(name) { format!("{name}: {way}") } else { name.clone() };
            // Its own rate is from the first to the last operation of each worker.
            let time = Duration::try_from_secs_f64(sum.ops as f64 / sum.iops).context("fio's rates make no sense")?;
            Ok(Figures { name, ops: sum.ops, bytes: sum.bytes, time, latency: latency(&sum.bins) })
        })
        .collect()
}

impl Sum {
    fn add(&mut self, way: &Way) {
        self.ops = self.ops.saturating_add(way.total_ios);
        self.bytes = self.bytes.saturating_add(way.io_bytes);
        self.iops += way.iops;
        for (end, count) in &way.clat_ns.bins {
            if let Ok(end) = end.parse() {
                let bin: &mut u64 = self.bins.entry(end).or_default();
                *bin = bin.saturating_add(*count);
            }
        }
    }
}

fn latency(bins: &BTreeMap<u64, u64>) -> Option<Latency> {
    let all: u128 = bins.values().map(|&count| u128::from(count)).sum();
    let percentile = |percent: u128| {
        let mut seen = 0;
        let found = bins.iter().find(|&(_, &count)| {
            seen += u128::from(count);
            seen * 100 >= all * percent
        });
        found.map(|(&end, _)| Duration::from_nanos(end))
    };
    let steps = bins.iter().filter(|&(_, &count)| count != 0).map(|(&end, &count)| (end, count)).collect();
    (all != 0).then_some(())?;
    Some(Latency { p50: percentile(50)?, p99: percentile(99)?, steps })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "\
; a comment
[global]
ioengine=libaio
bs = 4k
[one]
filename=/dev/vda
rw=randread
direct=0
numjobs=2
[beside]
rw=read
[two]
stonewall
rw=randrw:8
";

    #[test]
    fn jobs_are_grouped_by_what_runs_at_once() {
        let file = JobFile::parse(TWO).unwrap();
        assert_eq!(file.groups, [vec!["one".to_owned(), "beside".to_owned()], vec!["two".to_owned()]]);
        assert_eq!(file.writer.as_deref(), Some("two (rw=randrw)"));
        let all = JobFile::parse("[global]\nstonewall\nrw=randread\n[a]\n[b]\n[c]\n").unwrap();
        assert_eq!((all.groups.len(), all.writer), (3, None));
        assert_eq!(JobFile::parse("[global]\nrw=write\n[a]\n").unwrap().writer.as_deref(), Some("a (rw=write)"));
    }

    #[test]
    fn the_target_is_the_benchs_to_say() {
        let file = JobFile::parse(TWO).unwrap();
        let guest = file.for_guest();
        assert!(
            guest.starts_with("[global]\nthread=1\niomem_align=4k\nfilename=/dev/vda\ndirect=1\n[global]\n"),
            "{guest}"
        );
        assert_eq!((guest.matches("filename").count(), guest.matches("direct=0").count()), (1, 1), "{guest}");
        let host = file.for_host(Path::new("/d/a:b"), true);
        assert!(host.contains("filename=/d/a\\:b\ndirect=1\ninvalidate=0\n"), "{host}");
        assert!(!host.contains("direct=0") && host.contains("bs = 4k"), "{host}");
        let command = command(&file.groups[0], "/bench/it's.fio");
        assert!(command.ends_with(r"'--section=one' '--section=beside' '/bench/it'\''s.fio'"), "{command}");
    }

    #[test]
    fn what_has_no_place_is_refused_with_its_line() {
        for (text, expected) in [
            ("", "no job"),
            ("[global]\nrw=read\n", "no job"),
            ("rw=read\n[a]\n", "line 1 (`rw=read`)"),
            ("[a\n", "bracket"),
            ("[a]\nfilename=/dev/sda\n", "one disk, /dev/vda"),
            ("[a]\n\ndirectory=/mnt\n", "line 3 (`directory=/mnt`)"),
            ("[a]\ninclude other.fio\n", "no other files"),
            ("[a]\n[b]\n[a]\n", "two jobs"),
        ] {
            let error = format!("{:#}", JobFile::parse(text).unwrap_err());
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        }
    }

    fn job(name: &str, ways: &str) -> String {
        format!("{{\"jobname\":\"{name}\",\"error\":0,{ways}}}")
    }

    #[test]
    fn workers_are_added_up_and_directions_told_apart() {
        let read =
            r#""read":{"total_ios":1000,"io_bytes":4096000,"iops":500.0,"clat_ns":{"bins":{"1000":900,"9000":100}}}"#;
        let idle = r#""trim":{"total_ios":0,"io_bytes":0,"iops":0.0,"clat_ns":{}}"#;
        let write = r#""write":{"total_ios":10,"io_bytes":40960,"iops":5.0}"#;
        let jobs = [job("a", &format!("{read},{idle}")), job("a", read), job("b", &format!("{read},{write}"))];
        let text = format!("note: a remark\n{{\n\"fio version\":\"fio-3.33\",\"jobs\":[{}]}}\nmore", jobs.join(","));
        let all = parse(&text).unwrap();
        let names: Vec<_> = all.iter().map(|figures| figures.name.as_str()).collect();
        assert_eq!(names, ["a", "b: read", "b: write"]);
        assert_eq!((all[0].ops, all[0].bytes, all[0].time), (2000, 8_192_000, Duration::from_secs(2)));
        let latency = all[0].latency.as_ref().unwrap();
        assert_eq!((latency.p50, latency.p99), (Duration::from_nanos(1000), Duration::from_nanos(9000)));
        assert_eq!(latency.steps, [(1000, 1800), (9000, 200)]);
        assert!(all[2].latency.is_none());
    }

    #[test]
    fn bad_results_are_errors_of_one_line() {
        let good = format!("{{\"jobs\":[{}]}}", job("a", r#""read":{"total_ios":1,"iops":1.0}"#));
        assert!(parse(&good).is_ok());
        for cut in 0..good.len() {
            assert!(parse(&good[..cut]).is_err(), "{cut}");
        }
        for (text, expected) in [
            ("fio: failed parsing rw=bogus\n", "no result"),
            ("{\"jobs\":[]}", "moved nothing"),
            ("{\"jobs\":5}", "damaged"),
            ("{\"jobs\":[{\"jobname\":\"a\",\"error\":5}]}", "job a failed with error 5"),
            ("{\"jobs\":[{\"jobname\":\"a\",\"read\":{\"total_ios\":9,\"iops\":0.0}}]}", "0 IOPS"),
            ("{\"jobs\":[{\"jobname\":\"a\",\"read\":{\"total_ios\":9,\"iops\":1e-300}}]}", "no sense"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(expected) && !error.contains('\n'), "{text}: {error}");
        }
    }
}
