//! The part of a report that is about a Linux guest: its jobs of fio and its lines of iperf3.

use std::fmt::Write;

use super::chart::{self, Bar};
use super::distribution;
use super::text::{escape, range, short};
use crate::block::table::latency;
use crate::document::{Document, LinuxJob, LinuxPoint, LinuxProgram, Run, Series};
use crate::linux::table::{counts, explanations, figure, gigabits, lines, megabytes, of_host, setting, title};
use crate::table::cpu;

/// A section for each program.
pub(super) fn render(document: &Document, job: &LinuxJob) -> String {
    let mut page = format!("<p class=\"sub\">{}</p>\n", escape(&title(job)));
    for program in [LinuxProgram::Fio, LinuxProgram::Iperf3] {
        if lines(document, program).next().is_some() {
            page += &section(document, job, program);
        }
    }
    let notes = explanations(document);
    let _ = writeln!(page, "<p class=\"note\">{}</p>", escape(&notes.join(" ")));
    page
}

fn section(document: &Document, job: &LinuxJob, program: LinuxProgram) -> String {
    let what = setting(job, program);
    let mut page = format!("<section>\n<h2>{program}</h2>\n<p class=\"sub\">{}</p>\n", escape(&what));
    let mut points: Vec<&LinuxPoint> = Vec::new();
    lines(document, program).for_each(|(point, _)| {
        if !points.contains(&point) {
            points.push(point);
        }
    });
    page += "<div class=\"figures\">\n";
    for point in points {
        let all: Vec<&Series> =
            lines(document, program).filter(|&(known, _)| known == point).map(|(_, series)| series).collect();
        page += &plots(document, point, &all);
    }
    page += "</div>\n";
    page += &match program {
        LinuxProgram::Fio => fio(document),
        LinuxProgram::Iperf3 => iperf3(document),
    };
    page + "</section>\n"
}

/// Bars, and how latencies are distributed where that is known.
fn plots(document: &Document, point: &LinuxPoint, all: &[&Series]) -> String {
    let slot = |series: &Series| chart::slot(document, &series.name);
    let (unit, show): (_, fn(f64) -> String) = match point.program {
        LinuxProgram::Fio => ("IOPS", short),
        LinuxProgram::Iperf3 => ("Gbit/s", gigabits),
    };
    let bar = |series: &&'_ Series| {
        let spread = figure(series)?;
        let (text, of) = (show(spread.median), of_host(document, series));
        Some((spread, if of.is_empty() { text } else { format!("{text} · {of}") }))
    };
    let bars: Vec<_> = all
        .iter()
        .filter_map(|series| {
            let (spread, text) = bar(series)?;
            Some(Bar { name: &series.name, slot: slot(series), spread, text })
        })
        .collect();
    let label = format!("{unit}, {}", point.load);
    let mut page = chart::figure(&point.load, &format!("{unit} · of the host"), &chart::bars(&bars, &label));
    let curves: Vec<_> = all
        .iter()
        .map(|series| distribution::Curve {
            name: &series.name,
            slot: slot(series),
            reference: series.reference,
            steps: &series.latency_ns,
        })
        .collect();
    if let Some(svg) = distribution::plot(&curves, &format!("distribution of latencies of {}", point.load)) {
        page += &chart::figure(&format!("Latency, {}", point.load), "all runs", &svg);
    }
    page
}

/// A table's rows: the first cell of a point in its first row only.
fn rows(document: &Document, program: LinuxProgram, head: &str, cells: impl Fn(&Series) -> String) -> String {
    let mut page = format!("<div class=\"scroll\"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n");
    let mut last = None;
    for (point, series) in lines(document, program) {
        let first = last != Some(point);
        last = Some(point);
        let _ = writeln!(
            page,
            "<tr{}><td class=\"left\">{}</td><td class=\"left\">{}</td>{}</tr>",
            if first { " class=\"first\"" } else { "" },
            if first { escape(&point.load) } else { String::new() },
            escape(&series.name),
            cells(series),
        );
    }
    page + "</tbody>\n</table></div>\n"
}

fn fio(document: &Document) -> String {
    let head = "<th class=\"left\">job</th><th class=\"left\"></th><th>IOPS</th><th>least–most</th><th>of the<br>host</th>\
        <th>MB/s</th><th>p50 µs</th><th>p99 µs</th><th>CPU<br>µs/op</th><th>exits<br>/op</th><th>system<br>calls/op</th>";
    rows(document, LinuxProgram::Fio, head, |series| {
        let [exits, calls] = counts(series);
        let rate = series.rate();
        format!(
            "<td>{}</td><td class=\"soft\">{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>",
            rate.map_or_else(String::new, |rate| short(rate.median)),
            range(rate),
            of_host(document, series),
            megabytes(series),
            latency(series.spread(|run| run.p50_ns.map(|ns| ns as f64 / 1e3))),
            latency(series.spread(|run| run.p99_ns.map(|ns| ns as f64 / 1e3))),
            cpu(series),
            escape(&exits),
            escape(&calls),
        )
    })
}

fn iperf3(document: &Document) -> String {
    let head = "<th class=\"left\">options</th><th class=\"left\"></th><th>Gbit/s</th><th>least–most</th><th>of the<br>host</th>\
        <th>retransmits</th><th>CPU<br>µs/MiB</th><th>exits<br>/MiB</th><th>system<br>calls/MiB</th>";
    rows(document, LinuxProgram::Iperf3, head, |series| {
        let [exits, calls] = counts(series);
        let rate = figure(series);
        let retransmits = series.spread(|run: &Run| run.retransmits().map(|count| count as f64));
        format!(
            "<td>{}</td><td class=\"soft\">{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>",
            rate.map_or_else(String::new, |rate| gigabits(rate.median)),
            rate.map_or_else(String::new, |rate| format!("{}–{}", gigabits(rate.least), gigabits(rate.most))),
            of_host(document, series),
            retransmits.map_or_else(String::new, |count| format!("{:.0}", count.median)),
            cpu(series),
            escape(&exits),
            escape(&calls),
        )
    })
}
