//! What the programs around the devices share: `ringvm`, `ringvm-blk` and `ringvm-net`.
//!
//! [`keyval`] is the text form of options . [`program`] has the log and the signals, [`exit`] the exit codes.

pub mod exit;
pub mod help;
pub mod keyval;
pub mod program;
pub mod summary;
pub mod usage;
