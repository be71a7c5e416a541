//! Code that depends on the architecture of the guest's CPUs. There is one architecture so far.

pub mod x86_64;
