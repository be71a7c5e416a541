//! A NIC's memory of its driver's commands, for another NIC to continue with.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;

use super::control::{Control, MAX_TABLE, RxMode};
use super::features;
use crate::state::{Refusal, StateReader, StateWriter};

const VERSION: u32 = 1;

/// State that the control queue changes.
#[derive(Debug)]
pub(super) struct NetState {
    pub(super) mac: [u8; 6],
    /// How many pairs are in use, if the driver has said so.
    pub(super) pairs: Option<u16>,
    pub(super) rx: RxMode,
    /// The unfinished frames that the driver takes, as feature bits.
    pub(super) guest_offloads: u64,
    pub(super) announce: bool,
}

impl NetState {
    /// The current state.
    pub(super) fn of(control: &Control) -> Self {
        let said = control.pairs_said.load(Ordering::Acquire);
        Self {
            mac: *control.mac.lock().unwrap_or_else(PoisonError::into_inner),
            pairs: said.then(|| control.active.load(Ordering::Acquire)),
            rx: control.rx.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            guest_offloads: control.guest_offloads.load(Ordering::Relaxed) & features::GUEST_OFFLOADS,
            announce: control.announce.load(Ordering::Acquire),
        }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut state = StateWriter::new(VIRTIO_ID_NET, VERSION);
        state.put(&self.mac);
        // No driver says that it uses none.
        state.put(&self.pairs.unwrap_or(0).to_le_bytes());
        state.put(&self.guest_offloads.to_le_bytes());
        state.flag(self.announce);
        state.flag(self.rx.promiscuous);
        state.flag(self.rx.all_multicast);
        for table in [&self.rx.unicast, &self.rx.multicast] {
            state.put(&(table.len() as u32).to_le_bytes());
            state.put(table.as_flattened());
        }
        state.finish()
    }

    /// Reads untrusted bytes, for a NIC of so many pairs whose driver may have accepted `accepted`.
    pub(super) fn from_bytes(bytes: &[u8], max_pairs: u16, accepted: u64) -> Result<Self, Refusal> {
        let mut state = StateReader::new(bytes, VIRTIO_ID_NET, VERSION)?;
        let mac: [u8; 6] = state.take()?;
        if mac[0] & 1 != 0 {
            return Err("its MAC address is multicast");
        }
        let pairs = u16::from_le_bytes(state.take()?);
        let most = if accepted & 1 << features::MQ != 0 { max_pairs } else { 1 };
        if pairs > most {
            return Err("it uses more queue pairs than there are");
        }
        let guest_offloads = u64::from_le_bytes(state.take()?);
        if guest_offloads & !(accepted & features::GUEST_OFFLOADS) != 0 {
            return Err("it has offloads that were not negotiated");
        }
        let announce = state.flag()?;
        let (promiscuous, all_multicast) = (state.flag()?, state.flag()?);
        let mut table = || {
            let count = u32::from_le_bytes(state.take()?);
            if count > MAX_TABLE {
                return Err("it has a longer table of addresses than there can be");
            }
            (0..count).map(|_| state.take()).collect::<Result<Vec<[u8; 6]>, Refusal>>()
        };
        let (unicast, multicast) = (table()?, table()?);
        state.finish()?;
        let rx = RxMode { promiscuous, all_multicast, unicast, multicast, told: false };
        Ok(Self { mac, pairs: (pairs > 0).then_some(pairs), rx, guest_offloads, announce })
    }
}
