//! A device that changes its place while the guest uses it: served on I/O threads of this process, or in a daemon.
//!
//! Both places are a [`Device`] over the same open image or port. A move stops each queue, carries the device's state
//! over, and starts each queue at the same position in the other place, which first serves the requests that were in
//! flight and could be cancelled. Doorbells and interrupts stay the same.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ringvm_backends::device::{Device, DeviceError, DeviceInfo, End, Flusher, QueueParts, Stopping, Suspended};
use ringvm_backends::host::event::SharedEvent;
use ringvm_backends::setup::{DriverSetup, RingSetup};
use ringvm_backends::stats::DeviceStats;
use ringvm_backends::trace;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use tracing::{debug_span, error};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::PlaceError;
use crate::config::Place;
use crate::vhost_user::VhostUserDevice;

/// The part of a device that all its places share; it serves the device in one of them.
pub(super) trait Source: Send + Sync {
    /// Name of the device.
    fn name(&self) -> &str;

    /// Makes the device ready in a place. It may be served in another place at the same time, and must not disturb
    /// that before a queue starts.
    fn serve(&self, place: Place) -> Result<Box<dyn Server>, PlaceError>;

    /// Whether a device remembers anything of its driver that [`DriverSetup`] does not have.
    fn has_state(&self) -> bool {
        true
    }

    /// The driver has reset the device: brings the shared parts to their state for a fresh driver.
    fn reset(&self) {}

    /// See [`Device::flusher`].
    fn flusher(&self) -> Flusher {
        Box::new(|| Ok(()))
    }
}

/// A device in one place, with the facts about the place that a move needs. The defaults are those of this process.
pub(super) trait Server: Device {
    /// Whether the place is there to stop its queues.
    fn is_connected(&self) -> bool {
        true
    }

    /// Whether nothing of suspended queues is in flight.
    fn is_quiet(&self) -> bool {
        true
    }
}

impl Server for VhostUserDevice {
    fn is_connected(&self) -> bool {
        self.is_connected()
    }

    /// The in-flight writes of a dead daemon could land on top of those of the next place.
    fn is_quiet(&self) -> bool {
        self.is_quiet()
    }
}

/// A device, wherever it is served.
pub struct PlacedDevice {
    info: DeviceInfo,
    shared: Arc<Shared>,
}

/// Moves a device; its other half is the machine's.
#[derive(Clone)]
pub struct Mover(Arc<Shared>);

/// The outcome of one move.
#[derive(Clone, Debug)]
pub struct Moved {
    /// Name of the device.
    pub name: String,
    /// Where it is now.
    pub place: Place,
    /// How long the device was not served.
    pub pause: Duration,
}

struct Shared {
    source: Arc<dyn Source>,
    /// Held over a whole move: one at a time.
    moving: Mutex<()>,
    placed: Mutex<Placed>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Placed> {
        self.placed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Placed {
    name: String,
    server: Box<dyn Server>,
    place: Place,
    setup: DriverSetup,
    config_changed: Interrupt,
    /// The device may remember something that the setup does not have.
    has_state: bool,
    /// Statistics of other places.
    past: DeviceStats,
    /// A daemon was given the interrupts, and may keep them.
    lent: bool,
}

/// The interrupt of a queue, in the form that a place may use. An interrupt that was lent to a daemon is raised with
/// care from then on; a daemon is given the event itself.
fn interrupt(call: &Interrupt, lent: bool, place: Place) -> io::Result<Interrupt> {
    match call {
        Interrupt::Event(event) if lent && place == Place::Process => {
            Ok(Interrupt::Shared(Arc::new(SharedEvent::of(event)?)))
        }
        other => Ok(other.clone()),
    }
}

impl PlacedDevice {
    /// Serves a device in a place at first.
    pub(super) fn open(source: Arc<dyn Source>, place: Place) -> Result<(Self, Mover), PlaceError> {
        let server = source.serve(place)?;
        let info = server.info().clone();
        let placed = Placed {
            name: source.name().to_owned(),
            server,
            place,
            setup: DriverSetup::default(),
            config_changed: Interrupt::None,
            has_state: source.has_state(),
            past: DeviceStats::default(),
            lent: place == Place::Daemon,
        };
        let shared = Arc::new(Shared { source, moving: Mutex::default(), placed: Mutex::new(placed) });
        Ok((Self { info, shared: Arc::clone(&shared) }, Mover(shared)))
    }
}

impl Placed {
    /// Whether the device can be served in a place at all.
    fn check(&self, place: Place) -> Result<(), PlaceError> {
        let is_shared = |ring: &RingSetup| ring.mem.iter().all(|region| region.file_offset().is_some());
        if place == Place::Daemon && !self.setup.rings.values().all(is_shared) {
            return Err(PlaceError::Private { device: self.name.clone() });
        }
        Ok(())
    }

    fn move_to(&mut self, place: Place, mut next: Box<dyn Server>) -> Result<Moved, PlaceError> {
        // The configuration may have changed since the new place was asked for.
        self.check(place)?;
        next.on_config_change(self.config_changed.clone());
        self.setup.negotiate(next.as_mut())?;
        if !self.server.is_connected() {
            return Err(PlaceError::Away { device: self.name.clone() });
        }
        self.lent |= place == Place::Daemon;
        let start = Instant::now();
        let indices: Vec<u16> = self.setup.rings.keys().copied().collect();
        let ends = self.server.suspend(&indices).into_iter().map(Option::unwrap_or_default);
        let ends: BTreeMap<u16, Suspended> = indices.iter().copied().zip(ends).collect();
        if let Err(error) = self.go_on(next.as_mut(), place, &ends) {
            let reached = next.suspend(&indices);
            self.go_back(indices.into_iter().zip(reached), ends);
            return Err(error);
        }
        for ring in self.setup.rings.values() {
            // The driver may have missed the old place's last interrupt (pitfall 48).
            interrupt(&ring.call, self.lent, Place::Process).unwrap_or_default().raise();
        }
        let pause = start.elapsed();
        self.past.merge(&self.server.stats());
        self.server = next;
        self.place = place;
        Ok(Moved { name: self.name.clone(), place, pause })
    }

    /// Lets the new place continue where the old one was suspended.
    fn go_on(&self, next: &mut dyn Server, place: Place, ends: &BTreeMap<u16, Suspended>) -> Result<(), PlaceError> {
        if !self.server.is_quiet() {
            return Err(PlaceError::Away { device: self.name.clone() });
        }
        // Before features are accepted the only state is that of a new device.
        if self.has_state && self.setup.features.is_some() {
            next.load_state(&self.server.save_state()?)?;
        }
        Ok(self.setup.start_rings(next, ends, |call| interrupt(call, self.lent, place))?)
    }

    /// Lets the old place continue: at the new place's position of a queue, or else at its own. It still has its
    /// state.
    fn go_back(&mut self, reached: impl Iterator<Item = (u16, Option<Suspended>)>, mut ends: BTreeMap<u16, Suspended>) {
        ends.extend(reached.filter_map(|(index, there)| Some((index, there?))));
        let back = self.setup.start_rings(self.server.as_mut(), &ends, |call| interrupt(call, self.lent, self.place));
        if let Err(error) = back {
            error!(%error, "a move has failed, and so has going on without it; the driver must reset it");
            self.setup.rings.values().for_each(|ring| ring.fault.raise());
        }
    }
}

impl Mover {
    /// Name of the device.
    #[must_use]
    pub fn name(&self) -> String {
        self.0.source.name().to_owned()
    }

    /// Where the device is served.
    #[must_use]
    pub fn place(&self) -> Place {
        self.0.lock().place
    }

    /// Moves the device to its other place.
    ///
    /// # Errors
    /// When it can't be served there. It stays in its place then.
    pub fn toggle(&self) -> Result<Moved, PlaceError> {
        let _moving = self.moving();
        let place = match self.place() {
            Place::Process => Place::Daemon,
            Place::Daemon => Place::Process,
        };
        self.go_to(place)
    }

    /// Moves the device to a place, unless it is there already.
    ///
    /// # Errors
    /// When it can't be served there. It stays in its place then.
    pub fn move_to(&self, place: Place) -> Result<Option<Moved>, PlaceError> {
        let _moving = self.moving();
        if self.place() == place { Ok(None) } else { self.go_to(place).map(Some) }
    }

    fn moving(&self) -> MutexGuard<'_, ()> {
        self.0.moving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn go_to(&self, place: Place) -> Result<Moved, PlaceError> {
        let _device = trace::device(self.0.source.name()).entered();
        let _moving = debug_span!("move", from = ?self.place(), to = ?place).entered();
        self.0.lock().check(place)?;
        // Without the lock: a daemon may take its time, and the guest uses the device in its old place until then.
        let next = self.0.source.serve(place)?;
        self.0.lock().move_to(place, next)
    }
}

impl Device for PlacedDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn ack_features(&mut self, features: u64) -> Result<(), DeviceError> {
        let mut placed = self.shared.lock();
        placed.server.ack_features(features)?;
        placed.setup.features = Some(features);
        Ok(())
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        self.shared.lock().server.read_config(offset, data);
    }

    fn driver_fields(&self) -> Vec<std::ops::Range<u32>> {
        self.shared.lock().server.driver_fields()
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        let mut placed = self.shared.lock();
        placed.server.write_config(offset, data)?;
        placed.setup.wrote_config(offset, data);
        Ok(())
    }

    fn start_queue(&mut self, index: u16, mut parts: QueueParts) -> Result<(), DeviceError> {
        let mut placed = self.shared.lock();
        let host = |what, source| DeviceError::Host { device: self.info.name.clone(), what, source };
        let ring = RingSetup::of(&parts).map_err(|source| host("duplicating a doorbell", source))?;
        parts.call = interrupt(&parts.call, placed.lent, placed.place)
            .map_err(|source| host("duplicating an interrupt", source))?;
        placed.server.start_queue(index, parts)?;
        placed.setup.rings.insert(index, ring);
        Ok(())
    }

    fn stop(&mut self, queues: &[u16], end: End) -> Stopping {
        let mut placed = self.shared.lock();
        placed.setup.rings.retain(|index, _| !queues.contains(index));
        placed.server.stop(queues, end)
    }

    fn reset(&mut self) {
        let mut placed = self.shared.lock();
        placed.setup = DriverSetup::default();
        placed.has_state = self.shared.source.has_state();
        placed.server.reset();
        self.shared.source.reset();
    }

    fn on_config_change(&mut self, notify: Interrupt) {
        let mut placed = self.shared.lock();
        placed.config_changed = notify.clone();
        placed.server.on_config_change(notify);
    }

    fn flusher(&self) -> Flusher {
        self.shared.source.flusher()
    }

    fn save_state(&self) -> Result<Vec<u8>, DeviceError> {
        self.shared.lock().server.save_state()
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let mut placed = self.shared.lock();
        placed.server.load_state(state)?;
        placed.has_state = true;
        Ok(())
    }

    fn stats(&self) -> DeviceStats {
        let placed = self.shared.lock();
        let mut all = placed.server.stats();
        all.merge(&placed.past);
        all
    }
}
