//! The control queue (virtio 1.3, section 5.1.6.5): a class, a command, its data, and an answer of one byte.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::features;
use crate::host::event::SharedEvent;
use crate::io::ops::Io;
use crate::io::worker::{Handler, Outcome, Step};
use crate::net::port::{Filter, Port};
use crate::virtqueue::buffers::{Chain, GuestIo};

/// Most addresses of one MAC table.
pub(super) const MAX_TABLE: u32 = 1024;

/// State that the control queue changes, shared with the device and its other queues.
pub(super) struct Control {
    pub(super) port: Arc<dyn Port>,
    /// The NIC's address.
    pub(super) mac: Mutex<[u8; 6]>,
    /// How many pairs are in use.
    pub(super) active: Arc<AtomicU16>,
    /// Whether the driver has said how many.
    pub(super) pairs_said: AtomicBool,
    /// The unfinished frames that the driver takes now, as feature bits: those negotiated, until the driver says
    /// otherwise.
    pub(super) guest_offloads: Arc<AtomicU64>,
    /// Doorbells of the receive queues that run, by pair.
    pub(super) receivers: Mutex<Vec<Option<SharedEvent>>>,
    /// The device wants the driver to announce itself to the network, and the driver has not yet acknowledged that.
    pub(super) announce: AtomicBool,
    /// The receive mode that the driver asked for, in its own terms.
    pub(super) rx: Mutex<RxMode>,
}

/// The driver's receive filter.
#[derive(Clone, Debug, Default)]
pub(super) struct RxMode {
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
    pub(super) unicast: Vec<[u8; 6]>,
    pub(super) multicast: Vec<[u8; 6]>,
    /// Said once that the port can't filter.
    pub(super) told: bool,
}

/// A command that is answered with an error.
struct Refused;

impl Control {
    /// Spreads frames over the first `count` pairs.
    pub(super) fn set_pairs(&self, count: u16) -> std::io::Result<()> {
        let before = self.active.load(Ordering::Acquire);
        if count < before {
            // First the receivers: they then know why their reads fail.
            self.active.store(count, Ordering::Release);
        }
        if let Err(error) = self.port.set_pairs(usize::from(count)) {
            self.active.store(before, Ordering::Release);
            return Err(error);
        }
        self.active.store(count, Ordering::Release);
        for kick in self.receivers.lock().unwrap_or_else(PoisonError::into_inner).iter().flatten() {
            kick.raise();
        }
        Ok(())
    }

    /// Back to a fresh driver's view: all frames are received, on one pair.
    pub(super) fn forget_rx(&self) {
        *self.rx.lock().unwrap_or_else(PoisonError::into_inner) = RxMode { promiscuous: true, ..RxMode::default() };
        self.active.store(1, Ordering::Release);
    }

    /// Brings the port in line with all that was asked for.
    pub(super) fn settle_port(&self) -> std::io::Result<()> {
        self.filter_port();
        self.port.set_pairs(usize::from(self.active.load(Ordering::Acquire)))?;
        self.port.set_offloads(features::guest_offloads(self.guest_offloads.load(Ordering::Relaxed)))
    }

    /// Changes the receive mode, and brings the port in line with it and with the address.
    pub(super) fn change_rx(&self, change: impl FnOnce(&mut RxMode)) {
        change(&mut self.rx.lock().unwrap_or_else(PoisonError::into_inner));
        self.filter_port();
    }

    fn filter_port(&self) {
        let mut rx = self.rx.lock().unwrap_or_else(PoisonError::into_inner);
        let mut addresses = vec![*self.mac.lock().unwrap_or_else(PoisonError::into_inner)];
        addresses.extend(rx.unicast.iter().chain(&rx.multicast));
        let filter = Filter { promiscuous: rx.promiscuous, all_multicast: rx.all_multicast, addresses };
        if let Err(error) = self.port.set_filter(&filter)
            && !rx.promiscuous
            && !std::mem::replace(&mut rx.told, true)
        {
            // More than was asked for is received, which drivers have to live with (5.1.6.5.1).
            tracing::info!(port = self.port.name(), %error, "the port does not filter, the guest receives every frame");
        }
    }
}

/// Serves the control queue.
pub(super) struct ControlHandler {
    pub(super) control: Arc<Control>,
    /// The features that were negotiated.
    pub(super) accepted: u64,
    pub(super) max_pairs: u16,
    /// What lines of the log about its queue are part of.
    pub(super) span: tracing::Span,
}

impl ControlHandler {
    fn obey(&self, class: u32, command: u32, data: &mut GuestIo) -> Result<(), Refused> {
        match (class, command) {
            (VIRTIO_NET_CTRL_RX, _) if self.has(features::CTRL_RX) => self.set_rx(command, data),
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) if self.has(features::CTRL_RX) => {
                let unicast = addresses(data)?;
                let multicast = addresses(data)?;
                self.control.change_rx(|rx| (rx.unicast, rx.multicast) = (unicast, multicast));
                Ok(())
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) if self.has(features::CTRL_MAC_ADDR) => {
                let mac = data.take::<6>().filter(|mac| mac[0] & 1 == 0).ok_or(Refused)?;
                *self.control.mac.lock().unwrap_or_else(PoisonError::into_inner) = mac;
                self.control.change_rx(|_| {});
                Ok(())
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) if self.has(features::MQ) => {
                let count = u16::from_le_bytes(data.take().ok_or(Refused)?);
                if !(1..=self.max_pairs).contains(&count) {
                    return Err(Refused);
                }
                self.control.pairs_said.store(true, Ordering::Release);
                self.control.set_pairs(count).map_err(|error| self.failed("changing the number of queue pairs", &error))
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET)
                if self.has(features::CTRL_GUEST_OFFLOADS) =>
            {
                let wanted = u64::from_le_bytes(data.take().ok_or(Refused)?);
                let unknown = wanted & !(self.accepted & features::GUEST_OFFLOADS) != 0;
                // The port can't do one without the other: asking it again and again would only fill the log.
                if unknown || features::missing_premise(wanted).is_some() {
                    return Err(Refused);
                }
                let offloads = features::guest_offloads(wanted);
                self.control
                    .port
                    .set_offloads(offloads)
                    .map_err(|error| self.failed("changing the offloads", &error))?;
                self.control.guest_offloads.store(wanted, Ordering::Relaxed);
                Ok(())
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) if self.has(features::GUEST_ANNOUNCE) => {
                self.control.announce.store(false, Ordering::Release);
                Ok(())
            }
            _ => Err(Refused),
        }
    }

    fn set_rx(&self, command: u32, data: &mut GuestIo) -> Result<(), Refused> {
        let [on @ (0 | 1)] = data.take().ok_or(Refused)? else { return Err(Refused) };
        let on = on == 1;
        match command {
            VIRTIO_NET_CTRL_RX_PROMISC => self.control.change_rx(|rx| rx.promiscuous = on),
            VIRTIO_NET_CTRL_RX_ALLMULTI => self.control.change_rx(|rx| rx.all_multicast = on),
            _ => return Err(Refused),
        }
        Ok(())
    }

    fn has(&self, feature: u32) -> bool {
        self.accepted & 1 << feature != 0
    }

    fn failed(&self, what: &str, error: &std::io::Error) -> Refused {
        tracing::warn!(parent: &self.span, port = self.control.port.name(), %error, "{what}");
        Refused
    }
}

/// One table of addresses: a count, and as many of them.
fn addresses(data: &mut GuestIo) -> Result<Vec<[u8; 6]>, Refused> {
    let count = u32::from_le_bytes(data.take().ok_or(Refused)?);
    if count > MAX_TABLE {
        return Err(Refused);
    }
    (0..count).map(|_| data.take().ok_or(Refused)).collect()
}

impl Handler for ControlHandler {
    type Request = ();

    const OPS: &'static [&'static str] = &["control"];

    fn start(&mut self, chain: &mut Chain, (): &mut (), _: &mut Io<'_>) -> Step {
        if chain.writable.is_empty() {
            return Step::Fault("no room for an answer");
        }
        let head = if chain.unmapped { None } else { chain.readable.take::<2>() };
        let answer = head
            .ok_or(Refused)
            .and_then(|[class, command]| self.obey(class.into(), command.into(), &mut chain.readable));
        let ok = answer.is_ok();
        let byte = if ok { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        chain.writable.copy_from(&[byte as u8]);
        Step::Done(Outcome { op: 0, written: 1, bytes: 0, ok })
    }

    fn resume(&mut self, _: &mut Chain, (): &mut (), _: i32, _: &mut Io<'_>) -> Step {
        Step::Fault("control commands have nothing to resume")
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
