//! The machine below the drivers: boot, memory, processors, time, interrupts, the serial port, and how it all ends.

pub mod acpi;
pub mod apic;
pub mod boot;
pub mod clock;
pub mod interrupts;
pub mod mem;
pub mod paging;
pub mod port;
pub mod power;
pub mod pvh;
pub mod serial;
pub mod smp;
pub mod sync;

use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::say;

static FAILED: AtomicBool = AtomicBool::new(false);

/// Says what failed in one line, and ends the machine.
pub fn fail(what: fmt::Arguments<'_>) -> ! {
    if FAILED.swap(true, Ordering::SeqCst) {
        // Another vCPU is already saying what went wrong.
        clock::delay_ms(2_000);
    } else {
        say!("FAILED {what}");
    }
    power::off()
}
