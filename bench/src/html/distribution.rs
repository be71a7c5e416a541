//! How latencies are distributed: which part of all operations took less than so long. Time is logarithmic, and so is what is
//! left to 100 %, so that the tail has as much room as the rest.

use std::fmt::Write;

use super::chart::{BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, bottom, class, dash, open, rows};
use super::scale::Logarithmic;
use super::text::{escape, time};

/// The upper end of the axis: one in ten thousand takes longer.
const NINES: f64 = 4.0;
/// The lower end, in the same terms: what the fastest fiftieth takes is where the axis of time begins.
const LEAST: f64 = 0.0088;
const TICKS: [(f64, &str); 6] =
    [(0.0, "0 %"), (0.5, "50 %"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"), (0.9999, "99.99 %")];

/// One contestant.
pub(super) struct Curve<'a> {
    /// Whose.
    pub(super) name: &'a str,
    /// Its place among all contestants.
    pub(super) slot: usize,
    /// What the others are measured by.
    pub(super) reference: bool,
    /// How many took less than so many nanoseconds, but not less than the step before.
    pub(super) steps: &'a [(u64, u64)],
}

/// The plot; `None` if there is nothing in it.
pub(super) fn plot(curves: &[Curve<'_>], label: &str) -> Option<String> {
    let lines: Vec<_> = curves.iter().map(|curve| cumulative(curve.steps)).collect();
    let all = || lines.iter().flatten();
    // The odd one that is much faster than all others is left out, or they would have half of the plot.
    let start = all().filter(|&&(_, nines)| nines >= LEAST).map(|&(ns, _)| ns).fold(f64::INFINITY, f64::min);
    let end = all().filter(|&&(_, nines)| nines <= NINES).map(|&(ns, _)| ns).fold(0.0, f64::max);
    if end == 0.0 {
        return None;
    }
    let axis = Logarithmic::new(start * 0.8, end * 1.15);
    let x = |ns: f64| LEFT + axis.part(ns) * (WIDTH - LEFT - RIGHT);
    let y = |nines: f64| TOP + (1.0 - (nines / NINES).clamp(0.0, 1.0)) * (HEIGHT - TOP - BOTTOM);
    let mut svg = open(WIDTH, HEIGHT, label);
    svg += &rows(&TICKS.map(|(part, label)| (y(nines(part)), label.to_owned())));
    svg += &bottom(&axis.ticks().into_iter().map(|tick| (x(tick), time(tick))).collect::<Vec<_>>(), "latency");
    for (curve, line) in curves.iter().zip(&lines).rev() {
        let mut path = String::new();
        let mut last = 0.0;
        let visible = line.iter().filter(|&&(ns, _)| axis.part(ns) > 0.0);
        for &(ns, nines) in visible {
            // A step is a line from where it begins: its values lie anywhere in it.
            let _ = write!(path, "{}{:.1},{:.1} ", if path.is_empty() { "M" } else { "L" }, x(ns), y(nines));
            last = nines;
            if nines > NINES {
                break;
            }
        }
        if last == 0.0 {
            continue;
        }
        let _ = writeln!(
            svg,
            "<path class=\"line stroke {}{}\" d=\"{}\"><title>{}</title></path>",
            class(curve.slot),
            dash(curve.slot, curve.reference),
            path.trim_end(),
            escape(curve.name)
        );
    }
    Some(svg + "</svg>\n")
}

/// What is left to 1, as nines: 0.99 has two.
fn nines(part: f64) -> f64 {
    -(1.0 - part).max(1e-12).log10()
}

/// The ends of steps, and the nines of what lies before them, from 0 at the first on.
fn cumulative(steps: &[(u64, u64)]) -> Vec<(f64, f64)> {
    let total: f64 = steps.iter().map(|&(_, count)| count as f64).sum();
    let mut line = Vec::new();
    let mut before = 0.0;
    let mut last = 0;
    for &(end, count) in steps.iter().filter(|&&(end, count)| end > 0 && count > 0) {
        if end < last {
            // Whoever wrote this did not sort it.
            continue;
        }
        last = end;
        if line.is_empty() {
            line.push((end as f64 * 0.94, 0.0));
        }
        before += count as f64;
        line.push((end as f64, nines(before / total)));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up() {
        let line = cumulative(&[(1_000, 90), (2_000, 9), (50_000, 1)]);
        assert_eq!(line.len(), 4);
        assert!((line[1].1 - 1.0).abs() < 1e-9 && (line[2].1 - 2.0).abs() < 1e-9 && line[3].1 > NINES, "{line:?}");
        assert!(cumulative(&[]).is_empty() && cumulative(&[(5, 0)]).is_empty());
    }

    #[test]
    fn nothing_is_no_plot() {
        let curve = |steps| Curve { name: "x", slot: 0, reference: false, steps };
        assert!(plot(&[curve(&[])], "").is_none());
        assert!(plot(&[curve(&[(1_000, 5), (2_000, 5)])], "").unwrap().contains("<path"));
    }
}
