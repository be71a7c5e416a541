//! The bytes of a disk, behind one trait with static dispatch.
//!
//! A storage is a set of state machines over the data ring. Each operation has at most one ring operation
//! outstanding, or waits for another operation of the storage, and keeps its state in [`Storage::Op`], which lives in
//! the request's slot. So a request costs no allocation and no task. A format that needs several steps (tables before
//! data) is a longer machine of the same shape, or async code where speed matters less ([`tasks`]).

mod bounce;
pub mod null;
pub mod raw;
mod share;
mod spot;
pub mod tasks;

use std::io;
use std::os::fd::BorrowedFd;
use std::task::Waker;

use crate::io::ops::Io;
use crate::virtqueue::buffers::GuestIo;

/// The fixed properties of a storage, sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the disk, a multiple of `logical_block`.
    pub capacity: u64,
    /// Smallest unit that can be addressed without a read-modify-write; a power of two, at least 512.
    pub logical_block: u32,
    /// Unit that the storage works in; a power of two, at least `logical_block`.
    pub physical_block: u32,
    /// Whether it can't be written.
    pub readonly: bool,
    /// Whether it can give space back.
    pub discard: bool,
}

/// How far an operation has come.
#[derive(Debug)]
#[must_use]
pub enum Progress {
    /// A ring operation is outstanding, and its result goes to [`Storage::resume`]; or it waits for others, see
    /// [`Storage::is_waiting`].
    Pending,
    /// The operation has ended.
    Done(io::Result<()>),
}

/// The storage of a disk as one queue sees it. Lives on one thread.
///
/// The caller checks ranges against the capacity, and the storage checks them again: it never reaches beyond its end.
/// The caller resumes a started operation until it is done, or abandons it, before it uses the `Op` and `data` for
/// another one. A long operation goes in steps of bounded size ([`Io`] sees to that for reads and writes). Between
/// two steps its queue may be told to leave: the next step is then pushed nowhere, and the caller abandons the
/// operation.
pub trait Storage {
    /// The state of an operation in flight.
    type Op: Default;

    /// The fixed properties.
    fn geometry(&self) -> &Geometry;

    /// Fills `data` from `offset` on.
    fn read(&mut self, op: &mut Self::Op, offset: u64, data: &mut GuestIo, io: &mut Io<'_>) -> Progress;

    /// Writes all of `data` at `offset`, through to stable storage if `durable`.
    fn write(&mut self, op: &mut Self::Op, offset: u64, data: &mut GuestIo, durable: bool, io: &mut Io<'_>)
    -> Progress;

    /// Makes every write that was completed before durable.
    fn flush(&mut self, op: &mut Self::Op, io: &mut Io<'_>) -> Progress;

    /// Says that a range is not needed; it reads as anything afterwards.
    fn discard(&mut self, op: &mut Self::Op, offset: u64, len: u64, durable: bool, io: &mut Io<'_>) -> Progress;

    /// Makes a range read as zeroes; with `unmap`, its space may be given back.
    fn write_zeroes(
        &mut self,
        op: &mut Self::Op,
        offset: u64,
        len: u64,
        unmap: bool,
        durable: bool,
        io: &mut Io<'_>,
    ) -> Progress;

    /// Continues an operation whose ring operation has ended with `result`. `data` is that of its start; operations
    /// without data ignore it.
    fn resume(&mut self, op: &mut Self::Op, data: &mut GuestIo, result: i32, io: &mut Io<'_>) -> Progress;

    /// Forgets an operation that is pending, with no ring operation in flight.
    fn abandon(&mut self, _op: &mut Self::Op) {}

    /// Whether a pending operation waits for others instead of the ring. It is resumed with 0 when
    /// [`Self::next_woken`] has named its request.
    fn is_waiting(&self, _op: &Self::Op) -> bool {
        false
    }

    /// The queue is served from now on. Whoever has [`Self::next_woken`] name a request uses the waker, whose clones any
    /// thread may keep.
    fn attached(&mut self, _waker: &Waker) {}

    /// The next request whose operation no longer has to wait, by its number at the queue. Asked when the waker was
    /// used.
    fn next_woken(&mut self) -> Option<u32> {
        None
    }

    /// Calls `with` for every file that its operations name again and again.
    fn files(&self, _with: &mut dyn FnMut(BorrowedFd<'_>)) {}

    /// Makes everything durable and waits for it, e.g. before the process ends.
    ///
    /// # Errors
    /// The host's error.
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
