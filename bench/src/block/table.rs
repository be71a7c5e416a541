//! The tables of `block`: one for each pattern and size.

use std::fmt::Write;

use super::PLAIN_RING;
use crate::backend;
use crate::document::{BlockJob, BlockPoint, Document, Point, Series};
use crate::stats::Spread;
use crate::table::{Grid, about_counts, bytes, counts, cpu, machine, plural, ratio, starts, warnings, with_spread};
use crate::workload::{Pattern, Storage};

/// Puts the tables and what must be said with them together.
pub(crate) fn render(document: &Document, job: &BlockJob) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    for (rw, bs) in groups(document) {
        let _ = writeln!(text, "\n{}", title(job, rw, bs));
        let _ = writeln!(text, "{}\n", machine(&document.machine));
        let _ = writeln!(text, "{}", body(document, rw, bs));
    }
    let _ = writeln!(text, "\n{}{}", warnings(document), explanations(document, job).join("\n"));
    text
}

/// The patterns and sizes that there are.
pub(crate) fn groups(document: &Document) -> Vec<(Pattern, u64)> {
    let mut groups = Vec::new();
    for series in &document.series {
        if let Point::Block(BlockPoint { rw, bs, .. }) = series.point
            && !groups.contains(&(rw, bs))
        {
            groups.push((rw, bs));
        }
    }
    groups
}

/// The series of a pattern and a size, with their depths.
pub(crate) fn of_group(document: &Document, rw: Pattern, bs: u64) -> Vec<(u32, &Series)> {
    let of = |series: &Series| match series.point {
        Point::Block(point) if (point.rw, point.bs) == (rw, bs) => Some(point.depth),
        _ => None,
    };
    document.series.iter().filter_map(|series| Some((of(series)?, series))).collect()
}

/// What a table is about.
fn title(job: &BlockJob, rw: Pattern, bs: u64) -> String {
    format!("{} {}, {}", bytes(bs), rw.words(), setting(job))
}

/// What holds for all tables.
pub(crate) fn setting(job: &BlockJob) -> String {
    let place = match (&job.disk_file_system, job.direct) {
        (None, _) => format!("null storage of {} MiB", job.disk_bytes >> 20),
        (Some(name), true) => format!("O_DIRECT, {name} of {} MiB", job.disk_bytes >> 20),
        (Some(name), false) => format!("page-cached {name} of {} MiB", job.disk_bytes >> 20),
    };
    format!(
        "{place}, {}, {}, {}{}; medians of {}",
        plural(u32::from(job.queues), "queue"),
        plural(u32::from(job.cpus), "vCPU"),
        if job.completions == "polled" { "polling guest" } else { "interrupts" },
        if job.prefault { ", memory prefaulted" } else { "" },
        plural(job.runs, "interleaved run")
    )
}

fn body(document: &Document, rw: Pattern, bs: u64) -> Grid {
    let header =
        ["depth", "", "IOPS", "", "of ring", "p50 us", "p99 us", "CPU us/op", "kicks/op", "exits/op", "calls/op"];
    let mut grid = Grid::new(&header);
    for (depth, line) in of_group(document, rw, bs) {
        let limit = document.reference(&line.point).and_then(Series::rate);
        let [iops, spread] = with_spread(line.rate());
        let [kicks, exits, calls] = counts(line);
        let cells = [
            line.name.clone(),
            iops,
            spread,
            ratio(line.rate(), limit),
            latency(line.spread(|run| run.p50_ns.map(|ns| ns as f64 / 1e3))),
            latency(line.spread(|run| run.p99_ns.map(|ns| ns as f64 / 1e3))),
            cpu(line),
            kicks,
            exits,
            calls,
        ];
        grid.row(&depth.to_string(), &cells);
    }
    grid
}

/// Microseconds.
pub(crate) fn latency(figure: Option<Spread>) -> String {
    figure.map_or_else(String::new, |spread| {
        if spread.median < 100.0 { format!("{:.1}", spread.median) } else { format!("{:.0}", spread.median) }
    })
}

/// What must be said with the tables.
pub(crate) fn explanations(document: &Document, job: &BlockJob) -> Vec<String> {
    let mut lines = vec![
        "IOPS: median (least-most). of ring: of what the plain ring reaches. p50, p99: latency. CPU: per operation, of all"
            .to_owned(),
        "threads of the VMM but those of the vCPUs, where the guest works and polls; of the plain ring, its one thread."
            .to_owned(),
    ];
    if job.storage == Storage::Null {
        lines
            .push(format!("null storage: requests succeed at once and nothing is moved; the {PLAIN_RING}'s are NOPs."));
    }
    lines.extend(about_counts(document));
    if document.names().contains(&backend::NAME) {
        lines.push(format!("{}: no VM; a thread of this process takes the guest's place.", backend::NAME));
    }
    lines.extend(starts(document));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::Job;
    use crate::document::tests::sample_document;

    #[test]
    fn the_table_has_ratios_and_says_what_is_missing() {
        let mut document = sample_document();
        document.incomplete = Some("interrupted after 3 of 9 runs".to_owned());
        let Job::Block(job) = document.job.clone() else { unreachable!() };
        let text = render(&document, &job);
        let row = text.lines().find(|line| line.contains(" ringvm  ")).unwrap();
        let words: Vec<_> = row.split_whitespace().collect();
        assert_eq!(words[..5], ["ringvm", "451", "k", "(450", "k-452"], "{text}");
        assert!(words.contains(&"0.50") && words.ends_with(&["<0.001", "-", "-"]), "{text}");
        assert!(text.contains("NOT COMPLETE: interrupted after 3 of 9"), "{text}");
        assert!(text.contains("4 KiB random reads, page-cached ext4 of 1024 MiB"), "{text}");
    }

    #[test]
    fn each_pattern_and_size_has_a_table_of_its_own() {
        let mut document = sample_document();
        let mut more = document.series.clone();
        for series in &mut more {
            let Point::Block(point) = &mut series.point else { unreachable!() };
            (point.rw, point.bs) = (Pattern::Write, 1 << 20);
        }
        document.series.extend(more);
        let Job::Block(job) = document.job.clone() else { unreachable!() };
        let text = render(&document, &job);
        assert_eq!((groups(&document).len(), text.matches("depth").count()), (2, 2), "{text}");
        assert!(text.contains("1 MiB sequential writes"), "{text}");
    }
}
