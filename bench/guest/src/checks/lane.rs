//! One queue's part of a verify job: random operations in flight, each laid out in its own way, and each checked when it
//! comes back. A lane has a part of the disk to itself, so nothing outstanding overlaps.

use alloc::vec::Vec;

use crate::checks::framing::{Frame, Limits, Style, indirect_table};
use crate::checks::model::{Model, State};
use crate::drivers::blk::{self, Blk, BlkQueue};
use crate::drivers::queue::{DESCRIPTOR, INDIRECT, write_descriptor};
use crate::job::{Framing, Options};
use crate::machine::mem::Region;
use crate::machine::{clock, fail};
use crate::shared::rng::Rng;
use crate::spec::{self, RING_INDIRECT_DESC, SECTOR};

const DEFAULT_SIZE: u64 = 32 << 20;
const NO_SLOT: u16 = u16::MAX;
/// Segments of one discard or write-zeroes request, if the device takes so many.
const MOST_RANGES: u32 = 8;

/// What does not change while vCPUs work.
pub struct Shared<'a> {
    /// The job.
    pub options: &'a Options,
    /// What the disk should hold.
    pub model: Model,
    /// What the device takes.
    pub limits: Limits,
    /// The features in force.
    pub features: u64,
    /// The device's configuration.
    pub config: blk::Config,
    /// Ranges start and end at multiples of so many sectors.
    pub grain: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Read,
    Write(u32),
    WriteZeroes,
    Discard,
    Flush,
    GetId,
}

#[derive(Clone, Copy)]
struct Op {
    what: What,
    sector: u64,
    sectors: u64,
}

struct Slot {
    frame: Frame,
    table: Region,
    /// The descriptors of the queue's own table that the request takes.
    taken: Vec<u16>,
    op: Op,
    writable: usize,
    busy: bool,
}

/// Counts of what was done.
#[derive(Clone, Copy, Default)]
pub struct Counts {
    /// Operations of all kinds.
    pub ops: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
    /// Write-zeroes.
    pub zeroes: u64,
    /// Discards.
    pub discards: u64,
    /// Flushes.
    pub flushes: u64,
    /// GET_IDs.
    pub ids: u64,
    /// Bytes that the operations were about.
    pub bytes: u64,
    /// Sectors read and compared.
    pub sectors_checked: u64,
    /// Chains in an indirect table.
    pub indirect: u64,
    /// Descriptors of all chains.
    pub descriptors: u64,
    /// Completions behind a masked vector.
    pub masked: u64,
}

/// One queue's worth of work.
pub struct Lane {
    /// The queue's number.
    pub index: u64,
    rng: Rng,
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Free descriptors of the queue's own table.
    descriptors: Vec<u16>,
    by_head: Vec<u16>,
    /// Where streams are put together and taken apart.
    scratch: Vec<u8>,
    /// The first sector of the part of the disk that is this queue's for now.
    pub first: u64,
    /// The first sector behind it.
    pub end: u64,
    /// Sequential read-back starts here; `None` while operations are random.
    pub read_back: Option<u64>,
    /// What was done so far.
    pub counts: Counts,
}

impl<'a> Shared<'a> {
    /// For a device that is up.
    pub fn new(blk: &Blk, options: &'a Options) -> Self {
        let size = options.size.unwrap_or(DEFAULT_SIZE).min(blk.config.capacity * SECTOR as u64);
        let grain = u64::from(blk.config.blk_size).div_ceil(SECTOR as u64).max(1);
        let sectors = size / SECTOR as u64 / grain * grain;
        let most = (options.max / SECTOR) as u64;
        let parts = blk.queues.len() as u64;
        if sectors / parts < most * 2 || sectors > 1 << 31 {
            fail(format_args!("size where=disk expected=at-least-{}-sectors got={sectors}", most * 2 * parts));
        }
        if blk.has(spec::F_RO) {
            fail(format_args!("features where=device expected=writable got=VIRTIO_BLK_F_RO"));
        }
        let queue_size = usize::from(blk.queues[0].lock().queue.layout.size);
        let segs = (blk.config.seg_max as usize).min(queue_size.saturating_sub(2)).max(1);
        // One more than data, header and status, for a header in two halves, where the queue is long enough.
        let limits = Limits { segs, len: blk.config.size_max as usize, chain: (segs + 3).min(queue_size) };
        Self {
            options,
            model: Model::new(sectors, options.seed),
            limits,
            features: blk.features,
            config: blk.config.clone(),
            grain,
        }
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }
}

impl Lane {
    /// For one queue of a device that is up.
    pub fn new(queue: &BlkQueue, shared: &Shared<'_>) -> Self {
        let options = shared.options;
        let slots = (0..options.depth)
            .map(|slot| Slot {
                frame: Frame::new(options.max, &shared.limits, options.high && slot % 2 == 1),
                table: indirect_table(shared.limits.chain),
                taken: Vec::with_capacity(shared.limits.chain),
                op: Op { what: What::Flush, sector: 0, sectors: 0 },
                writable: 0,
                busy: false,
            })
            .collect();
        let index = u64::from(queue.queue.index);
        let mut lane = Self {
            index,
            rng: Rng::new(options.seed.wrapping_mul(0x1_0001).wrapping_add(index)),
            slots,
            free: Vec::new(),
            descriptors: Vec::new(),
            by_head: Vec::new(),
            scratch: alloc::vec![0; options.max + blk::HEADER + 1],
            first: 0,
            end: 0,
            read_back: None,
            counts: Counts::default(),
        };
        lane.start(usize::from(queue.queue.layout.size));
        lane
    }

    /// All slots and descriptors are free.
    pub fn start(&mut self, queue_size: usize) {
        self.free.clear();
        self.free.extend((0..self.slots.len() as u16).rev());
        self.descriptors.clear();
        self.descriptors.extend(0..queue_size as u16);
        self.by_head.clear();
        self.by_head.resize(queue_size, NO_SLOT);
        self.slots.iter_mut().for_each(|slot| {
            slot.busy = false;
            slot.taken.clear();
        });
    }

    /// Whether reading back has come to the end.
    pub fn finished(&self) -> bool {
        self.read_back.is_some_and(|next| next >= self.end)
    }

    /// Submits one operation; `false` if there is no room for it now.
    pub fn submit(&mut self, queue: &mut BlkQueue, shared: &Shared<'_>) -> bool {
        let Some(&slot) = self.free.last() else { return false };
        let op = match self.read_back {
            Some(next) if next >= self.end => return false,
            Some(next) => {
                let sectors = ((shared.options.max / SECTOR) as u64).min(self.end - next);
                Op { what: What::Read, sector: next, sectors }
            }
            None => match self.choose(shared) {
                Some(op) => op,
                None => return false,
            },
        };
        if !self.build(slot, op, queue, shared) {
            return false;
        }
        self.free.pop();
        if let Some(next) = &mut self.read_back {
            *next += op.sectors;
        }
        true
    }

    /// A random operation that overlaps nothing in flight.
    fn choose(&mut self, shared: &Shared<'_>) -> Option<Op> {
        let what = match self.rng.below(100) {
            0..=37 => What::Read,
            38..=75 => What::Write(shared.model.next_generation()),
            76..=84 if shared.has(spec::F_WRITE_ZEROES) => What::WriteZeroes,
            85..=92 if shared.has(spec::F_DISCARD) => What::Discard,
            93..=96 if shared.has(spec::F_FLUSH) => What::Flush,
            97 => What::GetId,
            _ => What::Read,
        };
        if matches!(what, What::Flush | What::GetId) {
            return Some(Op { what, sector: 0, sectors: 0 });
        }
        let mut most = (shared.options.max / SECTOR) as u64;
        // Beyond what its segments can carry a request cannot go.
        most = most.min((shared.limits.segs as u64).saturating_mul(shared.limits.len as u64) / SECTOR as u64);
        most = match what {
            What::Discard => most.min(u64::from(shared.config.max_discard_sectors)),
            What::WriteZeroes => most.min(u64::from(shared.config.max_write_zeroes_sectors)),
            _ => most,
        };
        let small = self.rng.below(4) == 0;
        let wanted = if small { 8 } else { 1 + self.rng.below(most) };
        let sectors = (wanted.min(most) / shared.grain).max(1) * shared.grain;
        let places = (self.end - self.first - sectors) / shared.grain + 1;
        for _ in 0..4 {
            let sector = self.first + self.rng.below(places) * shared.grain;
            let clear = |slot: &Slot| {
                !slot.busy || slot.op.sector + slot.op.sectors <= sector || sector + sectors <= slot.op.sector
            };
            if self.slots.iter().all(clear) {
                return Some(Op { what, sector, sectors });
            }
        }
        None
    }

    /// Lays an operation out and offers it; `false` if there are not enough descriptors.
    fn build(&mut self, index: u16, op: Op, queue: &mut BlkQueue, shared: &Shared<'_>) -> bool {
        let options = shared.options;
        let (kind, readable, writable) = self.compose(op, shared);
        // Half of them as an operating system would place them: so the ways with and without a bounce are both taken.
        let align = if self.rng.below(2) == 0 { SECTOR } else { options.align };
        let align = if matches!(op.what, What::Read | What::Write(_)) { align } else { options.align.min(blk::RANGE) };
        let style = Style { framing: options.framing, align, segs: options.segs };
        let limits = match op.what {
            // A device takes these in one piece or several, but seg_max is about data.
            What::Flush | What::GetId => Limits { segs: 1, ..shared.limits },
            What::Discard | What::WriteZeroes if options.framing == Framing::Plain => {
                Limits { segs: 1, ..shared.limits }
            }
            What::Discard | What::WriteZeroes => Limits { segs: 2.min(shared.limits.segs), ..shared.limits },
            What::Read | What::Write(_) => shared.limits,
        };
        let slot = &mut self.slots[usize::from(index)];
        slot.frame.plan(&mut self.rng, style, &limits, blk::HEADER + readable, writable + 1);
        let count = slot.frame.descriptors();
        let can_be_indirect = shared.has(RING_INDIRECT_DESC) && count <= shared.limits.chain;
        let direct_fits = count <= self.descriptors.len();
        let indirect = can_be_indirect && (!direct_fits || self.rng.below(2) == 0);
        if (indirect && self.descriptors.is_empty()) || (!indirect && !direct_fits) {
            return false;
        }
        slot.frame.paint();
        self.scratch[..blk::HEADER].copy_from_slice(&blk::header(kind, op.header_sector()));
        slot.frame.scatter(&self.scratch[..blk::HEADER + readable]);
        slot.taken.clear();
        if indirect {
            slot.taken.extend(self.descriptors.pop());
            slot.frame.write(slot.table, |at| at as u16);
            let len = (count * DESCRIPTOR) as u32;
            write_descriptor(queue.queue.layout.desc, slot.taken[0], slot.table.base(), len, INDIRECT, 0);
            self.counts.indirect += 1;
        } else {
            let from = self.descriptors.len() - count;
            slot.taken.extend(self.descriptors.drain(from..).rev());
            slot.frame.write(queue.queue.layout.desc, |at| slot.taken[at]);
        }
        slot.op = op;
        slot.writable = writable;
        slot.busy = true;
        self.by_head[usize::from(slot.taken[0])] = index;
        self.counts.descriptors += count as u64;
        queue.queue.offer(slot.taken[0]);
        true
    }

    /// Puts the data that the device reads behind the header in `scratch`. Returns the request's type and the lengths of
    /// the data that the device reads and writes.
    fn compose(&mut self, op: Op, shared: &Shared<'_>) -> (u32, usize, usize) {
        let bytes = op.sectors as usize * SECTOR;
        let data = &mut self.scratch[blk::HEADER..];
        match op.what {
            What::Read => (blk::T_IN, 0, bytes),
            What::Write(generation) => {
                for (index, sector) in data[..bytes].chunks_mut(SECTOR).enumerate() {
                    shared.model.content(op.sector + index as u64, generation, sector);
                }
                (blk::T_OUT, bytes, 0)
            }
            What::Flush => (blk::T_FLUSH, 0, 0),
            What::GetId => (blk::T_GET_ID, 0, blk::ID),
            What::WriteZeroes => {
                let config = &shared.config;
                let unmap = if self.rng.below(2) == 0 { blk::UNMAP } else { 0 };
                let most = (config.max_write_zeroes_seg, config.max_write_zeroes_sectors);
                (blk::T_WRITE_ZEROES, ranges(data, &mut self.rng, op, shared.grain, most, unmap), 0)
            }
            What::Discard => {
                let config = &shared.config;
                let most = (config.max_discard_seg, config.max_discard_sectors);
                (blk::T_DISCARD, ranges(data, &mut self.rng, op, shared.grain, most, 0), 0)
            }
        }
    }

    /// Takes and checks what the device has returned.
    pub fn reap(&mut self, queue: &mut BlkQueue, shared: &Shared<'_>) -> bool {
        let mut any = false;
        while let Some((head, len)) = queue.queue.next_used() {
            let slot = self.by_head.get(head as usize).copied().unwrap_or(NO_SLOT);
            if slot == NO_SLOT {
                fail(format_args!("used where=queue:{} expected=a-head-in-flight got={head}", self.index));
            }
            self.by_head[head as usize] = NO_SLOT;
            self.complete(slot, len, shared);
            any = true;
        }
        if any {
            queue.quiet();
        }
        any
    }

    fn complete(&mut self, index: u16, len: u32, shared: &Shared<'_>) {
        let slot = &mut self.slots[usize::from(index)];
        let op = slot.op;
        let written = slot.writable + 1;
        slot.frame.gather(&mut self.scratch[..written]);
        let status = self.scratch[slot.writable];
        if status != blk::S_OK {
            fail(format_args!(
                "status where=queue:{},{op} expected={} got={status} descriptors={}",
                self.index,
                blk::S_OK,
                slot.frame.descriptors()
            ));
        }
        if shared.options.used_len && len as usize != written {
            fail(format_args!("used-length where=queue:{},{op} expected={written} got={len}", self.index));
        }
        if op.what == What::Read
            && let Some(address) = slot.frame.spoilt_gap()
        {
            fail(format_args!(
                "dma where=queue:{},{op} expected=untouched got=written address={address:#x}",
                self.index
            ));
        }
        for (offset, sector) in (op.sector..op.sector + op.sectors).enumerate() {
            match op.what {
                What::Read => {
                    let data = &self.scratch[offset * SECTOR..(offset + 1) * SECTOR];
                    let expected = shared.model.state(sector);
                    if let Err(found) = shared.model.check(sector, data) {
                        fail(format_args!(
                            "verify where=queue:{},sector:{sector},{op} expected={expected} got={found}",
                            self.index
                        ));
                    }
                }
                What::Write(generation) => shared.model.set(sector, State::written(generation)),
                What::WriteZeroes => shared.model.set(sector, State::ZERO),
                What::Discard => shared.model.set(sector, shared.model.state(sector).or_zero()),
                What::Flush | What::GetId => {}
            }
        }
        self.count(op);
        let slot = &mut self.slots[usize::from(index)];
        slot.busy = false;
        self.descriptors.append(&mut slot.taken);
        self.free.push(index);
    }

    fn count(&mut self, op: Op) {
        let counts = &mut self.counts;
        counts.ops += 1;
        counts.bytes += op.sectors * SECTOR as u64;
        match op.what {
            What::Read => {
                counts.reads += 1;
                counts.sectors_checked += op.sectors;
            }
            What::Write(_) => counts.writes += 1,
            What::WriteZeroes => counts.zeroes += 1,
            What::Discard => counts.discards += 1,
            What::Flush => counts.flushes += 1,
            What::GetId => counts.ids += 1,
        }
    }

    /// Now and then: masks the queue's vector, waits for a completion, and expects its interrupt only after unmasking.
    pub fn try_masking(&mut self, queue: &mut BlkQueue, stall_ms: &u64) {
        let Some(irq) = queue.irq else { return };
        if self.rng.below(8) != 0 || queue.queue.in_flight() == 0 {
            return;
        }
        queue.mask(true);
        // What was raised before the mask may still arrive.
        clock::delay_us(200);
        let before = irq.count();
        if !queue.queue.arm() {
            let start = clock::ticks();
            while !queue.queue.pending() {
                core::hint::spin_loop();
                if clock::ticks().wrapping_sub(start) > clock::from_ms(*stall_ms) {
                    fail(format_args!("stall where=queue:{},masked expected=completions got=none", self.index));
                }
            }
            clock::delay_us(200);
            if irq.count() != before {
                fail(format_args!("interrupt where=queue:{},masked expected=none got=one", self.index));
            }
            queue.mask(false);
            let start = clock::ticks();
            while irq.count() == before {
                core::hint::spin_loop();
                if clock::ticks().wrapping_sub(start) > clock::from_ms(*stall_ms) {
                    fail(format_args!("interrupt where=queue:{},unmasked expected=one got=none", self.index));
                }
            }
            self.counts.masked += 1;
        }
        queue.mask(false);
    }

    /// After a reset: notes what is no longer known, and watches the memory of what was in flight. Returns how many
    /// operations were.
    pub fn abandon(&mut self, shared: &Shared<'_>) -> u64 {
        let mut in_flight = 0;
        for slot in &mut self.slots {
            slot.frame.paint();
            if !slot.busy {
                continue;
            }
            in_flight += 1;
            for sector in slot.op.sector..slot.op.sector + slot.op.sectors {
                match slot.op.what {
                    What::Write(_) => shared.model.set(sector, State::UNKNOWN),
                    What::Discard | What::WriteZeroes => {
                        shared.model.set(sector, shared.model.state(sector).or_zero());
                    }
                    What::Read | What::Flush | What::GetId => {}
                }
            }
        }
        in_flight
    }

    /// Checks that nothing was written to the memory of abandoned requests.
    pub fn check_untouched(&self) {
        for slot in &self.slots {
            if let Some(address) = slot.frame.spoilt_byte() {
                fail(format_args!(
                    "dma where=queue:{},after-reset,{} expected=untouched got=written address={address:#x}",
                    self.index, slot.op
                ));
            }
        }
    }
}

/// Writes the segments of a discard or write-zeroes request: the operation's range, cut at random. Returns their bytes.
fn ranges(data: &mut [u8], rng: &mut Rng, op: Op, grain: u64, (most, longest): (u32, u32), flags: u32) -> usize {
    let most = u64::from(most.clamp(1, MOST_RANGES));
    let longest = u64::from(longest) / grain * grain;
    let (mut at, end) = (op.sector, op.sector + op.sectors);
    let mut count = 0;
    while at < end {
        let left = (end - at) / grain;
        let last = count + 1 == most as usize;
        let sectors = (if last { left } else { 1 + rng.below(left) } * grain).min(longest);
        data[count * blk::RANGE..(count + 1) * blk::RANGE].copy_from_slice(&blk::range(at, sectors as u32, flags));
        at += sectors;
        count += 1;
        if last {
            break;
        }
    }
    count * blk::RANGE
}

impl Op {
    /// What a request's header says: only reads and writes have a sector there.
    fn header_sector(&self) -> u64 {
        match self.what {
            What::Read | What::Write(_) => self.sector,
            _ => 0,
        }
    }
}

impl core::fmt::Display for Op {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let name = match self.what {
            What::Read => "read",
            What::Write(_) => "write",
            What::WriteZeroes => "write-zeroes",
            What::Discard => "discard",
            What::Flush => "flush",
            What::GetId => "get-id",
        };
        write!(f, "{name}:{}+{}", self.sector, self.sectors)
    }
}
