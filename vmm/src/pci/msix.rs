//! MSI-X (PCI 3.0, 6.8.2): table, pending bits, per-vector and function masks.
//!
//! A vector that may fire has its route open; every other one has it closed, and a signal of its device then stays in
//! the route's event. That is the pending bit, delivered when the vector is unmasked (see [`MsiRoute`]).

use std::io;
use std::sync::Arc;

use ringvm_backends::host::event;
use tracing::warn;
use vmm_sys_util::eventfd::EventFd;

use super::config::ConfigSpace;
use crate::platform::{MsiMessage, MsiRoute, Platform};

/// Capability ID.
const CAPABILITY: u8 = 0x11;
/// Offset of the control word in the capability.
const CONTROL: u16 = 2;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK: u16 = 1 << 14;
/// Bytes of a table entry: message address, message data, vector control.
const ENTRY: usize = 16;
/// Bit 0 of vector control.
const VECTOR_MASK: u8 = 1;

struct Vector {
    entry: [u8; ENTRY],
    route: Box<dyn MsiRoute>,
    event: Arc<EventFd>,
    open: Option<MsiMessage>,
}

impl Vector {
    fn message(&self) -> MsiMessage {
        let word = |at: usize| {
            u32::from_le_bytes([self.entry[at], self.entry[at + 1], self.entry[at + 2], self.entry[at + 3]])
        };
        MsiMessage { address: u64::from(word(4)) << 32 | u64::from(word(0)), data: word(8) }
    }

    fn masked(&self) -> bool {
        self.entry[12] & VECTOR_MASK != 0
    }
}

/// The MSI-X side of a function.
pub struct Msix {
    vectors: Vec<Vector>,
    capability: u16,
    enabled: bool,
    function_masked: bool,
}

impl Msix {
    /// Adds `count` vectors to `space`; their table and pending bits are in BAR 0, at `table` and `pba`.
    ///
    /// # Errors
    /// When routes have run out.
    pub fn new(platform: &dyn Platform, space: &mut ConfigSpace, count: u16, table: u32, pba: u32) -> io::Result<Self> {
        let vectors = (0..count)
            .map(|_| {
                let route = platform.msi()?;
                let mut entry = [0; ENTRY];
                entry[12] = VECTOR_MASK;
                Ok(Vector { entry, event: route.event(), route, open: None })
            })
            .collect::<io::Result<Vec<_>>>()?;
        let mut body = Vec::with_capacity(10);
        body.extend((count - 1).to_le_bytes());
        body.extend(table.to_le_bytes());
        body.extend(pba.to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_MASK).to_le_bytes();
        let capability = space.add_capability(CAPABILITY, &body, &writable);
        Ok(Self { vectors, capability, enabled: false, function_masked: false })
    }

    /// Takes note of a write to configuration space. Returns whether MSI-X was switched on or off.
    pub fn update(&mut self, space: &ConfigSpace) -> bool {
        let control = space.word(self.capability + CONTROL);
        let (enabled, masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_MASK != 0);
        if (enabled, masked) == (self.enabled, self.function_masked) {
            return false;
        }
        let switched = enabled != self.enabled;
        (self.enabled, self.function_masked) = (enabled, masked);
        for index in 0..self.vectors.len() {
            self.refresh(index);
        }
        switched
    }

    /// Whether MSI-X is on; else the function uses INTx.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// The event that a device signals to raise `vector`.
    #[must_use]
    pub fn event(&self, vector: u16) -> Option<Arc<EventFd>> {
        self.vectors.get(usize::from(vector)).map(|vector| Arc::clone(&vector.event))
    }

    /// Forgets what is pending: the device was reset.
    pub fn clear_pending(&mut self) {
        for vector in &self.vectors {
            // An open route is consumed by the hypervisor.
            if vector.open.is_none() {
                event::take(event::borrow(&vector.event));
            }
        }
    }

    /// Reads the table; zero beyond its end.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let bytes =
            (offset as usize..).map(|at| self.vectors.get(at / ENTRY).map_or(0, |vector| vector.entry[at % ENTRY]));
        data.iter_mut().zip(bytes).for_each(|(data, byte)| *data = byte);
    }

    /// Writes the table; nothing beyond its end.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let mut touched = None;
        for (at, &byte) in (offset as usize..).zip(data) {
            let (index, place) = (at / ENTRY, at % ENTRY);
            // The part of the access before it runs off the table counts.
            let Some(vector) = self.vectors.get_mut(index) else { break };
            if touched.is_some_and(|touched| touched != index) {
                // An access across two entries is invalid (6.8.2): the rest is dropped.
                break;
            }
            touched = Some(index);
            // Vector control has one bit, the others read as zero.
            vector.entry[place] = match place {
                12 => byte & VECTOR_MASK,
                13.. => 0,
                _ => byte,
            };
        }
        if let Some(index) = touched {
            self.refresh(index);
        }
    }

    /// Reads the pending bits.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset as usize..) {
            *byte = (0..8)
                .filter(|bit| {
                    self.vectors
                        .get(at * 8 + bit)
                        .is_some_and(|vector| vector.open.is_none() && event::is_raised(event::borrow(&vector.event)))
                })
                .fold(0, |bits, bit| bits | 1 << bit);
        }
    }

    /// Opens or closes the route of a vector.
    fn refresh(&mut self, index: usize) {
        let may_fire = self.enabled && !self.function_masked;
        let vector = &mut self.vectors[index];
        let wanted = (may_fire && !vector.masked()).then(|| vector.message());
        if wanted == vector.open {
            return;
        }
        vector.open = match vector.route.set(wanted) {
            Ok(()) => wanted,
            Err(error) => {
                // The guest wrote a message that the hypervisor does not take: the vector is as good as masked.
                warn!(vector = index, message = ?wanted, %error, "MSI-X: setting a vector's route");
                None
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Identity;
    use crate::platform::fake::FakePlatform;

    const MESSAGE: MsiMessage = MsiMessage { address: 0x1_fee0_0000, data: 0x41 };

    fn msix(platform: &FakePlatform) -> (Msix, ConfigSpace) {
        let identity = Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem_vendor: 0, subsystem: 0 };
        let mut space = ConfigSpace::new(&identity, 0);
        (Msix::new(platform, &mut space, 3, 0x8000, 0x1_0000).unwrap(), space)
    }

    fn control(msix: &mut Msix, space: &mut ConfigSpace, value: u16) -> bool {
        space.write(msix.capability + CONTROL, &value.to_le_bytes());
        msix.update(space)
    }

    fn program(msix: &mut Msix, vector: u64, mask: u32) {
        msix.write_table(vector * 16, &MESSAGE.address.to_le_bytes());
        msix.write_table(vector * 16 + 8, &MESSAGE.data.to_le_bytes());
        msix.write_table(vector * 16 + 12, &mask.to_le_bytes());
    }

    #[test]
    fn a_vector_is_open_only_when_nothing_masks_it() {
        let platform = FakePlatform::default();
        let (mut msix, mut space) = msix(&platform);
        let open = || platform.routes.lock().unwrap()[1];
        program(&mut msix, 1, 0);
        assert_eq!(open(), None, "MSI-X is off");
        assert!(control(&mut msix, &mut space, CONTROL_ENABLE | CONTROL_MASK));
        assert_eq!(open(), None, "the function is masked");
        assert!(!control(&mut msix, &mut space, CONTROL_ENABLE));
        assert_eq!(open(), Some(MESSAGE));
        assert_eq!(platform.routes.lock().unwrap()[0], None, "masked from reset");
        program(&mut msix, 1, 1);
        assert_eq!(open(), None, "the vector is masked");
        program(&mut msix, 1, 0);
        msix.write_table(16 + 8, &7_u32.to_le_bytes());
        assert_eq!(open(), Some(MsiMessage { data: 7, ..MESSAGE }), "changed while open");
        assert!(control(&mut msix, &mut space, 0));
        assert_eq!(open(), None);
    }

    #[test]
    fn a_masked_vector_is_pending_until_reset() {
        let platform = FakePlatform::default();
        let (mut msix, mut space) = msix(&platform);
        control(&mut msix, &mut space, CONTROL_ENABLE);
        msix.event(2).unwrap().write(1).unwrap();
        let mut pba = [0xff; 8];
        msix.read_pba(0, &mut pba);
        assert_eq!(pba, [4, 0, 0, 0, 0, 0, 0, 0]);
        program(&mut msix, 2, 0);
        msix.read_pba(0, &mut pba);
        assert_eq!(pba, [0; 8], "delivered when it was unmasked");
        program(&mut msix, 2, 1);
        msix.clear_pending();
        msix.read_pba(0, &mut pba);
        assert_eq!(pba, [0; 8]);
    }

    #[test]
    fn pitfall_15_nothing_is_beyond_the_table() {
        let (mut msix, _) = msix(&FakePlatform::default());
        assert!(msix.event(3).is_none() && msix.event(0xffff).is_none());
        msix.write_table(48, &[0xff; 8]);
        let mut data = [0xaa; 8];
        msix.read_table(48, &mut data);
        assert_eq!(data, [0; 8]);
        msix.read_table(40, &mut data);
        assert_eq!(data, [0, 0, 0, 0, 1, 0, 0, 0], "the last entry, masked from reset");
        msix.write_table(12, &[0xff; 8]);
        msix.read_table(8, &mut data);
        assert_eq!(data[4..], [1, 0, 0, 0], "only the mask bit of vector control can be written");
        msix.read_table(16, &mut data);
        assert_eq!(data, [0; 8], "an access across two entries stops at the first");
    }

    #[test]
    fn a_write_that_runs_off_the_table_still_counts_for_the_last_entry() {
        let platform = FakePlatform::default();
        let (mut msix, mut space) = msix(&platform);
        control(&mut msix, &mut space, CONTROL_ENABLE);
        program(&mut msix, 2, 0);
        assert_eq!(platform.routes.lock().unwrap()[2], Some(MESSAGE));
        // Vector control of the last entry, and four bytes that are no entry's.
        msix.write_table(2 * 16 + 12, &[1, 0, 0, 0, 0, 0, 0, 0]);
        let mut mask = [0; 4];
        msix.read_table(2 * 16 + 12, &mut mask);
        assert_eq!(mask, [1, 0, 0, 0]);
        assert_eq!(platform.routes.lock().unwrap()[2], None, "the mask bit and the route agree");
    }
}
