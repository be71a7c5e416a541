//! Raw images and block devices: byte N of the disk is byte N of the file. Page-cached or O_DIRECT.
//!
//! Under O_DIRECT the kernel wants buffers and offsets aligned as statx(2) says (STATX_DIOALIGN). The guest's buffers
//! often are not: they are then bounced, and a write of part of a block reads the block first, one write at a time
//! per range. Short transfers continue where they ended; a failed hint is no failure; zeroes are written where a hole
//! can't be punched.
#![allow(unsafe_code, reason = "pushes buffers that its own operation state keeps alive")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};
use std::task::Waker;
use std::time::Instant;

use super::bounce::Bounce;
use super::share::{Part, Wait, Want};
use super::spot::{self, Spot};
use super::{Geometry, Progress, Storage};
use crate::io::ops::Io;
use crate::virtqueue::buffers::GuestIo;

/// Most bytes that one request bounces, or zeroes by writing, at once.
const MAX_BOUNCE: u64 = 128 << 10;

/// The alignment that O_DIRECT needs, in bytes, powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlign {
    /// Of buffer addresses.
    pub memory: u32,
    /// Of file offsets and lengths.
    pub offset: u32,
}

/// An open image, shared by the queues of its disk.
#[derive(Clone, Debug)]
pub struct Raw {
    file: Arc<File>,
    geometry: Geometry,
    /// `Some` under O_DIRECT.
    align: Option<DirectAlign>,
    /// Whether a guest may write less than the file takes at once: then each write has its blocks for itself.
    exclusive: bool,
    /// The source of written zeroes, one for the disk.
    zeroes: Arc<OnceLock<Bounce>>,
    /// Of this queue.
    part: Part,
    /// Likewise.
    spot: Spot,
}

impl Raw {
    /// An image over an open file, of which `geometry.capacity` bytes are used. With `align`, the file is open for
    /// O_DIRECT.
    #[must_use]
    pub fn new(file: Arc<File>, geometry: Geometry, align: Option<DirectAlign>) -> Self {
        // Requests come in sectors of 512 bytes; only a larger unit can be written in part.
        let exclusive = !geometry.readonly && align.is_some_and(|align| align.offset > 512);
        Self { file, geometry, align, exclusive, zeroes: Arc::default(), part: Part::default(), spot: Spot::new() }
    }

    fn begin(&mut self, op: &mut RawOp, kind: Kind, offset: u64, len: u64, durable: bool) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.geometry.capacity) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.geometry.readonly && !matches!(kind, Kind::Read | Kind::Sync) {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        op.kind = kind;
        op.offset = offset;
        op.left = len;
        op.durable = durable;
        op.stage = Stage::Direct;
        Ok(())
    }

    fn run(&mut self, op: &mut RawOp, data: &mut GuestIo, io: &mut Io<'_>) -> Progress {
        if op.left == 0 && !matches!(op.kind, Kind::Sync) {
            return self.end(op, Ok(()));
        }
        match op.kind {
            Kind::Read => self.push_read(op, data, io),
            Kind::Write | Kind::Zeroes => self.push_write(op, data, io),
            Kind::Discard | Kind::Punch { .. } => self.push_fallocate(op, io),
            Kind::Sync => {
                // SAFETY: the file stays open for as long as the storage, which is longer than any operation.
                unsafe { io.sync_data(self.file.as_fd()) };
                Progress::Pending
            }
        }
    }

    /// Whether the kernel takes the rest of the operation as it is.
    fn is_aligned(&self, op: &RawOp, data: &GuestIo) -> bool {
        self.align.is_none_or(|align| {
            op.offset.is_multiple_of(u64::from(align.offset))
                && data.is_aligned(align.memory as usize, align.offset as usize)
        })
    }

    /// The units of offsets and lengths, and of addresses.
    fn units(&self) -> (u64, usize) {
        self.align.map_or((1, 1), |align| (align.offset.into(), align.memory as usize))
    }

    /// The blocks that hold the next part of the operation.
    fn blocks(&self, op: &RawOp) -> (u64, u64) {
        let (unit, _) = self.units();
        let start = op.offset - op.offset % unit;
        (start, (op.offset + op.left.min(MAX_BOUNCE)).next_multiple_of(unit))
    }

    fn push_read(&mut self, op: &mut RawOp, data: &GuestIo, io: &mut Io<'_>) -> Progress {
        if self.is_aligned(op, data) {
            op.stage = Stage::Direct;
            // SAFETY: `data` belongs to the request that is resumed with it, and the file is the storage's.
            unsafe { io.read(self.file.as_fd(), data, op.offset) };
            return Progress::Pending;
        }
        if let Some(progress) = self.take_bounce(op, io) {
            return progress;
        }
        op.stage = Stage::Bounced;
        self.push_bounce_read(op, self.blocks(op), io);
        Progress::Pending
    }

    fn push_bounce_read(&mut self, op: &mut RawOp, blocks: (u64, u64), io: &mut Io<'_>) {
        op.bounce.stand_for(blocks);
        // SAFETY: the buffer is kept in the operation's state until it is resumed, and the file is the storage's.
        unsafe { io.read_buf(self.file.as_fd(), op.bounce.bytes_mut(), blocks.0) };
    }

    fn push_write(&mut self, op: &mut RawOp, data: &mut GuestIo, io: &mut Io<'_>) -> Progress {
        if matches!(op.kind, Kind::Write) && self.is_aligned(op, data) {
            return self.push_direct_write(op, data, io);
        }
        let blocks @ (start, end) = self.blocks(op);
        let whole = start == op.offset && end <= op.offset + op.left;
        let zeroes = whole && matches!(op.kind, Kind::Zeroes);
        if let Some(progress) = if zeroes { None } else { self.take_bounce(op, io) } {
            return progress;
        }
        if let Some(progress) = self.claim(op, blocks, io) {
            return progress;
        }
        if zeroes {
            self.push_zeroes(op, blocks, io);
        } else if whole {
            op.bounce.stand_for(blocks);
            self.push_bounce_write(op, data, io);
        } else {
            op.stage = Stage::ReadFirst;
            self.push_bounce_read(op, blocks, io);
        }
        Progress::Pending
    }

    fn push_direct_write(&mut self, op: &mut RawOp, data: &mut GuestIo, io: &mut Io<'_>) -> Progress {
        if let Some(progress) = self.claim(op, (op.offset, op.offset + op.left), io) {
            return progress;
        }
        op.stage = Stage::Direct;
        if let Some(progress) = self.write_on_the_spot(op, data, io) {
            return progress;
        }
        // SAFETY: `data` belongs to the request that is resumed with it, and the file is the storage's.
        unsafe { io.write(self.file.as_fd(), data, op.offset, op.durable) };
        Progress::Pending
    }

    fn push_zeroes(&mut self, op: &mut RawOp, (start, end): (u64, u64), io: &mut Io<'_>) {
        op.stage = Stage::Direct;
        let (unit, align) = self.units();
        let zeroes = self.zeroes.get_or_init(|| Bounce::new(MAX_BOUNCE.next_multiple_of(unit) as usize, align));
        let bytes = &zeroes.bytes()[..(end - start) as usize];
        // SAFETY: these bytes are never written to, and both they and the file belong to the storage.
        unsafe { io.write_buf(self.file.as_fd(), bytes, start, op.durable) };
    }

    /// Does a short write to the page cache without the ring. `None` if all of it, or the rest of it, has to go
    /// there.
    fn write_on_the_spot(&mut self, op: &mut RawOp, data: &mut GuestIo, io: &mut Io<'_>) -> Option<Progress> {
        if self.align.is_some() || op.durable || op.left > spot::LONGEST || !self.spot.is_next() {
            return None;
        }
        let start = Instant::now();
        let result = io.write_now(self.file.as_fd(), data, op.offset);
        self.spot.took(start.elapsed());
        match result {
            Ok(0) => Some(self.end(op, Err(short()))),
            Ok(count) if count >= op.left => Some(self.end(op, Ok(()))),
            Ok(count) => {
                self.advance(op, data, count);
                None
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => None,
            Err(error) => Some(self.end(op, Err(error))),
        }
    }

    fn push_bounce_write(&mut self, op: &mut RawOp, data: &GuestIo, io: &mut Io<'_>) {
        let skip = (op.offset - op.bounce.offset()) as usize;
        let count = op.left.min((op.bounce.len() - skip) as u64) as usize;
        let part = &mut op.bounce.bytes_mut()[skip..skip + count];
        if matches!(op.kind, Kind::Write) {
            data.copy_to(part);
        } else {
            part.fill(0);
        }
        op.stage = Stage::Bounced;
        // SAFETY: the buffer is kept in the operation's state until it is resumed, and the file is the storage's.
        unsafe { io.write_buf(self.file.as_fd(), op.bounce.bytes(), op.bounce.offset(), op.durable) };
    }

    /// Takes a buffer to bounce the rest of the operation in, part by part. Returns the operation's progress instead,
    /// if it has to wait for the buffer or can't have it.
    fn take_bounce(&mut self, op: &mut RawOp, io: &mut Io<'_>) -> Option<Progress> {
        let (unit, align) = self.units();
        // A block may be cut at either end.
        let room = op.left.min(MAX_BOUNCE) + 2 * unit;
        if op.memory == 0
            && let Some(progress) = self.take(op, Want::Memory(room + align as u64), io)
        {
            return Some(progress);
        }
        if op.bounce.len() == 0 {
            op.bounce = Bounce::new(room as usize, align);
        }
        None
    }

    /// Takes a range for this operation alone where blocks can be written in part. Its progress instead, as above.
    fn claim(&mut self, op: &mut RawOp, (start, end): (u64, u64), io: &mut Io<'_>) -> Option<Progress> {
        if !self.exclusive || op.held.is_some() {
            return None;
        }
        self.take(op, Want::Range(start, end), io)
    }

    fn take(&mut self, op: &mut RawOp, want: Want, io: &mut Io<'_>) -> Option<Progress> {
        op.wait = self.part.take(want, io.slot());
        if op.wait.is_some() {
            return Some(Progress::Pending);
        }
        op.receive(want);
        None
    }

    fn push_fallocate(&mut self, op: &mut RawOp, io: &mut Io<'_>) -> Progress {
        let (unit, _) = self.units();
        let range = (op.offset - op.offset % unit, (op.offset + op.left).next_multiple_of(unit));
        if let Some(progress) = self.claim(op, range, io) {
            return progress;
        }
        op.stage = Stage::Direct;
        let mode = match op.kind {
            Kind::Punch { unmap: false } => libc::FALLOC_FL_ZERO_RANGE,
            _ => libc::FALLOC_FL_PUNCH_HOLE,
        };
        // SAFETY: the file stays open for as long as the storage, which is longer than any operation.
        unsafe { io.fallocate(self.file.as_fd(), mode | libc::FALLOC_FL_KEEP_SIZE, op.offset, op.left) };
        Progress::Pending
    }

    /// `count` more bytes of the operation are done.
    fn advance(&mut self, op: &mut RawOp, data: &mut GuestIo, count: u64) {
        data.advance(count);
        op.offset += count;
        op.left -= count;
        self.release(op);
    }

    fn release(&mut self, op: &mut RawOp) {
        if let Some((start, end)) = op.held.take() {
            self.part.give_back(Want::Range(start, end));
        }
    }

    fn end(&mut self, op: &mut RawOp, result: io::Result<()>) -> Progress {
        self.abandon(op);
        Progress::Done(result)
    }

    fn transferred(&mut self, op: &mut RawOp, data: &mut GuestIo, count: u64, io: &mut Io<'_>) -> Progress {
        match op.stage {
            Stage::Direct => {
                if count >= op.left {
                    return self.end(op, Ok(()));
                }
                if count == 0 {
                    return self.end(op, Err(short()));
                }
                self.advance(op, data, count);
            }
            Stage::ReadFirst => {
                if count < op.bounce.len() as u64 {
                    return self.end(op, Err(short()));
                }
                self.push_bounce_write(op, data, io);
                return Progress::Pending;
            }
            Stage::Bounced => {
                let skip = op.offset - op.bounce.offset();
                let count = count.saturating_sub(skip).min(op.left);
                if count == 0 {
                    return self.end(op, Err(short()));
                }
                if matches!(op.kind, Kind::Read) {
                    data.copy_from(&op.bounce.bytes()[skip as usize..(skip + count) as usize]);
                }
                self.advance(op, data, count);
            }
        }
        self.run(op, data, io)
    }

    fn allocated(&mut self, op: &mut RawOp, data: &mut GuestIo, errno: i32, io: &mut Io<'_>) -> Progress {
        match (errno, op.kind) {
            (0, _) => {
                if op.durable {
                    op.kind = Kind::Sync;
                } else {
                    op.left = 0;
                }
            }
            // A discard promises no effect, so a host that can't do it is no error.
            (libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL, Kind::Discard) => op.left = 0,
            (libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL, Kind::Punch { unmap: true }) => {
                op.kind = Kind::Punch { unmap: false };
            }
            (libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL, _) => {
                // Data is written in smaller steps than this range, each with a claim of its own.
                self.release(op);
                op.kind = Kind::Zeroes;
            }
            (errno, _) => return self.end(op, Err(io::Error::from_raw_os_error(errno))),
        }
        self.run(op, data, io)
    }
}

impl Storage for Raw {
    type Op = RawOp;

    fn abandon(&mut self, op: &mut RawOp) {
        if let Some(wait) = op.wait.take() {
            self.part.give_up(wait);
        }
        self.release(op);
        if op.memory > 0 {
            op.bounce = Bounce::default();
            self.part.give_back(Want::Memory(std::mem::take(&mut op.memory)));
        }
    }

    fn is_waiting(&self, op: &RawOp) -> bool {
        op.wait.is_some()
    }

    fn attached(&mut self, waker: &Waker) {
        self.part.attached(waker);
    }

    fn next_woken(&mut self) -> Option<u32> {
        self.part.next_woken()
    }

    fn files(&self, with: &mut dyn FnMut(BorrowedFd<'_>)) {
        with(self.file.as_fd());
    }

    fn sync(&self) -> io::Result<()> {
        if self.geometry.readonly { Ok(()) } else { self.file.sync_data() }
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn read(&mut self, op: &mut RawOp, offset: u64, data: &mut GuestIo, io: &mut Io<'_>) -> Progress {
        match self.begin(op, Kind::Read, offset, data.len(), false) {
            Ok(()) => self.run(op, data, io),
            Err(e) => Progress::Done(Err(e)),
        }
    }

    fn write(&mut self, op: &mut RawOp, offset: u64, data: &mut GuestIo, durable: bool, io: &mut Io<'_>) -> Progress {
        match self.begin(op, Kind::Write, offset, data.len(), durable) {
            Ok(()) => self.run(op, data, io),
            Err(e) => Progress::Done(Err(e)),
        }
    }

    fn flush(&mut self, op: &mut RawOp, io: &mut Io<'_>) -> Progress {
        if self.geometry.readonly {
            return Progress::Done(Ok(()));
        }
        match self.begin(op, Kind::Sync, 0, 0, false) {
            Ok(()) => self.run(op, &mut GuestIo::default(), io),
            Err(e) => Progress::Done(Err(e)),
        }
    }

    fn discard(&mut self, op: &mut RawOp, offset: u64, len: u64, durable: bool, io: &mut Io<'_>) -> Progress {
        match self.begin(op, Kind::Discard, offset, len, durable) {
            Ok(()) => self.run(op, &mut GuestIo::default(), io),
            Err(e) => Progress::Done(Err(e)),
        }
    }

    fn write_zeroes(
        &mut self,
        op: &mut RawOp,
        offset: u64,
        len: u64,
        unmap: bool,
        durable: bool,
        io: &mut Io<'_>,
    ) -> Progress {
        match self.begin(op, Kind::Punch { unmap }, offset, len, durable) {
            Ok(()) => self.run(op, &mut GuestIo::default(), io),
            Err(e) => Progress::Done(Err(e)),
        }
    }

    fn resume(&mut self, op: &mut RawOp, data: &mut GuestIo, result: i32, io: &mut Io<'_>) -> Progress {
        if let Some(wait) = op.wait.take() {
            op.receive(wait.want);
            return self.run(op, data, io);
        }
        if matches!(-result, libc::EAGAIN | libc::EINTR) {
            return self.run(op, data, io);
        }
        match op.kind {
            Kind::Discard | Kind::Punch { .. } => self.allocated(op, data, -result, io),
            _ if result < 0 => self.end(op, Err(io::Error::from_raw_os_error(-result))),
            Kind::Sync => self.end(op, Ok(())),
            _ => self.transferred(op, data, result as u64, io),
        }
    }
}

/// The file is shorter than it was, or takes no more.
fn short() -> io::Error {
    io::ErrorKind::UnexpectedEof.into()
}

#[derive(Clone, Copy, Debug, Default)]
enum Kind {
    #[default]
    Read,
    Write,
    /// Zeroes written as data, where there is no other way.
    Zeroes,
    Discard,
    Punch {
        unmap: bool,
    },
    Sync,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// Between the guest's buffers and the file.
    #[default]
    Direct,
    /// Between the bounce buffer and the file.
    Bounced,
    /// The blocks of a partial write are being read.
    ReadFirst,
}

/// An operation on a raw image.
#[derive(Debug, Default)]
pub struct RawOp {
    kind: Kind,
    stage: Stage,
    offset: u64,
    left: u64,
    durable: bool,
    /// Its wait in the disk's lists, while it has nothing in the ring.
    wait: Option<Wait>,
    /// Bytes of the disk's bounce memory that it has.
    memory: u64,
    bounce: Bounce,
    /// The range that it has for itself.
    held: Option<(u64, u64)>,
}

impl RawOp {
    fn receive(&mut self, wanted: Want) {
        match wanted {
            Want::Memory(bytes) => self.memory = bytes,
            Want::Range(start, end) => self.held = Some((start, end)),
        }
    }
}

#[cfg(test)]
#[path = "raw_tests.rs"]
mod tests;
