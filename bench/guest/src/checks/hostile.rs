//! `job=hostile`: a driver that breaks the rules, one way after another. Each act must end as the table below says, and
//! after a reset the device must work, and store, as if nothing had been.

use crate::checks::verify::Checker;
use crate::drivers::blk::{self, Blk, BlkQueue};
use crate::drivers::pci;
use crate::drivers::queue::{INDIRECT, NEXT, WRITE, write_descriptor};
use crate::drivers::virtio::{self, NEEDS_RESET, common};
use crate::job::Options;
use crate::machine::mem::{self, Region};
use crate::machine::sync::Held;
use crate::machine::{clock, fail};
use crate::say;
use crate::spec::{self, SECTOR};

/// How long a device may take to notice what it has to notice.
const PATIENCE_MS: u64 = 20_000;
/// How long is waited for what need not come.
const WAIT_MS: u64 = 1_000;
/// Operations that are verified after each act.
const AFTERWARDS: u64 = 60;
/// No RAM and no device is there in any VMM of this kind: the last pages below 64 TiB.
const NOWHERE: u64 = 0x3fff_ffff_0000;

/// What became of an act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// The device says NEEDS_RESET.
    NeedsReset,
    /// The chain came back with this status byte; [`blk::S_UNSET`] if the device left it alone.
    Returned(u8),
    /// Nothing was heard.
    Nothing,
    /// A register held what it must not.
    Wrong,
}

/// What an act may end in.
#[derive(Clone, Copy)]
enum Expect {
    /// The driver can't be answered: NEEDS_RESET, or the chain returned without success.
    Broken,
    /// The request fails with a status.
    Fails,
    /// A later, proper request succeeds.
    Works,
    /// Anything that leaves the device usable after a reset.
    Survives,
}

impl Expect {
    fn allows(self, outcome: Outcome) -> bool {
        match (self, outcome) {
            (_, Outcome::Wrong) => false,
            (Self::Broken, Outcome::NeedsReset) | (Self::Survives, _) => true,
            (Self::Broken, Outcome::Returned(status)) => status != blk::S_OK,
            (Self::Fails, Outcome::Returned(status)) => status == blk::S_IOERR || status == blk::S_UNSUPP,
            (Self::Works, Outcome::Returned(status)) => status == blk::S_OK,
            _ => false,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Broken => "needs-reset-or-failure",
            Self::Fails => "error-status",
            Self::Works => "success",
            Self::Survives => "anything",
        }
    }
}

type Act = fn(&mut Bed<'_>) -> Outcome;

const ACTS: &[(&str, Expect, Act)] = &[
    ("avail-idx-jump", Expect::Broken, |bed| {
        bed.publish(bed.size() + 5);
        bed.watch()
    }),
    ("head-out-of-range", Expect::Broken, |bed| {
        bed.offer(bed.size());
        bed.watch()
    }),
    ("chain-loop", Expect::Broken, |bed| {
        bed.descriptor(0, bed.header.base() as u64, 16, NEXT, 1);
        bed.descriptor(1, bed.data.base() as u64, 512, NEXT | WRITE, 0);
        bed.offer(0);
        bed.watch()
    }),
    ("chain-loop-on-itself", Expect::Broken, |bed| {
        bed.descriptor(0, bed.header.base() as u64, 16, NEXT, 0);
        bed.offer(0);
        bed.watch()
    }),
    ("next-out-of-range", Expect::Broken, |bed| {
        bed.descriptor(0, bed.header.base() as u64, 16, NEXT, bed.size());
        bed.offer(0);
        bed.watch()
    }),
    ("readable-after-writable", Expect::Broken, |bed| {
        bed.descriptor(0, bed.status.base() as u64, 1, NEXT | WRITE, 1);
        bed.descriptor(1, bed.header.base() as u64, 16, 0, 0);
        bed.offer(0);
        bed.watch()
    }),
    ("no-status", Expect::Broken, |bed| {
        bed.descriptor(0, bed.header.base() as u64, 16, 0, 0);
        bed.offer(0);
        bed.watch()
    }),
    ("short-header", Expect::Broken, |bed| {
        bed.descriptor(0, bed.header.base() as u64, 8, NEXT, 1);
        bed.descriptor(1, bed.status.base() as u64, 1, WRITE, 0);
        bed.offer(0);
        bed.watch()
    }),
    ("empty-descriptors", Expect::Broken, |bed| {
        bed.descriptor(0, bed.header.base() as u64, 0, NEXT, 1);
        bed.descriptor(1, bed.status.base() as u64, 0, WRITE, 0);
        bed.offer(0);
        bed.watch()
    }),
    ("header-outside-memory", Expect::Broken, |bed| {
        bed.descriptor(0, NOWHERE, 16, NEXT, 1);
        bed.descriptor(1, bed.status.base() as u64, 1, WRITE, 0);
        bed.offer(0);
        bed.watch()
    }),
    ("data-outside-memory", Expect::Broken, |bed| bed.read_into(NOWHERE, 4096)),
    ("data-across-end-of-memory", Expect::Broken, |bed| bed.read_into(mem::end() as u64 - 512, 1024)),
    ("data-wraps", Expect::Broken, |bed| bed.read_into(u64::MAX - 1024, 4096)),
    ("data-huge", Expect::Broken, |bed| bed.read_into(bed.data.base() as u64, 0xffff_fe00)),
    ("data-in-own-bar", Expect::Broken, |bed| bed.read_into(bed.blk.transport.common.base() as u64, 512)),
    ("data-in-lapic", Expect::Broken, |bed| bed.read_into(0xfee0_0000, 512)),
    ("status-outside-memory", Expect::Broken, |bed| {
        bed.descriptor(0, bed.header.base() as u64, 16, NEXT, 1);
        bed.descriptor(1, NOWHERE, 1, WRITE, 0);
        bed.offer(0);
        bed.watch()
    }),
    ("indirect-outside-memory", Expect::Broken, |bed| bed.indirect(NOWHERE, 32, INDIRECT)),
    ("indirect-empty", Expect::Broken, |bed| bed.indirect(bed.data.base() as u64, 0, INDIRECT)),
    ("indirect-odd-length", Expect::Broken, |bed| bed.indirect(bed.data.base() as u64, 24, INDIRECT)),
    ("indirect-huge", Expect::Broken, |bed| bed.indirect(bed.data.base() as u64, 0xffff_fff0, INDIRECT)),
    ("indirect-nested", Expect::Broken, |bed| {
        let at = bed.data.base();
        write_descriptor(bed.data, 0, at, 32, INDIRECT, 0);
        bed.indirect(at as u64, 16, INDIRECT)
    }),
    ("indirect-loop", Expect::Broken, |bed| {
        write_descriptor(bed.data, 0, bed.header.base(), 16, NEXT, 1);
        write_descriptor(bed.data, 1, bed.data.base() + 2048, 512, NEXT | WRITE, 1);
        bed.indirect(bed.data.base() as u64, 32, INDIRECT)
    }),
    ("same-head-twice", Expect::Survives, |bed| {
        bed.request(blk::T_IN, 0, 4096, true);
        bed.queue.queue.layout.avail.write::<u16>(4, 0);
        bed.queue.queue.layout.avail.write::<u16>(6, 0);
        bed.publish(2);
        bed.watch()
    }),
    ("unknown-type", Expect::Fails, |bed| bed.submit(0x5555, 0, 0, true)),
    ("beyond-capacity", Expect::Fails, |bed| bed.submit(blk::T_IN, bed.blk.config.capacity, 512, true)),
    ("across-capacity", Expect::Fails, |bed| bed.submit(blk::T_IN, bed.blk.config.capacity - 1, 1024, true)),
    ("write-across-capacity", Expect::Fails, |bed| bed.submit(blk::T_OUT, bed.blk.config.capacity - 1, 1024, false)),
    ("sector-overflow", Expect::Fails, |bed| bed.submit(blk::T_IN, u64::MAX, 512, true)),
    ("sector-times-512-overflow", Expect::Fails, |bed| bed.submit(blk::T_IN, 1 << 55, 512, true)),
    ("not-a-sector", Expect::Fails, |bed| bed.submit(blk::T_IN, 0, 100, true)),
    ("discard-overflow", Expect::Fails, |bed| bed.range(blk::T_DISCARD, u64::MAX / 512, 8, 0)),
    ("discard-beyond-capacity", Expect::Fails, |bed| bed.range(blk::T_DISCARD, bed.blk.config.capacity - 1, 8, 0)),
    ("discard-unknown-flags", Expect::Fails, |bed| bed.range(blk::T_DISCARD, 0, 8, 0x8000_0000)),
    ("discard-unmap-flag", Expect::Fails, |bed| bed.range(blk::T_DISCARD, 0, 8, blk::UNMAP)),
    ("write-zeroes-overflow", Expect::Fails, |bed| bed.range(blk::T_WRITE_ZEROES, u64::MAX - 1, u32::MAX, 0)),
    ("write-zeroes-unknown-flags", Expect::Fails, |bed| bed.range(blk::T_WRITE_ZEROES, 0, 8, 0x2)),
    ("notify-out-of-range", Expect::Works, |bed| {
        for index in [bed.blk.transport.queues(), 0x7fff, 0xffff] {
            bed.queue.queue.ring_doorbell(index);
        }
        bed.submit(blk::T_IN, 0, 512, true)
    }),
    ("queue-select-out-of-range", Expect::Works, |bed| {
        let common = bed.blk.transport.common;
        for index in [bed.blk.transport.queues(), 0x7fff, 0xffff] {
            common.write(common::QUEUE_SELECT, index);
            if common.read::<u16>(common::QUEUE_SIZE) != 0 {
                return Outcome::Wrong;
            }
            common.write::<u16>(common::QUEUE_SIZE, 1);
            common.write::<u16>(common::QUEUE_MSIX_VECTOR, 0);
            bed.blk.transport.write_address(common::QUEUE_DESC, usize::MAX);
            common.write::<u16>(common::QUEUE_ENABLE, 1);
        }
        bed.submit(blk::T_IN, 0, 512, true)
    }),
    ("rewrite-live-queue", Expect::Works, |bed| {
        let transport = &bed.blk.transport;
        transport.common.write::<u16>(common::QUEUE_SELECT, 0);
        transport.common.write::<u16>(common::QUEUE_SIZE, 2);
        for area in [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE] {
            transport.write_address(area, NOWHERE as usize);
        }
        bed.submit(blk::T_IN, 0, 512, true)
    }),
    ("rewrite-live-features", Expect::Works, |bed| {
        let common = bed.blk.transport.common;
        for select in [0_u32, 1, 2, u32::MAX] {
            common.write(common::DRIVER_FEATURE_SELECT, select);
            common.write::<u32>(common::DRIVER_FEATURE, 0);
        }
        bed.submit(blk::T_IN, 0, 512, true)
    }),
    ("vector-out-of-range", Expect::Works, |bed| {
        let common = bed.blk.transport.common;
        if let Some(msix) = bed.blk.transport.msix {
            common.write::<u16>(common::QUEUE_SELECT, 0);
            for vector in [msix.entries(), 0x7ff, 0xfffe] {
                common.write(common::QUEUE_MSIX_VECTOR, vector);
                if common.read::<u16>(common::QUEUE_MSIX_VECTOR) != virtio::NO_VECTOR {
                    return Outcome::Wrong;
                }
            }
        }
        bed.submit(blk::T_IN, 0, 512, true)
    }),
    ("config-writes", Expect::Works, |bed| {
        let config = bed.blk.transport.config;
        for at in (0..config.len().min(64)).filter(|&at| at != blk::WRITEBACK) {
            config.write::<u8>(at, 0xff);
        }
        if config.read::<u32>(0) != bed.blk.config.capacity as u32 {
            return Outcome::Wrong;
        }
        bed.submit(blk::T_IN, 0, 512, true)
    }),
    ("bars-moved", Expect::Survives, |bed| {
        // Sizing a live BAR as a driver would, and back.
        let function = bed.blk.transport.function;
        for register in (0x10..0x28).step_by(4) {
            let old = function.read32(register);
            function.write32(register, u32::MAX);
            function.write32(register, old);
        }
        bed.submit(blk::T_IN, 0, 512, true)
    }),
    ("config-space-garbage", Expect::Survives, |bed| {
        let function: pci::Function = bed.blk.transport.function;
        // All but the command register and the BARs.
        for register in (0x28..=0xfc).step_by(4) {
            let old = function.read32(register);
            function.write32(register, 0xdead_beef);
            function.write32(register, old);
        }
        bed.submit(blk::T_IN, 0, 512, true)
    }),
    ("unaccepted-feature", Expect::Survives, |bed| {
        let transport = &bed.blk.transport;
        transport.reset();
        transport.add_status(virtio::ACKNOWLEDGE | virtio::DRIVER);
        for select in [0_u32, 1] {
            transport.common.write(common::DRIVER_FEATURE_SELECT, select);
            transport.common.write::<u32>(common::DRIVER_FEATURE, u32::MAX);
        }
        transport.add_status(virtio::FEATURES_OK);
        if transport.status() & virtio::FEATURES_OK != 0 { Outcome::Wrong } else { Outcome::Nothing }
    }),
    ("ring-outside-memory", Expect::Survives, |bed| {
        let transport = &bed.blk.transport;
        transport.negotiate(spec::VERSION_1);
        transport.common.write::<u16>(common::QUEUE_SELECT, 0);
        for area in [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE] {
            transport.write_address(area, NOWHERE as usize);
        }
        transport.common.write::<u16>(common::QUEUE_ENABLE, 1);
        transport.add_status(virtio::DRIVER_OK);
        bed.queue.queue.ring_doorbell(0);
        bed.watch()
    }),
    ("ring-across-end-of-memory", Expect::Survives, |bed| {
        let transport = &bed.blk.transport;
        transport.negotiate(spec::VERSION_1);
        transport.common.write::<u16>(common::QUEUE_SELECT, 0);
        for area in [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE] {
            transport.write_address(area, mem::end() - 64);
        }
        transport.common.write::<u16>(common::QUEUE_ENABLE, 1);
        transport.add_status(virtio::DRIVER_OK);
        bed.queue.queue.ring_doorbell(0);
        bed.watch()
    }),
    ("one-area-outside-memory", Expect::Survives, |bed| {
        let transport = &bed.blk.transport;
        let areas = [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE];
        // Again and again: whoever serves the queue must not pay for each time.
        for round in 0..60 {
            transport.negotiate(spec::VERSION_1);
            transport.common.write::<u16>(common::QUEUE_SELECT, 0);
            for (index, area) in areas.into_iter().enumerate() {
                let at = if index == round % 3 { NOWHERE as usize } else { bed.data.base() };
                transport.write_address(area, at);
            }
            transport.common.write::<u16>(common::QUEUE_ENABLE, 1);
            transport.add_status(virtio::DRIVER_OK);
        }
        bed.watch()
    }),
    ("ring-misaligned", Expect::Survives, |bed| {
        let transport = &bed.blk.transport;
        transport.negotiate(spec::VERSION_1);
        transport.common.write::<u16>(common::QUEUE_SELECT, 0);
        for area in [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE] {
            transport.write_address(area, bed.data.base() + 1);
        }
        transport.common.write::<u16>(common::QUEUE_ENABLE, 1);
        transport.add_status(virtio::DRIVER_OK);
        bed.queue.queue.ring_doorbell(0);
        bed.watch()
    }),
    ("queue-size-odd", Expect::Survives, |bed| {
        let transport = &bed.blk.transport;
        transport.negotiate(spec::VERSION_1);
        transport.common.write::<u16>(common::QUEUE_SELECT, 0);
        for size in [0_u16, 3, 0x8001, 0xffff] {
            transport.common.write(common::QUEUE_SIZE, size);
        }
        transport.common.write::<u16>(common::QUEUE_ENABLE, 1);
        transport.add_status(virtio::DRIVER_OK);
        bed.queue.queue.ring_doorbell(0);
        bed.watch()
    }),
    ("driver-ok-without-features", Expect::Survives, |bed| {
        bed.blk.transport.reset();
        bed.blk.transport.common.write(common::DEVICE_STATUS, virtio::DRIVER_OK);
        bed.queue.queue.ring_doorbell(0);
        bed.watch()
    }),
    ("status-garbage", Expect::Survives, |bed| {
        for status in 1..=255_u8 {
            bed.blk.transport.common.write(common::DEVICE_STATUS, status);
        }
        Outcome::Nothing
    }),
];

/// A device that is up, one of its queues, and memory for one request.
struct Bed<'a> {
    blk: &'a Blk,
    queue: Held<'a, BlkQueue>,
    header: Region,
    data: Region,
    status: Region,
    /// How long the device is watched, in ticks.
    patience: u64,
}

/// Does the act that the job names, or all of them.
pub fn run(options: &Options) {
    let memory = mem::dma(4 * 4096, 4096);
    let acts =
        ACTS.iter().filter(|(name, ..)| options.word.is_empty() || options.word == "all" || options.word == *name);
    let mut blk = Blk::open(options);
    let checker = Checker::new(&blk, options);
    let mut done = 0;
    for &(name, expect, act) in acts {
        memory.fill(0, memory.len(), 0);
        let mut bed = Bed {
            blk: &blk,
            queue: blk.queues[0].lock(),
            header: memory.sub(0, 16),
            data: memory.sub(4096, 8192),
            status: memory.sub(64, 1),
            patience: clock::from_ms(if matches!(expect, Expect::Survives) { WAIT_MS } else { PATIENCE_MS }),
        };
        bed.status.write::<u8>(0, blk::S_UNSET);
        if bed.possible(name) {
            let outcome = act(&mut bed);
            say!("hostile kind={name} outcome={outcome:?}");
            if !expect.allows(outcome) {
                fail(format_args!("hostile where={name} expected={} got={outcome:?}", expect.words()));
            }
            done += 1;
        } else {
            say!("hostile kind={name} outcome=not-offered");
        }
        drop(bed);
        blk = again(blk, options);
        checker.run(&blk, AFTERWARDS);
        blk = again(blk, options);
    }
    if done == 0 {
        fail(format_args!("command-line where=kind expected=a-known-act-or-all got={}", options.word));
    }
    blk.transport.reset();
    say!("result job={} acts={done} errors=0", options.name);
}

/// Brings the device up with rings that nothing has been in.
fn again(blk: Blk, options: &Options) -> Blk {
    blk.transport.reset();
    Blk::up(blk.transport, options)
}

impl Bed<'_> {
    /// Whether the features that an act needs are in force.
    fn possible(&self, name: &str) -> bool {
        (!name.starts_with("indirect") || self.blk.has(spec::RING_INDIRECT_DESC))
            && (!name.starts_with("discard") || self.blk.has(spec::F_DISCARD))
            && (!name.starts_with("write-zeroes") || self.blk.has(spec::F_WRITE_ZEROES))
            && (!name.starts_with("write-across") || !self.blk.has(spec::F_RO))
    }

    fn size(&self) -> u16 {
        self.queue.queue.layout.size
    }

    /// Writes a descriptor of the queue's own table, whatever is in it.
    fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let table = self.queue.queue.layout.desc;
        write_descriptor(table, index, address as usize, len, flags, next);
    }

    /// Makes a chain available that starts at any number.
    fn offer(&mut self, head: u16) {
        self.queue.queue.layout.avail.write(4, head);
        self.publish(1);
    }

    /// Writes avail.idx and notifies, whatever the driver thinks of it.
    fn publish(&mut self, idx: u16) {
        self.queue.queue.layout.avail.write(2, idx);
        let index = self.queue.queue.index;
        self.queue.queue.ring_doorbell(index);
    }

    /// Waits for what the device makes of it.
    fn watch(&self) -> Outcome {
        let start = clock::ticks();
        while clock::ticks().wrapping_sub(start) < self.patience {
            if self.blk.transport.status() & NEEDS_RESET != 0 {
                return Outcome::NeedsReset;
            }
            if self.queue.queue.device_used_idx() != 0 {
                return Outcome::Returned(self.status.read(0));
            }
        }
        Outcome::Nothing
    }

    /// Lays a proper request out in descriptors 0 to 2.
    fn request(&self, kind: u32, sector: u64, len: u32, device_writes: bool) {
        self.header.copy_in(0, &blk::header(kind, sector));
        self.descriptor(0, self.header.base() as u64, 16, NEXT, if len == 0 { 2 } else { 1 });
        let flags = if device_writes { NEXT | WRITE } else { NEXT };
        self.descriptor(1, self.data.base() as u64, len, flags, 2);
        self.descriptor(2, self.status.base() as u64, 1, WRITE, 0);
    }

    fn submit(&mut self, kind: u32, sector: u64, len: u32, device_writes: bool) -> Outcome {
        self.request(kind, sector, len, device_writes);
        self.offer(0);
        self.watch()
    }

    /// A read whose data descriptor says anything.
    fn read_into(&mut self, address: u64, len: u32) -> Outcome {
        self.request(blk::T_IN, 0, SECTOR as u32, true);
        self.descriptor(1, address, len, NEXT | WRITE, 2);
        self.offer(0);
        self.watch()
    }

    /// A discard or write-zeroes with any range.
    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> Outcome {
        self.data.copy_in(0, &blk::range(sector, sectors, flags));
        self.submit(kind, 0, blk::RANGE as u32, false)
    }

    /// A head that points at a table.
    fn indirect(&mut self, table: u64, len: u32, flags: u16) -> Outcome {
        self.header.copy_in(0, &blk::header(blk::T_IN, 0));
        self.descriptor(0, table, len, flags, 0);
        self.offer(0);
        self.watch()
    }
}
