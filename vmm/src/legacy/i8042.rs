//! The keyboard controller, as far as its reset line goes.

use vm_superio::{I8042Device, Trigger};

use crate::bus::BusDevice;
use crate::events::{Ending, Events};

/// See the module.
pub struct I8042 {
    device: I8042Device<ResetLine>,
}

struct ResetLine(Events);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.end(Ending::Reset);
        Ok(())
    }
}

impl I8042 {
    /// A controller whose reset line reports to `events`.
    #[must_use]
    pub fn new(events: Events) -> Self {
        Self { device: I8042Device::new(ResetLine(events)) }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [byte] = data {
            *byte = self.device.read(offset as u8);
        }
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        if let &[byte] = data {
            // Infallible: the trigger only sends an event.
            let _ = self.device.write(offset as u8, byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reset_command_resets() {
        let (events, receiver) = Events::channel();
        let mut i8042 = I8042::new(events);
        i8042.write(0x60, 4, &[0xd1]);
        i8042.write(0x60, 0, &[0xfe]);
        assert!(receiver.is_empty());
        i8042.write(0x60, 4, &[0xfe]);
        assert_eq!(receiver.try_recv(), Ok(Ending::Reset));
    }
}
