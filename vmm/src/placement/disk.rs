//! A disk that is served in this process or in a daemon: both have the same open image.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use ringvm_backends::block::{BlockDevice, BlockOptions, StorageKind};
use ringvm_backends::device::{DeviceError, Flusher, Place};
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_backends::keyval;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::placed::{Server, Source};
use super::{Mover, PlaceError, PlacedDevice, Threads, common_arguments, program};
use crate::vhost_user::peer::{self, Peer, Program};
use crate::vhost_user::{VhostUserDevice, Wanted};

const PROGRAM: &str = "ringvm-blk";

/// Opens a disk in the place that its options name. `pool` serves it here.
///
/// # Errors
/// Anything that is wrong with the options, the image or the daemon.
pub fn open_disk(
    name: &str,
    options: &BlockOptions,
    reactors: &ReactorOptions,
    pool: Option<&ReactorPool>,
    stats: bool,
) -> Result<(PlacedDevice, Mover), PlaceError> {
    let image = options.open_image()?.map(|file: File| Arc::new(OwnedFd::from(file)));
    let threads = Threads::new(reactors, pool);
    let source = Disk { name: name.to_owned(), options: options.clone(), stats, image, threads };
    PlacedDevice::open(Arc::new(source), options.place)
}

/// What it takes to serve a disk anywhere.
struct Disk {
    name: String,
    options: BlockOptions,
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
                let words = arguments(name, options, &threads.reactors, *stats);
                let program = Program::new(program(PROGRAM), words, image.iter().cloned().collect());
                let (queues, queue_size) = (Some(options.queues), options.queue_size);
                let wanted = Wanted { device_type: VIRTIO_ID_BLOCK, queues, queue_size };
                Ok(Box::new(VhostUserDevice::connect(name, Peer::Program(program), &wanted)?))
            }
        }
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

/// What a daemon is told of the disk.
fn arguments(name: &str, options: &BlockOptions, reactors: &ReactorOptions, stats: bool) -> Vec<OsString> {
    let on = |flag| if flag { "on" } else { "off" };
    let mut disk = match options.storage {
        StorageKind::Raw => format!("fd={},direct={}", peer::INHERITED, on(options.direct)),
        StorageKind::Null => format!("storage=null,size={}", options.size.unwrap_or(0)),
    };
    let mut add = |key: &str, value: &dyn std::fmt::Display| {
        // Writing to a string does not fail.
        _ = write!(disk, ",{key}={value}");
    };
    add("readonly", &on(options.readonly));
    add("queues", &options.queues);
    add("queue-size", &options.queue_size);
    if let Some(size) = options.block_size {
        add("block-size", &size);
    }
    if let Some(serial) = &options.serial {
        add("serial", &keyval::quote(serial));
    }
    let mut words = vec!["--disk".into(), disk.into()];
    words.extend(common_arguments(name, reactors, usize::from(options.queues), stats));
    words
}

#[cfg(test)]
mod tests {
    use ringvm_backends::device::{Device as _, QueueParts, QueueState, RingConfig};
    use vm_memory::{GuestAddress, GuestMemoryMmap};
    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    #[test]
    fn a_serial_number_adds_no_options_to_a_daemons() {
        let serial = Some("\",queue-size=2,x=\"".to_owned());
        let options =
            BlockOptions { serial, storage: StorageKind::Null, size: Some(1 << 20), ..BlockOptions::default() };
        let words = arguments("disk0", &options, &ReactorOptions::default(), false);
        let disk = words[1].to_str().unwrap();
        let read: BlockOptions = keyval::from_str(disk, Some("path")).unwrap();
        assert_eq!(read, BlockOptions { direct: read.direct, ..options }, "{disk}");
    }

    #[test]
    fn a_disk_of_a_guest_with_private_memory_stays_where_it_is() {
        let options = BlockOptions { storage: StorageKind::Null, size: Some(1 << 20), ..BlockOptions::default() };
        let (mut disk, mover) = open_disk("disk0", &options, &ReactorOptions::default(), None, false).unwrap();
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
