//! Time from the TSC, whose frequency comes from whatever this machine has.
//!
//! In order: the kvmclock page (its scale is the frequency), the hypervisor's timing leaf, CPUID leaf 0x15, the PIT by
//! measurement, CPUID leaf 0x16. Only the rate is used: readings on different vCPUs are never compared.

#![allow(unsafe_code, reason = "rdtsc")]

use core::sync::atomic::{AtomicU64, Ordering};

use crate::machine::port::{in8, out8};
use crate::machine::{boot, fail};

const PIT_HZ: u64 = 1_193_182;
const PIT_CHANNEL_2: u16 = 0x42;
const PIT_COMMAND: u16 = 0x43;
/// Gate of channel 2 in bit 0, its output in bit 5.
const PIT_GATE: u16 = 0x61;

/// In kHz. Before it is known delays assume a fast TSC, so that they are rather too long.
static KHZ: AtomicU64 = AtomicU64::new(4_000_000);

/// Reads the time stamp counter.
#[inline(always)]
pub fn ticks() -> u64 {
    // SAFETY: CR4.TSD is clear: ring 3 may.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Finds the frequency, and says where it came from.
pub fn init() -> &'static str {
    let (khz, source) = frequency();
    KHZ.store(khz, Ordering::Relaxed);
    source
}

/// The frequency of the TSC in kHz.
pub fn khz() -> u64 {
    KHZ.load(Ordering::Relaxed)
}

/// Ticks as nanoseconds.
pub fn to_ns(ticks: u64) -> u64 {
    (u128::from(ticks) * 1_000_000 / u128::from(khz())) as u64
}

/// Milliseconds as ticks.
pub fn from_ms(ms: u64) -> u64 {
    ms.saturating_mul(khz())
}

/// Waits.
pub fn delay_ms(ms: u64) {
    delay_ticks(from_ms(ms));
}

/// Waits.
pub fn delay_us(us: u64) {
    delay_ticks(us * khz() / 1_000);
}

fn delay_ticks(count: u64) {
    let start = ticks();
    while ticks().wrapping_sub(start) < count {
        core::hint::spin_loop();
    }
}

fn frequency() -> (u64, &'static str) {
    if let Some(khz) = boot::pvclock_scale().and_then(|(multiplier, shift)| from_scale(multiplier, shift)) {
        return (khz, "kvmclock");
    }
    let highest = |base: u32| boot::cpuid(base).map_or(0, |leaf| leaf[0]);
    let hypervisor = boot::cpuid(1).is_some_and(|leaf| leaf[2] >> 31 != 0);
    if hypervisor
        && highest(0x4000_0000) >= 0x4000_0010
        && let Some([khz, ..]) = boot::cpuid(0x4000_0010)
        && khz != 0
    {
        return (u64::from(khz), "hypervisor-leaf");
    }
    if highest(0) >= 0x15
        && let Some([denominator, numerator, crystal, _]) = boot::cpuid(0x15)
        && denominator != 0
        && numerator != 0
        && crystal != 0
    {
        return (u64::from(crystal) * u64::from(numerator) / u64::from(denominator) / 1_000, "cpuid-0x15");
    }
    if let Some(khz) = measure_by_pit() {
        return (khz, "pit");
    }
    if highest(0) >= 0x16
        && let Some([mhz, ..]) = boot::cpuid(0x16)
        && mhz != 0
    {
        return (u64::from(mhz) * 1_000, "cpuid-0x16");
    }
    fail(format_args!("clock where=tsc expected=a-known-frequency got=no-source"))
}

/// The frequency behind kvmclock's `(ticks << shift) * multiplier >> 32` nanoseconds.
fn from_scale(multiplier: u32, shift: i8) -> Option<u64> {
    let khz = (1_000_000_u64 << 32) / u64::from(multiplier);
    let khz = if shift < 0 { khz << shift.unsigned_abs() } else { khz >> shift };
    (khz != 0).then_some(khz)
}

/// Times 20 ms of the PIT's channel 2; `None` where there is no PIT.
fn measure_by_pit() -> Option<u64> {
    const COUNT: u64 = PIT_HZ / 50;
    out8(PIT_GATE, in8(PIT_GATE) & !0x03);
    // Channel 2, low then high byte, mode 0: the output goes up when the count has run down.
    out8(PIT_COMMAND, 0xb0);
    out8(PIT_CHANNEL_2, COUNT as u8);
    out8(PIT_CHANNEL_2, (COUNT >> 8) as u8);
    if in8(PIT_GATE) & 0x20 != 0 {
        return None;
    }
    out8(PIT_GATE, in8(PIT_GATE) & !0x02 | 0x01);
    let start = ticks();
    // With any real TSC the 20 ms are over long before this many ticks are.
    while ticks().wrapping_sub(start) < 1_000_000_000 {
        if in8(PIT_GATE) & 0x20 != 0 {
            return Some(ticks().wrapping_sub(start) * PIT_HZ / COUNT / 1_000);
        }
    }
    None
}
