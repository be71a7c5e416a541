//! The report: one HTML file that needs no other, made from a document and nothing else. Its plots are SVG in the page, their
//! colours those of the reader's light or dark scheme.

mod block;
mod chart;
mod distribution;
mod facts;
mod idle;
mod linux;
mod net;
mod scale;
mod style;
mod text;

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use self::text::escape;
use crate::document::{Document, Job};
use crate::table;

/// Writes the report.
///
/// # Errors
/// It can't be written.
pub fn write(document: &Document, path: &Path) -> Result<()> {
    fs::write(path, render(document)).with_context(|| format!("writing the report to {}", path.display()))
}

/// Puts the report together.
pub fn render(document: &Document) -> String {
    let (title, body) = match &document.job {
        Job::Block(job) => ("Disks", block::render(document, job)),
        Job::Net(job) => ("NICs", net::render(document, job)),
        Job::Idle(job) => ("An idle guest", idle::render(document, job)),
        Job::Linux(job) => ("A Linux guest", linux::render(document, job)),
    };
    let mut page = String::new();
    // Writing to a string does not fail.
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>ringvm-bench: {title}</title>\n\
         <style>{}</style>\n</head>\n<body>\n<main>\n<header>\n<p class=\"over\">ringvm-bench</p>\n<h1>{title}</h1>\n<p class=\"sub\">{} · {} × {} · Linux {}</p>\n</header>\n",
        style::CSS,
        escape(&document.date.replace('T', " ").replace('Z', " UTC")),
        document.machine.cpus,
        escape(&document.machine.cpu),
        escape(&document.machine.kernel),
    );
    if let Some(why) = &document.incomplete {
        let _ = writeln!(
            page,
            "<p class=\"warning\"><strong>Not complete:</strong> {}. What follows was measured until then.</p>",
            escape(why)
        );
    }
    if !document.removed.is_empty() {
        page += "<div class=\"warning\"><strong>Taken out</strong>\n<ul class=\"plain\">\n";
        for removed in &document.removed {
            let _ = writeln!(page, "<li>{}</li>", escape(&removed.to_string()));
        }
        page += "</ul></div>\n";
    }
    for lost in table::lost(document) {
        let class = if lost.is_grave { "warning" } else { "note" };
        let _ = writeln!(page, "<p class=\"{class}\"><strong>{}:</strong> {}</p>", lost.what, escape(&lost.text));
    }
    page += &body;
    page += &facts::render(document);
    page += "</main>\n</body>\n</html>\n";
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::Removed;
    use crate::document::tests::sample_document;

    /// Asserts that every element that is opened is closed, in order.
    fn assert_nested(page: &str) {
        const EMPTY: &[&str] = &["!doctype", "meta", "br"];
        let mut open = Vec::new();
        for tag in page.split('<').skip(1) {
            let (tag, _) = tag.split_once('>').expect("a tag ends");
            let name = tag.split([' ', '\n']).next().unwrap();
            if let Some(name) = name.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "{tag}");
            } else if !EMPTY.contains(&name) && !tag.ends_with('/') {
                open.push(name);
            }
        }
        assert!(open.is_empty(), "{open:?}");
    }

    #[test]
    fn a_report_is_whole_and_needs_nothing_else() {
        let mut document = sample_document();
        document.incomplete = Some("interrupted <b>".to_owned());
        let why = "it <died>".to_owned();
        document.removed.push(Removed { name: "qemu".to_owned(), at: Some("depth 1".to_owned()), why });
        document.series[0].runs[0].steal_percent = Some(12.0);
        let page = render(&document);
        assert_nested(&page);
        for foreign in ["http://", "https://", "src=", "@import", "url(", "<script", "<link"] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        assert!(page.contains("<svg") && page.contains("prefers-color-scheme: dark"));
        assert!(page.contains("<li>qemu at depth 1: it &lt;died&gt;</li>"), "{page}");
        assert!(page.contains("<p class=\"warning\"><strong>steal:</strong> Of the runs that count 1 lost"), "{page}");
        assert!(page.contains("interrupted &lt;b&gt;") && page.contains("/d/&lt;x&gt;&amp;.img"), "{page}");
    }

    #[test]
    fn a_document_with_one_depth_has_bars() {
        let mut document = sample_document();
        document.series.truncate(3);
        let page = render(&document);
        assert_nested(&page);
        assert!(page.contains("class=\"bar"), "{page}");
    }

    #[test]
    fn a_linux_guest_has_a_page_with_its_jobs() {
        let page = render(&crate::linux::table::tests::linux_document());
        assert_nested(&page);
        assert!(page.contains("<h2>fio</h2>") && page.contains("<h2>iperf3</h2>") && page.contains("a&lt;b"), "{page}");
        assert!(page.contains("/d/&lt;x&gt;.img") && page.contains("[a&lt;b]"), "{page}");
    }

    #[test]
    fn nothing_measured_is_still_a_page() {
        let mut document = sample_document();
        document.series.clear();
        assert_nested(&render(&document));
    }

    #[test]
    fn nonsense_in_a_file_does_not_break_the_page() {
        let mut document = sample_document();
        for series in &mut document.series {
            series.name = "<&\"'>".to_owned();
            if let crate::document::Point::Block(point) = &mut series.point {
                (point.bs, point.depth) = (0, point.depth - 1);
            }
            series.latency_ns = vec![(0, 0), (u64::MAX, u64::MAX), (5, 1)];
            for run in &mut series.runs {
                (run.ops, run.time_ns) = (0, 0);
            }
        }
        let page = render(&document);
        assert_nested(&page);
        assert!(!page.contains("NaN") && !page.contains("inf\""), "{page}");
    }
}
