//! The transmit queues: each chain is a header and a frame (virtio 1.3, 5.1.6.2).
#![allow(unsafe_code, reason = "pushes buffers that its own request keeps alive")]

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::frame::{HEADER_LEN, MAX_FRAME, MIN_FRAME, is_sound};
use crate::io::ops::Io;
use crate::io::worker::{Handler, Outcome, Step};
use crate::net::port::{Ends, Offloads, Port};
use crate::virtqueue::buffers::{Chain, GuestIo, MAX_PIECES};
use crate::virtqueue::interrupt::Interrupt;

/// The counters, in the order of [`TransmitHandler::OPS`].
#[derive(Clone, Copy)]
enum Op {
    Sent,
    /// No frame, no header, or a header that lies.
    Malformed,
    /// No peer at the other end, or an interface that is down or gone.
    Unreachable,
    /// The port took it for broken.
    Refused,
}

/// Sends what the driver transmits on one queue.
pub(super) struct TransmitHandler {
    pub(super) port: Arc<dyn Port>,
    pub(super) pair: usize,
    pub(super) ends: Ends,
    /// The work on frames that the driver may leave to the other side.
    pub(super) agreed: Offloads,
    /// The last frame found no peer.
    pub(super) lost: bool,
    /// Raised when a frame finds a peer again.
    pub(super) found: Interrupt,
}

/// A frame on its way.
#[derive(Default)]
pub(super) struct Transmit {
    /// A header that is not in one piece with its frame, as it was checked. Boxed, because the kernel is told where it is.
    header: Box<[u8; HEADER_LEN]>,
    /// The header, and the frame in guest memory.
    pieces: GuestIo,
    /// Waits for room at the port.
    waiting: bool,
}

impl TransmitHandler {
    fn send(&self, request: &Transmit, io: &mut Io<'_>) -> Step {
        // SAFETY: header and pieces stay in the request until it is resumed, guest memory as long as the queue.
        unsafe { io.write(self.ends.tx.as_fd(), &request.pieces, 0, false) };
        Step::Pending
    }
}

fn done(op: Op, bytes: u64) -> Step {
    Step::Done(Outcome { op: op as usize, written: 0, bytes, ok: matches!(op, Op::Sent) })
}

impl Handler for TransmitHandler {
    type Request = Transmit;

    const OPS: &'static [&'static str] = &["sent", "dropped_malformed", "dropped_unreachable", "dropped_refused"];

    /// Ports take frames at once.
    const BATCH: usize = 64;

    const MAY_WAIT: bool = true;

    fn start(&mut self, chain: &mut Chain, request: &mut Transmit, io: &mut Io<'_>) -> Step {
        let header = chain.readable.peek::<HEADER_LEN>().filter(|_| !chain.unmapped);
        let len = chain.readable.len().saturating_sub(HEADER_LEN as u64);
        let fits = (MIN_FRAME..=MAX_FRAME).contains(&len) && chain.readable.pieces().len() < MAX_PIECES;
        let Some(header) = header.filter(|header| fits && is_sound(header, len, self.agreed)) else {
            return done(Op::Malformed, 0);
        };
        request.waiting = false;
        request.pieces.clear();
        if chain.readable.pieces().len() > 1 {
            chain.readable.advance(HEADER_LEN as u64);
            *request.header = header;
            // SAFETY: the header is boxed in the request, which outlives the operation.
            unsafe { request.pieces.push(request.header.as_mut_ptr(), HEADER_LEN) };
        }
        // A header in one piece with its frame stays where it is: the kernel takes one buffer for less than two. The
        // guest may then change the header after the check. Another VM at the other end of the port checks its own
        // copy again. A tap's kernel checks only what it needs to be safe, so such a guest can have frames segmented
        // in ways that were not negotiated.
        request.pieces.append(&chain.readable);
        self.send(request, io)
    }

    fn resume(&mut self, _: &mut Chain, request: &mut Transmit, result: i32, io: &mut Io<'_>) -> Step {
        match result {
            // There may be room again.
            0.. if std::mem::take(&mut request.waiting) => self.send(request, io),
            0.. => {
                if std::mem::take(&mut self.lost) {
                    self.found.raise();
                }
                if self.port.is_astray(self.pair) {
                    self.port.find_peer(self.pair);
                }
                done(Op::Sent, request.pieces.len() - HEADER_LEN as u64)
            }
            _ => match -result {
                libc::EAGAIN => {
                    request.waiting = true;
                    // SAFETY: the port's ends stay open for as long as the handler has them.
                    unsafe { io.wait_writable(self.ends.tx.as_fd()) };
                    Step::Pending
                }
                libc::EINTR => self.send(request, io),
                libc::ENOTCONN
                | libc::ECONNREFUSED
                | libc::ECONNRESET
                | libc::EDESTADDRREQ
                | libc::EPIPE
                | libc::EPERM => {
                    self.port.find_peer(self.pair);
                    self.lost = true;
                    done(Op::Unreachable, 0)
                }
                // The interface is down, gone, or this queue of it disabled; or the queue is being stopped.
                errno @ (libc::EIO | libc::EBADFD | libc::ENETDOWN | libc::ECANCELED) => {
                    self.lost |= matches!(errno, libc::EIO | libc::ENETDOWN);
                    done(Op::Unreachable, 0)
                }
                _ => done(Op::Refused, 0),
            },
        }
    }

    fn files(&self, with: &mut dyn FnMut(BorrowedFd<'_>)) {
        with(self.ends.tx.as_fd());
    }

    fn window(&self) -> usize {
        if self.port.may_block() { 1 } else { usize::MAX }
    }
}
