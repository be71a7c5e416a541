//! Plots of figures over points, and bars. Each is an SVG that takes the width of its place.

use std::fmt::Write;

use super::scale::Linear;
use super::text::{escape, short};
use crate::document::Document;
use crate::stats::Spread;

pub(super) const WIDTH: f64 = 560.0;
pub(super) const HEIGHT: f64 = 300.0;
pub(super) const LEFT: f64 = 64.0;
pub(super) const RIGHT: f64 = 18.0;
pub(super) const TOP: f64 = 10.0;
pub(super) const BOTTOM: f64 = 44.0;
/// Colours, and shapes of points, before they come again.
const COLOURS: usize = 8;
/// Labels of an axis are at least so far apart.
const APART: f64 = 26.0;

/// One line, or one bar in each group.
pub(super) struct Curve<'a> {
    /// Whose.
    pub(super) name: &'a str,
    /// Its place among all contestants, which gives it its colour everywhere.
    pub(super) slot: usize,
    /// What the others are measured by.
    pub(super) reference: bool,
    /// Where and what.
    pub(super) points: Vec<(f64, Spread)>,
}

/// The slots of those that are known: the same in all reports, so that two can be read side by side.
const KNOWN: [&str; COLOURS] = [
    "",
    "ringvm",
    "ringvm, daemon",
    "firecracker",
    "firecracker-async",
    "cloud-hypervisor",
    "qemu",
    "qemu-storage-daemon",
];

/// The slot of a contestant: the first is for what the others are measured by.
pub(super) fn slot(document: &Document, name: &str) -> usize {
    if document.series.iter().any(|series| series.reference && series.name == name) {
        return 0;
    }
    let others = document.names().into_iter().filter(|name| !KNOWN.contains(name));
    let other = |name: &str| others.clone().position(|known| known == name).map(|index| COLOURS + index);
    KNOWN.iter().position(|known| *known == name).or_else(|| other(name)).unwrap_or(0)
}

/// The classes of a curve's elements.
pub(super) fn class(slot: usize) -> String {
    format!("k{}", slot % COLOURS)
}

/// How a curve's line is dashed: the reference's is, and those that share a colour with an earlier one are.
pub(super) fn dash(slot: usize, reference: bool) -> &'static str {
    match (reference, slot / COLOURS) {
        (true, _) => " dashed",
        (false, 0) => "",
        (false, _) => " dotted",
    }
}

/// A point's shape.
pub(super) fn mark(slot: usize, x: f64, y: f64) -> String {
    let class = format!("class=\"point fill {}\"", class(slot));
    match slot % 4 {
        0 => format!("<circle {class} cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\"/>"),
        1 => format!("<rect {class} x=\"{:.1}\" y=\"{:.1}\" width=\"8.5\" height=\"8.5\"/>", x - 4.25, y - 4.25),
        2 => format!(
            "<polygon {class} points=\"{:.1},{:.1} {:.1},{:.1} {:.1},{:.1}\"/>",
            x,
            y - 5.5,
            x + 5.2,
            y + 4.0,
            x - 5.2,
            y + 4.0
        ),
        _ => format!(
            "<polygon {class} points=\"{:.1},{:.1} {:.1},{:.1} {:.1},{:.1} {:.1},{:.1}\"/>",
            x,
            y - 5.8,
            x + 5.8,
            y,
            x,
            y + 5.8,
            x - 5.8,
            y
        ),
    }
}

/// Names, with the lines and points that stand for them.
pub(super) fn legend(names: &[(&str, usize, bool)]) -> String {
    let mut text = "<ul class=\"legend\">\n".to_owned();
    for &(name, slot, reference) in names {
        let _ = writeln!(
            text,
            "<li><svg viewBox=\"0 0 34 14\" aria-hidden=\"true\"><line class=\"line stroke {}{}\" x1=\"1\" y1=\"7\" x2=\"33\" y2=\"7\"/>{}</svg>{}</li>",
            class(slot),
            dash(slot, reference),
            mark(slot, 17.0, 7.0),
            escape(name)
        );
    }
    text + "</ul>\n"
}

/// A figure with its caption.
pub(super) fn figure(caption: &str, more: &str, svg: &str) -> String {
    let caption = escape(caption);
    let more = if more.is_empty() { String::new() } else { format!(" <small>{}</small>", escape(more)) };
    format!("<figure>\n<figcaption>{caption}{more}</figcaption>\n{svg}</figure>\n")
}

/// The start of an SVG, said in words for those who do not see it.
pub(super) fn open(width: f64, height: f64, label: &str) -> String {
    format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">\n", escape(label))
}

/// Horizontal lines of the grid, with their labels.
pub(super) fn rows(ticks: &[(f64, String)]) -> String {
    let mut svg = String::new();
    for (y, label) in ticks {
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 8.0,
            y + 4.0,
            escape(label)
        );
    }
    svg
}

/// The lower axis, with its labels and what they are of.
pub(super) fn bottom(ticks: &[(f64, String)], title: &str) -> String {
    let y = HEIGHT - BOTTOM;
    let mut svg = format!("<line class=\"axis\" x1=\"{LEFT}\" y1=\"{y}\" x2=\"{:.1}\" y2=\"{y}\"/>\n", WIDTH - RIGHT);
    let mut last = f64::NEG_INFINITY;
    for (x, label) in ticks {
        let _ = writeln!(svg, "<line class=\"axis\" x1=\"{x:.1}\" y1=\"{y}\" x2=\"{x:.1}\" y2=\"{:.1}\"/>", y + 4.0);
        if x - last >= APART {
            let _ = writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                y + 18.0,
                escape(label)
            );
            last = *x;
        }
    }
    let middle = f64::midpoint(LEFT, WIDTH - RIGHT);
    let _ =
        writeln!(svg, "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>", y + 37.0, escape(title));
    svg
}

/// Lines over depths, which lie as their logarithms do. `top` is where the axis ends at least; `ticks` and
/// `format` write its labels, and the values of points.
pub(super) fn over_depth(
    curves: &[Curve<'_>],
    top: f64,
    label: &str,
    (ticks, format): (impl Fn(f64) -> String, impl Fn(f64) -> String),
) -> String {
    let most = curves.iter().flat_map(|curve| &curve.points).map(|(_, spread)| spread.most);
    let axis = Linear::new(most.filter(|most| most.is_finite()).fold(top, f64::max));
    let mut depths: Vec<f64> = curves.iter().flat_map(|curve| curve.points.iter().map(|&(depth, _)| depth)).collect();
    depths.sort_by(f64::total_cmp);
    depths.dedup();
    let (first, last) = (depths.first().copied().unwrap_or(1.0), depths.last().copied().unwrap_or(2.0));
    let inset = 22.0;
    let x = |depth: f64| {
        let part = if last > first { (depth / first).ln() / (last / first).ln() } else { 0.5 };
        LEFT + inset + part * (WIDTH - LEFT - RIGHT - 2.0 * inset)
    };
    let y = |value: f64| TOP + (1.0 - axis.part(value)) * (HEIGHT - TOP - BOTTOM);
    let mut svg = open(WIDTH, HEIGHT, label);
    svg += &rows(&axis.ticks().into_iter().map(|tick| (y(tick), ticks(tick))).collect::<Vec<_>>());
    svg += &bottom(
        &depths.iter().map(|&depth| (x(depth), short(depth))).collect::<Vec<_>>(),
        "requests in flight per queue",
    );
    // The first come last, on top of the others.
    for curve in curves.iter().rev() {
        let class = class(curve.slot);
        let points: Vec<_> =
            curve.points.iter().map(|(depth, spread)| format!("{:.1},{:.1}", x(*depth), y(spread.median))).collect();
        let dash = dash(curve.slot, curve.reference);
        let _ = writeln!(svg, "<polyline class=\"line stroke {class}{dash}\" points=\"{}\"/>", points.join(" "));
        for (depth, spread) in &curve.points {
            let (x, y1, y2) = (x(*depth), y(spread.least), y(spread.most));
            let said = format!("{}, {}: {}", curve.name, short(*depth), format(spread.median));
            let _ = writeln!(
                svg,
                "<g><title>{} ({}–{})</title><line class=\"whisker stroke {class}\" x1=\"{x:.1}\" y1=\"{y1:.1}\" x2=\"{x:.1}\" y2=\"{y2:.1}\"/>{}</g>",
                escape(&said),
                escape(&format(spread.least)),
                escape(&format(spread.most)),
                mark(curve.slot, x, y(spread.median))
            );
        }
    }
    svg + "</svg>\n"
}

/// One bar.
pub(super) struct Bar<'a> {
    /// Whose.
    pub(super) name: &'a str,
    /// Its place among all contestants.
    pub(super) slot: usize,
    /// How long.
    pub(super) spread: Spread,
    /// What stands at its end.
    pub(super) text: String,
}

/// Bars below each other, each with its name and its value.
pub(super) fn bars(bars: &[Bar<'_>], label: &str) -> String {
    const ROW: f64 = 26.0;
    const NAMES: f64 = 150.0;
    const VALUES: f64 = 120.0;
    let most = bars.iter().map(|bar| bar.spread.most).filter(|most| most.is_finite()).fold(0.0, f64::max);
    let length = |value: f64| {
        let part = if most > 0.0 && value.is_finite() { (value / most).clamp(0.0, 1.0) } else { 0.0 };
        part * (WIDTH - NAMES - VALUES)
    };
    let height = bars.len() as f64 * ROW + 8.0;
    let mut svg = open(WIDTH, height, label);
    for (index, bar) in bars.iter().enumerate() {
        let (y, class) = (index as f64 * ROW + 4.0, class(bar.slot));
        let (middle, end) = (y + 10.0, NAMES + length(bar.spread.median));
        let (least, most) = (NAMES + length(bar.spread.least), NAMES + length(bar.spread.most));
        let _ = writeln!(
            svg,
            "<text class=\"name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect class=\"bar fill {class}\" x=\"{NAMES}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"20\" rx=\"2\"/>\
             <line class=\"axis\" x1=\"{least:.1}\" y1=\"{middle:.1}\" x2=\"{most:.1}\" y2=\"{middle:.1}\" style=\"stroke: var(--ink); stroke-width: 1.5\"/>\
             <text class=\"value\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            NAMES - 8.0,
            middle + 4.0,
            escape(bar.name),
            (end - NAMES).max(1.0),
            most.max(end) + 8.0,
            middle + 4.0,
            escape(&bar.text)
        );
    }
    svg + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::tests::sample_document;

    #[test]
    fn everybody_has_a_slot_and_those_that_are_known_keep_theirs() {
        let mut document = sample_document();
        document.series[2].name = "ringvm #2".to_owned();
        let of = |name| slot(&document, name);
        assert_eq!([of("plain ring"), of("ringvm"), of("qemu")], [0, 1, 6]);
        // After the reference, which is not among those that are known either.
        assert_eq!(of("ringvm #2"), COLOURS + 1);
        assert_ne!(dash(of("ringvm #2"), false), dash(of("ringvm"), false));
    }

    #[test]
    fn what_is_no_number_has_a_place_all_the_same() {
        let spread = Spread { median: f64::NAN, least: f64::NAN, most: f64::INFINITY };
        let curve = Curve { name: "x", slot: 3, reference: false, points: vec![(1.0, spread), (8.0, spread)] };
        let svg = over_depth(&[curve], 0.0, "", (short, short));
        assert!(!svg.contains("=\"NaN") && !svg.contains("=\"inf"), "{svg}");
        let svg = bars(&[Bar { name: "x", slot: 1, spread, text: String::new() }], "");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
