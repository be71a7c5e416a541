//! KVM: the only place that sees kvm-ioctls.

mod cpuid;
mod error;
mod irq;
mod msr;
pub mod probe;
mod regs;
mod run_page;
mod signal;
mod vcpu;
mod vm;

pub use error::KvmError;
pub use regs::Entry;
pub use vcpu::{VcpuThread, Vcpus};
pub use vm::{Kvm, Vm};
