//! A virtio block device: features, configuration, request format, and bringing it up for a job.
//! Virtio 1.3, section 5.2.

use alloc::vec::Vec;

use crate::drivers::pci::Msix;
use crate::drivers::queue::Queue;
use crate::drivers::virtio::{self, Transport};
use crate::job::Options;
use crate::machine::sync::Lock;
use crate::machine::{fail, interrupts, smp};
use crate::spec::{
    F_BLK_SIZE, F_CONFIG_WCE, F_DISCARD, F_FLUSH, F_MQ, F_SEG_MAX, F_SIZE_MAX, F_WRITE_ZEROES, RING_EVENT_IDX, SECTOR,
};

/// VIRTIO_BLK_T_IN.
pub const T_IN: u32 = 0;
/// VIRTIO_BLK_T_OUT.
pub const T_OUT: u32 = 1;
/// VIRTIO_BLK_T_FLUSH.
pub const T_FLUSH: u32 = 4;
/// VIRTIO_BLK_T_GET_ID.
pub const T_GET_ID: u32 = 8;
/// VIRTIO_BLK_T_DISCARD.
pub const T_DISCARD: u32 = 11;
/// VIRTIO_BLK_T_WRITE_ZEROES.
pub const T_WRITE_ZEROES: u32 = 13;

/// VIRTIO_BLK_S_OK.
pub const S_OK: u8 = 0;
/// VIRTIO_BLK_S_IOERR.
pub const S_IOERR: u8 = 1;
/// VIRTIO_BLK_S_UNSUPP.
pub const S_UNSUPP: u8 = 2;
/// What this driver writes into a status byte before the device does.
pub const S_UNSET: u8 = 0xee;

/// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP.
pub const UNMAP: u32 = 1;

/// Bytes of a request's header.
pub const HEADER: usize = 16;
/// Bytes of one segment of a discard or write-zeroes request.
pub const RANGE: usize = 16;
/// Bytes of the answer to GET_ID.
pub const ID: usize = 20;

/// Offset of the writeback field in the configuration.
pub const WRITEBACK: usize = 32;

/// Bytes of a request's header.
pub fn header(kind: u32, sector: u64) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// Bytes of one segment of a discard or write-zeroes request.
pub fn range(sector: u64, sectors: u32, flags: u32) -> [u8; RANGE] {
    let mut bytes = [0; RANGE];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// The device's configuration, with what its absent fields mean.
#[derive(Clone, Debug)]
pub struct Config {
    /// In sectors.
    pub capacity: u64,
    /// The largest data segment.
    pub size_max: u32,
    /// The most data segments.
    pub seg_max: u32,
    /// Logical block size.
    pub blk_size: u32,
    /// How many request queues there are.
    pub num_queues: u16,
    /// The most sectors in one discard segment.
    pub max_discard_sectors: u32,
    /// The most discard segments.
    pub max_discard_seg: u32,
    /// In sectors.
    pub discard_sector_alignment: u32,
    /// The most sectors in one write-zeroes segment.
    pub max_write_zeroes_sectors: u32,
    /// The most write-zeroes segments.
    pub max_write_zeroes_seg: u32,
    /// Whether write-zeroes with the unmap flag may deallocate.
    pub write_zeroes_may_unmap: bool,
    /// Whether the device caches writes.
    pub writeback: bool,
}

impl Config {
    /// Reads what `features` says is there.
    pub fn read(transport: &Transport, features: u64) -> Self {
        let config = transport.config;
        let word = |feature: u64, at: usize, absent: u32| {
            if features & feature != 0 && at + 4 <= config.len() { config.read::<u32>(at) } else { absent }
        };
        let byte = |feature: u64, at: usize| features & feature != 0 && at < config.len() && config.read::<u8>(at) != 0;
        if config.len() < 8 {
            fail(format_args!("config where=virtio-blk expected=at-least-8-bytes got={}", config.len()));
        }
        // Two halves that belong together: read again if the device changed them in between.
        let capacity = loop {
            let before: u8 = transport.common.read(virtio::common::CONFIG_GENERATION);
            let capacity = u64::from(config.read::<u32>(0)) | u64::from(config.read::<u32>(4)) << 32;
            if transport.common.read::<u8>(virtio::common::CONFIG_GENERATION) == before {
                break capacity;
            }
        };
        let queues = if features & F_MQ != 0 && config.len() >= 36 { config.read::<u16>(34) } else { 1 };
        Self {
            capacity,
            // Segments that hold nothing would make no disk: QEMU's exports say 0 for "no limit".
            size_max: match word(F_SIZE_MAX, 8, u32::MAX) {
                0 => u32::MAX,
                bytes => bytes,
            },
            seg_max: word(F_SEG_MAX, 12, 1),
            blk_size: word(F_BLK_SIZE, 20, SECTOR as u32),
            num_queues: queues,
            max_discard_sectors: word(F_DISCARD, 36, 0),
            max_discard_seg: word(F_DISCARD, 40, 0),
            discard_sector_alignment: word(F_DISCARD, 44, 1).max(1),
            max_write_zeroes_sectors: word(F_WRITE_ZEROES, 48, 0),
            max_write_zeroes_seg: word(F_WRITE_ZEROES, 52, 0),
            write_zeroes_may_unmap: byte(F_WRITE_ZEROES, 56),
            writeback: if features & F_CONFIG_WCE != 0 {
                byte(F_CONFIG_WCE, WRITEBACK)
            } else {
                features & F_FLUSH != 0
            },
        }
    }
}

/// A queue with the interrupt that was chosen for it.
pub struct BlkQueue {
    /// The queue.
    pub queue: Queue,
    /// Counts its interrupts; `None` when it is polled.
    pub irq: Option<Irq>,
    msix: Option<Msix>,
}

impl BlkQueue {
    /// Masks or unmasks the queue's interrupt.
    pub fn mask(&self, masked: bool) {
        if let (Some(irq), Some(msix)) = (self.irq, self.msix) {
            msix.mask(irq.entry, masked);
        }
    }

    /// Interrupts are not wanted while completions are being taken.
    #[inline(always)]
    pub fn quiet(&mut self) {
        match self.irq {
            Some(_) => self.queue.disarm(),
            None => self.queue.keep_quiet(),
        }
    }
}

/// One device vector: who counts it, and which MSI-X entry raises it.
#[derive(Clone, Copy)]
pub struct Irq {
    /// Index for [`interrupts::count`].
    pub index: usize,
    /// MSI-X entry.
    pub entry: u16,
}

impl Irq {
    /// How often it was taken.
    pub fn count(self) -> u64 {
        interrupts::count(self.index)
    }
}

/// The vector of configuration changes.
pub const CONFIG_IRQ: Irq = Irq { index: 0, entry: 0 };

fn msix(transport: &Transport) -> Msix {
    match transport.msix {
        Some(msix) => msix,
        None => fail(format_args!("msix where=device expected=a-vector-per-queue got=no-msix")),
    }
}

/// A block device that is up.
pub struct Blk {
    /// The device underneath.
    pub transport: Transport,
    /// The features in force.
    pub features: u64,
    /// Its configuration.
    pub config: Config,
    /// Its queues; each is used by one vCPU at a time.
    pub queues: Vec<Lock<BlkQueue>>,
}

impl Blk {
    /// Finds the block device with the index that the job names.
    pub fn find(options: &Options) -> Transport {
        let mut disks = virtio::devices().into_iter().filter(|&(kind, _)| kind == virtio::BLOCK);
        let Some((kind, function)) = disks.nth(options.disk) else {
            fail(format_args!("find where=pci expected=disk:{} got=fewer-block-devices", options.disk))
        };
        Transport::new(kind, function)
    }

    /// Finds the device and brings it up for a job.
    pub fn open(options: &Options) -> Self {
        Self::up(Self::find(options), options)
    }

    /// Brings a device up (again): from reset to DRIVER_OK.
    pub fn up(transport: Transport, options: &Options) -> Self {
        let features = transport.negotiate(options.wanted_features());
        let config = Config::read(&transport, features);
        let queues = options.queues.unwrap_or(config.num_queues);
        if queues == 0 || queues > config.num_queues || queues > transport.queues() {
            fail(format_args!("queues where=device expected=1..={} got={queues}", config.num_queues));
        }
        let event_idx = features & RING_EVENT_IDX != 0;
        smp::start(options.cpus);
        if options.irq {
            msix(&transport).route(CONFIG_IRQ.entry, smp::apic_id(0), CONFIG_IRQ.index);
            transport.common.write(virtio::common::CONFIG_MSIX_VECTOR, CONFIG_IRQ.entry);
        }
        let queues = (0..queues)
            .map(|index| {
                let irq = options.irq.then(|| Irq { index: usize::from(index) + 1, entry: index + 1 });
                if let Some(irq) = irq {
                    let cpu = usize::from(index) % options.cpus.min(usize::from(queues));
                    msix(&transport).route(irq.entry, smp::apic_id(cpu), irq.index);
                }
                let queue = transport.enable_queue(index, options.queue_size, irq.map(|irq| irq.entry), event_idx);
                Lock::new(BlkQueue { queue, irq, msix: transport.msix })
            })
            .collect();
        transport.start();
        Self { transport, features, config, queues }
    }

    /// Whether all of `features` are in force.
    pub fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    /// Switches the device's write cache; CONFIG_WCE must be in force.
    pub fn set_writeback(&self, on: bool) {
        self.transport.config.write(WRITEBACK, u8::from(on));
        let got: u8 = self.transport.config.read(WRITEBACK);
        if got != u8::from(on) {
            fail(format_args!("writeback where=config expected={} got={got}", u8::from(on)));
        }
    }
}
