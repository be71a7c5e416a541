//! The local APIC in xAPIC mode: registers at 0xfee00000, which ring 3 reaches as memory. (x2APIC's registers are MSRs,
//! out of ring 3's reach.) Intel SDM volume 3, chapter 11.

#![allow(unsafe_code, reason = "the register page's address is architectural")]

use crate::machine::interrupts::{FIRST_VECTOR, SPURIOUS, TIMER};
use crate::machine::mem::Region;
use crate::machine::{clock, fail};

const ID: usize = 0x20;
const TASK_PRIORITY: usize = 0x80;
const SPURIOUS_VECTOR: usize = 0xf0;
const COMMAND_LOW: usize = 0x300;
const COMMAND_HIGH: usize = 0x310;
const TIMER_VECTOR: usize = 0x320;
const TIMER_COUNT: usize = 0x380;
const TIMER_DIVIDE: usize = 0x3e0;
const PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_1: u32 = 0b1011;
const DIVIDE_BY_128: u32 = 0b1010;
/// Of that clock by 128: some half a second.
const RARE_TICK: u32 = 4_000_000;
/// Of the timer's clock, which runs at 1 GHz under KVM and at some such rate elsewhere: about sixteen milliseconds.
const TICK: u32 = 16_000_000;
const ENABLED: u32 = 0x100;
const PENDING: u32 = 1 << 12;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;

fn registers() -> Region {
    // SAFETY: mapped by the boot tables; a page of registers of the CPU that asks.
    unsafe { Region::new(0xfee0_0000, 0x1000) }
}

/// Enables the local APIC of this vCPU.
pub fn init() {
    registers().write::<u32>(TASK_PRIORITY, 0);
    registers().write::<u32>(SPURIOUS_VECTOR, ENABLED | u32::from(SPURIOUS));
}

/// Has the timer interrupt this vCPU every few milliseconds from now on.
pub fn tick() {
    registers().write(TIMER_DIVIDE, DIVIDE_BY_1);
    registers().write(TIMER_VECTOR, PERIODIC | (FIRST_VECTOR + TIMER) as u32);
    registers().write(TIMER_COUNT, TICK);
}

/// The same every half a second or so, for a vCPU that is to do as little as it can.
pub fn tick_rarely() {
    registers().write(TIMER_DIVIDE, DIVIDE_BY_128);
    registers().write(TIMER_VECTOR, PERIODIC | (FIRST_VECTOR + TIMER) as u32);
    registers().write(TIMER_COUNT, RARE_TICK);
}

/// Ends what [`tick`] began.
pub fn stop_ticking() {
    registers().write::<u32>(TIMER_COUNT, 0);
}

/// The local APIC id of this vCPU.
pub fn id() -> u32 {
    registers().read::<u32>(ID) >> 24
}

/// Resets another vCPU and makes it run the code at `page` (4 KiB aligned, below 1 MiB) in real mode.
pub fn start(id: u32, page: usize) {
    command(id, INIT);
    clock::delay_us(200);
    // Twice, as hardware wants it; one that runs already ignores the second.
    command(id, STARTUP | (page >> 12) as u32);
    clock::delay_us(200);
    command(id, STARTUP | (page >> 12) as u32);
}

fn command(id: u32, what: u32) {
    registers().write(COMMAND_HIGH, id << 24);
    registers().write(COMMAND_LOW, what);
    let start = clock::ticks();
    while registers().read::<u32>(COMMAND_LOW) & PENDING != 0 {
        if clock::ticks().wrapping_sub(start) > clock::from_ms(1_000) {
            fail(format_args!("ipi where=apic:{id} expected=delivered got=pending command={what:#x}"));
        }
    }
}
