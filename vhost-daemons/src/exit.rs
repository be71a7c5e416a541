//! The exit codes of the daemons: those of all our programs.

pub use ringvm_cli::exit::Exit;
