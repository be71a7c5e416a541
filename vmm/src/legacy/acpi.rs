//! The sleep and reset registers of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7 and 4.8.3.6), and the POST port.

use crate::arch::x86_64::layout::PORT_ACPI;
use crate::bus::BusDevice;
use crate::events::{Ending, Events};

/// Sleep control register.
pub const PORT_SLEEP_CONTROL: u64 = PORT_ACPI.start;
/// Sleep status register.
pub const PORT_SLEEP_STATUS: u64 = PORT_ACPI.start + 1;
/// Reset register.
pub const PORT_RESET: u64 = PORT_ACPI.start + 2;
/// The value to write to it.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of the soft-off state, as \_S5 has it.
pub const SLEEP_TYPE_S5: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;

/// The registers.
pub struct AcpiRegisters {
    events: Events,
}

impl AcpiRegisters {
    /// Registers that report to `events`.
    #[must_use]
    pub fn new(events: Events) -> Self {
        Self { events }
    }
}

impl BusDevice for AcpiRegisters {
    fn read(&mut self, _base: u64, _offset: u64, data: &mut [u8]) {
        // The machine never sleeps, so it never woke either.
        data.fill(0);
    }

    fn write(&mut self, base: u64, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match base + offset {
            PORT_SLEEP_CONTROL => {
                let kind = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                if value & SLEEP_ENABLE != 0 && kind == SLEEP_TYPE_S5 {
                    self.events.end(Ending::PowerOff);
                }
            }
            PORT_RESET if value == RESET_VALUE => self.events.end(Ending::Reset),
            _ => {}
        }
    }
}

/// A port that takes what it is given: POST codes, and the writes that kernels use as a delay.
pub struct PostPort;

impl BusDevice for PostPort {
    fn read(&mut self, _base: u64, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&mut self, _base: u64, _offset: u64, data: &[u8]) {
        tracing::trace!(code = format_args!("{data:02x?}"), "POST");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(port: u64, data: &[u8]) -> Vec<Ending> {
        let (events, receiver) = Events::channel();
        AcpiRegisters::new(events).write(PORT_ACPI.start, port - PORT_ACPI.start, data);
        receiver.try_iter().collect()
    }

    #[test]
    fn only_the_right_values_end_the_machine() {
        assert_eq!(write(PORT_SLEEP_CONTROL, &[0x34]), [Ending::PowerOff]);
        assert_eq!(write(PORT_SLEEP_CONTROL, &[0x14]), [], "not enabled");
        assert_eq!(write(PORT_SLEEP_CONTROL, &[0x24]), [], "not S5");
        assert_eq!(write(PORT_SLEEP_CONTROL, &[0x34, 0]), [], "not a byte");
        assert_eq!(write(PORT_RESET, &[1]), [Ending::Reset]);
        assert_eq!(write(PORT_RESET, &[0]), []);
        assert_eq!(write(PORT_SLEEP_STATUS, &[0xff]), []);
    }
}
