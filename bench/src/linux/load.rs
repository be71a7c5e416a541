//! What the guest and the host are to do: groups of fio's jobs, and lines of iperf3's options.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::boot::Done;
use super::fio::{self, JobFile};
use super::iperf3;
use crate::cli::LinuxOptions;
use crate::document::{LinuxPoint, LinuxProgram};
use crate::sample::Sample;

/// Run where the user names nothing.
const USUAL_FIO: (&str, &str) = ("disk.fio", include_str!("../../jobs/disk.fio"));
const USUAL_IPERF3: &str = include_str!("../../jobs/iperf3.txt");

/// All that is to be run.
#[derive(Clone, Debug)]
pub struct Loads {
    /// Job files, with their names.
    pub fio: Vec<(String, JobFile)>,
    /// Lines of options.
    pub iperf3: Vec<String>,
}

/// One of them.
#[derive(Clone, Copy, Debug)]
pub enum Step<'a> {
    /// Jobs of a job file that run at once.
    Fio {
        /// The index of the file.
        file: usize,
        /// The jobs.
        group: &'a [String],
        /// What tells the jobs of this file from those of others; empty if there are none.
        prefix: &'a str,
    },
    /// A line of options.
    Iperf3(&'a str),
}

impl Loads {
    /// Reads what the options name.
    ///
    /// # Errors
    /// A file that can't be read or understood; with the file and the line.
    pub fn read(options: &LinuxOptions) -> Result<Self> {
        let mut loads = Self { fio: Vec::new(), iperf3: Vec::new() };
        for path in &options.fio {
            let name = path.display();
            let text = fs::read_to_string(path).with_context(|| format!("reading the job file {name}"))?;
            let file = JobFile::parse(&text).with_context(|| format!("the job file {name}"))?;
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            ensure!(
                !loads.fio.iter().any(|(known, _)| *known == name),
                "two job files are named {name}: their results could not be told apart"
            );
            loads.fio.push((name, file));
        }
        for given in &options.iperf3 {
            let path = Path::new(given);
            let lines = if path.is_file() {
                let text =
                    fs::read_to_string(path).with_context(|| format!("reading the lines of iperf3 in {given}"))?;
                iperf3::lines(&text).with_context(|| format!("the lines of iperf3 in {given}"))?
            } else if given.trim_start().starts_with('-') {
                iperf3::lines(given).context("--iperf3")?
            } else {
                bail!("--iperf3 {given}: there is no such file, and options of iperf3's client begin with -");
            };
            for line in lines {
                ensure!(!loads.iperf3.contains(&line), "--iperf3: `{line}` is there twice");
                loads.iperf3.push(line);
            }
        }
        if loads.fio.is_empty() && loads.iperf3.is_empty() {
            let (name, text) = USUAL_FIO;
            loads.fio.push((name.to_owned(), JobFile::parse(text)?));
            loads.iperf3 = iperf3::lines(USUAL_IPERF3)?;
        }
        Ok(loads)
    }

    /// Whether a disk takes part.
    pub fn has_disk(&self) -> bool {
        !self.fio.is_empty()
    }

    /// Whether a NIC takes part.
    pub fn has_network(&self) -> bool {
        !self.iperf3.is_empty()
    }

    /// The first job that changes the disk.
    pub fn writer(&self) -> Option<String> {
        self.fio.iter().find_map(|(name, file)| Some(format!("{name}'s job {}", file.writer.as_ref()?)))
    }

    /// All of them, in order.
    pub fn steps(&self) -> Vec<Step<'_>> {
        let several = self.fio.len() > 1;
        let groups = self.fio.iter().enumerate().flat_map(move |(index, (name, file))| {
            let prefix = if several { name.as_str() } else { "" };
            file.groups.iter().map(move |group| Step::Fio { file: index, group, prefix })
        });
        groups.chain(self.iperf3.iter().map(|line| Step::Iperf3(line))).collect()
    }
}

impl Step<'_> {
    /// The shell's command, where job files are numbered in `folder`, and iperf3's server is at this address.
    pub fn command(&self, folder: &str, server: &str) -> String {
        match self {
            Self::Fio { file, group, .. } => fio::command(group, &format!("{folder}/{file}.fio")),
            Self::Iperf3(line) => iperf3::command(line, server),
        }
    }

    /// For messages.
    pub fn name(&self) -> String {
        match self {
            Self::Fio { group, prefix, .. } => self.point(prefix, &group.join(", ")).to_string(),
            Self::Iperf3(line) => self.point("", line).to_string(),
        }
    }

    /// What its program has measured, each figure at its point.
    ///
    /// # Errors
    /// It has failed, or its output can't be understood; with what it said.
    pub fn figures(&self, done: &Done) -> Result<Vec<(LinuxPoint, Sample)>> {
        let all = self.parse(&done.output).and_then(|all| {
            ensure!(done.status == 0, "it ended with code {}", done.status);
            Ok(all)
        });
        all.map_err(|error| {
            // Remarks on stdout that are no result tell why there is none.
            let said = [&done.errors, &done.output].map(|text| {
                let line =
                    text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with(['{', '"', '}']));
                line.unwrap_or_default()
            });
            let said = said.iter().find(|line| !line.is_empty()).map_or_else(String::new, |line| format!(": {line}"));
            anyhow::anyhow!("{}: {error:#}{said}", self.name())
        })
    }

    fn parse(&self, output: &str) -> Result<Vec<(LinuxPoint, Sample)>> {
        match self {
            Self::Fio { prefix, .. } => {
                let sample = |figures: fio::Figures| {
                    let (ops, time, latency) = (figures.ops, figures.time, figures.latency);
                    let sample = Sample { ops, time, latency, bytes: Some(figures.bytes), ..Sample::default() };
                    (self.point(prefix, &figures.name), sample)
                };
                Ok(fio::parse(output)?.into_iter().map(sample).collect())
            }
            Self::Iperf3(line) => {
                let iperf3::Figures { bytes, time, streams } = iperf3::parse(output)?;
                let sample = Sample { ops: bytes >> 20, time, bytes: Some(bytes), streams, ..Sample::default() };
                Ok(vec![(self.point("", line), sample)])
            }
        }
    }

    fn point(&self, prefix: &str, load: &str) -> LinuxPoint {
        let program = match self {
            Self::Fio { .. } => LinuxProgram::Fio,
            Self::Iperf3(_) => LinuxProgram::Iperf3,
        };
        let load = if prefix.is_empty() { load.to_owned() } else { format!("{prefix}: {load}") };
        LinuxPoint { program, load }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn read(words: &[&str]) -> Result<Loads> {
        let all = ["ringvm-bench", "linux"].iter().chain(words);
        let Some(Command::Linux(options)) = Cli::try_parse_from(all).unwrap().command else { unreachable!() };
        Loads::read(&options)
    }

    #[test]
    fn the_usual_loads_are_those_of_the_job_files() {
        let loads = read(&[]).unwrap();
        assert!(loads.has_disk() && loads.has_network() && loads.writer().is_some());
        let names: Vec<_> = loads.steps().iter().map(Step::name).collect();
        assert_eq!(names[0], "fio randread-4k", "{names:?}");
        assert!(names.len() >= 5 && names.iter().any(|name| name.starts_with("iperf3 ")), "{names:?}");
    }

    #[test]
    fn files_and_lines_are_read_and_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let (a, b) = (file("a.fio", "[x]\nrw=read\n"), file("b.fio", "[x]\nrw=read\n[y]\nstonewall\n"));
        let lines = file("lines", "-t 1\n-t 1 -R\n");
        let loads = read(&["--fio", &a, "--fio", &b, "--iperf3", &lines, "--iperf3", "-t 2"]).unwrap();
        let names: Vec<_> = loads.steps().iter().map(Step::name).collect();
        assert_eq!(names, ["fio a: x", "fio b: x", "fio b: y", "iperf3 -t 1", "iperf3 -t 1 -R", "iperf3 -t 2"]);
        assert!(loads.steps()[2].command("/bench", "h").ends_with("'--section=y' '/bench/1.fio'"));
        for (words, expected) in [
            (&["--fio", "/nowhere.fio"][..], "reading the job file /nowhere.fio"),
            (&["--fio", &a, "--fio", &a], "two job files are named a"),
            (&["--fio", &lines], "line 1"),
            (&["--iperf3", "nowhere"], "no such file"),
            (&["--iperf3", "-t 1", "--iperf3", "-t 1"], "there twice"),
        ] {
            let error = format!("{:#}", read(words).unwrap_err());
            assert!(error.contains(expected) && !error.contains('\n'), "{words:?}: {error}");
        }
    }

    #[test]
    fn a_program_that_fails_is_named_and_quoted() {
        let group = ["a".to_owned()];
        let step = Step::Fio { file: 0, group: &group, prefix: "" };
        let error = |status, output: &str, errors: &str| {
            let done = Done { status, output: output.to_owned(), errors: errors.to_owned(), ..Done::default() };
            step.figures(&done).unwrap_err().to_string()
        };
        let bogus = error(1, "", "fio: failed parsing rw=bogus\nfio: job a dropped\n");
        assert_eq!(bogus, "fio a: fio printed no result: fio: failed parsing rw=bogus");
        assert_eq!(error(127, "", "sh: fio: not found"), "fio a: fio printed no result: sh: fio: not found");
        let good = r#"{"jobs":[{"jobname":"a","read":{"total_ios":9,"iops":9.0}}]}"#;
        assert_eq!(error(2, good, ""), "fio a: it ended with code 2");
        assert_eq!(
            error(0, &good[..20], ""),
            "fio a: fio's result is damaged: EOF while parsing a value at line 1 column 20"
        );
    }
}
