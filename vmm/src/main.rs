//! The `ringvm` program.

use std::process::ExitCode;

use ringvm::cli::{Cli, Command};
use ringvm::exit::Exit;
use ringvm::{check, run};
use ringvm_cli::program::{ignore_file_size_signal, raise_descriptor_limit, start_tracing};

fn main() -> ExitCode {
    ignore_file_size_signal();
    let cli = match Cli::from_process() {
        Ok(cli) => cli,
        Err(message) => {
            eprintln!("ringvm: {message}");
            return Exit::Configuration.into();
        }
    };
    start_tracing(cli.verbose);
    raise_descriptor_limit();
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
