//! KVM: the only place that sees kvm-ioctls.

mod error;
mod irq;
pub mod probe;
mod run_page;
mod signal;
mod state;
mod vcpu;
mod vm;

pub use error::KvmError;
pub use state::VcpuState;
pub use vcpu::{VcpuThread, Vcpus};
pub use vm::{Kvm, Vm};
