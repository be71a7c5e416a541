//! What the tables of all measurements have in common.

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, CellAlignment, Table, TableComponent};

use crate::document::{Document, Point, Series};
use crate::host::Machine;
use crate::stats::Spread;

/// A table whose rows come in groups.
pub(crate) struct Grid {
    table: Table,
    /// The first column of the row before.
    group: Option<String>,
}

impl Grid {
    /// With this header.
    pub(crate) fn new(header: &[&str]) -> Self {
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
        table.set_header(header.iter().enumerate().map(|(column, text)| cell(column, text)));
        Self { table, group: None }
    }

    /// Adds a row to a group, which is named in its first row only.
    pub(crate) fn row(&mut self, group: &str, cells: &[String]) {
        let mut first = group;
        match &self.group {
            Some(last) if last == group => first = "",
            Some(_) => _ = self.table.add_row([""]),
            None => {}
        }
        self.group = Some(group.to_owned());
        let all = std::iter::once(first).chain(cells.iter().map(String::as_str));
        self.table.add_row(all.enumerate().map(|(column, text)| cell(column, text)));
    }
}

impl std::fmt::Display for Grid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.table.fmt(f)
    }
}

/// Names are to the left, numbers to the right.
fn cell(column: usize, text: &str) -> Cell {
    Cell::new(text).set_alignment(if column == 1 { CellAlignment::Left } else { CellAlignment::Right })
}

/// The median, in thousands, and its surroundings in a cell of their own.
pub(crate) fn with_spread(rate: Option<Spread>) -> [String; 2] {
    rate.map_or_else(Default::default, |rate| {
        [thousands(rate.median), format!("({}-{})", thousands(rate.least), thousands(rate.most))]
    })
}

/// One median in terms of another.
pub(crate) fn ratio(rate: Option<Spread>, limit: Option<Spread>) -> String {
    match (rate, limit) {
        (Some(rate), Some(limit)) if limit.median > 0.0 => format!("{:.2}", rate.median / limit.median),
        _ => String::new(),
    }
}

/// The median of the CPU time per operation.
pub(crate) fn cpu(series: &Series) -> String {
    series.spread(|run| run.cpu_per_op()).map_or_else(String::new, |cpu| format!("{:.2}", cpu.median))
}

/// Something per operation that may not be known, or be very small.
pub(crate) fn per_op(count: Option<f64>) -> String {
    match count {
        None => "-".to_owned(),
        Some(0.0) => "0".to_owned(),
        Some(count) if count < 0.001 => "<0.001".to_owned(),
        Some(count) if count < 1.0 => format!("{count:.3}"),
        Some(count) => format!("{count:.2}"),
    }
}

/// Notifications, exits and system calls per operation.
pub(crate) fn counts(series: &Series) -> [String; 3] {
    let kicks = series.spread(|run| run.per_op(run.kicks)).map(|kicks| kicks.median);
    // Without a guest there is nobody to send or to exit.
    let of_a_vm = |count| if series.command.is_empty() { String::new() } else { per_op(count) };
    [of_a_vm(kicks), of_a_vm(series.exits_per_op()), per_op(series.syscalls_per_op())]
}

/// What must be said of [`counts`].
pub(crate) fn about_counts(document: &Document) -> Vec<String> {
    let mut lines = vec![
        "kicks: notifications sent by the guest. exits: of the guest, by KVM's count. -: can't be had here.".to_owned(),
    ];
    let by = |series: &Series| series.counted.as_ref().map(|counted| counted.by.clone());
    match document.series.iter().find_map(by) {
        Some(by) => lines.push(format!(
            "calls: system calls of the VMM and its daemons in a run of its own, counted by {by}, which slows it."
        )),
        None => lines
            .push("calls: system calls; those of VMMs are counted with --syscalls, in runs of their own.".to_owned()),
    }
    lines
}

/// The second line of a table's title.
pub(crate) fn machine(machine: &Machine) -> String {
    format!("{} x {}, Linux {}", machine.cpus, machine.cpu, machine.kernel)
}

/// Said of a document that is not all that was planned, and of CPU time that its runs had to do without.
pub(crate) fn warnings(document: &Document) -> String {
    let incomplete = document.incomplete.iter().map(|why| format!("NOT COMPLETE: {why}\n"));
    let removed = document.removed.iter().map(|removed| format!("TAKEN OUT: {removed}\n"));
    let lost = lost(document).into_iter().map(|lost| format!("{}: {}\n", lost.what, lost.text));
    incomplete.chain(removed).chain(lost).collect()
}

/// What other programs may take of all CPUs, in per cent, before that is said.
const LIMIT_OF_OTHERS: f64 = 10.0;

/// What is to be said of CPU time that runs had to do without.
pub(crate) struct LostText {
    /// Of what kind.
    pub(crate) what: &'static str,
    pub(crate) text: String,
    /// Whether some of what counts has lost too much.
    pub(crate) is_grave: bool,
}

/// Said of what the host and other programs took, if that was looked at.
pub(crate) fn lost(document: &Document) -> Vec<LostText> {
    stolen(document).into_iter().chain(taken(document)).collect()
}

/// Said of programs that took much meanwhile.
fn taken(document: &Document) -> Option<LostText> {
    let lost = document.most_lost(LIMIT_OF_OTHERS, |run| run.others_percent).filter(|lost| lost.above != 0)?;
    let text = format!(
        "Other programs took more than {LIMIT_OF_OTHERS} % of all CPUs during {}, up to {:.0} % ({} at {}): measure again when this \
         machine is less busy.",
        match lost.above {
            1 => "one run that counts".to_owned(),
            above => format!("{above} runs that count"),
        },
        lost.most,
        lost.worst.name,
        label(&lost.worst.point)
    );
    Some(LostText { what: "others", text, is_grave: true })
}

/// Said of what the host took away, and what was done about it.
fn stolen(document: &Document) -> Option<LostText> {
    let steal = document.steal?;
    let limit = steal.limit_percent;
    let lost = document.most_lost(limit, |run| run.steal_percent)?;
    let repeated = match steal.repeated {
        0 => String::new(),
        1 => format!("one run that lost more than {limit} % of its CPU time to the host was repeated. "),
        count => format!("{count} runs that lost more than {limit} % of their CPU time to the host were repeated. "),
    };
    let (most, who, at) = (lost.most, &lost.worst.name, label(&lost.worst.point));
    let kept = match lost.above {
        0 if most <= 0.0 => "No run that counts lost any.".to_owned(),
        0 => format!("No run that counts lost more than {most:.1} %."),
        above => format!(
            "Of the runs that count {above} lost more than {limit} %, up to {most:.1} % ({who} at {at}): measure again when the host is \
             less busy."
        ),
    };
    Some(LostText { what: "steal", text: repeated + &kept, is_grave: lost.above != 0 })
}

/// A point in a few words.
pub(crate) fn label(point: &Point) -> String {
    match point {
        Point::Block(point) => {
            format!("{} {}, depth {}", point.rw.job(), bytes(point.bs), point.depth)
        }
        Point::Net(point) => point.to_string(),
        Point::Idle(point) => format!("idle, {} disks, {} NICs", point.disks, point.nics),
        Point::Linux(point) => point.to_string(),
    }
}

/// `4 KiB`, `512 bytes`.
pub(crate) fn bytes(bs: u64) -> String {
    match bs {
        _ if bs.is_multiple_of(1 << 20) => format!("{} MiB", bs >> 20),
        _ if bs >= 1024 => format!("{} KiB", bs as f64 / 1024.0),
        _ => format!("{bs} bytes"),
    }
}

/// `523 k`; small figures in full.
pub(crate) fn thousands(value: f64) -> String {
    if value < 10_000.0 { format!("{value:.0}") } else { format!("{:.0} k", value / 1_000.0) }
}

/// What starting each VMM took, over all its runs, in the order of their first appearance.
pub(crate) fn starts(document: &Document) -> Vec<String> {
    document.names().into_iter().filter_map(|name| start(document, name)).collect()
}

fn start(document: &Document, name: &str) -> Option<String> {
    let start = document.spread_of(name, |run| run.to_first_instruction_ns.map(|ns| ns as f64 / 1e6))?;
    let memory = document.spread_of(name, |run| run.memory_beyond_ram.map(|bytes| bytes as f64 / f64::from(1 << 20)));
    let memory = memory.map_or_else(|| "unknown memory".to_owned(), |memory| format!("{:.1} MiB", memory.median));
    let starts: usize =
        document.series.iter().filter(|series| series.name == name).map(|series| series.runs.len()).sum();
    Some(format!(
        "{name}: {:.1} ms ({:.1}-{:.1}) from exec to the guest's first instruction, {memory} besides the guest's RAM (median of {starts} starts).",
        start.median, start.least, start.most,
    ))
}

/// `one queue`, `2 queues`.
pub(crate) fn plural(count: u32, word: &str) -> String {
    if count == 1 { format!("one {word}") } else { format!("{count} {word}s") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::Removed;
    use crate::document::tests::sample_document;

    #[test]
    fn groups_are_named_once_and_set_apart() {
        let mut grid = Grid::new(&["depth", "", "IOPS"]);
        for (group, name) in [("1", "a"), ("1", "b"), ("32", "a")] {
            grid.row(group, &[name.to_owned(), "5 k".to_owned()]);
        }
        let text = grid.to_string();
        let rows: Vec<_> = text.lines().map(str::trim).collect();
        assert_eq!(rows.iter().filter(|row| row.starts_with('1')).count(), 1, "{text}");
        assert_eq!(rows.iter().filter(|row| row.starts_with('b')).count(), 1, "{text}");
        assert_eq!(rows.iter().filter(|row| row.is_empty()).count(), 1, "{text}");
    }

    #[test]
    fn what_was_taken_out_and_what_was_lost_is_said() {
        let mut document = sample_document();
        assert_eq!(warnings(&document), "steal: No run that counts lost more than 0.5 %.\n");
        let why = "it died".to_owned();
        document.removed.push(Removed { name: "qemu".to_owned(), at: Some("depth 1".to_owned()), why });
        document.steal.as_mut().unwrap().repeated = 7;
        document.series[1].runs[2].steal_percent = Some(41.3);
        assert_eq!(
            warnings(&document),
            "TAKEN OUT: qemu at depth 1: it died\n\
             steal: 7 runs that lost more than 3 % of their CPU time to the host were repeated. Of the runs that count 1 lost more \
             than 3 %, up to 41.3 % (ringvm at rand-read 4 KiB, depth 1): measure again when the host is less busy.\n"
        );
        document.series.iter_mut().flat_map(|series| &mut series.runs).for_each(|run| run.steal_percent = Some(0.0));
        document.steal.as_mut().unwrap().repeated = 1;
        let text = &lost(&document)[0].text;
        assert!(text.starts_with("one run that lost") && text.ends_with("No run that counts lost any."), "{text}");
        document.series[4].runs[0].others_percent = Some(48.8);
        assert_eq!(
            lost(&document)[1].text,
            "Other programs took more than 10 % of all CPUs during one run that counts, up to 49 % (ringvm at rand-read 4 KiB, depth \
             32): measure again when this machine is less busy."
        );
        document.steal = None;
        document.series[4].runs[0].others_percent = Some(9.0);
        assert!(lost(&document).is_empty());
    }

    #[test]
    fn figures_read_well() {
        let spread = |median: f64| Some(Spread { median, least: median / 2.0, most: median * 2.0 });
        assert_eq!(with_spread(spread(523_400.0)), ["523 k", "(262 k-1047 k)"]);
        assert_eq!(with_spread(spread(9_000.0)), ["9000", "(4500-18 k)"]);
        assert_eq!(ratio(spread(80.0), spread(100.0)), "0.80");
        assert_eq!(ratio(spread(80.0), None), "");
        assert_eq!(
            [None, Some(0.0), Some(1e-6), Some(0.25), Some(3.0)].map(per_op),
            ["-", "0", "<0.001", "0.250", "3.00"]
        );
    }
}
