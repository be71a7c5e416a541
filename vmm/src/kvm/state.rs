//! The state of a vCPU: everything needed to continue elsewhere.

use std::io;

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
    kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use tracing::debug;

use super::error::{KvmError, call};

/// The state of a paused vCPU.
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
    /// Exceptions and interrupts in progress.
    pub events: kvm_vcpu_events,
    /// Model-specific registers, the TSC among them.
    pub msrs: Vec<kvm_msr_entry>,
}

impl VcpuState {
    /// Reads the state of a vCPU that is not in KVM_RUN.
    pub(super) fn of(id: u32, vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, KvmError> {
        let what = |part: &str| call(format!("reading {part} of vCPU {id}"));
        Ok(Self {
            id,
            // First: reading it lets pending INITs and SIPIs take effect, which change the rest of the state.
            mp_state: vcpu.get_mp_state().map_err(what("the run state"))?,
            regs: vcpu.get_regs().map_err(what("the registers"))?,
            sregs: vcpu.get_sregs().map_err(what("the control registers"))?,
            xsave: vcpu.get_xsave().map_err(what("the vector registers"))?,
            xcrs: vcpu.get_xcrs().map_err(what("the extended control registers"))?,
            debugregs: vcpu.get_debug_regs().map_err(what("the debug registers"))?,
            lapic: vcpu.get_lapic().map_err(what("the local APIC"))?,
            events: vcpu.get_vcpu_events().map_err(what("the pending events"))?,
            msrs: read_msrs(vcpu, msrs)
                .map_err(|source| KvmError::Call { what: format!("reading the MSRs of vCPU {id}"), source })?,
        })
    }
}

/// Reads MSRs. KVM lists some that it then does not have for this vCPU, as its CPUID has it; these are left out.
fn read_msrs(vcpu: &VcpuFd, mut indices: &[u32]) -> io::Result<Vec<kvm_msr_entry>> {
    let mut read = Vec::with_capacity(indices.len());
    while !indices.is_empty() {
        let entries: Vec<_> = indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|error| io::Error::other(format!("{error:?}")))?;
        // It stops at the first that it refuses.
        let count = vcpu.get_msrs(&mut msrs)?;
        read.extend_from_slice(&msrs.as_slice()[..count]);
        if let Some(refused) = indices.get(count) {
            debug!(msr = format_args!("{refused:#x}"), "KVM does not let this MSR be read; it is no part of the state");
        }
        indices = indices.get(count + 1..).unwrap_or_default();
    }
    Ok(read)
}
