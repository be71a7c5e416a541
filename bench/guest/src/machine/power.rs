//! How a run ends: power-off, reboot or crash.

use crate::machine::acpi::{self, Address};
use crate::machine::port::{out8, out16};
use crate::machine::{clock, fail, interrupts};

/// SLP_TYPx of S5 in the hardware-reduced sleep control register, with SLP_EN. The real value is in the DSDT's `_S5`,
/// which takes an AML interpreter to read; this is the one that VMMs of this kind use.
const SLEEP_S5: u8 = (5 << 2) | (1 << 5);
/// SLP_TYP of S5 in QEMU's PM1a control register, with SLP_EN.
const PM1_S5: u16 = 1 << 13;
/// QEMU's isa-debug-exit device.
const DEBUG_EXIT: u16 = 0xf4;
const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// Powers the machine off by the first way that works.
pub fn off() -> ! {
    let fadt = acpi::fadt();
    if let Some(register) = fadt.sleep_control {
        write(register, SLEEP_S5);
        clock::delay_ms(200);
    }
    if let Some(port) = fadt.pm1a_control {
        out16(port, PM1_S5);
        clock::delay_ms(200);
    }
    out8(DEBUG_EXIT, 0);
    clock::delay_ms(20);
    out8(KEYBOARD_COMMAND, KEYBOARD_RESET);
    clock::delay_ms(200);
    interrupts::destroy()
}

/// Reboots through the keyboard controller.
pub fn reboot_by_keyboard() -> ! {
    out8(KEYBOARD_COMMAND, KEYBOARD_RESET);
    clock::delay_ms(1_000);
    fail(format_args!("reboot where=keyboard-controller expected=reset got=nothing"))
}

/// Reboots through the FADT's reset register.
pub fn reboot_by_acpi() -> ! {
    match acpi::fadt().reset {
        Some((register, value)) => {
            write(register, value);
            clock::delay_ms(1_000);
            fail(format_args!("reboot where=acpi-reset-register expected=reset got=nothing"))
        }
        None => fail(format_args!("reboot where=fadt expected=reset-register got=none")),
    }
}

/// Makes the machine triple-fault.
pub fn crash() -> ! {
    interrupts::destroy()
}

fn write(register: Address, value: u8) {
    match register {
        Address::Port(port) => out8(port, value),
        Address::Memory(region) => region.write(0, value),
    }
}
