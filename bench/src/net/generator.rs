//! A source of frames on the host's side of the tap: a packet socket (packet(7)) that is bound to the interface and goes
//! past its queueing discipline straight to its driver, many frames per system call.
//!
//! It sends more than anybody takes, but without wasting the CPUs that it shares with who is measured: where the tap's
//! queue is full, it sleeps for less time than the queue lasts.

#![allow(unsafe_code, reason = "packet sockets and sendmmsg have no safe wrapper among our dependencies")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use rustix::thread::{CpuSet, sched_setaffinity};

use super::interface::Interface;
use crate::packet::{self, DISCARD, FILLER};

/// Frames per system call.
const BATCH: usize = 64;
/// A tap queues 500 frames: at this, a taker of two million per second does not run dry.
const PAUSE: Duration = Duration::from_micros(50);
/// Frames come in that many flows where they are to be spread over queues, else in one.
const FLOWS: usize = 64;
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];

/// A generator at work.
#[derive(Debug)]
pub struct Generator {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Generator {
    /// Starts to send frames of `size` bytes, more than anybody takes; on those CPUs, if they are said.
    ///
    /// # Errors
    /// A packet socket can't be had.
    pub fn start(interface: &Interface, size: usize, cpus: Option<CpuSet>) -> Result<Self> {
        Self::new(interface, size, move |socket, frames, stop| {
            if let Some(cpus) = cpus {
                sched_setaffinity(None, &cpus)?;
            }
            flood(socket, frames, stop)
        })
    }

    /// Starts to send single frames of `size` bytes, that far apart.
    ///
    /// # Errors
    /// A packet socket can't be had.
    pub fn drip(interface: &Interface, size: usize, apart: Duration) -> Result<Self> {
        Self::new(interface, size, move |socket, frames, stop| drip(socket, frames, stop, apart))
    }

    fn new(
        interface: &Interface,
        size: usize,
        work: impl FnOnce(&OwnedFd, &[Vec<u8>], &AtomicBool) -> io::Result<()> + Send + 'static,
    ) -> Result<Self> {
        let socket = socket(interface.index()?).context("making a packet socket (this takes CAP_NET_RAW)")?;
        let flows = if interface.pairs > 1 { FLOWS } else { 1 };
        let frames: Vec<Vec<u8>> = (0..flows).map(|flow| frame(size, DISCARD + flow as u16)).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("generator".to_owned())
            .spawn(move || work(&socket, &frames, &stopped))
            .context("starting the generator")?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Ends it.
    ///
    /// # Errors
    /// It could not send.
    pub fn stop(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result.context("sending frames into the tap"),
            Some(Err(_)) => Err(anyhow!("the generator's thread died")),
        }
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn frame(size: usize, port: u16) -> Vec<u8> {
    let start = packet::start(size, MAC, false, port);
    let mut frame = vec![FILLER; size];
    frame[..start.bytes().len()].copy_from_slice(start.bytes());
    frame
}

fn socket(index: u32) -> io::Result<OwnedFd> {
    // Protocol 0: what the interface brings is not for this socket.
    // SAFETY: makes a descriptor, touches no memory.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was made just now and nobody else knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let bypass: libc::c_int = 1;
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the value is `len` bytes long and alive across the call.
    let set =
        unsafe { libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, (&raw const bypass).cast(), len) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: index as libc::c_int,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is `len` bytes long and alive across the call.
    if unsafe { libc::bind(fd, (&raw const address).cast(), len) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

fn drip(socket: &OwnedFd, frames: &[Vec<u8>], stop: &AtomicBool, apart: Duration) -> io::Result<()> {
    for frame in frames.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        rustix::io::write(socket, frame)?;
        thread::sleep(apart);
    }
    Ok(())
}

fn flood(socket: &OwnedFd, frames: &[Vec<u8>], stop: &AtomicBool) -> io::Result<()> {
    let mut pieces: Vec<libc::iovec> = (0..BATCH)
        .map(|at| &frames[at % frames.len()])
        .map(|frame| libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() })
        .collect();
    let mut messages: Vec<libc::mmsghdr> = pieces
        .iter_mut()
        .map(|piece| libc::mmsghdr {
            msg_hdr: libc::msghdr {
                msg_name: ptr::null_mut(),
                msg_namelen: 0,
                msg_iov: ptr::from_mut(piece),
                msg_iovlen: 1,
                msg_control: ptr::null_mut(),
                msg_controllen: 0,
                msg_flags: 0,
            },
            msg_len: 0,
        })
        .collect();
    // A pause is to end when it is over, not some 50 us later.
    rustix::thread::set_current_timer_slack(std::num::NonZero::new(1)).map_err(io::Error::from)?;
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: each message has one piece, which is a frame; all of them outlive the call, which reads the frames and
        // writes the messages' lengths.
        let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), BATCH as libc::c_uint, 0) };
        if sent == BATCH as libc::c_int {
            continue;
        }
        if sent < 0 {
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN | libc::EINTR)) {
                return Err(error);
            }
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}
