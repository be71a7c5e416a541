//! Where a value is counted: 2^BITS steps per power of two. The embedded guest's histogram uses this very file.

/// The step of a value.
#[inline(always)]
pub(super) fn step<const BITS: u32>(value: u64) -> usize {
    if value < 1 << BITS {
        return value as usize;
    }
    // The leading bit says which power of two, the next BITS say which step of it.
    let shift = 63 - value.leading_zeros() - BITS;
    (shift as usize) * (1 << BITS) + (value >> shift) as usize
}

/// The least value of a step.
pub(super) fn low<const BITS: u32>(index: usize) -> u64 {
    let steps = 1 << BITS;
    if index < steps {
        return index as u64;
    }
    ((index % steps + steps) as u64) << (index / steps - 1)
}
