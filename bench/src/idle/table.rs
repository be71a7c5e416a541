//! The table of `idle`.

use std::fmt::Write;

use crate::document::{Document, IdleJob, Point};
use crate::stats::Spread;
use crate::table::{Grid, machine, per_op, plural, starts, warnings};

/// Puts the table and what must be said with it together.
pub(crate) fn render(document: &Document, job: &IdleJob) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(text, "\n{}", title(document, job));
    let _ = writeln!(text, "{}\n", machine(&document.machine));
    let mut grid = Grid::new(&["", "", "% of a CPU", "", "of these vCPUs", "calls/s", "exits/s"]);
    for line in &document.series {
        let all = line.spread(|run| run.cpu_percent());
        let of_vcpus = line.spread(|run| Some(run.vcpu_ns? as f64 * 100.0 / run.time_ns.max(1) as f64));
        let cells = [
            line.name.clone(),
            percent(all),
            all.map_or_else(String::new, |all| format!("({:.3}-{:.3})", all.least, all.most)),
            percent(of_vcpus),
            per_op(line.syscalls_per_op()),
            per_op(line.exits_per_op()),
        ];
        grid.row("", &cells);
    }
    let _ = writeln!(text, "{grid}\n");
    let lines = explanations().into_iter().map(str::to_owned).chain(starts(document)).collect::<Vec<_>>();
    let _ = writeln!(text, "{}{}", warnings(document), lines.join("\n"));
    text
}

fn percent(figure: Option<Spread>) -> String {
    figure.map_or_else(String::new, |figure| format!("{:.3}", figure.median))
}

/// What the table is about.
pub(crate) fn title(document: &Document, job: &IdleJob) -> String {
    let devices = document.series.iter().find_map(|series| match series.point {
        Point::Idle(point) => Some(point),
        _ => None,
    });
    let (disks, nics) = devices.map_or((0, 0), |point| (point.disks, point.nics));
    format!(
        "a guest that does nothing, {}, {}, {}; medians of {} of {} s",
        plural(u32::from(disks), "disk"),
        plural(u32::from(nics), "NIC"),
        plural(u32::from(job.cpus), "vCPU"),
        plural(job.runs, "interleaved run"),
        job.time_ms as f64 / 1e3
    )
}

/// What must be said with the table.
pub(crate) fn explanations() -> Vec<&'static str> {
    vec![
        "Median (least-most), of all threads and daemons of the VMM, vCPUs included. All devices are up, each disk has been",
        "read from once, interrupts are asked for; the vCPU halts, but for two ticks of its timer a second.",
    ]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::document::{IdlePoint, Job, Series};
    use crate::sample::Sample;

    #[test]
    fn idle_is_told_in_per_cent() {
        let job = IdleJob { cpus: 1, runs: 3, time_ms: 10_000 };
        let mut document = Document::new(Job::Idle(job.clone()), Vec::new());
        let mut series = Series::new("ringvm", Point::Idle(IdlePoint { disks: 2, nics: 1 }), Vec::new(), Vec::new());
        for micros in [10_000, 20_000, 40_000] {
            let (time, cpu) = (Duration::from_secs(10), Some(Duration::from_micros(micros)));
            series.add(&Sample { time, cpu, ..Sample::default() });
        }
        document.series.push(series);
        let text = render(&document, &job);
        assert!(text.contains("0.200") && text.contains("(0.100-0.400)"), "{text}");
        assert!(text.contains("2 disks, one NIC, one vCPU; medians of 3 interleaved runs of 10 s"), "{text}");
    }
}
