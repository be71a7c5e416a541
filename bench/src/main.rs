//! `ringvm-bench`: measures ringvm, and other VMMs, with the embedded guest.

use std::process::ExitCode;

use clap::Parser;
use ringvm_bench::cli::{Cli, Command};
use ringvm_bench::{block, signals};

fn main() -> ExitCode {
    let command = Cli::parse().command.unwrap_or_default();
    signals::install();
    let Command::Block(options) = command;
    match block::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ringvm-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
