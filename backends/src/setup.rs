//! The driver's setup of a device, kept apart from the device: the next server of the queues continues from this
//! record.
//!
//! It has three users: the vhost-user frontend, which replays it to every new daemon; a device that moves between
//! places; and code that saves a machine. Together with [`Device::save_state`] and the queue positions it is
//! complete.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::device::{Device, DeviceError, GuestMemory, QueueParts, RingConfig, Suspended};
use crate::virtqueue::interrupt::Interrupt;

/// The driver's setup of one device since the last reset.
#[derive(Default)]
pub struct DriverSetup {
    /// Features that the driver has accepted, once it has.
    pub features: Option<u64>,
    /// The rings that run.
    pub rings: BTreeMap<u16, RingSetup>,
    config_writes: Vec<(u32, Vec<u8>)>,
}

/// A running ring, as the driver has set it up.
pub struct RingSetup {
    /// Where it lies.
    pub ring: RingConfig,
    /// Memory that it and its buffers live in.
    pub mem: GuestMemory,
    /// Its doorbell.
    pub kick: EventFd,
    /// Its interrupt.
    pub call: Interrupt,
    /// Raised if the driver breaks the ring.
    pub fault: Interrupt,
}

impl RingSetup {
    /// Records the setup of a queue that is about to start.
    ///
    /// # Errors
    /// When the host has no descriptor left for the doorbell.
    pub fn of(parts: &QueueParts) -> io::Result<Self> {
        let QueueParts { ring, mem, kick, call, fault, .. } = parts;
        let (kick, call, fault) = (kick.try_clone()?, call.clone(), fault.clone());
        Ok(Self { ring: *ring, mem: Arc::clone(mem), kick, call, fault })
    }

    /// The parts needed to continue with the ring at the position where it was suspended.
    ///
    /// # Errors
    /// When the host has no descriptor left for the doorbell.
    pub fn parts(&self, at: Suspended) -> io::Result<QueueParts> {
        Ok(QueueParts {
            call: self.call.clone(),
            fault: self.fault.clone(),
            from: at.state,
            left: at.left,
            ..QueueParts::new(self.ring, Arc::clone(&self.mem), self.kick.try_clone()?)
        })
    }
}

impl DriverSetup {
    /// Records a write to the configuration space. Writes are replayed whole and in order: a device may refuse a part
    /// of a field. A write that another one overwrites entirely is forgotten, so that a driver can't make the record
    /// grow without end.
    pub fn wrote_config(&mut self, offset: u32, data: &[u8]) {
        let end = |offset: u32, data: &[u8]| u64::from(offset) + data.len() as u64;
        let covers = |(at, old): &(u32, Vec<u8>)| offset <= *at && end(*at, old) <= end(offset, data);
        self.config_writes.retain(|write| !covers(write));
        self.config_writes.push((offset, data.to_vec()));
    }

    /// The writes to the configuration space, oldest first.
    pub fn config_writes(&self) -> impl Iterator<Item = (u32, &[u8])> {
        self.config_writes.iter().map(|(offset, data)| (*offset, data.as_slice()))
    }

    /// Brings a fresh device to the state that the driver negotiated, except for the device's own state and its
    /// queues.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn negotiate(&self, to: &mut dyn Device) -> Result<(), DeviceError> {
        if let Some(features) = self.features {
            to.ack_features(features)?;
        }
        self.config_writes().try_for_each(|(offset, data)| to.write_config(offset, data))
    }

    /// Starts the rings on a device that has its features and its state, each at its position in `at`, or else from
    /// its beginning. `call` maps a ring's own interrupt to the one that the device may raise.
    ///
    /// # Errors
    /// When the device or the host refuses. Some of the rings may be running then.
    pub fn start_rings(
        &self,
        to: &mut dyn Device,
        at: &BTreeMap<u16, Suspended>,
        call: impl Fn(&Interrupt) -> io::Result<Interrupt>,
    ) -> Result<(), DeviceError> {
        // The last first, as the transport does: a NIC wants its control queue before those that it controls.
        for (&index, ring) in self.rings.iter().rev() {
            let at = at.get(&index).cloned().unwrap_or_default();
            let parts = call(&ring.call).and_then(|call| Ok(QueueParts { call, ..ring.parts(at)? }));
            let parts = parts.map_err(|source| DeviceError::Host {
                device: to.info().name.clone(),
                what: "duplicating the events of a queue",
                source,
            })?;
            to.start_queue(index, parts)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_writes_keep_their_order_and_do_not_pile_up() {
        let mut setup = DriverSetup::default();
        for value in 0..100 {
            setup.wrote_config(4, &[value, value]);
            setup.wrote_config(5, &[value]);
        }
        let writes: Vec<_> = setup.config_writes().collect();
        assert_eq!(writes, [(4, &[99, 99][..]), (5, &[99][..])]);
        setup.wrote_config(0, &[0; 8]);
        assert_eq!(setup.config_writes().collect::<Vec<_>>(), [(0, &[0; 8][..])]);
    }
}
