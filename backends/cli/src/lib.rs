//! What the programs around the devices share: `ringvm`, `ringvm-blk` and `ringvm-net`.
//!
//! [`keyval`] is the text form of options . [`io_options`] are those of the I/O
//! threads. [`program`] has the log and the signals, [`exit`] the exit codes.

pub mod exit;
pub mod help;
pub mod io_options;
pub mod keyval;
pub mod program;
pub mod summary;
pub mod usage;
