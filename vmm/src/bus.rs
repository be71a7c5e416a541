//! Address to handler, for port I/O and memory-mapped I/O alike.
//!
//! Only configuration passes here: doorbells of running queues are ioeventfds and never leave the kernel. Addresses
//! without a handler read as all ones and swallow writes, as on a PC.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use thiserror::Error;

/// Something that answers at a range of addresses.
pub trait BusDevice: Send {
    /// Fills `data` from `offset` into the range that begins at `base`.
    fn read(&mut self, base: u64, offset: u64, data: &mut [u8]);

    /// Writes `data` at `offset` into the range that begins at `base`.
    fn write(&mut self, base: u64, offset: u64, data: &[u8]);
}

/// A shared handler.
pub type Handler = Arc<Mutex<dyn BusDevice>>;

/// A range could not be claimed.
#[derive(Debug, Error)]
pub enum BusError {
    /// The range is empty or wraps around.
    #[error("the address range {base:#x}+{len:#x} is not a range")]
    Range {
        /// First address.
        base: u64,
        /// Number of addresses.
        len: u64,
    },
    /// Someone else answers there.
    #[error("the address range {base:#x}+{len:#x} overlaps one in use")]
    Overlap {
        /// First address.
        base: u64,
        /// Number of addresses.
        len: u64,
    },
}

struct Claim {
    len: u64,
    handler: Handler,
}

/// One address space.
#[derive(Default)]
pub struct Bus {
    claims: RwLock<BTreeMap<u64, Claim>>,
}

impl Bus {
    /// Claims `len` addresses from `base` on.
    ///
    /// # Errors
    /// When the range is empty or too long, or overlaps another.
    pub fn insert(&self, base: u64, len: u64, handler: Handler) -> Result<(), BusError> {
        let end = base.checked_add(len).filter(|&end| end > base).ok_or(BusError::Range { base, len })?;
        let mut claims = self.claims.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((&other, claim)) = claims.range(..end).next_back()
            && other + claim.len > base
        {
            return Err(BusError::Overlap { base, len });
        }
        claims.insert(base, Claim { len, handler });
        Ok(())
    }

    /// Gives up the range that begins at `base`.
    pub fn remove(&self, base: u64) {
        self.claims.write().unwrap_or_else(PoisonError::into_inner).remove(&base);
    }

    /// Reads; all ones where no handler covers the whole access.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            // The claim is looked up first and its handler locked after: a handler may claim ranges itself.
            Some((base, handler)) => {
                handler.lock().unwrap_or_else(PoisonError::into_inner).read(base, address - base, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes; ignored where no handler covers the whole access.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((base, handler)) = self.find(address, data.len()) {
            handler.lock().unwrap_or_else(PoisonError::into_inner).write(base, address - base, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, Handler)> {
        let claims = self.claims.read().unwrap_or_else(PoisonError::into_inner);
        let (&base, claim) = claims.range(..=address).next_back()?;
        let end = (address - base).checked_add(len as u64)?;
        (end <= claim.len).then(|| (base, Arc::clone(&claim.handler)))
    }
}

/// The address spaces of a machine.
#[derive(Default)]
pub struct Buses {
    /// Port I/O.
    pub pio: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u8);

    impl BusDevice for Echo {
        fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
            data.fill(self.0.wrapping_add(offset as u8));
        }

        fn write(&mut self, _base: u64, _offset: u64, data: &[u8]) {
            self.0 = data[0];
        }
    }

    fn read(bus: &Bus, address: u64) -> u8 {
        let mut data = [0];
        bus.read(address, &mut data);
        data[0]
    }

    #[test]
    fn addresses_reach_their_handler_and_nobody_elses() {
        let bus = Bus::default();
        bus.insert(0x100, 0x10, Arc::new(Mutex::new(Echo(1)))).unwrap();
        bus.insert(0x110, 0x10, Arc::new(Mutex::new(Echo(100)))).unwrap();
        assert_eq!(read(&bus, 0x10f), 16);
        assert_eq!(read(&bus, 0x110), 100);
        assert_eq!(read(&bus, 0xff), 0xff);
        assert_eq!(read(&bus, 0x120), 0xff);
        bus.write(0x118, &[7]);
        assert_eq!(read(&bus, 0x110), 7);
        bus.remove(0x110);
        assert_eq!(read(&bus, 0x110), 0xff);
    }

    #[test]
    fn an_access_that_leaves_its_range_reads_as_ones() {
        let bus = Bus::default();
        bus.insert(0x100, 4, Arc::new(Mutex::new(Echo(1)))).unwrap();
        let mut data = [0; 4];
        bus.read(0x102, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.read(u64::MAX, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn overlaps_are_refused() {
        let bus = Bus::default();
        let echo: Handler = Arc::new(Mutex::new(Echo(1)));
        bus.insert(0x100, 0x10, Arc::clone(&echo)).unwrap();
        for (base, len) in [(0xf0, 0x11), (0x100, 1), (0x10f, 1), (0x80, 0x1000), (0x108, 0x100)] {
            assert!(matches!(bus.insert(base, len, Arc::clone(&echo)), Err(BusError::Overlap { .. })), "{base:#x}");
        }
        assert!(matches!(bus.insert(0, 0, Arc::clone(&echo)), Err(BusError::Range { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, Arc::clone(&echo)), Err(BusError::Range { .. })));
        bus.insert(0x110, 1, echo).unwrap();
    }
}
