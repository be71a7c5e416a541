//! The receive queues: frames of the port land in the driver's buffers (virtio 1.3, 5.1.6.3 and 5.1.6.4).

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use super::features::guest_offloads;
use super::frame::{HEADER_LEN, MIN_FRAME, NUM_BUFFERS, is_sound};
use crate::io::receiver::{Source, Verdict};
use crate::net::port::Ends;
use crate::virtqueue::buffers::GuestIo;
use crate::virtqueue::interrupt::Interrupt;

/// Reasons to drop a frame, as indices into [`ReceiveSource::OPS`].
const SHORT: usize = 1;
const OVERSIZED: usize = 2;
const UNWANTED: usize = 3;

/// Brings frames to one receive queue.
pub(super) struct ReceiveSource {
    pub(super) pair: u16,
    pub(super) ends: Ends,
    /// The longest frame that may come, header included.
    pub(super) frame_len: u64,
    /// Whether frames may span chains (VIRTIO_NET_F_MRG_RXBUF).
    pub(super) merges: bool,
    /// The unfinished frames that the driver takes now, as feature bits.
    pub(super) agreed: Arc<AtomicU64>,
    /// How many pairs are in use.
    pub(super) active: Arc<AtomicU16>,
    /// Raised when the port is gone.
    pub(super) gone: Interrupt,
}

impl Source for ReceiveSource {
    const OPS: &'static [&'static str] = &["received", "dropped_short", "dropped_oversized", "dropped_unwanted"];

    fn frame_len(&self) -> u64 {
        self.frame_len
    }

    fn merges(&self) -> bool {
        self.merges
    }

    fn enabled(&self) -> bool {
        self.pair < self.active.load(Ordering::Acquire)
    }

    fn failed(&mut self) {
        self.gone.raise();
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.ends.rx.as_fd()
    }

    fn received(&mut self, room: &GuestIo, len: u64, chains: u16) -> Verdict {
        let Some(header) = room.peek::<HEADER_LEN>().filter(|_| len >= HEADER_LEN as u64 + MIN_FRAME) else {
            return Verdict::Drop(SHORT);
        };
        if len >= room.len() && room.len() < self.frame_len {
            // It filled the room that there was: the rest of it is lost.
            return Verdict::Drop(OVERSIZED);
        }
        let bytes = len - HEADER_LEN as u64;
        if !is_sound(&header, bytes, guest_offloads(self.agreed.load(Ordering::Relaxed))) {
            return Verdict::Drop(UNWANTED);
        }
        room.copy_from_at(NUM_BUFFERS, &chains.to_le_bytes());
        Verdict::Deliver(bytes)
    }
}
