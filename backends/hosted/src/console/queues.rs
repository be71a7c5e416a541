//! The two queues of a console (virtio 1.3, section 5.3.2): port 0's receiveq and transmitq.
//!
//! A queue is locked while it is looked at, so that one that was stopped is not touched any more. Bytes of the host are
//! neither read nor written under that lock.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use thiserror::Error;
use vhost_user_backend::{VringRwLock, VringState, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::backlog::CAPACITY;
use super::chain::Buffers;
use super::host::{Host, Room};

/// Why a queue can't be served any more.
#[derive(Debug, Error)]
pub(super) enum Broken {
    #[error("{0}")]
    Ring(#[from] virtio_queue::Error),
    #[error("entry {0} of its available ring can't be read")]
    Entry(u16),
}

/// The state of a queue after it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It does not run.
    Stopped,
    /// No chain is available; the driver kicks when there is one.
    Empty,
    /// A chain is available and has to wait: for room, or for input. The driver does not kick.
    Waiting,
    /// Chains are available, and others are to have their turn first.
    More,
}

/// The part of the first available chain of the transmitq that was read already: it is longer than the backlog.
#[derive(Debug, Default)]
pub(super) struct Transmit {
    taken: usize,
}

impl Transmit {
    /// Takes output of the guest's for as long as there is room for it.
    pub(super) fn serve(
        &mut self,
        vring: &VringRwLock,
        mem: &GuestMemoryMmap,
        host: &mut Host,
    ) -> Result<Turn, Broken> {
        serve(vring, mem, |chain| {
            // A chain that can't be read goes back at once, and nothing of it is output.
            let buffers = Buffers::collect(mem, chain, false).unwrap_or_default();
            self.take(&buffers, mem, host).then_some(0)
        })
    }

    /// Takes a chain's bytes; returns whether the chain is done with.
    fn take(&mut self, buffers: &Buffers, mem: &GuestMemoryMmap, host: &mut Host) -> bool {
        let left = buffers.len().saturating_sub(self.taken);
        let (skipped, count) = match host.room() {
            Room::Nowhere => (0, 0),
            Room::Newest => (left.saturating_sub(CAPACITY), left.min(CAPACITY)),
            Room::Bytes(room) if left <= room => (0, left),
            // Whole if it ever fits, so that the position of the queue never lies within a chain.
            Room::Bytes(room) if buffers.len() > CAPACITY && room > 0 => {
                self.push(buffers, mem, host, 0, room);
                self.taken += room;
                return false;
            }
            Room::Bytes(_) => return false,
        };
        self.push(buffers, mem, host, skipped, count);
        self.taken = 0;
        true
    }

    fn push(&self, buffers: &Buffers, mem: &GuestMemoryMmap, host: &mut Host, skipped: usize, count: usize) {
        let mut bytes = vec![0; count];
        let read = buffers.read(mem, self.taken + skipped, &mut bytes);
        host.push(&bytes[..read], skipped as u64);
    }

    /// The queue starts anew, or elsewhere.
    pub(super) fn reset(&mut self) {
        self.taken = 0;
    }
}

/// Gives input to the guest. [`Turn::Waiting`] if it has buffers for more.
pub(super) fn receive(vring: &VringRwLock, mem: &GuestMemoryMmap, pending: &mut VecDeque<u8>) -> Result<Turn, Broken> {
    serve(vring, mem, |chain| {
        if pending.is_empty() {
            return None;
        }
        // A chain that takes nothing goes back at once.
        let buffers = Buffers::collect(mem, chain, true).unwrap_or_default();
        let (count, input) = (buffers.len().min(pending.len()), pending.make_contiguous());
        let written = buffers.write(mem, &input[..count]);
        pending.drain(..written);
        Some(written as u32)
    })
}

/// Passes available chains to `each`, which returns the number of bytes that it has written to one, or `None` if the
/// chain stays where it is.
fn serve(
    vring: &VringRwLock,
    mem: &GuestMemoryMmap,
    mut each: impl FnMut(DescriptorChain<&GuestMemoryMmap>) -> Option<u32>,
) -> Result<Turn, Broken> {
    let mut vring = vring.get_mut();
    if !vring.is_enabled() || !vring.get_queue().ready() {
        return Ok(Turn::Stopped);
    }
    // A driver that refills meanwhile must not keep us in this loop.
    let mut left = usize::from(vring.get_queue().size());
    let mut is_used = false;
    let result = loop {
        match look(&mut vring, mem, &mut each, &mut left, &mut is_used) {
            // Looks once more when kicks are on: a chain may have come before that.
            Ok(Turn::Empty) => match vring.enable_notification() {
                Ok(true) => {}
                Ok(false) => break Ok(Turn::Empty),
                Err(error) => break Err(error.into()),
            },
            other => break other,
        }
    };
    // Chains that were given back before the queue broke are told, too.
    if is_used && vring.needs_notification().unwrap_or(true) {
        // A counter that is full (EAGAIN) is an interrupt that the driver has yet to see.
        drop(vring.signal_used_queue());
    }
    result
}

/// Serves chains until none is available, or one has to wait.
fn look(
    vring: &mut VringState,
    mem: &GuestMemoryMmap,
    each: &mut impl FnMut(DescriptorChain<&GuestMemoryMmap>) -> Option<u32>,
    left: &mut usize,
    is_used: &mut bool,
) -> Result<Turn, Broken> {
    vring.disable_notification()?;
    loop {
        let queue = vring.get_queue_mut();
        let position = queue.next_avail();
        if queue.avail_idx(mem, Ordering::Acquire)?.0 == position {
            return Ok(Turn::Empty);
        }
        if *left == 0 {
            return Ok(Turn::More);
        }
        let chain = queue.iter(mem)?.next().ok_or(Broken::Entry(position))?;
        let head = chain.head_index();
        let Some(written) = each(chain) else {
            queue.set_next_avail(position);
            return Ok(Turn::Waiting);
        };
        queue.add_used(mem, head, written)?;
        *is_used = true;
        *left -= 1;
    }
}
