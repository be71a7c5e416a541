//! Configuration space of a type 0 function: header, capability list, and which bits of it can be written (PCI 3.0,
//! chapter 6).

/// Size of the configuration space of a conventional function.
pub(super) const SIZE: usize = 256;

/// Offsets of registers.
pub mod reg {
    /// Command.
    pub const COMMAND: u16 = 0x04;
    /// Status.
    pub const STATUS: u16 = 0x06;
    /// First base address register.
    pub const BAR0: u16 = 0x10;
    /// First capability.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line, a scratch register for software.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Interrupt pin.
    pub const INTERRUPT_PIN: u16 = 0x3d;
}

/// Command: the function answers to memory accesses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may access memory itself.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command: INTx is off.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Status: INTx is pending.
const STATUS_INTERRUPT: u8 = 1 << 3;
/// Status: there is a capability list.
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// First byte after the header.
const FIRST_CAPABILITY: u16 = 0x40;

/// A function's description of itself.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class code: base class, sub-class, interface.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// The registers of a function.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    next_capability: u16,
    last_capability: u16,
}

impl ConfigSpace {
    /// A space without BARs or capabilities, in which nothing but the command register's `command` bits can be written.
    #[must_use]
    pub fn new(identity: &Identity, command: u16) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            next_capability: FIRST_CAPABILITY,
            last_capability: reg::CAPABILITIES,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision]);
        space.put(0x09, &identity.class.to_le_bytes()[..3]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(reg::COMMAND, &command.to_le_bytes());
        space
    }

    /// Wires interrupt pin A, which software may note down as `line`.
    pub fn set_interrupt(&mut self, line: u8) {
        self.put(reg::INTERRUPT_LINE, &[line, 1]);
        self.allow(reg::INTERRUPT_LINE, &[0xff]);
    }

    /// Appends a capability, of which `writable` bits can be written, and returns its offset. `body` begins after the
    /// pointer to the next one.
    ///
    /// # Panics
    /// When the space is full: capabilities are fixed when the code is written.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let offset = self.next_capability;
        let end = usize::from(offset) + 2 + body.len();
        assert!(end <= SIZE, "capabilities fit into configuration space");
        self.put(offset, &[id, 0]);
        self.put(offset + 2, body);
        self.allow(offset + 2, writable);
        let link = if self.last_capability == reg::CAPABILITIES { reg::CAPABILITIES } else { self.last_capability + 1 };
        self.put(link, &[offset as u8]);
        self.bytes[usize::from(reg::STATUS)] |= STATUS_CAPABILITIES;
        self.last_capability = offset;
        self.next_capability = (end as u16).next_multiple_of(4);
        offset
    }

    /// Reads; all ones beyond the space, as for a function without extended space.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let offset = usize::from(offset);
        match self.bytes.get(offset..offset + data.len()) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    /// Writes those bits that can be written.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (index, &value) in (usize::from(offset)..SIZE).zip(data) {
            let mask = self.writable[index];
            self.bytes[index] = self.bytes[index] & !mask | value & mask;
        }
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> u16 {
        self.word(reg::COMMAND)
    }

    /// Shows or hides a pending INTx in the status register.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let status = &mut self.bytes[usize::from(reg::STATUS)];
        *status = *status & !STATUS_INTERRUPT | if pending { STATUS_INTERRUPT } else { 0 };
    }

    /// A register of 16 bits.
    #[must_use]
    pub fn word(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// A register of 32 bits.
    #[must_use]
    pub fn dword(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Sets bytes, writable or not.
    pub(super) fn put(&mut self, offset: u16, bytes: &[u8]) {
        self.bytes[usize::from(offset)..][..bytes.len()].copy_from_slice(bytes);
    }

    /// Makes bits writable.
    pub(super) fn allow(&mut self, offset: u16, mask: &[u8]) {
        self.writable[usize::from(offset)..][..mask.len()].copy_from_slice(mask);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_form_a_list_and_only_allowed_bits_change() {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 1,
            subsystem: 2,
        };
        let mut space = ConfigSpace::new(&identity, COMMAND_MEMORY | COMMAND_BUS_MASTER);
        let first = space.add_capability(9, &[1, 2, 3], &[0, 0xff, 0]);
        let second = space.add_capability(0x11, &[4, 5], &[]);
        assert_eq!((first, second), (0x40, 0x48));
        let mut list = [0; 2];
        space.read(reg::CAPABILITIES, &mut list[..1]);
        assert_eq!(list[0], 0x40);
        space.read(first, &mut list);
        assert_eq!(list, [9, 0x48]);
        space.read(second, &mut list);
        assert_eq!(list, [0x11, 0]);
        assert_ne!(space.word(reg::STATUS) & 0x10, 0);

        space.write(first + 2, &[0xaa, 0xbb, 0xcc]);
        let mut body = [0; 3];
        space.read(first + 2, &mut body);
        assert_eq!(body, [1, 0xbb, 3]);
        space.write(0, &[0xff; 4]);
        assert_eq!(space.dword(0), 0x1042_1af4);
        space.write(reg::COMMAND, &[0xff, 0xff]);
        assert_eq!(space.command(), 6);
        space.write(0xfe, &[0xff; 4]);
        let mut beyond = [0; 4];
        space.read(0x100, &mut beyond);
        assert_eq!(beyond, [0xff; 4]);
    }
}
