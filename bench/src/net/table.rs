//! The table of `net`.

use std::fmt::Write;

use super::{Flow, PLAIN_BESIDE, QUEUE_SIZE, SLEEPER_QUEUE_SIZE};
use crate::document::{Document, NetJob, Point, Series};
use crate::stats::Spread;
use crate::table::{Grid, about_counts, counts, cpu, machine, plural, ratio, starts, warnings, with_spread};
use crate::workload::Direction;

/// Puts the table and what must be said with it together.
pub(crate) fn render(document: &Document, job: &NetJob) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(text, "\n{}", title(job));
    let _ = writeln!(text, "{}\n", machine(&document.machine));
    let _ = writeln!(text, "{}\n", body(document));
    let _ = writeln!(text, "{}{}", warnings(document), explanations(document).join("\n"));
    text
}

/// What the table is about.
pub(crate) fn title(job: &NetJob) -> String {
    format!(
        "frames through a tap, {}, {} in flight, {}{}; medians of {} of {} ms",
        plural(u32::from(job.pairs), "queue pair"),
        job.depth,
        plural(u32::from(job.cpus), "vCPU"),
        if job.prefault { ", memory prefaulted" } else { "" },
        plural(job.runs, "interleaved run"),
        job.time_ms
    )
}

/// The series with their flows.
pub(crate) fn flows(document: &Document) -> impl Iterator<Item = (Flow, &Series)> {
    document.series.iter().filter_map(|series| match series.point {
        Point::Net(flow) => Some((flow, series)),
        _ => None,
    })
}

fn body(document: &Document) -> Grid {
    let header = [
        "bytes",
        "",
        "frames/s",
        "",
        "Gbit/s",
        "of plain",
        "CPU us/frame",
        "kicks/frame",
        "exits/frame",
        "calls/frame",
    ];
    let mut grid = Grid::new(&header);
    for (flow, line) in flows(document) {
        let limit = document.reference(&line.point).and_then(Series::rate);
        let [frames, spread] = with_spread(line.rate());
        let [kicks, exits, calls] = counts(line);
        let cells = [
            line.name.clone(),
            frames,
            spread,
            gigabits(line.rate(), flow.size),
            ratio(line.rate(), limit),
            cpu(line),
            kicks,
            exits,
            calls,
        ];
        grid.row(&flow.to_string(), &cells);
    }
    grid
}

pub(crate) fn gigabits(rate: Option<Spread>, size: usize) -> String {
    rate.map_or_else(String::new, |rate| format!("{:.2}", rate.median * size as f64 * 8.0 / 1e9))
}

/// What must be said with the table.
pub(crate) fn explanations(document: &Document) -> Vec<String> {
    let any = |is: fn(Flow, &Series) -> bool| flows(document).any(|(flow, series)| is(flow, series));
    let mut lines = vec![
        "frames/s: median (least-most). of plain: of what the plain process reaches. Bytes are those of a frame without its",
        "check sequence. CPU: per frame, of all threads of the VMM but those of the vCPUs, where the guest works or polls; of",
        "the plain process, its one thread.",
    ];
    if any(|flow, _| flow.direction == Direction::Out) {
        lines.push(
            "out: into a tap that nobody reads; all frames that were counted arrived there, by the tap's own count.",
        );
    }
    if any(|flow, _| flow.direction == Direction::In) {
        lines.push("in: what came of a flood from the host's side, which has a CPU to itself where the guest sleeps.");
    }
    if any(|flow, _| flow.irq) {
        lines.push(
            "irq: the guest sleeps until an interrupt comes, as the drivers of other guests do; elsewhere it polls.",
        );
    }
    if any(|_, series| series.name == PLAIN_BESIDE) {
        lines.push("plain, CPU shared: the plain process while a thread per vCPU polls as the guest's vCPUs do.");
    }
    let mut lines: Vec<String> = lines.into_iter().map(str::to_owned).collect();
    lines.push(format!(
        "Queues of {QUEUE_SIZE} where the guest polls, of {SLEEPER_QUEUE_SIZE} where it sleeps, if the VMM has such."
    ));
    lines.extend(about_counts(document));
    lines.extend(starts(document));
    lines
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::document::Job;
    use crate::net::PLAIN;
    use crate::sample::Sample;

    #[test]
    fn bits_ratios_and_cpu_are_those_of_the_medians() {
        let job = NetJob { depth: 256, pairs: 1, cpus: 1, prefault: false, runs: 1, time_ms: 1_000 };
        let mut document = Document::new(Job::Net(job.clone()), Vec::new());
        let point = Point::Net(Flow::new(Direction::Out, 1_500, false));
        for (name, ops) in [(PLAIN, 2_000_000), ("ringvm", 1_800_000)] {
            let mut series = Series::new(name, point.clone(), Vec::new(), Vec::new());
            series.reference = name == PLAIN;
            let (time, cpu) = (Duration::from_secs(1), Some(Duration::from_millis(900)));
            series.add(&Sample { ops, time, cpu, syscalls: Some(ops), ..Sample::default() });
            document.series.push(series);
        }
        let text = render(&document, &job);
        let row = text.lines().find(|line| line.contains("ringvm")).unwrap();
        let words: Vec<_> = row.split_whitespace().collect();
        assert_eq!(words[words.len() - 4..], ["21.60", "0.90", "0.50", "1.00"], "{text}");
        let all = explanations(&document).join(" ");
        assert!(all.contains("out: ") && !all.contains("in: what came"), "{all}");
    }
}
