//! Processes one block request, from its arrival to its status byte.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;

use tracing::Span;
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;

use super::options::SERIAL_LEN;
use super::request::{Header, IOERR, KINDS, Kind, Limits, Refusal, Segment, UNSUPP};
use crate::block::storage::{Progress, Storage};
use crate::io::ops::Io;
use crate::io::worker::{Handler, Outcome, Step};
use crate::virtqueue::buffers::Chain;

/// Serves the requests of one queue from a storage.
pub(crate) struct BlockHandler<S> {
    pub(crate) storage: S,
    pub(crate) limits: Limits,
    pub(crate) serial: [u8; SERIAL_LEN],
    /// Cleared: every write is durable before it is answered.
    pub(crate) writeback: Arc<AtomicBool>,
    /// What lines of the log about its queue are part of.
    pub(crate) span: Span,
    /// Requests that the host has failed.
    pub(crate) failures: u64,
}

/// A block request in flight.
pub(crate) struct Request<O> {
    kind: Kind,
    /// Payload bytes.
    len: u64,
    op: O,
    segments: Vec<Segment>,
    next_segment: usize,
}

impl<O: Default> Default for Request<O> {
    fn default() -> Self {
        Self { kind: Kind::Other, len: 0, op: O::default(), segments: Vec::new(), next_segment: 0 }
    }
}

impl BlockHandler<()> {
    /// The same over a storage.
    pub(super) fn over<S>(self, storage: S) -> BlockHandler<S> {
        let Self { storage: (), limits, serial, writeback, span, failures } = self;
        BlockHandler { storage, limits, serial, writeback, span, failures }
    }
}

impl<S: Storage> BlockHandler<S> {
    fn begin(&mut self, chain: &mut Chain, request: &mut Request<S::Op>, io: &mut Io<'_>) -> Result<Progress, Refusal> {
        request.kind = Kind::Other;
        request.len = 0;
        if chain.unmapped {
            return Err(IOERR);
        }
        let header = Header::take(&mut chain.readable).ok_or(IOERR)?;
        request.kind = header.kind;
        if self.limits.readonly && matches!(header.kind, Kind::Write | Kind::Discard | Kind::WriteZeroes) {
            return Err(IOERR);
        }
        Ok(match header.kind {
            Kind::Read => {
                request.len = chain.writable.len();
                let offset = self.limits.transfer(header.sector, request.len)?;
                self.storage.read(&mut request.op, offset, &mut chain.writable, io)
            }
            Kind::Write => {
                request.len = chain.readable.len();
                let offset = self.limits.transfer(header.sector, request.len)?;
                let durable = !self.writeback.load(Ordering::Relaxed);
                self.storage.write(&mut request.op, offset, &mut chain.readable, durable, io)
            }
            Kind::Flush => self.storage.flush(&mut request.op, io),
            Kind::Discard if !self.limits.discard => return Err(UNSUPP),
            Kind::WriteZeroes if !self.limits.write_zeroes => return Err(UNSUPP),
            Kind::Discard | Kind::WriteZeroes => {
                self.limits.segments(header.kind, &mut chain.readable, &mut request.segments)?;
                request.next_segment = 0;
                self.next_segments(request, io)
            }
            Kind::GetId => {
                request.len = chain.writable.copy_from(&self.serial) as u64;
                Progress::Done(Ok(()))
            }
            Kind::Other => return Err(UNSUPP),
        })
    }

    /// Starts segments until one has to be waited for.
    fn next_segments(&mut self, request: &mut Request<S::Op>, io: &mut Io<'_>) -> Progress {
        let durable = !self.writeback.load(Ordering::Relaxed);
        while let Some(&Segment { offset, len, unmap }) = request.segments.get(request.next_segment) {
            request.next_segment += 1;
            let progress = if request.kind == Kind::Discard {
                self.storage.discard(&mut request.op, offset, len, durable, io)
            } else {
                self.storage.write_zeroes(&mut request.op, offset, len, unmap, durable, io)
            };
            match progress {
                Progress::Done(Ok(())) => request.len += len,
                other => return other,
            }
        }
        Progress::Done(Ok(()))
    }

    #[inline(always)]
    fn step(&mut self, chain: &Chain, request: &Request<S::Op>, progress: Result<Progress, Refusal>) -> Step {
        let status = match progress {
            Ok(Progress::Pending) => return Step::Pending,
            Ok(Progress::Done(Ok(()))) => VIRTIO_BLK_S_OK as u8,
            Ok(Progress::Done(Err(error))) => self.failed(request.kind, error),
            Err(refusal) => self.refused(chain.head, request.kind, refusal),
        };
        chain.writable.set_last(status);
        let ok = status == VIRTIO_BLK_S_OK as u8;
        // The used length counts from the first writable byte on: data that was not read is not claimed.
        let read = if ok && matches!(request.kind, Kind::Read | Kind::GetId) { request.len } else { 0 };
        let written = read as u32 + 1;
        Step::Done(Outcome { op: request.kind as usize, written, bytes: request.len, ok })
    }

    /// The status of a request that the host has failed.
    #[cold]
    fn failed(&mut self, kind: Kind, error: io::Error) -> u8 {
        self.failures += 1;
        // A failing disk fails every request: one line each time their number has doubled.
        if self.failures.is_power_of_two() {
            let (kind, failures) = (KINDS[kind as usize], self.failures);
            tracing::warn!(parent: &self.span, kind, %error, failures, "the host failed a request");
        }
        IOERR.0
    }

    /// The status of a request that can't be served.
    #[cold]
    fn refused(&self, head: u16, kind: Kind, Refusal(status): Refusal) -> u8 {
        tracing::debug!(parent: &self.span, head, ?kind, status, "request refused");
        status
    }
}

impl<S: Storage> Handler for BlockHandler<S> {
    type Request = Request<S::Op>;

    const OPS: &'static [&'static str] = KINDS;

    fn attached(&mut self, waker: &Waker) {
        self.storage.attached(waker);
    }

    fn files(&self, with: &mut dyn FnMut(BorrowedFd<'_>)) {
        self.storage.files(with);
    }

    #[inline]
    fn start(&mut self, chain: &mut Chain, request: &mut Self::Request, io: &mut Io<'_>) -> Step {
        if !chain.writable.take_last() {
            return Step::Fault("no room for a status");
        }
        let progress = self.begin(chain, request, io);
        self.step(chain, request, progress)
    }

    fn abandon(&mut self, request: &mut Self::Request) {
        self.storage.abandon(&mut request.op);
    }

    fn is_waiting(&self, request: &Self::Request) -> bool {
        self.storage.is_waiting(&request.op)
    }

    fn next_woken(&mut self) -> Option<u32> {
        self.storage.next_woken()
    }

    fn resume(&mut self, chain: &mut Chain, request: &mut Self::Request, result: i32, io: &mut Io<'_>) -> Step {
        let data = if request.kind == Kind::Read { &mut chain.writable } else { &mut chain.readable };
        let mut progress = self.storage.resume(&mut request.op, data, result, io);
        if let (Progress::Done(Ok(())), Kind::Discard | Kind::WriteZeroes) = (&progress, request.kind) {
            request.len += request.segments[request.next_segment - 1].len;
            progress = self.next_segments(request, io);
        }
        self.step(chain, request, Ok(progress))
    }
}
