//! The plain process: what one thread with one io_uring reaches on the same tap with the same frames.
//!
//! No guest, no virtqueue: preallocated buffers, each with a header and a frame as a VMM has them, a burst of reads or writes
//! with one system call, taken from all queues of the tap in turn; the tap is a registered file. Reads don't wait in the
//! kernel: where a burst finds nothing at all, poll(2) waits for the next frame. Other ways (bursts of 32 or 64, vectors, a
//! file that is not registered, reads that wait, a system call per frame) were measured to be up to a tenth slower, or equal, when sending.

#![allow(unsafe_code, reason = "requests on an io_uring point into buffers")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use io_uring::{IoUring, opcode, types};
use ringvm_backends::net::port::Port;
use ringvm_backends::net::port::tap::Tap;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::interface::Interface;
use crate::limit::{ring, thread_time};
use crate::packet::{self, DISCARD, FILLER, HEADER};
use crate::run::Sample;
use crate::signals;

/// How long the tap may have nothing to read, or take for a burst.
const PATIENCE: Duration = Duration::from_secs(10);
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
/// Where a frame may not lie in one cache line with another.
const LINE: usize = 64;

/// What the plain process is to do.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// The tap.
    pub interface: &'a Interface,
    /// Whether it sends or reads.
    pub transmits: bool,
    /// Bytes of the frames.
    pub size: usize,
    /// Whether they are TCP to be cut into segments.
    pub segments: bool,
    /// Frames per burst.
    pub burst: u32,
    /// How long is run before the measurement.
    pub warm: Duration,
    /// How long is measured.
    pub time: Duration,
}

struct Plain<'a> {
    job: Job<'a>,
    // Before the buffers: fields are dropped in this order, and the ring must be gone first.
    ring: IoUring,
    files: Vec<Arc<OwnedFd>>,
    buffers: Vec<u8>,
    stride: usize,
    in_flight: u32,
    frames: u64,
    /// System calls.
    calls: u64,
}

/// Runs the job. When it reads, somebody has to send.
///
/// # Errors
/// The tap or an io_uring can't be had, a request fails, nothing comes.
pub fn measure(job: &Job<'_>) -> Result<Sample> {
    let tap = job.interface.open()?;
    let mut plain = Plain::new(*job, &tap)?;
    plain.turns(job.warm)?;
    let (frames, calls) = (plain.frames, plain.calls);
    let cpu = thread_time();
    let time = plain.turns(job.time)?;
    let cpu = thread_time().saturating_sub(cpu);
    let syscalls = Some(plain.calls - calls);
    Ok(Sample { ops: plain.frames - frames, time, cpu: Some(cpu), syscalls, ..Sample::default() })
}

impl<'a> Plain<'a> {
    fn new(job: Job<'a>, tap: &Tap) -> Result<Self> {
        let ends = (0..tap.pairs()).map(|pair| tap.ends(pair));
        let files: Vec<_> = ends.map(|ends| if job.transmits { ends.tx } else { ends.rx }).collect();
        let ring = ring(job.burst).context("making an io_uring for the plain process")?;
        let fds: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        ring.submitter().register_files(&fds).context("registering the tap with an io_uring")?;
        let stride = (HEADER + job.size).next_multiple_of(LINE);
        // Every page is touched before anything is measured.
        let mut buffers = vec![FILLER; stride * job.burst as usize];
        for buffer in buffers.chunks_exact_mut(stride) {
            let start = packet::start(job.size, MAC, job.segments, DISCARD);
            buffer[..HEADER].copy_from_slice(&start.header);
            buffer[HEADER..][..start.bytes().len()].copy_from_slice(start.bytes());
        }
        Ok(Self { job, ring, files, buffers, stride, in_flight: 0, frames: 0, calls: 0 })
    }

    /// Bursts for a time; returns how long that was.
    fn turns(&mut self, time: Duration) -> Result<Duration> {
        let start = Instant::now();
        loop {
            let passed = start.elapsed();
            if passed >= time {
                return Ok(passed);
            }
            signals::check()?;
            let done = self.burst()?;
            self.frames += u64::from(done);
            if done == 0 {
                self.wait()?;
            }
        }
    }

    /// Submits a burst and takes its completions; returns how many frames went or came.
    fn burst(&mut self) -> Result<u32> {
        let len = (HEADER + self.job.size) as u32;
        for (index, buffer) in self.buffers.chunks_exact_mut(self.stride).enumerate() {
            let file = types::Fixed((index % self.files.len()) as u32);
            let entry = if self.job.transmits {
                opcode::Write::new(file, buffer.as_ptr(), len).build()
            } else {
                opcode::Read::new(file, buffer.as_mut_ptr(), len).rw_flags(libc::RWF_NOWAIT).build()
            };
            // SAFETY: nothing is in flight here, so that the buffer is this request's alone; it is waited for below, and if
            // that fails, the buffers are never freed.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                bail!("the plain process's submission queue is full at a burst of {}", self.job.burst);
            }
            self.in_flight += 1;
        }
        let mut done = 0;
        let deadline = Instant::now() + PATIENCE;
        while self.in_flight != 0 {
            if Instant::now() > deadline {
                bail!("a burst on {} took more than {} s", self.job.interface.name, PATIENCE.as_secs());
            }
            let limit = types::Timespec::from(PATIENCE);
            let arguments = types::SubmitArgs::new().timespec(&limit);
            self.calls += 1;
            match self.ring.submitter().submit_with_args(self.in_flight as usize, &arguments) {
                Err(error) if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::ETIME | libc::EBUSY)) => {
                    return Err(error).context("submitting to the plain process's ring");
                }
                _ => {}
            }
            for completion in self.ring.completion() {
                self.in_flight -= 1;
                match completion.result() {
                    result if result == len as i32 => done += 1,
                    result if result == -libc::EAGAIN && !self.job.transmits => {}
                    result @ ..0 => {
                        return Err(io::Error::from_raw_os_error(-result))
                            .with_context(|| format!("a frame of {} bytes on the tap", self.job.size));
                    }
                    other => bail!("a request for {len} bytes on the tap ended after {other}"),
                }
            }
        }
        Ok(done)
    }

    /// Waits for something to read.
    fn wait(&mut self) -> Result<()> {
        self.calls += 1;
        let mut fds: Vec<_> = self.files.iter().map(|file| PollFd::new(file, PollFlags::IN)).collect();
        let limit = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        match poll(&mut fds, Some(&limit)) {
            Ok(0) => bail!("no frame came for {} s", PATIENCE.as_secs()),
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("waiting for a frame"),
        }
    }
}

impl Drop for Plain<'_> {
    fn drop(&mut self) {
        // A ring that is closed lets go of its files some time later, and the next one wants the tap at once.
        let _ = self.ring.submitter().unregister_files();
        if self.in_flight != 0 {
            // After an error requests may still be in flight into them.
            std::mem::forget(std::mem::take(&mut self.buffers));
        }
    }
}
