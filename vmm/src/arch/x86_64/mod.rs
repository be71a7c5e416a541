//! x86-64: the address map, CPUID, and the registers and MSRs that a guest starts with. Data only; `kvm` hands it to
//! the kernel.

pub mod cpuid;
pub mod layout;
pub mod msr;
pub mod regs;
