//! Requests cut into descriptors in every way that the specification allows: what the device reads and what it writes are
//! two streams of bytes, each cut anywhere and scattered over an arena. Virtio 1.3, section 2.6.4 (message framing).

use alloc::vec::Vec;

use crate::drivers::blk;
use crate::drivers::queue::{DESCRIPTOR, NEXT, WRITE, write_descriptor};
use crate::job::Framing;
use crate::machine::mem::{self, Region};
use crate::machine::paging;
use crate::shared::rng::Rng;
use crate::spec;

/// What lies in the arena where no piece is.
const CANARY: u8 = 0xa5;
/// The most space that a piece's place wastes.
const WASTE: usize = 1024;

/// What a device takes.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The most data descriptors.
    pub segs: usize,
    /// The longest descriptor.
    pub len: usize,
    /// The most descriptors in all.
    pub chain: usize,
}

/// How a request is to be cut.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Where cuts may be.
    pub framing: Framing,
    /// What lengths and addresses are multiples of.
    pub align: usize,
    /// Exactly so many data descriptors, or a random number.
    pub segs: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
struct Piece {
    at: usize,
    len: usize,
    writable: bool,
}

/// One request's bytes in memory, as its descriptors name them.
pub struct Frame {
    arena: Region,
    /// How much of the arena the current request lies in.
    used: usize,
    pieces: Vec<Piece>,
    /// Indices of `pieces` in the order in which they lie in the arena.
    order: Vec<u16>,
    cuts: Vec<usize>,
}

impl Frame {
    /// Room for requests with so many bytes of data, in RAM above 4 GiB or below.
    pub fn new(max: usize, limits: &Limits, high: bool) -> Self {
        let (len, align) = (max + (limits.chain + 1) * WASTE, 4096);
        Self {
            arena: if high { paging::dma_high(len, align) } else { mem::dma(len, align) },
            used: 0,
            pieces: Vec::with_capacity(limits.chain),
            order: Vec::with_capacity(limits.chain),
            cuts: Vec::with_capacity(limits.chain + 1),
        }
    }

    /// Cuts and places a request of `readable` (header and data) and `writable` (data and status) bytes.
    pub fn plan(&mut self, rng: &mut Rng, style: Style, limits: &Limits, readable: usize, writable: usize) {
        self.pieces.clear();
        let data = (readable - blk::HEADER).max(writable - 1);
        let least = data.div_ceil(limits.len).max(usize::from(data != 0));
        let most = limits.segs.min(data / style.align).max(least);
        let segs = match style.segs {
            Some(segs) => segs.clamp(least, most),
            None if rng.below(2) == 0 => (1 + rng.below(4) as usize).clamp(least, most),
            None => (1 + rng.below(most.max(1) as u64) as usize).clamp(least, most),
        };
        let any = style.framing == Framing::Any;
        // Together with data: fewer descriptors than a driver of the old school would use.
        let joined = any && rng.below(4) == 0;
        let split_header = any && rng.below(4) == 0 && segs + 3 <= limits.chain;
        let segs_readable = if readable > blk::HEADER { segs } else { 0 };
        self.cut(rng, style, limits, readable, blk::HEADER, segs_readable, joined, split_header);
        let first_writable = self.pieces.len();
        let segs_writable = if writable > 1 { segs } else { 0 };
        self.cut(rng, style, limits, writable, 0, segs_writable, joined, false);
        self.pieces[first_writable..].iter_mut().for_each(|piece| piece.writable = true);
        self.place(rng, style);
    }

    /// Cuts one stream. Data lies from `start` on: up to the end, or (`start` of 0) to the status byte.
    #[allow(clippy::too_many_arguments, reason = "one decision each")]
    fn cut(
        &mut self,
        rng: &mut Rng,
        style: Style,
        limits: &Limits,
        len: usize,
        start: usize,
        segs: usize,
        joined: bool,
        split_header: bool,
    ) {
        let end = if start == 0 { len - 1 } else { len };
        self.cuts.clear();
        let boundary = if start == 0 { end } else { start };
        if boundary != 0 && boundary != len && !(joined && end - start < limits.len.saturating_sub(blk::HEADER)) {
            self.cuts.push(boundary);
        }
        if split_header && start != 0 {
            self.cuts.push(1 + rng.below(blk::HEADER as u64 - 1) as usize);
        }
        let units = (end - start) / style.align;
        for _ in 1..segs {
            if units > 1 {
                self.cuts.push(start + (1 + rng.below(units as u64 - 1) as usize) * style.align);
            }
        }
        self.cuts.sort_unstable();
        self.cuts.dedup();
        self.cuts.push(len);
        let mut from = 0;
        for index in 0..self.cuts.len() {
            // What is longer than the device takes is cut again.
            while from < self.cuts[index] {
                let piece = (self.cuts[index] - from).min(limits.len);
                self.pieces.push(Piece { at: 0, len: piece, writable: false });
                from += piece;
            }
        }
    }

    /// Gives each piece a place in the arena, in random order and with gaps.
    fn place(&mut self, rng: &mut Rng, style: Style) {
        self.order.clear();
        self.order.extend(0..self.pieces.len() as u16);
        for index in (1..self.order.len()).rev() {
            self.order.swap(index, rng.below(index as u64 + 1) as usize);
        }
        let mut at = 0;
        for &index in &self.order {
            at += rng.below(64) as usize;
            if style.align >= spec::SECTOR {
                at = at.next_multiple_of(spec::SECTOR);
            }
            self.pieces[usize::from(index)].at = at;
            at += self.pieces[usize::from(index)].len;
        }
        self.used = (at + 64).min(self.arena.len());
    }

    /// How many descriptors the request takes.
    pub fn descriptors(&self) -> usize {
        self.pieces.len()
    }

    /// Writes the bytes that the device will read.
    pub fn scatter(&self, mut bytes: &[u8]) {
        for piece in self.pieces.iter().filter(|piece| !piece.writable) {
            let (now, later) = bytes.split_at(piece.len);
            self.arena.copy_in(piece.at, now);
            bytes = later;
        }
    }

    /// Collects the bytes that the device has written.
    pub fn gather(&self, bytes: &mut [u8]) {
        let mut done = 0;
        for piece in self.pieces.iter().filter(|piece| piece.writable) {
            self.arena.copy_out(piece.at, &mut bytes[done..done + piece.len]);
            done += piece.len;
        }
    }

    /// Fills the arena, so that what the device writes there can be told.
    pub fn paint(&self) {
        self.arena.fill(0, self.used, CANARY);
    }

    /// The first byte outside of all writable pieces that is not as it was painted; pieces that the device reads are
    /// passed over.
    pub fn spoilt_gap(&self) -> Option<usize> {
        let mut at = 0;
        for &index in &self.order {
            let piece = self.pieces[usize::from(index)];
            let spoilt = self.arena.find_other(at, piece.at - at, CANARY);
            if spoilt.is_some() {
                return spoilt.map(|offset| self.arena.base() + offset);
            }
            at = piece.at + piece.len;
        }
        self.arena.find_other(at, self.used - at, CANARY).map(|offset| self.arena.base() + offset)
    }

    /// The first byte of the whole arena that is not as it was painted.
    pub fn spoilt_byte(&self) -> Option<usize> {
        self.arena.find_other(0, self.used, CANARY).map(|offset| self.arena.base() + offset)
    }

    /// Writes the request's descriptors into a table, `slot` giving each one's index.
    pub fn write(&self, table: Region, slot: impl Fn(usize) -> u16) {
        let last = self.pieces.len() - 1;
        for (index, piece) in self.pieces.iter().enumerate() {
            let flags = if piece.writable { WRITE } else { 0 } | if index < last { NEXT } else { 0 };
            let next = if index < last { slot(index + 1) } else { 0 };
            write_descriptor(table, slot(index), self.arena.base() + piece.at, piece.len as u32, flags, next);
        }
    }
}

/// Memory for an indirect table with so many descriptors.
pub fn indirect_table(descriptors: usize) -> Region {
    mem::dma(descriptors * DESCRIPTOR, DESCRIPTOR)
}
