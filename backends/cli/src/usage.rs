//! Reading a command line: a mistake gets one line, not a page of usage.

use clap::error::ErrorKind;
use clap::{Command, Parser};

/// Reads the command line of this process. Prints help or the version and exits, if one of them is asked for. `command` is the
/// command whose help a user with a mistake is referred to, e.g. `ringvm run`. `describe` completes the help texts; it is
/// called only when they are printed, because making them costs every other start time and memory.
///
/// # Errors
/// One line about what is wrong.
pub fn parse<T: Parser>(command: &str, describe: fn(Command) -> Command) -> Result<T, String> {
    T::try_parse().map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp => describe(T::command()).try_get_matches().err().unwrap_or(error).exit(),
        _ if error.use_stderr() => one_line(&error, command),
        _ => error.exit(),
    })
}

/// Turns a usage error into one line, without the usage.
#[must_use]
pub fn one_line(error: &clap::Error, command: &str) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let program = command.split(' ').next().unwrap_or(command);
        return format!("a command is missing; see `{program} --help`");
    }
    let text = error.to_string();
    let lines =
        text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let what = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    format!("{}; see `{command} --help`", what.trim_start_matches("error: ").replace(" tip: ", "; "))
}
