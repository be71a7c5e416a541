//! The tables of `linux`: one of fio's jobs, one of iperf3's lines.

use std::fmt::Write;

use super::HOST;
use crate::block::table::latency;
use crate::document::{Document, LinuxJob, LinuxPoint, LinuxProgram, Point, Run, Series};
use crate::stats::Spread;
use crate::table::{Grid, cpu, machine, per_op, plural, ratio, warnings, with_spread};

/// Puts the tables and what must be said with them together.
pub(crate) fn render(document: &Document, job: &LinuxJob) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(text, "\n{}", title(job));
    let _ = writeln!(text, "{}", machine(&document.machine));
    for (program, grid) in [(LinuxProgram::Fio, fio(document)), (LinuxProgram::Iperf3, iperf3(document))] {
        if lines(document, program).next().is_some() {
            let _ = writeln!(text, "\n{program}: {}\n{grid}", setting(job, program));
        }
    }
    let _ = writeln!(text, "\n{}{}", warnings(document), explanations(document).join("\n"));
    text
}

/// What all of it is about.
pub(crate) fn title(job: &LinuxJob) -> String {
    format!(
        "a guest with Linux {}, {}, {} MiB; medians of {}",
        job.kernel,
        plural(u32::from(job.cpus), "vCPU"),
        job.memory >> 20,
        plural(job.runs, "interleaved run")
    )
}

/// What a program worked on.
pub(crate) fn setting(job: &LinuxJob, program: LinuxProgram) -> String {
    match program {
        LinuxProgram::Fio => format!(
            "a disk of {} MiB, {}, {}",
            job.disk_bytes >> 20,
            match (&job.disk_file_system, job.direct) {
                (Some(name), true) => format!("O_DIRECT on the host's {name}"),
                (Some(name), false) => format!("page-cached on the host's {name}"),
                (None, _) => "on nothing".to_owned(),
            },
            plural(u32::from(job.queues), "queue")
        ),
        LinuxProgram::Iperf3 => format!("a NIC on a tap, {}", plural(u32::from(job.pairs), "queue pair")),
    }
}

/// The series of a program, point by point in the order of their first appearance.
pub(crate) fn lines(document: &Document, program: LinuxProgram) -> impl Iterator<Item = (&LinuxPoint, &Series)> {
    let point = move |series: &'_ Series| match &series.point {
        Point::Linux(point) => (point.program == program).then_some(point.clone()),
        _ => None,
    };
    let mut points: Vec<LinuxPoint> = Vec::new();
    for found in document.series.iter().filter_map(point) {
        if !points.contains(&found) {
            points.push(found);
        }
    }
    points.into_iter().flat_map(|wanted| {
        document.series.iter().filter_map(move |series| match &series.point {
            Point::Linux(point) if *point == wanted => Some((point, series)),
            _ => None,
        })
    })
}

fn fio(document: &Document) -> Grid {
    let header = ["job", "", "IOPS", "", "of host", "MB/s", "p50 us", "p99 us", "CPU us/op", "exits/op", "calls/op"];
    let mut grid = Grid::new(&header);
    for (point, line) in lines(document, LinuxProgram::Fio) {
        let [iops, spread] = with_spread(line.rate());
        let [exits, calls] = counts(line);
        let cells = [
            line.name.clone(),
            iops,
            spread,
            of_host(document, line),
            megabytes(line),
            latency(line.spread(|run| run.p50_ns.map(|ns| ns as f64 / 1e3))),
            latency(line.spread(|run| run.p99_ns.map(|ns| ns as f64 / 1e3))),
            cpu(line),
            exits,
            calls,
        ];
        grid.row(&point.load, &cells);
    }
    grid
}

fn iperf3(document: &Document) -> Grid {
    let header =
        ["options", "", "Gbit/s", "", "of host", "least stream", "retransmits", "CPU us/MiB", "exits/MiB", "calls/MiB"];
    let mut grid = Grid::new(&header);
    for (point, line) in lines(document, LinuxProgram::Iperf3) {
        let rate = figure(line);
        let [exits, calls] = counts(line);
        let cells = [
            line.name.clone(),
            rate.map_or_else(String::new, |rate| gigabits(rate.median)),
            rate.map_or_else(String::new, |rate| format!("({}-{})", gigabits(rate.least), gigabits(rate.most))),
            of_host(document, line),
            line.spread(least_stream).map_or_else(String::new, |rate| gigabits(rate.median)),
            line.spread(|run| run.retransmits().map(|count| count as f64))
                .map_or_else(String::new, |count| format!("{:.0}", count.median)),
            cpu(line),
            exits,
            calls,
        ];
        grid.row(&point.load, &cells);
    }
    grid
}

/// Exits and system calls per operation; without a VM there is nobody whose they were.
pub(crate) fn counts(series: &Series) -> [String; 2] {
    if series.command.is_empty() {
        return Default::default();
    }
    [per_op(series.exits_per_op()), per_op(series.syscalls_per_op())]
}

/// What a series is judged by: operations per second, or bits per second.
pub(crate) fn figure(series: &Series) -> Option<Spread> {
    if series.point.is_of_streams() { series.spread(Run::bits_per_second) } else { series.rate() }
}

/// In terms of the host's own run.
pub(crate) fn of_host(document: &Document, series: &Series) -> String {
    ratio(figure(series), document.reference(&series.point).and_then(figure))
}

/// What the slowest of the streams brought.
fn least_stream(run: &Run) -> Option<f64> {
    run.streams.iter().map(|stream| stream.bits_per_second).min_by(f64::total_cmp)
}

/// Millions of bytes per second.
pub(crate) fn megabytes(series: &Series) -> String {
    series.spread(Run::bits_per_second).map_or_else(String::new, |rate| format!("{:.0}", rate.median / 8e6))
}

/// Of bits per second, in three digits or so.
pub(crate) fn gigabits(rate: f64) -> String {
    let rate = rate / 1e9;
    let digits = if rate < 1.0 { 3 } else { 2 };
    format!("{rate:.digits$}")
}

/// What must be said with the tables.
pub(crate) fn explanations(document: &Document) -> Vec<String> {
    let mut lines = vec![
        format!("Median (least-most). of {HOST}: of the same load on the host itself; fio on the same disk, iperf3 over the loopback"),
        "interface with the MTU of the guest's NIC. CPU: of all threads of the VMM but those of the vCPUs; of jobs that run at once,".to_owned(),
        "and of both directions of one, the mean. exits: by KVM's count. -: can't be had here, or (calls) not asked for: --syscalls.".to_owned(),
    ];
    let memory = |name: &str| {
        let memory =
            document.spread_of(name, |run| run.memory_beyond_ram.map(|bytes| bytes as f64 / f64::from(1 << 20)))?;
        Some(format!("{name}: {:.1} MiB besides the guest's RAM.", memory.median))
    };
    lines.extend(document.names().into_iter().filter_map(memory));
    lines
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::document::Job;
    use crate::sample::{Latency, Sample, Stream, VmSample};

    /// A document of two jobs and a line, with two contestants.
    pub(crate) fn linux_document() -> Document {
        let job = LinuxJob {
            kernel: "6.1.0-test".to_owned(),
            cpus: 2,
            memory: 512 << 20,
            queues: 1,
            pairs: 1,
            direct: false,
            runs: 3,
            disk: Some("/d/<x>.img".to_owned()),
            disk_bytes: 64 << 20,
            disk_file_system: Some("ext4".to_owned()),
            fio: vec!["[a<b]\n".to_owned()],
            iperf3: vec!["-t 1 -R".to_owned()],
        };
        let mut document = Document::new(Job::Linux(job), Vec::new());
        for (name, base) in [("host", 200_000), ("ringvm", 100_000)] {
            for (program, load) in
                [(LinuxProgram::Fio, "a<b"), (LinuxProgram::Fio, "c"), (LinuxProgram::Iperf3, "-t 1 -R")]
            {
                let point = Point::Linux(LinuxPoint { program, load: load.to_owned() });
                let command = if name == "host" { Vec::new() } else { vec!["/bin/vmm".to_owned()] };
                let mut series = Series::new(name, point, command, Vec::new());
                series.reference = name == "host";
                for run in 0..3 {
                    let streams = program == LinuxProgram::Iperf3;
                    let ops = if streams { base / 100 + run } else { base + run };
                    let bytes = Some(if streams { ops << 20 } else { ops * 4096 });
                    let latency =
                        Latency { p50: Duration::from_micros(9), p99: Duration::from_micros(99), steps: Vec::new() };
                    let vm = VmSample {
                        vcpu: None,
                        to_first_instruction: None,
                        memory: Some(7 << 20),
                        exits: Some(5),
                        line: "fio".to_owned(),
                    };
                    let stream = |retransmits| Stream { bits_per_second: 1e9, retransmits, lost_percent: None };
                    series.add(&Sample {
                        ops,
                        time: Duration::from_secs(1),
                        latency: (!streams).then_some(latency),
                        cpu: (name != "host").then_some(Duration::from_millis(500)),
                        bytes,
                        streams: if streams { vec![stream(Some(3)), stream(Some(4))] } else { Vec::new() },
                        vm: (name != "host").then_some(vm),
                        ..Sample::default()
                    });
                }
                document.series.push(series);
            }
        }
        document
    }

    #[test]
    fn jobs_and_lines_have_tables_with_ratios() {
        let document = linux_document();
        let Job::Linux(job) = document.job.clone() else { unreachable!() };
        let text = render(&document, &job);
        for wanted in [
            "Linux 6.1.0-test, 2 vCPUs, 512 MiB",
            "page-cached on the host's ext4, one queue",
            "a NIC on a tap",
            "ringvm: 7.0 MiB",
        ] {
            assert!(text.contains(wanted), "{wanted}: {text}");
        }
        let rows: Vec<Vec<_>> = text
            .lines()
            .filter(|line| line.contains(" ringvm "))
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(rows.len(), 3, "{text}");
        assert_eq!(
            rows[0],
            ["ringvm", "100", "k", "(100", "k-100", "k)", "0.50", "410", "9.0", "99.0", "5.00", "<0.001", "-"],
            "{text}"
        );
        assert_eq!(rows[2][..6], ["ringvm", "8.40", "(8.39-8.41)", "0.50", "1.00", "7"], "{text}");
        // Point by point, though they were measured contestant by contestant.
        let order: Vec<_> =
            lines(&document, LinuxProgram::Fio).map(|(point, series)| (&point.load[..], &series.name[..])).collect();
        assert_eq!(order, [("a<b", "host"), ("a<b", "ringvm"), ("c", "host"), ("c", "ringvm")]);
    }

    #[test]
    fn a_document_of_a_linux_guest_survives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        let document = linux_document();
        document.write(&path).unwrap();
        let again = Document::read(&path).unwrap();
        assert_eq!(serde_json::to_value(&again).unwrap(), serde_json::to_value(&document).unwrap());
        let first = serde_json::to_value(&again.series[3]).unwrap();
        assert_eq!((&first["program"], &first["load"]), (&"fio".into(), &"a<b".into()));
        assert_eq!(first["median_iops"], 100_001.0);
        let streams = serde_json::to_value(&again.series[5]).unwrap();
        assert_eq!(streams["median_bits_per_second"], f64::from(1001 << 20) * 8.0);
        assert_eq!(
            (&streams["median_iops"], &streams["runs"][0]["streams"][1]["retransmits"]),
            (&serde_json::Value::Null, &4.into())
        );
    }
}
