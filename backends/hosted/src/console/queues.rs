//! The two queues of a console (virtio 1.3, section 5.3.2): port 0's receiveq and transmitq.
//!
//! Bytes of the host are neither read nor written while a queue is locked.

use std::collections::VecDeque;

use vhost_user_backend::VringRwLock;
use vm_memory::GuestMemoryMmap;

use super::QUEUE_SIZE;
use super::backlog::CAPACITY;
use super::chain::Buffers;
use super::host::{Host, Room};
use crate::serving::{Broken, Served, Turn, serve};

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
        let Served { turn, .. } = serve(vring, mem, QUEUE_SIZE, |chain| {
            // A chain that can't be read goes back at once, and nothing of it is output.
            let buffers = Buffers::collect(mem, chain, false).unwrap_or_default();
            self.take(&buffers, mem, host).then_some(0)
        })?;
        Ok(turn)
    }

    /// Takes a chain's bytes; returns whether the chain is done with.
    fn take(&mut self, buffers: &Buffers, mem: &GuestMemoryMmap, host: &mut Host) -> bool {
        let left = buffers.len().saturating_sub(self.taken);
        let (skipped, count) = match host.room() {
            Room::Nowhere => (0, 0),
            Room::Stalled => {
                host.note_dropped(left as u64);
                (0, 0)
            }
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
    let Served { turn, .. } = serve(vring, mem, QUEUE_SIZE, |chain| {
        if pending.is_empty() {
            return None;
        }
        // A chain that takes nothing goes back at once.
        let buffers = Buffers::collect(mem, chain, true).unwrap_or_default();
        let (count, input) = (buffers.len().min(pending.len()), pending.make_contiguous());
        let written = buffers.write(mem, &input[..count]);
        pending.drain(..written);
        Some(written as u32)
    })?;
    Ok(turn)
}
