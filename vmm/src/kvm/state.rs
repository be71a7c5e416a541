//! The state of a vCPU: everything needed to continue elsewhere.

use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use super::error::{KvmError, call};

/// The state of a paused vCPU, but for its MSRs.
pub struct VcpuState {
    /// Its number.
    pub id: u32,
    /// Whether it runs, halts or waits for a SIPI.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments and control registers.
    pub sregs: kvm_sregs,
    /// Floating point and vectors.
    pub xsave: kvm_xsave,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debugregs: kvm_debugregs,
    /// The local APIC.
    pub lapic: kvm_lapic_state,
    /// Exceptions and interrupts under way.
    pub events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads the state of a vCPU that is not in KVM_RUN.
    pub(super) fn of(id: u32, vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let what = |part: &str| call(format!("reading {part} of vCPU {id}"));
        Ok(Self {
            id,
            // First: reading it has pending INITs and SIPIs take effect, which change what follows.
            mp_state: vcpu.get_mp_state().map_err(what("the run state"))?,
            regs: vcpu.get_regs().map_err(what("the registers"))?,
            sregs: vcpu.get_sregs().map_err(what("the control registers"))?,
            xsave: vcpu.get_xsave().map_err(what("the vector registers"))?,
            xcrs: vcpu.get_xcrs().map_err(what("the extended control registers"))?,
            debugregs: vcpu.get_debug_regs().map_err(what("the debug registers"))?,
            lapic: vcpu.get_lapic().map_err(what("the local APIC"))?,
            events: vcpu.get_vcpu_events().map_err(what("the pending events"))?,
        })
    }
}
