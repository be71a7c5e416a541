//! Model-specific registers at power-on, as firmware would leave them.

const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

const MISC_ENABLE_FAST_STRING: u64 = 1;
/// MTRRs enabled, everything write-back: without it Linux gives up the PAT.
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// MSRs that a guest likes to find set, index and value. It can do without any of them.
pub const BOOT_MSRS: [(u32, u64); 2] =
    [(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING), (IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK)];
