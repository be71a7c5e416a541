//! `ringvm-bench compare A.json B.json`: what has changed from one result to another, contestant by contestant.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Result, bail};
use serde_json::Value;

use crate::document::{Document, Point, Run, Series};
use crate::linux::table::gigabits;
use crate::stats::Spread;
use crate::table::{self, Grid, label, thousands};

/// What two results have in common.
pub struct Comparison {
    /// The table, and what must be said with it.
    pub text: String,
    /// The least of all ratios, and where it was.
    pub least: (f64, String),
}

/// One contestant at one point in both.
struct Pair<'a> {
    a: &'a Series,
    b: &'a Series,
}

/// Reads two results and compares them.
///
/// # Errors
/// A file that is none of ours, or nothing in common.
pub fn files(a: &Path, b: &Path) -> Result<Comparison> {
    let (name_a, name_b) = (a.display().to_string(), b.display().to_string());
    documents(&Document::read(a)?, &Document::read(b)?, &name_a, &name_b)
}

fn documents(a: &Document, b: &Document, name_a: &str, name_b: &str) -> Result<Comparison> {
    let twin =
        |series: &'_ Series| b.series.iter().find(|other| (&other.point, &other.name) == (&series.point, &series.name));
    let pairs: Vec<_> = a.series.iter().filter_map(|series| Some(Pair { a: series, b: twin(series)? })).collect();
    let mut least: Option<(f64, String)> = None;
    let mut grid = Grid::new(&["", "", "A", "", "B", "", "ratio", "least-most", "", "p99", "CPU/op"]);
    for Pair { a, b } in &pairs {
        let (figure, less_is_better) = figure(&a.point);
        let (Some(of_a), Some(of_b)) = (a.spread(figure), b.spread(figure)) else { continue };
        let ratio = ratio(of_a, of_b, less_is_better);
        let label = label(&a.point);
        if ratio.median.is_finite() && least.as_ref().is_none_or(|(known, _)| ratio.median < *known) {
            least = Some((ratio.median, format!("{} at {label}", a.name)));
        }
        let few = a.runs.len() < 2 || b.runs.len() < 2;
        let mark = match of_a.is_apart_from(of_b) {
            false => "",
            // One run has no spread.
            true if few => "?",
            true if ratio.median > 1.0 => "better",
            true => "WORSE",
        };
        let show = |spread: Spread| {
            let number = |value| match (less_is_better, a.point.is_of_streams()) {
                (true, _) => format!("{value:.3} %"),
                (false, true) => format!("{} Gbit/s", gigabits(value)),
                (false, false) => thousands(value),
            };
            [number(spread.median), format!("({}-{})", number(spread.least), number(spread.most))]
        };
        let ([median_a, spread_a], [median_b, spread_b]) = (show(of_a), show(of_b));
        let of = |figure: fn(&Run) -> Option<f64>| {
            let (of_a, of_b) = (a.spread(figure)?.median, b.spread(figure)?.median);
            (of_a > 0.0).then(|| format!("{:.2}", of_b / of_a))
        };
        let cells = [
            a.name.clone(),
            median_a,
            spread_a,
            median_b,
            spread_b,
            format!("{:.3}", ratio.median),
            format!("{:.2}-{:.2}", ratio.least, ratio.most),
            mark.to_owned(),
            of(|run| run.p99_ns.map(|ns| ns as f64)).unwrap_or_default(),
            of(Run::cpu_per_op).unwrap_or_default(),
        ];
        grid.row(&label, &cells);
    }
    let Some(least) = least else {
        bail!("{name_a} and {name_b} have nothing in common: no contestant was measured at the same point in both");
    };
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(text, "\nA: {name_a}, {}, {}\nB: {name_b}, {}, {}\n\n{grid}\n", a.date, a.tool, b.date, b.tool);
    let _ = writeln!(
        text,
        "ratio: of the medians, above 1 where B is better; least-most: of single runs at worst and at best. better, WORSE: none\n\
         of the runs of one lies among those of the other; ?: there was one run only, so that nobody knows. p99, CPU/op: B in terms of A."
    );
    for line in differences(a, b) {
        let _ = writeln!(text, "{line}");
    }
    let alone = a.series.len() + b.series.len() - 2 * pairs.len();
    if alone != 0 {
        let _ = writeln!(text, "{alone} series are in one of the files only.");
    }
    Ok(Comparison { text, least })
}

/// What is compared, and whether less of it is better.
fn figure(point: &Point) -> (fn(&Run) -> Option<f64>, bool) {
    match point {
        Point::Idle(_) => (Run::cpu_percent, true),
        point if point.is_of_streams() => (Run::bits_per_second, false),
        _ => (|run| Some(run.rate()), false),
    }
}

/// B in terms of A, or the other way round where less is better.
fn ratio(a: Spread, b: Spread, less_is_better: bool) -> Spread {
    let (over, under) = if less_is_better { (a, b) } else { (b, a) };
    Spread { median: over.median / under.median, least: over.least / under.most, most: over.most / under.least }
}

/// What makes two results less comparable than they look.
fn differences(a: &Document, b: &Document) -> Vec<String> {
    let mut lines = Vec::new();
    let mut tell = |what: &str, a: &Value, b: &Value| {
        if a != b {
            lines.push(format!("NOT THE SAME: {what} is {a} in A and {b} in B"));
        }
    };
    let object = |value: serde_json::Result<Value>| value.unwrap_or_default();
    let (job_a, job_b) = (object(serde_json::to_value(&a.job)), object(serde_json::to_value(&b.job)));
    // How often, how long and in which file says little of what was measured.
    let aside = ["runs", "disk", "time_ms"];
    for (key, value) in job_a.as_object().into_iter().flatten().filter(|(key, _)| !aside.contains(&key.as_str())) {
        tell(key, value, job_b.get(key).unwrap_or(&Value::Null));
    }
    let (machine_a, machine_b) = (object(serde_json::to_value(&a.machine)), object(serde_json::to_value(&b.machine)));
    for key in ["cpu", "cpus", "kernel"] {
        tell(key, &machine_a[key], &machine_b[key]);
    }
    for (name, document) in [("A", a), ("B", b)] {
        if let Some(why) = &document.incomplete {
            lines.push(format!("NOT COMPLETE: {name}: {why}"));
        }
        lines.extend(document.removed.iter().map(|removed| format!("TAKEN OUT: {name}: {removed}")));
        let grave = table::lost(document).into_iter().filter(|lost| lost.is_grave);
        lines.extend(grave.map(|lost| format!("{}: {name}: {}", lost.what, lost.text)));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::Removed;
    use crate::document::tests::sample_document;

    fn slower(part: f64) -> Document {
        let mut document = sample_document();
        for run in
            document.series.iter_mut().filter(|series| series.name == "ringvm").flat_map(|series| &mut series.runs)
        {
            run.ops = (run.ops as f64 * part) as u64;
        }
        document
    }

    #[test]
    fn changes_beyond_the_spread_are_marked() {
        let compared = documents(&sample_document(), &slower(0.5), "a", "b").unwrap();
        assert_eq!(compared.text.matches(" WORSE ").count(), 2, "{}", compared.text);
        assert!((compared.least.0 - 0.5).abs() < 0.01 && compared.least.1.starts_with("ringvm at rand-read"));
        let same = documents(&sample_document(), &sample_document(), "a", "b").unwrap();
        assert!(!same.text.contains(" WORSE ") && (same.least.0 - 1.0).abs() < 1e-9, "{}", same.text);
        let better = documents(&slower(0.5), &sample_document(), "a", "b").unwrap();
        assert!(better.text.contains(" better ") && better.least.0 >= 1.0 - 1e-9, "{}", better.text);
    }

    #[test]
    fn one_run_has_no_spread() {
        let (mut a, mut b) = (sample_document(), slower(0.5));
        for series in a.series.iter_mut().chain(&mut b.series) {
            series.runs.truncate(1);
        }
        let compared = documents(&a, &b, "a", "b").unwrap();
        assert!(compared.text.contains(" ? ") && !compared.text.contains(" WORSE "), "{}", compared.text);
    }

    #[test]
    fn what_differs_is_said() {
        let (a, mut b) = (sample_document(), sample_document());
        b.machine.kernel = "0.1".to_owned();
        b.incomplete = Some("interrupted".to_owned());
        let crate::document::Job::Block(job) = &mut b.job else { unreachable!() };
        job.queues = 4;
        let text = documents(&a, &b, "a", "b").unwrap().text;
        for wanted in ["queues is 1 in A and 4 in B", "kernel is", "NOT COMPLETE: B: interrupted"] {
            assert!(text.contains(wanted), "{text}");
        }
    }

    #[test]
    fn who_was_taken_out_of_one_is_named_and_the_others_are_compared() {
        let (a, mut b) = (sample_document(), sample_document());
        b.series.retain(|series| series.name != "ringvm, daemon");
        b.removed.push(Removed { name: "ringvm, daemon".to_owned(), at: None, why: "it died".to_owned() });
        b.series[0].runs[0].steal_percent = Some(50.0);
        let text = documents(&a, &b, "a", "b").unwrap().text;
        for wanted in
            ["TAKEN OUT: B: ringvm, daemon: it died", "2 series are in one of the files only", "steal: B: Of the runs"]
        {
            assert!(text.contains(wanted), "{text}");
        }
        assert!(!text.contains("steal: A") && text.contains("1.000"), "{text}");
    }

    #[test]
    fn nothing_in_common_is_an_error() {
        let (a, mut b) = (sample_document(), sample_document());
        b.series.iter_mut().for_each(|series| series.name += "!");
        let error = documents(&a, &b, "a.json", "b.json").err().unwrap().to_string();
        assert!(error.contains("a.json and b.json have nothing in common"), "{error}");
    }

    #[test]
    fn less_is_better_where_it_is_a_cost() {
        let of = |value| Spread { median: value, least: value, most: value };
        assert!(ratio(of(4.0), of(2.0), true).median > 1.0 && ratio(of(4.0), of(2.0), false).median < 1.0);
    }
}
