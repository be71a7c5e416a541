//! The part of a report that is about disks: a section for each pattern and size.

use std::fmt::Write;

use super::chart::{self, Bar, Curve};
use super::distribution;
use super::text::{escape, range, short, tick};
use crate::block::table::{explanations, groups, latency, of_group, setting};
use crate::document::{BlockJob, Document, Point, Series};
use crate::stats::Spread;
use crate::table::{bytes, counts, cpu};
use crate::workload::Pattern;

/// All sections.
pub(super) fn render(document: &Document, job: &BlockJob) -> String {
    let mut page = String::new();
    for (rw, bs) in groups(document) {
        page += &section(document, job, rw, bs);
    }
    // Starts are told by a table of their own.
    let notes = explanations(document, job);
    let notes = notes.iter().filter(|line| !line.contains("from exec to")).map(String::as_str).collect::<Vec<_>>();
    let _ = writeln!(page, "<p class=\"note\">{}</p>", escape(&notes.join(" ")));
    page
}

fn section(document: &Document, job: &BlockJob, rw: Pattern, bs: u64) -> String {
    let all = of_group(document, rw, bs);
    let names = document.names();
    let slot = |name: &str| chart::slot(document, name);
    let mut depths: Vec<u32> = all.iter().map(|&(depth, _)| depth).collect();
    depths.dedup();
    let mut page = format!(
        "<section>\n<h2>{} {}</h2>\n<p class=\"sub\">{}</p>\n",
        bytes(bs),
        escape(rw.words()),
        escape(&setting(job))
    );
    page += &in_words(document, &all);
    let shown: Vec<_> = names.iter().filter(|name| all.iter().any(|(_, series)| series.name == **name)).collect();
    let is_reference = |name: &str| all.iter().any(|(_, series)| series.name == name && series.reference);
    let legend: Vec<_> = shown.iter().map(|&&name| (name, slot(name), is_reference(name))).collect();
    page += &chart::legend(&legend);
    page += "<div class=\"figures\">\n";
    if depths.len() > 1 {
        let curve = |name: &'_ str, figure: &dyn Fn(&Series) -> Option<Spread>| {
            let own = all.iter().filter(|(_, series)| series.name == name);
            own.filter_map(|(depth, series)| Some((f64::from((*depth).max(1)), figure(series)?))).collect::<Vec<_>>()
        };
        let curves = |figure: &dyn Fn(&Series) -> Option<Spread>| -> Vec<Curve<'_>> {
            let curves = shown.iter().map(|&&name| Curve {
                name,
                slot: slot(name),
                reference: is_reference(name),
                points: curve(name, figure),
            });
            curves.collect()
        };
        let svg = chart::over_depth(
            &curves(&Series::rate),
            0.0,
            "operations per second over requests in flight",
            (tick, short),
        );
        page += &chart::figure("IOPS over depth", "median, least to most", &svg);
        let of_limit = |series: &Series| ratio(document, series);
        let (label, write) = ("ratio to the plain ring over requests in flight", |ratio: f64| format!("{ratio:.2}"));
        let svg = chart::over_depth(&curves(&of_limit), 1.0, label, (write, write));
        page += &chart::figure("Of what the plain ring reaches", "in terms of its median", &svg);
    } else {
        page += &chart::figure("IOPS", "median, least to most; of the plain ring", &bars(document, &all, slot));
    }
    for &depth in &depths {
        let of = all.iter().filter(|&&(known, _)| known == depth);
        let curves: Vec<_> = of
            .map(|(_, series)| distribution::Curve {
                name: &series.name,
                slot: slot(&series.name),
                reference: series.reference,
                steps: &series.latency_ns,
            })
            .collect();
        if let Some(svg) = distribution::plot(&curves, &format!("distribution of latencies at depth {depth}")) {
            page += &chart::figure(
                &format!("Latency at depth {depth}"),
                "part of all operations that took less; all runs",
                &svg,
            );
        }
    }
    page += "</div>\n";
    page += &table(document, &all);
    page + "</section>\n"
}

/// A rate in terms of the median of the reference's.
fn ratio(document: &Document, series: &Series) -> Option<Spread> {
    let limit = document.reference(&series.point)?.rate()?.median;
    let rate = series.rate().filter(|_| limit > 0.0)?;
    Some(Spread { median: rate.median / limit, least: rate.least / limit, most: rate.most / limit })
}

/// What ringvm has come to, in a line for each depth.
fn in_words(document: &Document, all: &[(u32, &Series)]) -> String {
    let mut lines = String::new();
    for &(depth, series) in all.iter().filter(|(_, series)| series.name == "ringvm") {
        let Some(rate) = series.rate() else { continue };
        let mut line = format!("Depth {depth}: {} IOPS", short(rate.median));
        if let Some(ratio) = ratio(document, series) {
            let _ = write!(line, ", {:.2} of the plain ring", ratio.median);
        }
        let peers = all.iter().filter(|(_, other)| {
            other.point == series.point
                && !other.reference
                && !other.name.starts_with("ringvm")
                && !other.command.is_empty()
        });
        let best = peers.filter_map(|(_, other)| Some((other.rate()?.median, other.name.as_str())));
        if let Some((best, name)) = best.max_by(|one, other| one.0.total_cmp(&other.0)).filter(|&(best, _)| best > 0.0)
        {
            let _ = write!(line, ", {:.2} × the best other ({name})", rate.median / best);
        }
        let _ = writeln!(lines, "<li>{}</li>", escape(&line));
    }
    if lines.is_empty() {
        lines
    } else {
        format!("<p>ringvm, its devices in process:</p>\n<ul class=\"plain\">\n{lines}</ul>\n")
    }
}

fn bars(document: &Document, all: &[(u32, &Series)], slot: impl Fn(&str) -> usize) -> String {
    let bar = |series: &'_ Series| {
        let spread = series.rate()?;
        let of = ratio(document, series).map_or_else(String::new, |ratio| format!(" · {:.2}", ratio.median));
        Some((spread, format!("{}{of}", short(spread.median))))
    };
    let bars: Vec<_> = all
        .iter()
        .filter_map(|(_, series)| {
            let (spread, text) = bar(series)?;
            Some(Bar { name: &series.name, slot: slot(&series.name), spread, text })
        })
        .collect();
    chart::bars(&bars, "operations per second")
}

fn table(document: &Document, all: &[(u32, &Series)]) -> String {
    let mut page = "<div class=\"scroll\"><table>\n<thead><tr><th>depth</th><th class=\"left\"></th><th>IOPS</th><th>least–most</th>\
        <th>of the<br>plain ring</th><th>p50 µs</th><th>p99 µs</th><th>CPU<br>µs/op</th><th>kicks<br>/op</th><th>exits<br>/op</th>\
        <th>system<br>calls/op</th></tr></thead>\n<tbody>\n"
        .to_owned();
    let mut last: Option<&Point> = None;
    for &(depth, series) in all {
        let first = last != Some(&series.point);
        last = Some(&series.point);
        let [kicks, exits, calls] = counts(series);
        let rate = series.rate();
        let _ = writeln!(
            page,
            "<tr{}><td>{}</td><td class=\"left\">{}</td><td>{}</td><td class=\"soft\">{}</td><td>{}</td><td>{}</td><td>{}</td>\
             <td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            if first { " class=\"first\"" } else { "" },
            if first { depth.to_string() } else { String::new() },
            escape(&series.name),
            rate.map_or_else(String::new, |rate| short(rate.median)),
            range(rate),
            ratio(document, series).map_or_else(String::new, |ratio| format!("{:.2}", ratio.median)),
            latency(series.spread(|run| run.p50_ns.map(|ns| ns as f64 / 1e3))),
            latency(series.spread(|run| run.p99_ns.map(|ns| ns as f64 / 1e3))),
            cpu(series),
            escape(&kicks),
            escape(&exits),
            escape(&calls),
        );
    }
    page + "</tbody>\n</table></div>\n"
}
