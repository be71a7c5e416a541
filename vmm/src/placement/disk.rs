//! A disk that is served in this process or in a daemon: both have the same open image.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringvm_backends::block::{BlockDevice, BlockOptions, StorageKind};
use ringvm_backends::device::{DeviceError, Flusher};
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_backends::options::Checked;
use ringvm_cli::keyval;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::placed::{Server, Source};
use super::{Mover, PlaceError, PlacedDevice, Threads, common_arguments, program, reactor_arguments};
use crate::config::Place;
use crate::vhost_user::peer::{self, Peer, Program};
use crate::vhost_user::{VhostUserDevice, Wanted};

const PROGRAM: &str = "ringvm-blk";

/// Opens a disk in a place. `pool` serves it here.
///
/// # Errors
/// Anything that is wrong with the options, the image or the daemon.
pub fn open_disk(
    name: &str,
    place: Place,
    options: &Checked<BlockOptions>,
    reactors: &ReactorOptions,
    pool: Option<&ReactorPool>,
    stats: bool,
) -> Result<(PlacedDevice, Mover), PlaceError> {
    let image = options.open_image()?.map(|file: File| Arc::new(OwnedFd::from(file)));
    let threads = Threads::new(reactors, pool);
    let source = Disk { name: name.to_owned(), options: options.clone(), stats, image, threads };
    PlacedDevice::open(Arc::new(source), place)
}

/// The parts needed to serve a disk anywhere.
struct Disk {
    name: String,
    options: Checked<BlockOptions>,
    stats: bool,
    /// Keeps the lock, wherever the disk is.
    image: Option<Arc<OwnedFd>>,
    threads: Threads,
}

impl Source for Disk {
    fn name(&self) -> &str {
        &self.name
    }

    fn serve(&self, place: Place) -> Result<Box<dyn Server>, PlaceError> {
        let Self { name, options, stats, image, threads } = self;
        match place {
            Place::Process => {
                let pool = threads.pool(name)?;
                let image = image.as_ref().map(|image| image.try_clone().map(File::from)).transpose();
                let what = "duplicating the image's descriptor";
                let image = image.map_err(|source| PlaceError::Host { device: name.clone(), what, source })?;
                Ok(Box::new(BlockDevice::with_image(name, options, image, &pool)?))
            }
            Place::Daemon => {
                let words = arguments(name, options, &threads.reactors, *stats).map_err(|error| PlaceError::Host {
                    device: name.clone(),
                    what: "writing its daemon's options",
                    source: io::Error::other(error),
                })?;
                let program = Program::new(program(PROGRAM), words, image.iter().cloned().collect());
                let (queues, queue_size) = (Some(options.queues), options.queue_size);
                let wanted = Wanted::new(VIRTIO_ID_BLOCK, queues, queue_size);
                Ok(Box::new(VhostUserDevice::connect(name, Peer::Program(program), &wanted)?))
            }
        }
    }

    /// A disk remembers its cache mode only, which the driver has written to the configuration space.
    fn has_state(&self) -> bool {
        false
    }

    /// The same file, wherever it was written.
    fn flusher(&self) -> Flusher {
        let (device, image) = (self.name.clone(), self.image.clone());
        Box::new(move || {
            let flushed = image.as_ref().map_or(Ok(()), rustix::fs::fdatasync);
            flushed.map_err(|error| DeviceError::Host {
                device: device.clone(),
                what: "flushing",
                source: error.into(),
            })
        })
    }
}

impl Server for BlockDevice {}

/// The daemon's options for the disk: the same, with the open image instead of its path.
fn arguments(
    name: &str,
    options: &BlockOptions,
    reactors: &ReactorOptions,
    stats: bool,
) -> Result<Vec<OsString>, keyval::Error> {
    let fd = (options.storage == StorageKind::Raw).then_some(peer::INHERITED);
    let disk = BlockOptions { path: None, fd, ..options.clone() };
    let mut words = vec!["--disk".into(), keyval::to_string(&disk)?.into()];
    words.extend(common_arguments(name, stats));
    words.extend(reactor_arguments(reactors, usize::from(options.queues)));
    Ok(words)
}

#[cfg(test)]
mod tests {
    use ringvm_backends::device::{Device as _, QueueParts, QueueState, RingConfig};
    use vm_memory::{GuestAddress, GuestMemoryMmap};
    use vmm_sys_util::eventfd::EventFd;

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
        let (mut disk, mover) = open_disk("disk0", Place::Process, &options, &reactors, None, false).unwrap();
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
