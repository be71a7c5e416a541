//! Storage that is written as async code, for all that needs more than one operation at a time for a request: formats
//! with tables, several files, sockets.
//!
//! Every operation is a task on the runtime of the I/O thread (see [`crate::io::tasks`]). That costs an allocation and
//! some passes through the runtime, so what must be as fast as a raw image is a state machine over the data ring
//! instead, as [`super::raw`] is.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::task::Waker;

use super::{Geometry, Progress, Storage};
use crate::io::ops::Io;
use crate::io::tasks;
use crate::virtqueue::buffers::GuestIo;

/// The storage of a disk as one queue sees it. Lives on one I/O thread.
///
/// Ranges lie within the capacity, and writes come only to a storage that can be written. Operations run side by side
/// and may end in any order. Each runs to its end, also when the queue is asked to stop: an operation is never torn,
/// and a queue leaves only when all have ended.
pub trait AsyncStorage: 'static {
    /// Fills `data` from `offset` on.
    fn read(&self, offset: u64, data: GuestIo) -> impl Future<Output = io::Result<()>>;

    /// Writes all of `data` at `offset`, through to stable storage if `durable`.
    fn write(&self, offset: u64, data: GuestIo, durable: bool) -> impl Future<Output = io::Result<()>>;

    /// Makes every write that was completed before durable.
    fn flush(&self) -> impl Future<Output = io::Result<()>>;

    /// Says that a range is not needed; it reads as anything afterwards.
    fn discard(&self, offset: u64, len: u64, durable: bool) -> impl Future<Output = io::Result<()>>;

    /// Makes a range read as zeroes; with `unmap`, its space may be given back.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, durable: bool) -> impl Future<Output = io::Result<()>>;
}

/// The queue's side of an [`AsyncStorage`].
pub(crate) struct Tasks<A> {
    storage: Rc<A>,
    geometry: Geometry,
    /// Requests whose operations have ended.
    ended: Rc<RefCell<VecDeque<u32>>>,
    waker: Waker,
}

/// The outcome of an operation, once it has one.
type Outcome = Rc<Cell<Option<io::Result<()>>>>;

/// An operation's task, as its request sees it.
#[derive(Default)]
pub(crate) struct TaskOp(Option<Outcome>);

/// An operation's task, as the task sees it. However it ends, the request hears of it.
struct Ending {
    outcome: Outcome,
    slot: u32,
    ended: Rc<RefCell<VecDeque<u32>>>,
    waker: Waker,
}

impl Drop for Ending {
    fn drop(&mut self) {
        let outcome = self.outcome.take();
        let panicked = || Err(io::Error::other("the operation's task has panicked"));
        self.outcome.set(Some(outcome.unwrap_or_else(panicked)));
        self.ended.borrow_mut().push_back(self.slot);
        self.waker.wake_by_ref();
    }
}

impl<A: AsyncStorage> Tasks<A> {
    pub(crate) fn new(storage: A, geometry: Geometry) -> Self {
        Self { storage: Rc::new(storage), geometry, ended: Rc::default(), waker: Waker::noop().clone() }
    }

    /// Starts the operation that `call` makes, on a range of the disk.
    fn start<F: Future<Output = io::Result<()>> + 'static>(
        &self,
        op: &mut TaskOp,
        (offset, len): (u64, u64),
        io: &Io<'_>,
        call: impl FnOnce(Rc<A>) -> F,
    ) -> Progress {
        if offset.checked_add(len).is_none_or(|end| end > self.geometry.capacity) {
            return Progress::Done(Err(io::ErrorKind::InvalidInput.into()));
        }
        if io.leads_nowhere() {
            return Progress::Pending;
        }
        let outcome = Outcome::default();
        op.0 = Some(Rc::clone(&outcome));
        let (ended, waker) = (Rc::clone(&self.ended), self.waker.clone());
        let ending = Ending { outcome, slot: io.slot(), ended, waker };
        let operation = call(Rc::clone(&self.storage));
        tasks::spawn(async move {
            let outcome = operation.await;
            ending.outcome.set(Some(outcome));
        });
        Progress::Pending
    }
}

impl<A: AsyncStorage> Storage for Tasks<A> {
    type Op = TaskOp;

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn attached(&mut self, waker: &Waker) {
        self.waker = waker.clone();
    }

    fn read(&mut self, op: &mut TaskOp, offset: u64, data: &mut GuestIo, io: &mut Io<'_>) -> Progress {
        let (len, data) = (data.len(), data.split_to(data.len()));
        self.start(op, (offset, len), io, |storage| async move { storage.read(offset, data).await })
    }

    fn write(&mut self, op: &mut TaskOp, offset: u64, data: &mut GuestIo, durable: bool, io: &mut Io<'_>) -> Progress {
        let (len, data) = (data.len(), data.split_to(data.len()));
        self.start(op, (offset, len), io, |storage| async move { storage.write(offset, data, durable).await })
    }

    fn flush(&mut self, op: &mut TaskOp, io: &mut Io<'_>) -> Progress {
        self.start(op, (0, 0), io, |storage| async move { storage.flush().await })
    }

    fn discard(&mut self, op: &mut TaskOp, offset: u64, len: u64, durable: bool, io: &mut Io<'_>) -> Progress {
        self.start(op, (offset, len), io, |storage| async move { storage.discard(offset, len, durable).await })
    }

    fn write_zeroes(
        &mut self,
        op: &mut TaskOp,
        offset: u64,
        len: u64,
        unmap: bool,
        durable: bool,
        io: &mut Io<'_>,
    ) -> Progress {
        let call = |storage: Rc<A>| async move { storage.write_zeroes(offset, len, unmap, durable).await };
        self.start(op, (offset, len), io, call)
    }

    fn resume(&mut self, op: &mut TaskOp, _: &mut GuestIo, _: i32, _: &mut Io<'_>) -> Progress {
        // Named by `next_woken`, so there is an outcome.
        op.0.take().and_then(|outcome| outcome.take()).map_or(Progress::Pending, Progress::Done)
    }

    fn next_woken(&mut self) -> Option<u32> {
        self.ended.borrow_mut().pop_front()
    }
}
