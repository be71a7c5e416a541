//! What becomes of a document: its table, and the files that the user wants.

use std::io::Write;

use anyhow::{Context, Result};

use crate::cli::Output;
use crate::document::{Document, Job};
use crate::{block, html, idle, linux, net};

/// Writes the files and prints the table. The files first: a reader of the table may be gone by now.
///
/// # Errors
/// Something can't be written.
pub fn deliver(document: &Document, output: &Output) -> Result<()> {
    if let Some(path) = &output.json {
        document.write(path)?;
    }
    if let Some(path) = &output.html {
        html::write(document, path)?;
    }
    print(&table(document))
}

/// Prints to stdout.
///
/// # Errors
/// Nobody reads it.
pub fn print(text: &str) -> Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("printing the table")
}

/// The table of a document.
pub fn table(document: &Document) -> String {
    match &document.job {
        Job::Block(job) => block::table::render(document, job),
        Job::Net(job) => net::table::render(document, job),
        Job::Idle(job) => idle::table::render(document, job),
        Job::Linux(job) => linux::table::render(document, job),
    }
}
