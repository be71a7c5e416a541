//! The VM: capabilities, memory slots, doorbells, interrupts.

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_CAP_PMU_CAPABILITY, KVM_MAX_CPUID_ENTRIES, KVM_PMU_CAP_DISABLE, MsrList, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, NoDatamatch, VmFd};
use ringvm_backends::device::GuestMemory;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::error::{KvmError, call};
use super::irq::Irqs;
use super::signal;
use crate::arch::x86_64::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::platform::{IrqLine, MsiRoute, Platform};

const API_VERSION: i32 = 12;

/// Capabilities that ringvm needs, with KVM's names for them.
pub(super) const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
];

/// An open `/dev/kvm` with everything that ringvm needs.
pub struct Kvm {
    pub(super) system: kvm_ioctls::Kvm,
    pub(super) supported_cpuid: CpuId,
}

impl Kvm {
    /// Opens `/dev/kvm` and looks at its capabilities.
    ///
    /// # Errors
    /// When it can't be opened or lacks something.
    pub fn open() -> Result<Self, KvmError> {
        let system = kvm_ioctls::Kvm::new().map_err(|error| KvmError::Open { source: error.into() })?;
        let version = system.get_api_version();
        if version != API_VERSION {
            return Err(KvmError::Version(version));
        }
        if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !system.check_extension(*cap)) {
            return Err(KvmError::Capability(name));
        }
        let supported_cpuid =
            system.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("asking for the supported CPUID"))?;
        Ok(Self { system, supported_cpuid })
    }

    /// The largest number of vCPUs of a VM.
    #[must_use]
    pub fn max_vcpus(&self) -> u32 {
        // APIC ID 255 is the broadcast address as long as IDs have eight bits.
        u32::try_from(self.system.get_max_vcpus()).unwrap_or(u32::MAX).min(255)
    }

    /// Width of guest-physical addresses.
    #[must_use]
    pub fn physical_bits(&self) -> u32 {
        crate::arch::x86_64::cpuid::physical_bits(&self.supported_cpuid)
    }

    /// Whether the LAPIC timer has a TSC deadline mode.
    pub(super) fn tsc_deadline(&self) -> bool {
        self.system.check_extension(Cap::TscDeadlineTimer)
    }
}

/// A VM with its memory and an in-kernel irqchip.
pub struct Vm {
    pub(super) fd: Arc<VmFd>,
    irqs: Arc<Irqs>,
    /// KVM holds no reference on mapped memory: it must not go before the VM.
    pub(super) memory: GuestMemory,
    /// The MSRs that are part of a vCPU's state, as far as KVM says. Only whoever saves it needs them.
    pub(super) saved_msrs: Result<MsrList, kvm_ioctls::Error>,
}

impl Vm {
    /// Creates a VM over `memory`.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn new(kvm: &Kvm, memory: GuestMemory) -> Result<Self, KvmError> {
        signal::install().map_err(|source| KvmError::Call { what: "installing the vCPU signal".into(), source })?;
        let fd = kvm.system.create_vm().map_err(call("creating a VM"))?;
        // Real mode on Intel hosts without unrestricted guests needs these four pages; AMD ignores them.
        fd.set_identity_map_address(KVM_IDENTITY_MAP).map_err(call("placing the identity map page"))?;
        fd.set_tss_address(KVM_TSS as usize).map_err(call("placing the TSS pages"))?;
        // Before the interrupt controllers: a slot that is set within some 8 ms of their creation waits until these
        // have passed.
        for (slot, region) in memory.iter().enumerate() {
            set_memory_region(&fd, slot as u32, region)?;
        }
        fd.create_irq_chip().map_err(call("creating the interrupt controllers"))?;
        let fd = Arc::new(fd);
        let irqs = Irqs::new(Arc::clone(&fd))
            .map_err(|source| KvmError::Call { what: "setting the interrupt routes".into(), source })?;
        Ok(Self { fd, irqs, memory, saved_msrs: kvm.system.get_msr_index_list() })
    }

    /// The MSRs that are part of a vCPU's state.
    pub(super) fn saved_msrs(&self) -> Result<&[u32], KvmError> {
        let msrs = self.saved_msrs.as_ref();
        msrs.map(|msrs| msrs.as_slice()).map_err(|&error| call("asking for the MSRs of a vCPU's state")(error))
    }

    /// Takes the performance counters away from vCPUs that are created after this. On a KVM that can't (before Linux
    /// 5.18), CPUID just does not report them.
    pub(super) fn disable_pmu(&self) -> Result<(), KvmError> {
        let can = self.fd.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
        if can <= 0 || can as u32 & KVM_PMU_CAP_DISABLE == 0 {
            return Ok(());
        }
        let args = [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0];
        let capability = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, args, ..Default::default() };
        self.fd.enable_cap(&capability).map_err(call("switching the performance counters off"))
    }
}

#[allow(unsafe_code, reason = "memory is handed to KVM by address")]
fn set_memory_region(fd: &VmFd, slot: u32, region: &vm_memory::GuestRegionMmap) -> Result<(), KvmError> {
    let guest = region.start_addr().raw_value();
    let kvm_region = kvm_userspace_memory_region {
        slot,
        guest_phys_addr: guest,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the region is mapped for as long as `Vm::memory` lives, which is as long as the VM's descriptor is held
    // by `Vm`; threads that hold the descriptor longer hold the memory too (see `Vcpus`).
    unsafe { fd.set_user_memory_region(kvm_region) }
        .map_err(call(format!("giving the VM {} MiB of memory at {guest:#x}", region.len() >> 20)))
}

impl Vm {
    /// How many interrupt routes devices have.
    #[must_use]
    pub fn routes(&self) -> usize {
        self.irqs.routes()
    }
}

impl Platform for Vm {
    fn msi(&self) -> io::Result<Box<dyn MsiRoute>> {
        self.irqs.msi()
    }

    fn line(&self, gsi: u32) -> Arc<dyn IrqLine> {
        self.irqs.line(gsi)
    }

    fn edge(&self, gsi: u32) -> io::Result<EventFd> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        self.fd.register_irqfd(&event, gsi)?;
        Ok(event)
    }

    fn attach_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()> {
        Ok(self.fd.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }

    fn detach_doorbell(&self, address: u64, event: &EventFd) -> io::Result<()> {
        Ok(self.fd.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)?)
    }
}
