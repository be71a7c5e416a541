//! The harness that measures VMMs with one embedded guest, beside what a plain io_uring ring reaches on the host.
//!
//! A measurement is a boot of the guest under a VMM ([`vmm`], [`run`]), its results read from the serial port, what the
//! process cost read from /proc ([`process`]); runs of all contenders are interleaved ([`plan`]) and end in a table and, if
//! wanted, in JSON ([`report`]). [`mod@block`] measures disks, [`net`] NICs.

pub mod backend;
pub mod block;
pub mod cli;
pub mod guest;
#[path = "../guest/src/hist.rs"]
pub mod hist;
pub mod host;
pub mod limit;
pub mod net;
#[path = "../guest/src/packet.rs"]
pub mod packet;
pub mod plan;
pub mod process;
pub mod report;
#[path = "../guest/src/rng.rs"]
pub mod rng;
pub mod run;
pub mod scratch;
pub mod signals;
mod table;
pub mod vmm;
