//! The block device (virtio 1.3, section 5.2): features, configuration space and the start and stop of its queues.

mod config;
mod handler;
pub mod options;
pub mod request;
#[cfg(test)]
mod request_tests;
pub mod storage;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use crate::device::{Device, DeviceError, DeviceInfo, Flusher, QueueParts};
use crate::io::queues::Queues;
use crate::io::reactor::ReactorPool;
use crate::io::tasks;
use crate::options::Checked;
use crate::state::{Refusal, StateReader, StateWriter};
use crate::stats::DeviceStats;
use crate::virtqueue::End;
use crate::virtqueue::buffers::MAX_PIECES;
use crate::virtqueue::split::RING_FEATURES;
use crate::virtqueue::stopping::Stopping;
use config::{CONFIG_LEN, WRITEBACK};
use handler::BlockHandler;
use options::SERIAL_LEN;
pub use options::{BlockOptions, OpenError, StorageKind};
use request::{Limits, SECTOR};
use storage::tasks::{AsyncStorage, Tasks};
use storage::{Geometry, Storage};

/// The layout of a disk's state: the driver's choice of a cache mode.
const STATE_VERSION: u32 = 1;

/// A storage of any kind, crossed once per queue start.
trait Backing: Send {
    fn start(
        &self,
        handler: BlockHandler<()>,
        queues: &mut Queues,
        index: u16,
        parts: QueueParts,
        features: u64,
    ) -> Result<(), DeviceError>;

    fn sync(&self) -> Box<dyn Fn() -> io::Result<()> + Send>;
}

impl<S: Storage + Clone + Send + 'static> Backing for S {
    fn start(
        &self,
        handler: BlockHandler<()>,
        queues: &mut Queues,
        index: u16,
        parts: QueueParts,
        features: u64,
    ) -> Result<(), DeviceError> {
        let handler = handler.over(self.clone());
        queues.start(index, parts, features, move || handler)
    }

    fn sync(&self) -> Box<dyn Fn() -> io::Result<()> + Send> {
        let storage = self.clone();
        Box::new(move || storage.sync())
    }
}

/// What makes a storage of async code.
struct Async<F> {
    geometry: Geometry,
    make: F,
    pool: ReactorPool,
}

impl<A: AsyncStorage, F: Fn() -> A + Clone + Send + 'static> Backing for Async<F> {
    fn start(
        &self,
        handler: BlockHandler<()>,
        queues: &mut Queues,
        index: u16,
        parts: QueueParts,
        features: u64,
    ) -> Result<(), DeviceError> {
        let (make, geometry) = (self.make.clone(), self.geometry);
        queues.start(index, parts, features, move || handler.over(Tasks::new(make(), geometry)))
    }

    fn sync(&self) -> Box<dyn Fn() -> io::Result<()> + Send> {
        let (make, pool) = (self.make.clone(), self.pool.clone());
        Box::new(move || {
            let (reply, flushed) = mpsc::channel();
            let make = make.clone();
            pool.least_loaded().call(move || {
                // Without a receiver nobody waits any more.
                tasks::spawn(async move { drop(reply.send(make().flush().await)) });
            });
            flushed.recv().unwrap_or_else(|_| Err(io::Error::other("the flush has panicked on its I/O thread")))
        })
    }
}

/// A disk.
pub struct BlockDevice {
    info: DeviceInfo,
    backing: Box<dyn Backing>,
    limits: Limits,
    serial: [u8; SERIAL_LEN],
    config: [u8; CONFIG_LEN],
    features: u64,
    writeback: Arc<AtomicBool>,
    queues: Queues,
}

impl BlockDevice {
    /// Opens a disk whose queues will be spread over the threads of `pool`.
    ///
    /// # Errors
    /// Anything that is wrong with the options or the image, in one line.
    pub fn open(name: &str, options: &BlockOptions, pool: &ReactorPool) -> Result<Self, OpenError> {
        let checked = Checked::new(options.clone()).map_err(|what| options.refuse(what))?;
        Self::open_checked(name, &checked, pool)
    }

    /// As [`Self::open`], with options that were checked when they were read.
    ///
    /// # Errors
    /// Anything that is wrong with the image, in one line.
    pub fn open_checked(name: &str, options: &Checked<BlockOptions>, pool: &ReactorPool) -> Result<Self, OpenError> {
        Self::with_image(name, options, options.open_image()?, pool)
    }

    /// A disk over an image that [`Checked::<BlockOptions>::open_image`] has opened, for these options or others with
    /// the same image.
    ///
    /// # Errors
    /// Anything that is wrong with the image.
    pub fn with_image(
        name: &str,
        options: &BlockOptions,
        image: Option<File>,
        pool: &ReactorPool,
    ) -> Result<Self, OpenError> {
        Ok(match image {
            Some(image) => Self::over(name, options.raw(image)?, options, pool),
            None => Self::over(name, options.null()?, options, pool),
        })
    }

    /// A disk over a storage of any kind. Of the options, the queues and the serial number are looked at.
    pub fn over<S>(name: &str, storage: S, options: &BlockOptions, pool: &ReactorPool) -> Self
    where
        S: Storage + Clone + Send + 'static,
    {
        let geometry = *storage.geometry();
        Self::backed(name, geometry, Box::new(storage), options, pool)
    }

    /// A disk over a storage that is written as async code. `make` makes the storage for each queue, on the I/O thread
    /// that serves it.
    pub fn over_async<A: AsyncStorage>(
        name: &str,
        geometry: Geometry,
        make: impl Fn() -> A + Clone + Send + 'static,
        options: &BlockOptions,
        pool: &ReactorPool,
    ) -> Self {
        Self::backed(name, geometry, Box::new(Async { geometry, make, pool: pool.clone() }), options, pool)
    }

    fn backed(
        name: &str,
        geometry: Geometry,
        backing: Box<dyn Backing>,
        options: &BlockOptions,
        pool: &ReactorPool,
    ) -> Self {
        let mut features = RING_FEATURES
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_MQ;
        if geometry.readonly {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_CONFIG_WCE | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
            features |= u64::from(geometry.discard) << VIRTIO_BLK_F_DISCARD;
        }
        let limits = Limits {
            sectors: geometry.capacity / SECTOR,
            readonly: geometry.readonly,
            discard: false,
            write_zeroes: false,
            max_segment_sectors: config::MAX_SEGMENT_SECTORS,
            max_segments: config::MAX_SEGMENTS,
        };
        // Header and status need a descriptor each, also in a driver that has no indirect ones.
        let seg_max = u32::from(options.queue_size - 2).min(MAX_PIECES as u32);
        let mut serial = [0; SERIAL_LEN];
        let text = options.serial.as_deref().unwrap_or(name).as_bytes();
        let len = text.len().min(SERIAL_LEN);
        serial[..len].copy_from_slice(&text[..len]);
        Self {
            info: DeviceInfo {
                device_type: VIRTIO_ID_BLOCK,
                name: name.to_owned(),
                features,
                queue_sizes: vec![options.queue_size; usize::from(options.queues)],
                config_len: CONFIG_LEN as u32,
            },
            backing,
            limits,
            serial,
            config: config::config_space(&geometry, &limits, seg_max, options.queues),
            features: 0,
            writeback: Arc::new(AtomicBool::new(true)),
            queues: Queues::new(name, usize::from(options.queues), pool.clone()),
        }
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// The cache mode in the state of another disk.
    fn cache_mode(&self, state: &[u8]) -> Result<bool, Refusal> {
        let mut state = StateReader::new(state, VIRTIO_ID_BLOCK, STATE_VERSION)?;
        let writeback = state.flag()?;
        state.finish()?;
        // Without the feature no driver can have chosen a mode.
        if !writeback && self.info.features & 1 << VIRTIO_BLK_F_CONFIG_WCE == 0 {
            return Err("it has a cache mode that this disk does not offer");
        }
        Ok(writeback)
    }

    /// Brings the cache mode in line with the negotiated features (section 5.2.5.2): write-through for a driver that
    /// can't flush, else the driver's last choice, else write-back.
    fn update_cache_mode(&self) {
        let chosen = !self.has(VIRTIO_BLK_F_CONFIG_WCE) || self.config[WRITEBACK] != 0;
        self.writeback.store(self.has(VIRTIO_BLK_F_FLUSH) && chosen, Ordering::Relaxed);
    }
}

impl Device for BlockDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn ack_features(&mut self, features: u64) -> Result<(), DeviceError> {
        self.info.check_features(features)?;
        self.features = features;
        self.limits.discard = self.has(VIRTIO_BLK_F_DISCARD);
        self.limits.write_zeroes = self.has(VIRTIO_BLK_F_WRITE_ZEROES);
        self.update_cache_mode();
        Ok(())
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        crate::device::read_space(&self.config, offset, data);
    }

    fn driver_fields(&self) -> Vec<std::ops::Range<u32>> {
        let offered = self.info.features & 1 << VIRTIO_BLK_F_CONFIG_WCE != 0;
        let writeback = WRITEBACK as u32..WRITEBACK as u32 + 1;
        offered.then_some(writeback).into_iter().collect()
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), DeviceError> {
        let (WRITEBACK, &[value @ (0 | 1)], true) = (offset as usize, data, self.has(VIRTIO_BLK_F_CONFIG_WCE)) else {
            return Err(DeviceError::Config { device: self.info.name.clone(), offset, len: data.len() });
        };
        self.config[WRITEBACK] = value;
        self.update_cache_mode();
        Ok(())
    }

    fn start_queue(&mut self, index: u16, parts: QueueParts) -> Result<(), DeviceError> {
        let handler = BlockHandler {
            storage: (),
            limits: self.limits,
            serial: self.serial,
            writeback: Arc::clone(&self.writeback),
            span: self.queues.span(index),
            failures: 0,
        };
        self.backing.start(handler, &mut self.queues, index, parts, self.features)
    }

    fn stop(&mut self, queues: &[u16], end: End) -> Stopping {
        self.queues.stop(queues, end)
    }

    fn reset(&mut self) {
        self.queues.reset();
        self.features = 0;
        self.limits.discard = false;
        self.limits.write_zeroes = false;
        self.config[WRITEBACK] = 1;
        self.writeback.store(true, Ordering::Relaxed);
    }

    fn flusher(&self) -> Flusher {
        let (sync, device) = (self.backing.sync(), self.info.name.clone());
        Box::new(move || {
            sync().map_err(|source| DeviceError::Host { device: device.clone(), what: "flushing", source })
        })
    }

    fn save_state(&self) -> Result<Vec<u8>, DeviceError> {
        let mut state = StateWriter::new(VIRTIO_ID_BLOCK, STATE_VERSION);
        state.flag(self.config[WRITEBACK] != 0);
        Ok(state.finish())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), DeviceError> {
        let writeback = self.cache_mode(state);
        let writeback = writeback.map_err(|reason| DeviceError::State { device: self.info.name.clone(), reason })?;
        self.config[WRITEBACK] = writeback.into();
        self.update_cache_mode();
        Ok(())
    }

    fn stats(&self) -> DeviceStats {
        self.queues.stats()
    }
}
