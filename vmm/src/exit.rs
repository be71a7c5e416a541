//! The exit codes of `ringvm run`: those of all our programs.

pub use ringvm_cli::exit::Exit;
