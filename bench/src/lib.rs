//! The harness that measures VMMs with one embedded guest, beside what a plain io_uring ring reaches on the host.
//!
//! A measurement is a boot of the guest under a VMM ([`vmm`], [`run`]), its results read from the serial port, what the
//! process cost read from /proc ([`process`]); runs of all contestants are interleaved ([`block`]) and end in a table
//! ([`table`]) and, if wanted, in JSON ([`report`]).

pub mod backend;
pub mod block;
pub mod cli;
pub mod guest;
#[path = "../guest/src/hist.rs"]
pub mod hist;
pub mod host;
pub mod limit;
pub mod process;
pub mod report;
#[path = "../guest/src/rng.rs"]
pub mod rng;
pub mod run;
pub mod scratch;
pub mod signals;
pub mod table;
pub mod vmm;
