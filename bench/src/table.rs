//! What the tables of all measurements have in common.

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, CellAlignment, Table, TableComponent};

use crate::report::{Series, Spread};

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
pub(crate) fn cpu<P>(series: &Series<P>) -> String {
    series.spread(|sample| sample.cpu_per_op()).map_or_else(String::new, |cpu| format!("{:.2}", cpu.median))
}

/// `523 k`; small figures in full.
fn thousands(value: f64) -> String {
    if value < 10_000.0 { format!("{value:.0}") } else { format!("{:.0} k", value / 1_000.0) }
}

/// What starting each VMM took, over all its runs, in the order of their first appearance.
pub(crate) fn starts<P>(series: &[Series<P>]) -> Vec<String> {
    let mut names: Vec<&str> = Vec::new();
    for line in series {
        if !names.contains(&line.name.as_str()) {
            names.push(&line.name);
        }
    }
    names.into_iter().filter_map(|name| start(series, name)).collect()
}

fn start<P>(series: &[Series<P>], name: &str) -> Option<String> {
    let runs = || series.iter().filter(|line| line.name == name).flat_map(|line| &line.samples);
    let vms = || runs().filter_map(|sample| sample.vm.as_ref());
    let start =
        Spread::of(vms().filter_map(|vm| vm.to_first_instruction).map(|time| time.as_secs_f64() * 1e3).collect())?;
    let memory = Spread::of(vms().filter_map(|vm| vm.memory).map(|bytes| bytes as f64 / f64::from(1 << 20)).collect());
    let memory = memory.map_or_else(|| "unknown memory".to_owned(), |memory| format!("{:.1} MiB", memory.median));
    Some(format!(
        "{name}: {:.1} ms ({:.1}-{:.1}) from exec to the guest's first instruction, {memory} besides the guest's RAM (median of {} starts).",
        start.median,
        start.least,
        start.most,
        runs().count()
    ))
}

/// `one queue`, `2 queues`.
pub(crate) fn plural(count: u32, word: &str) -> String {
    if count == 1 { format!("one {word}") } else { format!("{count} {word}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn figures_read_well() {
        let spread = |median: f64| Some(Spread { median, least: median / 2.0, most: median * 2.0 });
        assert_eq!(with_spread(spread(523_400.0)), ["523 k", "(262 k-1047 k)"]);
        assert_eq!(with_spread(spread(9_000.0)), ["9000", "(4500-18 k)"]);
        assert_eq!(ratio(spread(80.0), spread(100.0)), "0.80");
        assert_eq!(ratio(spread(80.0), None), "");
    }
}
