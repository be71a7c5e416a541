//! What depends on the architecture of the guest's CPUs. There is one so far.

pub mod x86_64;
