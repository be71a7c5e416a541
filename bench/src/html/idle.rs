//! The part of a report that is about a guest that does nothing.

use std::fmt::Write;

use super::chart::{self, Bar};
use super::text::escape;
use crate::document::{Document, IdleJob, Series};
use crate::idle::table::{explanations, title};

/// One plot: it is all that there is to say.
pub(super) fn render(document: &Document, job: &IdleJob) -> String {
    let mut page = format!(
        "<section>\n<h2>CPU time of an idle guest</h2>\n<p class=\"sub\">{}</p>\n",
        escape(&title(document, job))
    );
    let bar = |series: &'_ Series| {
        let spread = series.spread(|run| run.cpu_percent())?;
        Some((spread, format!("{:.3} %", spread.median)))
    };
    let bars: Vec<_> = document
        .series
        .iter()
        .filter_map(|series| {
            let (spread, text) = bar(series)?;
            Some(Bar { name: &series.name, slot: chart::slot(document, &series.name), spread, text })
        })
        .collect();
    page += "<div class=\"figures\">\n";
    page += &chart::figure(
        "Per cent of one CPU",
        "median, least to most; all threads and daemons",
        &chart::bars(&bars, "per cent of a CPU"),
    );
    page += "</div>\n";
    let _ = writeln!(page, "<p class=\"note\">{}</p>", escape(&explanations().join(" ")));
    page + "</section>\n"
}
