//! Model-specific registers at power-on, as firmware would leave them.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use tracing::debug;

const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs enabled, everything write-back: without it Linux gives up the PAT.
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Sets what a guest likes to find. A guest lives without any of it, so a host that refuses one is only noted.
pub(super) fn set_boot_msrs(vcpu: &VcpuFd) {
    let boot = [(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK)];
    // One call each: KVM_SET_MSRS stops at the first that it refuses.
    for (index, data) in boot {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let set = Msrs::from_entries(&[entry]).ok().and_then(|msrs| vcpu.set_msrs(&msrs).ok());
        if set != Some(1) {
            debug!(msr = format_args!("{index:#x}"), "KVM of this host does not let this MSR be set; going on without");
        }
    }
}
