//! The device's side of the receive and the transmit queue (virtio 1.3, section 5.10.6), with `virtio-queue`.

use std::io::{self, Write};
use std::ops::DerefMut;

use tracing::debug;
use vhost_user_backend::{VringRwLock, VringState, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::muxer::Muxer;
use super::packet::{HEADER_LEN, Header};

/// The guest's memory.
pub(super) type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A queue whose ring the driver has made unusable: there is no going on with this device.
fn broken(name: &'static str) -> impl Fn(virtio_queue::Error) -> io::Error {
    move |error| io::Error::other(format!("the {name} queue is broken: {error}"))
}

/// Where the driver's queue stands; `None` if it does not run.
pub(super) fn position(vring: &VringRwLock<Memory>) -> Option<u16> {
    let state = vring.get_ref();
    (state.is_enabled() && state.get_queue().ready()).then(|| state.get_queue().next_avail())
}

/// Takes up to `most` packets from the guest. Returns how many there were.
pub(super) fn transmit(vring: &VringRwLock<Memory>, mem: &Memory, muxer: &mut Muxer, most: usize) -> io::Result<usize> {
    const NAME: &str = "transmit";
    let mut state = vring.get_mut();
    if !is_running(&state) {
        return Ok(0);
    }
    // One look at the memory for all: the driver's may be replaced meanwhile.
    let mem = mem.memory();
    let (mut count, mut idle) = (0, false);
    state.get_queue_mut().disable_notification(&*mem).map_err(broken(NAME))?;
    loop {
        let before = count;
        while count < most && !muxer.must_wait() {
            let queue = state.get_queue_mut();
            let Some(chain) = queue.iter(mem.clone()).map_err(broken(NAME))?.next() else { break };
            let head = chain.head_index();
            match chain.reader(&*mem) {
                Ok(mut packet) => match Header::read(&mut packet) {
                    Ok(header) => muxer.take(&header, &mut packet),
                    Err(_) => debug!("a chain is too short for a packet"),
                },
                Err(error) => debug!("a chain can't be read: {error}"),
            }
            queue.add_used(&*mem, head, 0).map_err(broken(NAME))?;
            count += 1;
        }
        if count == most || muxer.must_wait() {
            break;
        }
        if !state.get_queue_mut().enable_notification(&*mem).map_err(broken(NAME))? {
            break;
        }
        idle = check_progress(NAME, idle, before == count)?;
    }
    notify(&mut state, &mem, count, NAME)?;
    Ok(count)
}

/// Gives the guest up to `most` packets. Returns how many receive buffers were used.
pub(super) fn receive(vring: &VringRwLock<Memory>, mem: &Memory, muxer: &mut Muxer, most: usize) -> io::Result<usize> {
    const NAME: &str = "receive";
    let mut state = vring.get_mut();
    if !is_running(&state) {
        return Ok(0);
    }
    let mem = mem.memory();
    let (mut count, mut idle) = (0, false);
    state.get_queue_mut().disable_notification(&*mem).map_err(broken(NAME))?;
    loop {
        let before = count;
        while count < most && muxer.has_packets() {
            let queue = state.get_queue_mut();
            let Some(chain) = queue.iter(mem.clone()).map_err(broken(NAME))?.next() else { break };
            let head = chain.head_index();
            let used = match chain.writer(&*mem) {
                Ok(mut buffer) => {
                    let len = buffer.available_bytes();
                    // Buffers that nothing fits are given back with nothing in them.
                    let fits = len > HEADER_LEN || len == HEADER_LEN && muxer.has_control();
                    let packet = fits.then(|| muxer.next(len - HEADER_LEN));
                    match packet {
                        Some(Some(header)) => write(&mut buffer, &header, muxer.payload(&header))?,
                        // A socket had nothing after all. The buffer is for the next packet.
                        Some(None) => {
                            queue.go_to_previous_position();
                            continue;
                        }
                        None => 0,
                    }
                }
                Err(error) => {
                    debug!("a receive buffer can't be written: {error}");
                    0
                }
            };
            queue.add_used(&*mem, head, used).map_err(broken(NAME))?;
            count += 1;
        }
        // Buffers that come while there is nothing to put in them are no reason to be called.
        if count == most || !muxer.has_packets() {
            break;
        }
        if !state.get_queue_mut().enable_notification(&*mem).map_err(broken(NAME))? {
            break;
        }
        idle = check_progress(NAME, idle, before == count)?;
    }
    notify(&mut state, &mem, count, NAME)?;
    Ok(count)
}

fn is_running(state: &VringState<Memory>) -> bool {
    state.is_enabled() && state.get_queue().ready()
}

/// A ring that has more, and from which nothing can be taken, would keep the thread for ever. Nothing may have been taken
/// once, when the driver added the first chain right after that look.
fn check_progress(name: &'static str, was_idle: bool, is_idle: bool) -> io::Result<bool> {
    if was_idle && is_idle {
        return Err(io::Error::other(format!("the {name} queue is broken: its entries can't be read")));
    }
    Ok(is_idle)
}

fn write(buffer: &mut impl Write, header: &Header, payload: &[u8]) -> io::Result<u32> {
    buffer.write_all(&header.bytes())?;
    buffer.write_all(payload)?;
    Ok((HEADER_LEN + payload.len()) as u32)
}

/// Interrupts the driver if it wants that for what was used.
fn notify(
    state: &mut impl DerefMut<Target = VringState<Memory>>,
    mem: &GuestMemoryMmap,
    count: usize,
    name: &'static str,
) -> io::Result<()> {
    if count > 0
        && state.get_queue_mut().needs_notification(mem).map_err(broken(name))?
        && let Err(error) = state.signal_used_queue()
    {
        // An event that is full already has somebody to read it.
        debug!("interrupting the driver: {error}");
    }
    Ok(())
}
