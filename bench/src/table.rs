//! The table that a measurement ends in.

use std::fmt::Write;
use std::time::Duration;

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, CellAlignment, Table, TableComponent};

use crate::backend;
use crate::block::PLAIN_RING;
use crate::cli::BlockOptions;
use crate::host::Machine;
use crate::report::{Series, Spread};
use crate::scratch::Scratch;

/// Puts the table and what must be said with it together.
pub fn render(options: &BlockOptions, scratch: &Scratch, machine: &Machine, series: &[Series]) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(text, "\n{}", title(options, scratch));
    let _ = writeln!(text, "{} x {}, Linux {}\n", machine.cpus, machine.cpu, machine.kernel);
    let _ = writeln!(text, "{}\n", body(series));
    let _ = writeln!(
        text,
        "IOPS: median (least-most). p50, p99: latency. CPU: per operation, of all threads of the VMM but"
    );
    let _ = writeln!(text, "those of the vCPUs, where the guest works and polls; of the plain ring, its one thread.");
    if series.iter().any(|line| line.name == backend::NAME) {
        let _ = writeln!(text, "{}: no VM; a thread of this process takes the guest's place.", backend::NAME);
    }
    for name in names(series) {
        if let Some(line) = start_line(series, &name) {
            let _ = writeln!(text, "{line}");
        }
    }
    text
}

fn title(options: &BlockOptions, scratch: &Scratch) -> String {
    let plural = |count: u32, word: &str| if count == 1 { format!("one {word}") } else { format!("{count} {word}s") };
    format!(
        "{} KiB {}, {} {} of {} MiB, {}, {}, {}; medians of {}",
        options.bs as f64 / 1024.0,
        options.rw.words(),
        if options.direct { "O_DIRECT," } else { "page-cached" },
        scratch.file_system,
        scratch.size >> 20,
        plural(u32::from(options.queues), "queue"),
        plural(u32::from(options.cpus), "vCPU"),
        if options.irq { "interrupts" } else { "polling guest" },
        plural(options.runs, "interleaved run")
    )
}

fn body(series: &[Series]) -> Table {
    let mut table = Table::new();
    table.load_preset(NOTHING);
    for line in [TableComponent::TopBorder, TableComponent::HeaderLines, TableComponent::BottomBorder] {
        table.set_style(line, '─');
    }
    let crossings = [
        TableComponent::TopBorderIntersections,
        TableComponent::MiddleHeaderIntersections,
        TableComponent::BottomBorderIntersections,
    ];
    for crossing in crossings {
        table.set_style(crossing, '─');
    }
    let header = ["depth", "", "IOPS", "", "of plain ring", "p50 us", "p99 us", "CPU us/op"];
    table.set_header(header.iter().enumerate().map(|(column, name)| Cell::new(name).set_alignment(alignment(column))));
    let mut last = None;
    for line in series {
        let limit =
            series.iter().find(|other| other.depth == line.depth && other.name == PLAIN_RING).and_then(Series::iops);
        let iops = line.iops();
        let depth = if last == Some(line.depth) { String::new() } else { line.depth.to_string() };
        if last.is_some_and(|last| last != line.depth) {
            table.add_row([""]);
        }
        last = Some(line.depth);
        let cells = [
            depth,
            line.name.clone(),
            iops.map_or_else(String::new, |iops| thousands(iops.median)),
            iops.map_or_else(String::new, |iops| format!("({}-{})", thousands(iops.least), thousands(iops.most))),
            ratio(iops, limit),
            latency(line.spread(|sample| Some(microseconds(sample.p50)))),
            latency(line.spread(|sample| Some(microseconds(sample.p99)))),
            line.spread(|sample| sample.cpu_per_op()).map_or_else(String::new, |cpu| format!("{:.2}", cpu.median)),
        ];
        table.add_row(
            cells.into_iter().enumerate().map(|(column, text)| Cell::new(text).set_alignment(alignment(column))),
        );
    }
    table
}

fn alignment(column: usize) -> CellAlignment {
    if column == 1 { CellAlignment::Left } else { CellAlignment::Right }
}

fn ratio(iops: Option<Spread>, limit: Option<Spread>) -> String {
    match (iops, limit) {
        (Some(iops), Some(limit)) if limit.median > 0.0 => format!("{:.2}", iops.median / limit.median),
        _ => String::new(),
    }
}

fn latency(figure: Option<Spread>) -> String {
    figure.map_or_else(String::new, |spread| {
        if spread.median < 100.0 { format!("{:.1}", spread.median) } else { format!("{:.0}", spread.median) }
    })
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// `523 k`; small figures in full.
fn thousands(value: f64) -> String {
    if value < 10_000.0 { format!("{value:.0}") } else { format!("{:.0} k", value / 1_000.0) }
}

/// Names in the order of their first appearance.
fn names(series: &[Series]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for line in series {
        if !names.contains(&line.name) {
            names.push(line.name.clone());
        }
    }
    names
}

/// What starting a VMM took, over all its runs.
fn start_line(series: &[Series], name: &str) -> Option<String> {
    let runs = || series.iter().filter(|line| line.name == name).flat_map(|line| &line.samples);
    let start = Spread::of(
        runs().filter_map(|sample| sample.to_first_instruction).map(|time| time.as_secs_f64() * 1e3).collect(),
    )?;
    let memory =
        Spread::of(runs().filter_map(|sample| sample.memory).map(|bytes| bytes as f64 / f64::from(1 << 20)).collect());
    let memory = memory.map_or_else(|| "unknown memory".to_owned(), |memory| format!("{:.1} MiB", memory.median));
    Some(format!(
        "{name}: {:.1} ms ({:.1}-{:.1}) from exec to the guest's first instruction, {memory} besides the guest's RAM (median of {} starts).",
        start.median,
        start.least,
        start.most,
        runs().count()
    ))
}
