//! The table of `net`.

use std::fmt::Write;

use super::{Flow, PLAIN, PLAIN_BESIDE, QUEUE_SIZE, SLEEPER_QUEUE_SIZE};
use crate::cli::{Direction, NetOptions};
use crate::host::Machine;
use crate::report::{Series, Spread};
use crate::table::{Grid, cpu, plural, ratio, starts, with_spread};

/// Puts the table and what must be said with it together.
pub(super) fn render(options: &NetOptions, machine: &Machine, series: &[Series<Flow>]) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(text, "\n{}", title(options));
    let _ = writeln!(text, "{} x {}, Linux {}\n", machine.cpus, machine.cpu, machine.kernel);
    let _ = writeln!(text, "{}\n", body(series));
    for line in explanations(series) {
        let _ = writeln!(text, "{line}");
    }
    let _ = writeln!(
        text,
        "Queues of {QUEUE_SIZE} where the guest polls, of {SLEEPER_QUEUE_SIZE} where it sleeps, if the VMM has such."
    );
    for line in starts(series) {
        let _ = writeln!(text, "{line}");
    }
    text
}

fn title(options: &NetOptions) -> String {
    format!(
        "frames through a tap, {}, {} in flight, {}; medians of {} of {} ms",
        plural(u32::from(options.pairs), "queue pair"),
        options.depth,
        plural(u32::from(options.cpus), "vCPU"),
        plural(options.runs, "interleaved run"),
        options.time.as_millis()
    )
}

fn body(series: &[Series<Flow>]) -> Grid {
    let mut grid = Grid::new(&["bytes", "", "frames/s", "", "Gbit/s", "of plain process", "CPU us/frame"]);
    for line in series {
        let limit = series.iter().find(|other| other.point == line.point && other.name == PLAIN).and_then(Series::rate);
        let [frames, spread] = with_spread(line.rate());
        let cells = [
            line.name.clone(),
            frames,
            spread,
            gigabits(line.rate(), line.point.size),
            ratio(line.rate(), limit),
            cpu(line),
        ];
        grid.row(&line.point.to_string(), &cells);
    }
    grid
}

fn gigabits(rate: Option<Spread>, size: usize) -> String {
    rate.map_or_else(String::new, |rate| format!("{:.2}", rate.median * size as f64 * 8.0 / 1e9))
}

fn explanations(series: &[Series<Flow>]) -> Vec<&'static str> {
    let mut lines = vec![
        "frames/s: median (least-most). Bytes are those of a frame without its check sequence. CPU: per frame, of all",
        "threads of the VMM but those of the vCPUs, where the guest works or polls; of the plain process, its one thread.",
    ];
    if series.iter().any(|line| line.point.direction == Direction::Out) {
        lines.push(
            "out: into a tap that nobody reads; all frames that were counted arrived there, by the tap's own count.",
        );
    }
    if series.iter().any(|line| line.point.direction == Direction::In) {
        lines.push("in: what came of a flood from the host's side, which runs on the same CPUs.");
    }
    if series.iter().any(|line| line.point.irq) {
        lines.push(
            "irq: the guest sleeps until an interrupt comes, as the drivers of other guests do; elsewhere it polls.",
        );
    }
    if series.iter().any(|line| line.name == PLAIN_BESIDE) {
        lines.push("plain, CPU shared: the plain process while a thread per vCPU polls as the guest's vCPUs do.");
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::run::Sample;

    #[test]
    fn bits_ratios_and_cpu_are_those_of_the_medians() {
        let flow = Flow { direction: Direction::Out, size: 1_500, irq: false };
        let series = [(PLAIN, 2_000_000), ("ringvm", 1_800_000)].map(|(name, ops)| {
            let mut series = Series::new(name, flow, Vec::new());
            let cpu = Some(Duration::from_millis(900));
            series.samples.push(Sample {
                ops,
                time: Duration::from_secs(1),
                latency: None,
                cpu,
                carried: None,
                vm: None,
            });
            series
        });
        let text = body(&series).to_string();
        let row = text.lines().find(|line| line.contains("ringvm")).unwrap();
        let words: Vec<_> = row.split_whitespace().collect();
        assert_eq!(words[words.len() - 3..], ["21.60", "0.90", "0.50"], "{text}");
        let all = explanations(&series).join(" ");
        assert!(all.contains("out: ") && !all.contains("in: "), "{all}");
    }
}
