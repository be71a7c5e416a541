//! A disk that changes its place while the guest uses it: served on I/O threads of this process, or in a daemon.
//!
//! Both places are a [`Device`] over the same open image. A move stops each queue where it is and starts it at the same position in
//! the other place, which first serves what was in flight and could be cancelled; doorbells and interrupts stay what they are.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ringvm_backends::block::{BlockDevice, BlockOptions, StorageKind};
use ringvm_backends::device::{
    Device, DeviceError, DeviceInfo, End, GuestMemory, QueueParts, RingConfig, Stopping, Suspended,
};
use ringvm_backends::host::event::SharedEvent;
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_backends::options::Checked;
use ringvm_backends::stats::DeviceStats;
use ringvm_backends::virtqueue::interrupt::Interrupt;
use ringvm_cli::keyval;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::{PlaceError, common_arguments, program};
use crate::config::Place;
use crate::vhost_user::peer::{self, Peer, Program};
use crate::vhost_user::{VhostUserDevice, Wanted};

const PROGRAM: &str = "ringvm-blk";

/// A disk, wherever it is served.
pub struct PlacedDisk {
    info: DeviceInfo,
    shared: Arc<Mutex<Placed>>,
}

/// Moves a disk whose other half is the machine's.
#[derive(Clone)]
pub struct Mover {
    name: String,
    shared: Arc<Mutex<Placed>>,
}

/// What one move did.
#[derive(Clone, Debug)]
pub struct Moved {
    /// Name of the disk.
    pub name: String,
    /// Where it is now.
    pub place: Place,
    /// How long nobody served it.
    pub pause: Duration,
}

enum Server {
    Process(Box<BlockDevice>),
    Daemon(VhostUserDevice),
}

impl Server {
    fn device(&mut self) -> &mut dyn Device {
        match self {
            Self::Process(device) => device.as_mut(),
            Self::Daemon(device) => device,
        }
    }

    fn device_ref(&self) -> &dyn Device {
        match self {
            Self::Process(device) => device.as_ref(),
            Self::Daemon(device) => device,
        }
    }
}

struct Placed {
    source: Source,
    server: Server,
    place: Place,
    features: Option<u64>,
    /// Bytes of the configuration space that the driver has written.
    written: BTreeMap<u32, u8>,
    config_changed: Interrupt,
    running: BTreeMap<u16, Kept>,
    /// What was counted in other places.
    past: DeviceStats,
    /// A daemon was given the interrupts, and may keep them.
    lent: bool,
}

/// What a queue needs to start again.
struct Kept {
    ring: RingConfig,
    mem: GuestMemory,
    kick: EventFd,
    call: Interrupt,
    fault: Interrupt,
}

impl Kept {
    fn parts(&self, end: Suspended, call: Interrupt) -> io::Result<QueueParts> {
        Ok(QueueParts {
            call,
            fault: self.fault.clone(),
            from: end.state,
            left: end.left,
            ..QueueParts::new(self.ring, Arc::clone(&self.mem), self.kick.try_clone()?)
        })
    }
}

/// The interrupt of a queue as a place may use it. One that was lent to a daemon is raised with care from then on; a daemon is
/// given the event itself.
fn interrupt(call: &Interrupt, lent: bool, place: Place) -> io::Result<Interrupt> {
    match call {
        Interrupt::Event(event) if lent && place == Place::Process => {
            Ok(Interrupt::Shared(Arc::new(SharedEvent::of(event)?)))
        }
        other => Ok(other.clone()),
    }
}

impl PlacedDisk {
    /// Opens a disk in a place. `pool` serves it here.
    ///
    /// # Errors
    /// Anything that is wrong with the options, the image or the daemon.
    pub fn open(
        name: &str,
        place: Place,
        options: &Checked<BlockOptions>,
        reactors: &ReactorOptions,
        pool: Option<&ReactorPool>,
        stats: bool,
    ) -> Result<(Self, Mover), PlaceError> {
        let image = options.open_image()?.map(|file: File| Arc::new(OwnedFd::from(file)));
        let mut source = Source {
            name: name.to_owned(),
            options: options.clone(),
            reactors: reactors.clone(),
            stats,
            image,
            pool: pool.cloned(),
        };
        let server = source.serve(place)?;
        let info = server.device_ref().info().clone();
        let shared = Arc::new(Mutex::new(Placed {
            source,
            server,
            place,
            features: None,
            written: BTreeMap::new(),
            config_changed: Interrupt::None,
            running: BTreeMap::new(),
            past: DeviceStats::default(),
            lent: place == Place::Daemon,
        }));
        Ok((Self { info, shared: Arc::clone(&shared) }, Mover { name: name.to_owned(), shared }))
    }

    fn lock(&self) -> MutexGuard<'_, Placed> {
        lock(&self.shared)
    }
}

fn lock(placed: &Mutex<Placed>) -> MutexGuard<'_, Placed> {
    placed.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What it takes to serve the disk anywhere.
#[derive(Clone)]
struct Source {
    name: String,
    options: Checked<BlockOptions>,
    reactors: ReactorOptions,
    stats: bool,
    /// Keeps the lock, wherever the disk is.
    image: Option<Arc<OwnedFd>>,
    /// As long as it was ever served here.
    pool: Option<ReactorPool>,
}

impl Source {
    /// Serves the disk in a place.
    fn serve(&mut self, place: Place) -> Result<Server, PlaceError> {
        let Self { name, options, reactors, stats, image, pool } = self;
        let host = |what, source| PlaceError::Host { device: name.clone(), what, source };
        match place {
            Place::Process => {
                let pool = match pool {
                    Some(pool) => pool,
                    None => {
                        pool.insert(ReactorPool::new(reactors).map_err(|error| host("starting I/O threads", error))?)
                    }
                };
                let image = image.as_ref().map(|image| image.try_clone().map(File::from)).transpose();
                let image = image.map_err(|error| host("duplicating the image's descriptor", error))?;
                Ok(Server::Process(Box::new(BlockDevice::with_image(name, options, image, pool)?)))
            }
            Place::Daemon => {
                let arguments = arguments(name, options, reactors, *stats)
                    .map_err(|error| host("writing the options", io::Error::other(error)))?;
                let program = Program::new(program(PROGRAM), arguments, image.iter().cloned().collect());
                let (queues, queue_size) = (Some(options.queues), options.queue_size);
                let wanted = Wanted { device_type: VIRTIO_ID_BLOCK, queues, queue_size };
                Ok(Server::Daemon(VhostUserDevice::connect(name, Peer::Program(program), &wanted)?))
            }
        }
    }
}

/// What a daemon is told of the disk: the same, with the open image instead of its path.
fn arguments(
    name: &str,
    options: &BlockOptions,
    reactors: &ReactorOptions,
    stats: bool,
) -> Result<Vec<OsString>, keyval::Error> {
    let fd = (options.storage == StorageKind::Raw).then_some(peer::INHERITED);
    let disk = BlockOptions { path: None, fd, ..options.clone() };
    let mut words = vec!["--disk".into(), keyval::to_string(&disk)?.into()];
    words.extend(common_arguments(name, reactors, usize::from(options.queues), stats));
    Ok(words)
}

impl Placed {
    /// Brings a new server to where the driver has the old one, short of its queues.
    fn prepare(&self, server: &mut Server) -> Result<(), DeviceError> {
        let device = server.device();
        device.on_config_change(self.config_changed.clone());
        if let Some(features) = self.features {
            device.ack_features(features)?;
        }
        for (&offset, &byte) in &self.written {
            device.write_config(offset, &[byte])?;
        }
        Ok(())
    }

    /// Whether the disk can be served in a place at all.
    fn check(&self, place: Place) -> Result<(), PlaceError> {
        let is_shared = |kept: &Kept| kept.mem.iter().all(|region| region.file_offset().is_some());
        if place == Place::Daemon && !self.running.values().all(is_shared) {
            return Err(PlaceError::Private { device: self.source.name.clone() });
        }
        Ok(())
    }

    fn move_to(&mut self, place: Place, mut next: Server) -> Result<Moved, PlaceError> {
        self.prepare(&mut next)?;
        if let Server::Daemon(device) = &self.server
            && !device.is_connected()
        {
            return Err(PlaceError::Away { device: self.source.name.clone() });
        }
        self.lent |= place == Place::Daemon;
        let lent = self.lent;
        let start = Instant::now();
        let indices: Vec<u16> = self.running.keys().copied().collect();
        let ends = self.server.device().suspend(&indices);
        let ends: Vec<Suspended> = ends.into_iter().map(Option::unwrap_or_default).collect();
        // Whatever a daemon that died has in flight could land on top of what the next place writes.
        let is_quiet = !matches!(&self.server, Server::Daemon(device) if !device.is_quiet());
        let mut failure = (!is_quiet).then(|| PlaceError::Away { device: self.source.name.clone() });
        for (index, end) in indices.iter().zip(&ends).take_while(|_| is_quiet) {
            let kept = &self.running[index];
            let parts = interrupt(&kept.call, lent, place).and_then(|call| kept.parts(end.clone(), call));
            let result = parts
                .map_err(|source| DeviceError::Host {
                    device: self.source.name.clone(),
                    what: "duplicating a doorbell",
                    source,
                })
                .and_then(|parts| next.device().start_queue(*index, parts));
            if let Err(error) = result {
                failure.get_or_insert(error.into());
            }
        }
        if let Some(error) = failure {
            // Back to where it was; nothing was lost.
            let back = next.device().suspend(&indices);
            for ((index, there), here) in indices.into_iter().zip(back).zip(ends) {
                let kept = &self.running[&index];
                let parts = interrupt(&kept.call, lent, self.place);
                if let Ok(parts) = parts.and_then(|call| kept.parts(there.unwrap_or(here), call)) {
                    self.server.device().start_queue(index, parts)?;
                }
            }
            return Err(error);
        }
        for kept in self.running.values() {
            // What the old place has said last may not have been heard (pitfall 48).
            interrupt(&kept.call, lent, Place::Process).unwrap_or_default().raise();
        }
        let pause = start.elapsed();
        self.past.merge(&self.server.device().stats());
        self.server = next;
        self.place = place;
        Ok(Moved { name: self.source.name.clone(), place, pause })
    }
}

impl Mover {
    /// The name of the disk.
    #[must_use]
    pub fn name(&self) -> String {
        self.name.clone()
    }

    /// Moves the disk to the place where it is not.
    ///
    /// # Errors
    /// When it can't be served there. It goes on where it is.
    pub fn toggle(&self) -> Result<Moved, PlaceError> {
        let (place, mut source) = {
            let placed = lock(&self.shared);
            let place = match placed.place {
                Place::Process => Place::Daemon,
                Place::Daemon => Place::Process,
            };
            placed.check(place)?;
            (place, placed.source.clone())
        };
        // Without the lock: a daemon may take its time, and meanwhile the guest uses the disk where it is.
        let next = source.serve(place)?;
        let mut placed = lock(&self.shared);
        placed.source = source;
        placed.move_to(place, next)
    }
}

impl Device for PlacedDisk {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn ack_features(&mut self, features: u64) -> Result<(), DeviceError> {
        let mut placed = self.lock();
        placed.server.device().ack_features(features)?;
        placed.features = Some(features);
        Ok(())
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        self.lock().server.device_ref().read_config(offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        let mut placed = self.lock();
        placed.server.device().write_config(offset, data)?;
        placed.written.extend((offset..).zip(data.iter().copied()));
        Ok(())
    }

    fn start_queue(&mut self, index: u16, mut parts: QueueParts) -> Result<(), DeviceError> {
        let mut placed = self.lock();
        let QueueParts { ring, mem, kick, call, fault, .. } = &parts;
        let kick = kick.try_clone().map_err(|source| DeviceError::Host {
            device: placed.source.name.clone(),
            what: "duplicating a doorbell",
            source,
        })?;
        let kept = Kept { ring: *ring, mem: Arc::clone(mem), kick, call: call.clone(), fault: fault.clone() };
        parts.call = interrupt(call, placed.lent, placed.place).map_err(|source| DeviceError::Host {
            device: placed.source.name.clone(),
            what: "duplicating an interrupt",
            source,
        })?;
        placed.server.device().start_queue(index, parts)?;
        placed.running.insert(index, kept);
        Ok(())
    }

    fn stop(&mut self, queues: &[u16], end: End) -> Stopping {
        let mut placed = self.lock();
        placed.running.retain(|index, _| !queues.contains(index));
        placed.server.device().stop(queues, end)
    }

    fn reset(&mut self) {
        let mut placed = self.lock();
        placed.running.clear();
        placed.written.clear();
        placed.features = None;
        placed.server.device().reset();
    }

    fn on_config_change(&mut self, notify: Interrupt) {
        let mut placed = self.lock();
        placed.config_changed = notify.clone();
        placed.server.device().on_config_change(notify);
    }

    fn flush(&mut self) -> Result<(), DeviceError> {
        let mut placed = self.lock();
        let Some(image) = &placed.source.image else { return placed.server.device().flush() };
        // The same file, wherever it was written.
        rustix::fs::fdatasync(image).map_err(|source| DeviceError::Host {
            device: placed.source.name.clone(),
            what: "flushing",
            source: source.into(),
        })
    }

    fn stats(&self) -> DeviceStats {
        let placed = self.lock();
        let mut all = placed.server.device_ref().stats();
        all.merge(&placed.past);
        all
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use ringvm_backends::device::QueueState;

    use super::*;

    #[test]
    fn a_daemon_is_told_the_options_with_the_open_image() {
        let told = |options: &BlockOptions| {
            let words = arguments("disk0", options, &ReactorOptions::default(), false).unwrap();
            keyval::read::<Checked<BlockOptions>>(words[1].to_str().unwrap()).unwrap().into_inner()
        };
        // Text of the user's adds no options of its own.
        let serial = Some("\",queue-size=2,x=\"".to_owned());
        let null = BlockOptions { serial, storage: StorageKind::Null, size: Some(1 << 20), ..BlockOptions::default() };
        assert_eq!(told(&null), null);
        let raw = BlockOptions { path: Some("/x.img".into()), direct: true, queues: 3, ..BlockOptions::default() };
        assert_eq!(told(&raw), BlockOptions { path: None, fd: Some(peer::INHERITED), ..raw });
    }

    #[test]
    fn a_disk_of_a_guest_with_private_memory_stays_where_it_is() {
        let options = BlockOptions { storage: StorageKind::Null, size: Some(1 << 20), ..BlockOptions::default() };
        let options = Checked::new(options).unwrap();
        let reactors = ReactorOptions::default();
        let (mut disk, mover) = PlacedDisk::open("disk0", Place::Process, &options, &reactors, None, false).unwrap();
        disk.ack_features(disk.info().features).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let parts = QueueParts::new(
            RingConfig { size: 16, desc: 0, avail: 0x1000, used: 0x2000 },
            Arc::new(memory),
            EventFd::new(0).unwrap(),
        );
        disk.start_queue(0, parts).unwrap();
        assert!(matches!(mover.toggle(), Err(PlaceError::Private { .. })));
        assert_eq!(disk.drain(0), Some(QueueState::default()), "it is served all the same");
    }
}
