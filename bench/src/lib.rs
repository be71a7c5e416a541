//! The harness that measures VMMs with one embedded guest, beside what a plain io_uring ring reaches on the host.
//!
//! A measurement is a boot of the guest under a VMM ([`vmm`], [`run`]), its results read from the serial port, what the
//! process cost read from /proc ([`process`]) and from the kernel's counters ([`exits`], [`counter`], [`strace`]); runs of all
//! contenders are interleaved ([`plan`]), repeated where the host took their CPU time ([`steal`]), and end in one [`document`],
//! from which tables, JSON and HTML are made ([`report`]).
//! [`mod@block`] measures disks, [`net`] NICs, [`idle`] a guest that does nothing, [`linux`] a Linux guest with fio and iperf3;
//! [`compare`] sets two documents side by side.

pub mod backend;
pub mod block;
mod child;
pub mod cli;
mod companion;
pub mod compare;
pub mod counter;
mod date;
pub mod document;
pub mod exits;
pub mod guest;
#[path = "../guest/src/shared/hist.rs"]
pub mod hist;
pub mod host;
pub mod html;
pub mod idle;
mod kernel_fs;
pub mod limit;
pub mod linux;
pub mod net;
#[path = "../guest/src/shared/packet.rs"]
pub mod packet;
pub mod plan;
pub mod process;
pub mod report;
#[path = "../guest/src/shared/rng.rs"]
pub mod rng;
pub mod run;
pub mod sample;
pub mod scratch;
pub mod signals;
pub mod stats;
pub mod steal;
pub mod strace;
mod table;
pub mod vmm;
pub mod workload;
