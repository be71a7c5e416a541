//! The guest's CPUID: the host's supported leaves, with the topology and the caches of this machine, and without the
//! features that the guest is not to have.
//!
//! Every vCPU is a core of its own in one package; its APIC ID is its number. Leaf numbers and bits are those of the
//! Intel SDM (volume 2A, CPUID) and the AMD APM (volume 3, appendix E).

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// "Auth" and "Hygo", the beginnings of the vendor strings of AMD and its kin.
const VENDOR_AMD: u32 = u32::from_le_bytes(*b"Auth");
const VENDOR_HYGON: u32 = u32::from_le_bytes(*b"Hygo");

const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
const EXT1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXT1_ECX_TOPOLOGY: u32 = 1 << 22;

const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// TSC and APIC bus frequency in kHz; not KVM's own but where guests of several VMMs look.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// KVM's LAPIC timer counts nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// EAX, EBX, ECX, EDX.
type Registers = [u32; 4];

/// Nested virtualization: VMX; SVM and SKINIT; KVM's asynchronous page faults as exits of a nested guest.
const NESTED: [(u32, Registers); 3] =
    [(1, [0, 0, 1 << 5, 0]), (0x8000_0001, [0, 0, 1 << 2 | 1 << 12, 0]), (0x4000_0001, [1 << 10, 0, 0, 0])];
/// The abilities of SVM.
const NESTED_LEAVES: [u32; 1] = [0x8000_000a];

/// Performance monitoring: DTES64 and PDCM, DS; LBR; AMD's IBS and its counters of the core, the north bridge and the L3 cache.
const PMU: [(u32, Registers); 3] = [
    (1, [0, 0, 1 << 2 | 1 << 15, 1 << 21]),
    (7, [0, 0, 0, 1 << 19]),
    (0x8000_0001, [0, 0, 1 << 10 | 1 << 23 | 1 << 24 | 1 << 28, 0]),
];
/// Its own leaves: architectural counters, LBR, more architectural counters, IBS, AMD's PerfMonV2.
const PMU_LEAVES: [u32; 5] = [0xa, 0x1c, 0x23, 0x8000_001b, 0x8000_0022];

/// Sub-leaves of the cache leaves to look at: no CPU has more levels.
const MAX_CACHES: u32 = 8;
/// Caches for a host that tells of none: L1d, L1i, L2 and L3 of a common server, in the format of leaf 4.
const DEFAULT_CACHES: [Registers; 4] = [
    [0x0000_0121, 0x01c0_003f, 63, 0],
    [0x0000_0122, 0x01c0_003f, 63, 0],
    [0x0000_0143, 0x03c0_003f, 1023, 0],
    [0x0000_0163, 0x03c0_003f, 16383, 0],
];

/// The CPUID of a machine, built once; a vCPU differs only in its APIC ID.
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
}

/// The template's inputs besides the supported leaves.
pub struct Traits {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Whether the guest may run guests of its own.
    pub nested: bool,
    /// Whether it has performance counters.
    pub pmu: bool,
    /// Whether the LAPIC timer has a TSC deadline mode.
    pub tsc_deadline: bool,
    /// TSC frequency, where KVM tells it.
    pub tsc_khz: Option<u32>,
}

impl Template {
    /// From what KVM supports and, for caches it is silent about, from `host`: the CPUID instruction of this CPU.
    pub fn new(supported: &CpuId, host: impl Fn(u32, u32) -> Registers, traits: &Traits) -> Self {
        let mut template = Self { entries: supported.as_slice().to_vec() };
        if !traits.nested {
            template.hide(&NESTED, &NESTED_LEAVES);
        }
        if !traits.pmu {
            template.hide(&PMU, &PMU_LEAVES);
        }
        template.set_basic(traits);
        template.set_extended_topology(traits.cpus);
        if template.is_amd() {
            template.set_amd(&host, traits.cpus);
        } else {
            let caches = template.caches(4, &host, traits.cpus);
            // Cores of the package, in bits 31:26 of every sub-leaf.
            let cores = traits.cpus.next_power_of_two().min(64) - 1;
            template.set_caches(4, caches.into_iter().map(|[eax, ebx, ecx, edx]| [eax | cores << 26, ebx, ecx, edx]));
        }
        template.set_timing(traits.tsc_khz);
        template
    }

    /// The CPUID of vCPU `id`.
    #[must_use]
    pub fn for_vcpu(&self, id: u32) -> Vec<kvm_cpuid_entry2> {
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
                0xb | 0x1f => entry.edx = id,
                0x8000_001e => (entry.eax, entry.ebx) = (id, id & 0xff),
                _ => {}
            }
        }
        entries
    }

    fn find(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        self.entries.iter().find(|entry| entry.function == function && entry.index == index)
    }

    fn find_mut(&mut self, function: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.entries.iter_mut().find(|entry| entry.function == function && entry.index == 0)
    }

    fn registers(&self, function: u32, index: u32) -> Registers {
        self.find(function, index).map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    }

    fn is_amd(&self) -> bool {
        matches!(self.registers(0, 0)[1], VENDOR_AMD | VENDOR_HYGON)
    }

    /// Replaces all sub-leaves of `function`.
    fn replace(&mut self, function: u32, leaves: impl IntoIterator<Item = Registers>) {
        self.entries.retain(|entry| entry.function != function);
        self.entries.extend((0..).zip(leaves).map(|(index, [eax, ebx, ecx, edx])| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }));
    }

    /// Clears bits of leaves (their first sub-leaf), and whole leaves.
    fn hide(&mut self, bits: &[(u32, Registers)], leaves: &[u32]) {
        for entry in &mut self.entries {
            if leaves.contains(&entry.function) {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
            for (_, [eax, ebx, ecx, edx]) in bits.iter().filter(|(leaf, _)| (*leaf, 0) == (entry.function, entry.index))
            {
                entry.eax &= !eax;
                entry.ebx &= !ebx;
                entry.ecx &= !ecx;
                entry.edx &= !edx;
            }
        }
    }

    fn set_basic(&mut self, traits: &Traits) {
        if let Some(leaf) = self.find_mut(0) {
            leaf.eax = leaf.eax.max(0xb);
        }
        if let Some(leaf) = self.find_mut(1) {
            // Number of addressable APIC IDs in the package.
            leaf.ebx = leaf.ebx & 0xff00_ffff | traits.cpus.next_power_of_two().min(255) << 16;
            leaf.ecx |= LEAF1_ECX_X2APIC | LEAF1_ECX_HYPERVISOR;
            set(&mut leaf.ecx, LEAF1_ECX_TSC_DEADLINE, traits.tsc_deadline);
            set(&mut leaf.edx, LEAF1_EDX_HTT, traits.cpus > 1);
        }
    }

    /// Leaves 0xb and 0x1f: one thread a core, all cores in the package.
    fn set_extended_topology(&mut self, cpus: u32) {
        const SMT: u32 = 1 << 8;
        const CORE: u32 = 2 << 8;
        let levels = [[0, 1, SMT, 0], [id_bits(cpus), cpus, CORE | 1, 0], [0, 0, 2, 0]];
        self.replace(0xb, levels);
        if self.registers(0, 0)[0] >= 0x1f {
            self.replace(0x1f, levels);
        }
    }

    fn set_amd(&mut self, host: &impl Fn(u32, u32) -> Registers, cpus: u32) {
        let caches = self.caches(0x8000_001d, host, cpus);
        self.set_caches(0x8000_001d, caches);
        // One thread a core, one node; the core's number is filled in per vCPU.
        self.replace(0x8000_001e, [[0; 4]]);
        if let Some(leaf) = self.find_mut(0x8000_0000) {
            leaf.eax = leaf.eax.max(0x8000_001e);
        }
        if let Some(leaf) = self.find_mut(0x8000_0001) {
            leaf.ecx |= EXT1_ECX_TOPOLOGY;
            set(&mut leaf.ecx, EXT1_ECX_CMP_LEGACY, cpus > 1);
        }
        if let Some(leaf) = self.find_mut(0x8000_0008) {
            // NC: cores less one; ApicIdSize: bits of the core number.
            leaf.ecx = leaf.ecx & !0xf0ff | (cpus - 1) & 0xff | id_bits(cpus) << 12;
        }
    }

    /// The caches of `leaf` (4 or 0x8000001d, of one format), shared as this machine's topology has it.
    fn caches(&self, leaf: u32, host: &impl Fn(u32, u32) -> Registers, cpus: u32) -> Vec<Registers> {
        let supported = list_caches(|index| self.registers(leaf, index));
        let caches = if supported.is_empty() { list_caches(|index| host(leaf, index)) } else { supported };
        let caches = if caches.is_empty() { DEFAULT_CACHES.to_vec() } else { caches };
        caches
            .into_iter()
            .map(|[eax, ebx, ecx, edx]| {
                let level = eax >> 5 & 7;
                // L1 and L2 belong to a core, L3 and beyond to the package.
                let sharing = if level >= 3 { cpus.next_power_of_two() - 1 } else { 0 };
                let line = (ebx & 0xfff) + 1;
                // fio, for one, gives up on a line that is no power of two.
                let line = if line.is_power_of_two() && line >= 16 { line } else { 64 };
                [eax & 0x3fff | sharing << 14, ebx & !0xfff | (line - 1), ecx, edx]
            })
            .collect()
    }

    fn set_caches(&mut self, leaf: u32, caches: impl IntoIterator<Item = Registers>) {
        // The list ends with a sub-leaf of type 0.
        self.replace(leaf, caches.into_iter().chain([[0; 4]]));
    }

    fn set_timing(&mut self, tsc_khz: Option<u32>) {
        let Some(tsc_khz) = tsc_khz else { return };
        if let Some(leaf) = self.find_mut(HYPERVISOR_BASE) {
            leaf.eax = leaf.eax.max(HYPERVISOR_TIMING);
            self.replace(HYPERVISOR_TIMING, [[tsc_khz, APIC_BUS_KHZ, 0, 0]]);
        }
    }
}

/// Width of guest-physical addresses.
pub fn physical_bits(supported: &CpuId) -> u32 {
    let leaf = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    // Without the leaf a CPU has 36 bits.
    leaf.map_or(36, |leaf| leaf.eax & 0xff).clamp(36, 52)
}

/// The CPUID instruction of this CPU.
pub fn host(function: u32, index: u32) -> Registers {
    let limit = std::arch::x86_64::__cpuid(function & 0x8000_0000).eax;
    if function > limit {
        return [0; 4];
    }
    let leaf = std::arch::x86_64::__cpuid_count(function, index);
    [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
}

fn list_caches(leaf: impl Fn(u32) -> Registers) -> Vec<Registers> {
    (0..MAX_CACHES).map(leaf).take_while(|[eax, ..]| eax & 0x1f != 0).collect()
}

/// Bits that tell `cpus` APIC IDs apart.
fn id_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: Registers) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn template(vendor: &[u8; 4], extra: &[kvm_cpuid_entry2], host: Registers, cpus: u32) -> Template {
        let traits = Traits { cpus, nested: false, pmu: false, tsc_deadline: true, tsc_khz: Some(2_000_000) };
        template_of(vendor, extra, host, &traits)
    }

    fn template_of(vendor: &[u8; 4], extra: &[kvm_cpuid_entry2], host: Registers, traits: &Traits) -> Template {
        let mut leaves = vec![
            leaf(0, 0, [0xd, u32::from_le_bytes(*vendor), 0, 0]),
            leaf(1, 0, [0, 0, 0, 0]),
            leaf(HYPERVISOR_BASE, 0, [HYPERVISOR_BASE + 1, 0, 0, 0]),
            leaf(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0; 4]),
            leaf(0x8000_0008, 0, [48, 0, 0, 0]),
        ];
        leaves.extend_from_slice(extra);
        let supported = CpuId::from_entries(&leaves).unwrap();
        Template::new(&supported, |_, index| if index == 0 { host } else { [0; 4] }, traits)
    }

    #[test]
    fn every_vcpu_has_its_apic_id() {
        let template = template(b"Genu", &[], [0; 4], 3);
        let cpuid = template.for_vcpu(2);
        let get = |function, index| {
            let found = cpuid.as_slice().iter().find(|entry| entry.function == function && entry.index == index);
            *found.unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"))
        };
        assert_eq!(get(1, 0).ebx >> 24, 2);
        assert_eq!(get(1, 0).ebx >> 16 & 0xff, 4);
        assert_ne!(get(1, 0).edx & LEAF1_EDX_HTT, 0);
        assert_eq!((get(0xb, 1).eax, get(0xb, 1).ebx, get(0xb, 1).edx), (2, 3, 2));
        assert_eq!((get(0xb, 0).eax, get(0xb, 0).ebx), (0, 1));
        assert_eq!(get(HYPERVISOR_TIMING, 0).eax, 2_000_000);
        assert_eq!(get(HYPERVISOR_BASE, 0).eax, HYPERVISOR_TIMING);
    }

    #[test]
    fn caches_come_from_kvm_then_the_host_then_a_default_and_have_a_line_size() {
        let of_kvm = leaf(4, 0, [0x121, 0x1c0_003f, 99, 0]);
        assert_eq!(template(b"Genu", &[of_kvm], [0x121, 0x3f, 7, 0], 2).registers(4, 0)[2], 99);
        assert_eq!(template(b"Genu", &[], [0x121, 0x3f, 7, 0], 2).registers(4, 0)[2], 7);
        let default = template(b"Genu", &[], [0; 4], 2);
        assert_eq!(default.registers(4, 3)[0] >> 14 & 0xfff, 1, "L3 is shared by both");
        assert_eq!(default.registers(4, 0)[0] >> 14 & 0xfff, 0, "L1 is not");
        assert_eq!(default.registers(4, 4), [0; 4]);
        // A cache without a line size, as seen in the lab under another VMM.
        assert_eq!(template(b"Auth", &[], [0x121, 0, 7, 0], 1).registers(0x8000_001d, 0)[1] & 0xfff, 63);
    }

    #[test]
    fn amd_topology_counts_the_cores() {
        let template = template(b"Auth", &[], [0; 4], 4);
        assert_eq!(template.registers(0x8000_0008, 0)[2], 3 | 2 << 12);
        assert_ne!(template.registers(0x8000_0001, 0)[2] & EXT1_ECX_TOPOLOGY, 0);
        assert_eq!(template.for_vcpu(3).iter().find(|e| e.function == 0x8000_001e).unwrap().eax, 3);
    }

    #[test]
    fn nested_virtualization_and_the_pmu_are_there_only_when_asked_for() {
        const ALL: Registers = [u32::MAX; 4];
        let supported: Vec<_> = [(7, 0), (7, 1), (0xa, 0), (0x1c, 0), (0x23, 0), (0x23, 1), (0x4000_0001, 0)]
            .into_iter()
            .chain([(0x8000_000a, 0), (0x8000_001b, 0), (0x8000_0022, 0)])
            .map(|(function, index)| leaf(function, index, ALL))
            .collect();
        for (nested, pmu) in [(false, false), (true, false), (false, true), (true, true)] {
            let traits = Traits { cpus: 1, nested, pmu, tsc_deadline: true, tsc_khz: None };
            let mut template = template_of(b"Auth", &supported, [0; 4], &traits);
            for function in [1, 0x8000_0001] {
                // What these leaves are given in `template_of` is nothing.
                let entry = template.find_mut(function).unwrap();
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (u32::MAX, u32::MAX, u32::MAX, u32::MAX);
            }
            let given = CpuId::from_entries(&template.entries).unwrap();
            let template = Template::new(&given, |_, _| [0; 4], &traits);
            let bit = |function, register: usize, bit: u32| template.registers(function, 0)[register] & 1 << bit != 0;
            for (function, register, number) in
                [(1, 2, 5), (0x8000_0001, 2, 2), (0x8000_0001, 2, 12), (0x4000_0001, 0, 10)]
            {
                assert_eq!(bit(function, register, number), nested, "{function:#x}.{register} bit {number}");
            }
            for (function, register, number) in [(1, 2, 2), (1, 2, 15), (1, 3, 21), (7, 3, 19)] {
                assert_eq!(bit(function, register, number), pmu, "{function:#x}.{register} bit {number}");
            }
            for number in [10, 23, 24, 28] {
                assert_eq!(bit(0x8000_0001, 2, number), pmu, "0x80000001.2 bit {number}");
            }
            assert_eq!(template.registers(0x8000_000a, 0) != [0; 4], nested);
            for (function, index) in [(0xa, 0), (0x1c, 0), (0x23, 0), (0x23, 1), (0x8000_001b, 0), (0x8000_0022, 0)] {
                assert_eq!(template.registers(function, index) != [0; 4], pmu, "{function:#x}.{index}");
            }
            assert_eq!(template.registers(7, 1), ALL, "another sub-leaf");
            assert!(bit(1, 3, 0) && bit(1, 2, 0) && bit(7, 1, 0) && bit(0x4000_0001, 0, 0), "the rest stays");
        }
    }
}
