//! `ringvm-bench`: measures ringvm, and other VMMs, with the embedded guest.

use std::process::ExitCode;

use clap::Parser;
use ringvm_bench::cli::{Cli, Command};
use ringvm_bench::{block, net, signals};

fn main() -> ExitCode {
    let command = Cli::parse().command.unwrap_or_default();
    match measure(&command) {
        Ok(()) => ExitCode::SUCCESS,
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
            block::run(options)
        }
        Command::Net(options) => {
            // Before the first thread is started, which the signals take.
            net::namespace::enter()?;
            signals::install();
            net::run(options)
        }
    }
}
