//! The receive and the transmit queue (virtio 1.3, section 5.10.6).

use std::io::{self, Write};

use tracing::debug;
use vhost_user_backend::{VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueT, Writer};
use vm_memory::GuestMemoryMmap;

use super::muxer::Muxer;
use super::packet::{HEADER_LEN, Header};
use crate::serving::{Broken, Served, Turn, is_running, serve};

/// A queue whose ring the driver has made unusable: there is no going on with this device.
fn broken(name: &'static str) -> impl Fn(Broken) -> io::Error {
    move |broken| io::Error::other(format!("the {name} queue is broken: {broken}"))
}

/// Where the driver's queue stands; `None` if it does not run.
pub(super) fn position(vring: &VringRwLock) -> Option<u16> {
    let state = vring.get_ref();
    is_running(&state).then(|| state.get_queue().next_avail())
}

/// Takes up to `most` packets from the guest.
pub(super) fn transmit(
    vring: &VringRwLock,
    mem: &GuestMemoryMmap,
    muxer: &mut Muxer,
    most: usize,
) -> io::Result<Served> {
    let take = |chain: DescriptorChain<&GuestMemoryMmap>| {
        if muxer.must_wait() {
            return None;
        }
        match chain.reader(mem) {
            Ok(mut packet) => match Header::read(&mut packet) {
                Ok(header) => muxer.take(&header, &mut packet),
                Err(_) => debug!("a chain is too short for a packet"),
            },
            Err(error) => debug!("a chain can't be read: {error}"),
        }
        Some(0)
    };
    serve(vring, mem, most, take).map_err(broken("transmit"))
}

/// Gives the guest up to `most` packets.
pub(super) fn receive(
    vring: &VringRwLock,
    mem: &GuestMemoryMmap,
    muxer: &mut Muxer,
    most: usize,
) -> io::Result<Served> {
    // Buffers that come while there is nothing to put in them are no reason to be called.
    if !muxer.has_packets() {
        return Ok(Served { turn: Turn::Waiting, chains: 0 });
    }
    let give = |chain: DescriptorChain<&GuestMemoryMmap>| {
        if !muxer.has_packets() {
            return None;
        }
        match chain.writer(mem) {
            Ok(buffer) => fill(buffer, muxer),
            Err(error) => {
                debug!("a receive buffer can't be written: {error}");
                Some(0)
            }
        }
    };
    serve(vring, mem, most, give).map_err(broken("receive"))
}

/// Puts the next packet into a buffer. Returns its length, or `None` if there is no packet after all.
fn fill(mut buffer: Writer<'_>, muxer: &mut Muxer) -> Option<u32> {
    let room = buffer.available_bytes();
    while muxer.has_packets() {
        // Buffers that nothing fits are given back with nothing in them.
        if room < HEADER_LEN || room == HEADER_LEN && !muxer.has_control() {
            return Some(0);
        }
        // A socket may have had nothing after all. The buffer is for the next packet then.
        let Some(header) = muxer.next(room - HEADER_LEN) else { continue };
        let payload = muxer.payload(&header);
        if let Err(error) = buffer.write_all(&header.bytes()).and_then(|()| buffer.write_all(payload)) {
            // Not seen: it has room, and its memory was looked up before.
            debug!("a packet is lost: {error}");
            return Some(0);
        }
        return Some((HEADER_LEN + payload.len()) as u32);
    }
    None
}
