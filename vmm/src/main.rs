//! The `ringvm` program.

use std::io::IsTerminal;
use std::process::ExitCode;

use ringvm::cli::{Cli, Command};
use ringvm::exit::Exit;
use ringvm::{check, run};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = match Cli::from_process() {
        Ok(cli) => cli,
        Err(message) => {
            eprintln!("ringvm: {message}");
            return Exit::Configuration.into();
        }
    };
    start_tracing(cli.verbose);
    let result = match cli.command {
        Command::Check => return check::check().into(),
        Command::Run(args) => args.into_config().map_err(|error| (error.to_string(), Exit::Configuration)),
    };
    let result = result.and_then(|config| run::run(&config).map_err(|error| (error.to_string(), error.exit())));
    match result {
        Ok(exit) => exit.into(),
        Err((message, exit)) => {
            eprintln!("ringvm: {message}");
            exit.into()
        }
    }
}

fn start_tracing(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let colours = std::io::stderr().is_terminal();
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    subscriber.with_ansi(colours).with_target(false).init();
}
