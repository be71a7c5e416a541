//! The device's side of a virtqueue (virtio 1.3, section 2.7.14), with `virtio-queue`: the loop that hands chains to a
//! device, gives them back and tells the driver.
//!
//! A queue is locked while it is looked at, so that one that was stopped is not touched any more.

use std::ops::DerefMut;
use std::sync::atomic::Ordering;

use thiserror::Error;
use tracing::debug;
use vhost_user_backend::{VringRwLock, VringState, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

/// Why a queue can't be served any more: the driver broke its ring.
#[derive(Debug, Error)]
pub(crate) enum Broken {
    #[error("{0}")]
    Ring(#[from] virtio_queue::Error),
    #[error("entry {0} of its available ring can't be read")]
    Entry(u16),
    #[error("entry {position} of its available ring names descriptor {head}, of {size}")]
    Head { position: u16, head: u16, size: u16 },
}

/// The state of a queue after it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It does not run.
    Stopped,
    /// No chain is available; the driver kicks when there is one.
    Empty,
    /// A chain is available and stays where it is. The driver does not kick.
    Waiting,
    /// Chains are available, and others are to have their turn first.
    More,
}

/// The outcome of a look at a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Served {
    pub(crate) turn: Turn,
    /// Chains that were given back.
    pub(crate) chains: usize,
}

/// Passes available chains to `each`, at most `most` of them. It returns the number of bytes that it has written to one,
/// or `None` if the chain stays where it is.
pub(crate) fn serve<'m>(
    vring: &VringRwLock,
    mem: &'m GuestMemoryMmap,
    most: usize,
    mut each: impl FnMut(DescriptorChain<&'m GuestMemoryMmap>) -> Option<u32>,
) -> Result<Served, Broken> {
    let mut vring = vring.get_mut();
    if !is_running(&vring) {
        return Ok(Served { turn: Turn::Stopped, chains: 0 });
    }
    let mut chains = 0;
    // A driver that refills meanwhile, or moves its index to and fro, must not keep us in this loop.
    let mut left = most;
    let turn = loop {
        match look(&mut vring, mem, &mut each, &mut left, &mut chains) {
            // Looks once more when kicks are on: a chain may have come before that.
            Ok(Turn::Empty) => match vring.get_queue_mut().enable_notification(mem) {
                Ok(true) if left == 0 => break Ok(Turn::More),
                Ok(true) => left -= 1,
                Ok(false) => break Ok(Turn::Empty),
                Err(error) => break Err(error.into()),
            },
            other => break other,
        }
    };
    // Interrupts the driver for chains given back before the queue broke, too.
    if chains > 0 {
        notify(&mut vring, mem);
    }
    Ok(Served { turn: turn?, chains })
}

/// Whether the driver's queue may be served.
pub(crate) fn is_running(vring: &VringState) -> bool {
    vring.is_enabled() && vring.get_queue().ready()
}

/// Serves chains until none is available, or one has to wait.
fn look<'m>(
    vring: &mut VringState,
    mem: &'m GuestMemoryMmap,
    each: &mut impl FnMut(DescriptorChain<&'m GuestMemoryMmap>) -> Option<u32>,
    left: &mut usize,
    chains: &mut usize,
) -> Result<Turn, Broken> {
    let queue = vring.get_queue_mut();
    queue.disable_notification(mem)?;
    loop {
        let position = queue.next_avail();
        if queue.avail_idx(mem, Ordering::Acquire)?.0 == position {
            return Ok(Turn::Empty);
        }
        if *left == 0 {
            return Ok(Turn::More);
        }
        let used = queue.next_used();
        let size = queue.size();
        let chain = queue.iter(mem)?.next().ok_or(Broken::Entry(position))?;
        let head = chain.head_index();
        if head >= size {
            // The iterator has passed it. A queue whose positions differ would count as one with chains in flight, and
            // never as stopped.
            queue.set_next_avail(position);
            return Err(Broken::Head { position, head, size });
        }
        let Some(written) = each(chain) else {
            queue.set_next_avail(position);
            return Ok(Turn::Waiting);
        };
        if let Err(error) = queue.add_used(mem, head, written) {
            queue.set_next_avail(position);
            queue.set_next_used(used);
            return Err(error.into());
        }
        *chains += 1;
        *left -= 1;
    }
}

/// Interrupts the driver if it wants that for what was used.
fn notify(vring: &mut impl DerefMut<Target = VringState>, mem: &GuestMemoryMmap) {
    if vring.get_queue_mut().needs_notification(mem).unwrap_or(true)
        && let Err(error) = vring.signal_used_queue()
    {
        // A counter that is full (EAGAIN) is an interrupt that the driver has yet to see.
        debug!("interrupting the driver: {error}");
    }
}
