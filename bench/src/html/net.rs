//! The part of a report that is about NICs: frames per second by size and direction.

use std::fmt::Write;

use super::chart::{self, Bar};
use super::text::{escape, range, short};
use crate::document::{Document, NetJob, Series};
use crate::net::table::{explanations, flows, gigabits, title};
use crate::stats::Spread;
use crate::table::{counts, cpu, ratio};

/// A plot for each size and direction, and a table of all.
pub(super) fn render(document: &Document, job: &NetJob) -> String {
    let slot = |name: &str| chart::slot(document, name);
    let mut page = format!("<section>\n<h2>Frames per second</h2>\n<p class=\"sub\">{}</p>\n", escape(&title(job)));
    let mut points = Vec::new();
    flows(document).for_each(|(flow, _)| {
        if !points.contains(&flow) {
            points.push(flow);
        }
    });
    page += "<div class=\"figures\">\n";
    for point in points {
        let all: Vec<&Series> = flows(document).filter(|&(flow, _)| flow == point).map(|(_, series)| series).collect();
        let bars: Vec<_> = all
            .iter()
            .filter_map(|series| {
                let spread = series.rate()?;
                let of = ratio(Some(spread), limit(document, series));
                let text =
                    if of.is_empty() { short(spread.median) } else { format!("{} · {of}", short(spread.median)) };
                Some(Bar { name: &series.name, slot: slot(&series.name), spread, text })
            })
            .collect();
        let tso = if point.tso { ", TSO" } else { "" };
        let caption = format!("{} bytes {}{tso}", point.size, point.direction.words());
        let more = if point.irq {
            "frames/s · of the plain process; the guest sleeps"
        } else {
            "frames/s · of the plain process"
        };
        page += &chart::figure(&caption, more, &chart::bars(&bars, &format!("frames per second, {caption}")));
    }
    page += "</div>\n";
    page += &table(document);
    let notes = explanations(document);
    let notes = notes.iter().filter(|line| !line.contains("from exec to")).map(String::as_str).collect::<Vec<_>>();
    let _ = writeln!(page, "<p class=\"note\">{}</p>", escape(&notes.join(" ")));
    page + "</section>\n"
}

fn limit(document: &Document, series: &Series) -> Option<Spread> {
    document.reference(&series.point).and_then(Series::rate)
}

fn table(document: &Document) -> String {
    let mut page = "<div class=\"scroll\"><table>\n<thead><tr><th class=\"left\">bytes</th><th class=\"left\"></th><th>frames/s</th><th>least–most</th>\
        <th>Gbit/s</th><th>of the plain<br>process</th><th>CPU<br>µs/frame</th><th>kicks<br>/frame</th><th>exits<br>/frame</th>\
        <th>system calls<br>/frame</th></tr></thead>\n<tbody>\n"
        .to_owned();
    let mut last = None;
    for (flow, series) in flows(document) {
        let first = last != Some(flow);
        last = Some(flow);
        let [kicks, exits, calls] = counts(series);
        let rate = series.rate();
        let _ = writeln!(
            page,
            "<tr{}><td class=\"left\">{}</td><td class=\"left\">{}</td><td>{}</td><td class=\"soft\">{}</td><td>{}</td><td>{}</td>\
             <td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            if first { " class=\"first\"" } else { "" },
            if first { flow.to_string() } else { String::new() },
            escape(&series.name),
            rate.map_or_else(String::new, |rate| short(rate.median)),
            range(rate),
            gigabits(rate, flow.size),
            ratio(rate, limit(document, series)),
            cpu(series),
            escape(&kicks),
            escape(&exits),
            escape(&calls),
        );
    }
    page + "</tbody>\n</table></div>\n"
}
