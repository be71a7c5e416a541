//! The table of `block`.

use std::fmt::Write;
use std::time::Duration;

use super::PLAIN_RING;
use crate::backend;
use crate::cli::BlockOptions;
use crate::host::Machine;
use crate::report::{Series, Spread};
use crate::scratch::Scratch;
use crate::table::{Grid, cpu, plural, ratio, starts, with_spread};

/// Puts the table and what must be said with it together.
pub(super) fn render(options: &BlockOptions, scratch: &Scratch, machine: &Machine, series: &[Series<u32>]) -> String {
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
    for line in starts(series) {
        let _ = writeln!(text, "{line}");
    }
    text
}

fn title(options: &BlockOptions, scratch: &Scratch) -> String {
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

fn body(series: &[Series<u32>]) -> Grid {
    let mut grid = Grid::new(&["depth", "", "IOPS", "", "of plain ring", "p50 us", "p99 us", "CPU us/op"]);
    for line in series {
        let limit =
            series.iter().find(|other| other.point == line.point && other.name == PLAIN_RING).and_then(Series::rate);
        let [iops, spread] = with_spread(line.rate());
        let cells = [
            line.name.clone(),
            iops,
            spread,
            ratio(line.rate(), limit),
            latency(line.spread(|sample| sample.latency.map(|latency| microseconds(latency.p50)))),
            latency(line.spread(|sample| sample.latency.map(|latency| microseconds(latency.p99)))),
            cpu(line),
        ];
        grid.row(&line.point.to_string(), &cells);
    }
    grid
}

fn latency(figure: Option<Spread>) -> String {
    figure.map_or_else(String::new, |spread| {
        if spread.median < 100.0 { format!("{:.1}", spread.median) } else { format!("{:.0}", spread.median) }
    })
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
