//! The harness of the integration tests: what the host must offer ([`host`]), real VMs on the host's own KVM
//! ([`native`], with the [`embedded`] guest), and the nested lab, where a stock Debian guest runs under real AMD SVM ([`lab`]).
//!
//! A test that starts a VM is a few lines; everything that more than one of them needs is here.

pub mod embedded;
pub mod error;
pub mod host;
pub mod interposer;
pub mod lab;
pub mod moves;
pub mod native;
pub mod ongoing;
pub mod paths;
pub mod streams;
pub mod stuck_disk;

pub use error::{Error, Result};
