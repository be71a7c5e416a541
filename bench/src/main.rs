//! `ringvm-bench`: measures ringvm, and other VMMs, with the embedded guest.

use std::process::ExitCode;

use clap::Parser;
use ringvm_bench::cli::{Cli, Command};
use ringvm_bench::document::Document;
use ringvm_bench::{block, compare, html, idle, linux, net, report, signals};

fn main() -> ExitCode {
    let command = Cli::parse().command.unwrap_or_default();
    match measure(&command) {
        Ok(()) => signals::interrupted().map_or(ExitCode::SUCCESS, ExitCode::from),
        Err(error) => {
            eprintln!("ringvm-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(command: &Command) -> anyhow::Result<()> {
    match command {
        Command::Block(options) => {
            signals::install();
            block::run(options, report::deliver)
        }
        Command::Net(options) => {
            // Before the first thread is started, which the signals take.
            net::namespace::enter()?;
            signals::install();
            net::run(options, report::deliver)
        }
        Command::Idle(options) => {
            if options.nics != 0 {
                net::namespace::enter()?;
            }
            signals::install();
            idle::run(options, report::deliver)
        }
        Command::Linux(options) => {
            let loads = linux::loads(options)?;
            if loads.has_network() {
                net::namespace::enter()?;
            }
            signals::install();
            linux::run(options, loads, report::deliver)
        }
        Command::Compare(options) => {
            let compared = compare::files(&options.a, &options.b)?;
            report::print(&compared.text)?;
            let (least, at) = compared.least;
            match options.fail_below {
                Some(limit) if least < limit => anyhow::bail!("{at}: {least:.3} is below {limit}"),
                _ => Ok(()),
            }
        }
        Command::Report(options) => {
            let document = Document::read(&options.result)?;
            match &options.html {
                Some(path) => html::write(&document, path),
                None => report::print(&report::table(&document)),
            }
        }
    }
}
