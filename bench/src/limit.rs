//! The plain ring: what one thread with one io_uring reaches on the host with the same file and the same requests.
//!
//! No guest, no virtqueue, no other thread: preallocated buffers, one submit per batch, completions reaped in batches. Its
//! random sequence is the guest's own (`rng.rs` is one file), and so are its time stamps: taken once per turn.

#![allow(unsafe_code, reason = "requests on an io_uring point into buffers")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use io_uring::{IoUring, opcode, types};
use rustix::time::{ClockId, clock_gettime};

use crate::hist::Hist;
use crate::rng::Rng;
use crate::sample::{Latency, Sample};
use crate::signals;
use crate::workload::Pattern;

const ALIGN: usize = 4096;
/// Per cent of reads in [`Pattern::Mixed`], as in the guest.
const READS: u64 = 70;

/// What the plain ring is to do.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// The file or block device; without one, requests are NOPs, for which the kernel does nothing but complete them.
    pub path: Option<&'a Path>,
    /// O_DIRECT.
    pub direct: bool,
    /// With registered buffers.
    pub registered: bool,
    /// Reads or writes.
    pub pattern: Pattern,
    /// Bytes per request.
    pub bs: u64,
    /// Bytes of the file that are used.
    pub size: u64,
    /// Requests in flight.
    pub depth: u32,
    /// How long is run before the measurement.
    pub warm: Duration,
    /// How long is measured.
    pub time: Duration,
}

/// Page-aligned memory for all requests.
struct Buffers {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffers {
    fn new(len: usize) -> Self {
        // Not zeroes, and every page is touched before anything is measured.
        let bytes = vec![0x5a_u8; len + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Self { bytes, start }
    }

    fn slot(&mut self, index: usize, len: usize) -> *mut u8 {
        self.bytes[self.start + index * len..][..len].as_mut_ptr()
    }
}

struct Loop<'a> {
    job: Job<'a>,
    // Before the buffers: fields are dropped in this order, and the ring must be gone first.
    ring: IoUring,
    file: Option<File>,
    buffers: Buffers,
    rng: Rng,
    blocks: u64,
    next_block: u64,
    free: Vec<u32>,
    submitted: Vec<Instant>,
    in_flight: usize,
    ops: u64,
    /// System calls.
    calls: u64,
    latency: Box<Hist>,
}

/// Runs the job.
///
/// # Errors
/// A file that can't be opened, a kernel without io_uring, a request that fails.
pub fn measure(job: &Job<'_>) -> Result<Sample> {
    let mut ring = Loop::new(*job)?;
    ring.turns(job.warm)?;
    (ring.ops, ring.calls, *ring.latency) = (0, 0, Hist::default());
    let cpu = thread_time();
    let elapsed = ring.turns(job.time)?;
    let cpu = thread_time().saturating_sub(cpu);
    let (ops, calls, latency) = (ring.ops, ring.calls, Latency::of(&ring.latency));
    ring.drain()?;
    let (latency, cpu, syscalls) = (Some(latency), Some(cpu), Some(calls));
    Ok(Sample { ops, time: elapsed, latency, cpu, syscalls, ..Sample::default() })
}

impl<'a> Loop<'a> {
    fn new(job: Job<'a>) -> Result<Self> {
        let flags = if job.direct { libc::O_DIRECT } else { 0 };
        let mut how = OpenOptions::new();
        how.read(true).write(job.pattern.writes()).custom_flags(flags);
        let open =
            |path: &Path| how.open(path).with_context(|| format!("opening {} for the plain ring", path.display()));
        let file = job.path.map(open).transpose()?;
        let depth = job.depth as usize;
        let ring = ring(job.depth).context("making an io_uring for the plain ring (kernel.io_uring_disabled, a seccomp filter, or a kernel before 5.6)")?;
        let len = depth * job.bs as usize;
        let mut buffers = Buffers::new(len);
        if job.registered {
            let all = libc::iovec { iov_base: buffers.slot(0, len).cast(), iov_len: len };
            // SAFETY: the buffers are dropped after the ring.
            unsafe { ring.submitter().register_buffers(&[all]) }
                .context("registering buffers with the plain ring (ulimit -l)")?;
        }
        Ok(Self {
            ring,
            file,
            buffers,
            rng: Rng::new(1),
            blocks: job.size / job.bs,
            next_block: 0,
            free: (0..job.depth).rev().collect(),
            submitted: vec![Instant::now(); depth],
            in_flight: 0,
            ops: 0,
            calls: 0,
            latency: Box::default(),
            job,
        })
    }

    /// Keeps the ring full for a time; returns how long that was.
    fn turns(&mut self, time: Duration) -> Result<Duration> {
        let start = Instant::now();
        loop {
            let now = Instant::now();
            self.reap(now)?;
            if now.duration_since(start) >= time {
                return Ok(now.duration_since(start));
            }
            signals::check()?;
            self.fill(now)?;
            self.enter()?;
        }
    }

    fn drain(&mut self) -> Result<()> {
        while self.in_flight != 0 {
            self.enter()?;
            self.reap(Instant::now())?;
        }
        Ok(())
    }

    fn enter(&mut self) -> Result<()> {
        self.calls += 1;
        match self.ring.submit_and_wait(1) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error).context("submitting to the plain ring"),
        }
    }

    fn fill(&mut self, now: Instant) -> Result<()> {
        let bs = self.job.bs as usize;
        while let Some(slot) = self.free.pop() {
            let block = if matches!(self.job.pattern, Pattern::Read | Pattern::Write) {
                let block = self.next_block;
                self.next_block = (block + 1) % self.blocks;
                block
            } else {
                self.rng.below(self.blocks)
            };
            let read = match self.job.pattern {
                Pattern::Read | Pattern::RandRead => true,
                Pattern::Write | Pattern::RandWrite => false,
                Pattern::Mixed => self.rng.below(100) < READS,
            };
            let buffer = self.buffers.slot(slot as usize, bs);
            let offset = block * self.job.bs;
            let entry = match self.file.as_ref().map(|file| types::Fd(file.as_raw_fd())) {
                Some(fd) if self.job.registered && read => {
                    opcode::ReadFixed::new(fd, buffer, bs as u32, 0).offset(offset).build()
                }
                Some(fd) if self.job.registered => {
                    opcode::WriteFixed::new(fd, buffer, bs as u32, 0).offset(offset).build()
                }
                Some(fd) if read => opcode::Read::new(fd, buffer, bs as u32).offset(offset).build(),
                Some(fd) => opcode::Write::new(fd, buffer, bs as u32).offset(offset).build(),
                None => opcode::Nop::new().build(),
            };
            let entry = entry.user_data(u64::from(slot));
            // SAFETY: the buffer is this slot's alone until its completion, and `Loop` drains the ring, or (after an
            // error) closes it, before it frees the buffers; the kernel holds the file itself.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                bail!("the plain ring's submission queue is full at depth {}", self.job.depth);
            }
            self.submitted[slot as usize] = now;
            self.in_flight += 1;
        }
        Ok(())
    }

    fn reap(&mut self, now: Instant) -> Result<()> {
        let whole = if self.file.is_some() { self.job.bs as i32 } else { 0 };
        for completion in self.ring.completion() {
            let slot = completion.user_data() as usize;
            self.in_flight -= 1;
            match completion.result() {
                result if result == whole => {}
                result @ ..0 => {
                    return Err(io::Error::from_raw_os_error(-result)).with_context(|| {
                        let path = self.job.path.unwrap_or(Path::new("nothing"));
                        format!("{} of {} on the plain ring", self.job.pattern.words(), path.display())
                    });
                }
                short => bail!("a request of {} bytes on the plain ring ended after {short}", self.job.bs),
            }
            self.latency.record(now.duration_since(self.submitted[slot]).as_nanos() as u64);
            self.ops += 1;
            self.free.push(slot as u32);
        }
        Ok(())
    }
}

impl Drop for Loop<'_> {
    fn drop(&mut self) {
        // After an error requests may still be in flight into the buffers.
        while self.in_flight != 0 && self.ring.submit_and_wait(1).is_ok() {
            self.in_flight -= self.ring.completion().count();
        }
        if self.in_flight != 0 {
            std::mem::forget(std::mem::take(&mut self.buffers.bytes));
        }
    }
}

/// A ring with what a careful programmer would switch on, as far as the kernel has it.
pub(crate) fn ring(entries: u32) -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_coop_taskrun()
        .build(entries)
        .or_else(|error| if error.raw_os_error() == Some(libc::EINVAL) { IoUring::new(entries) } else { Err(error) })
}

/// CPU time of the calling thread so far.
pub(crate) fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(size: usize) -> tempfile::NamedTempFile {
        // Beside the test: the usual directory may be in memory, where O_DIRECT is not to be had.
        let exe = std::env::current_exe().unwrap();
        let mut file = tempfile::NamedTempFile::new_in(exe.parent().unwrap()).unwrap();
        file.write_all(&vec![0xff; size]).unwrap();
        file
    }

    fn job(path: &Path, pattern: Pattern, direct: bool) -> Job<'_> {
        let (warm, time) = (Duration::from_millis(5), Duration::from_millis(50));
        Job { path: Some(path), direct, registered: false, pattern, bs: 4096, size: 1 << 20, depth: 8, warm, time }
    }

    #[test]
    fn reads_and_writes_are_counted_and_done() {
        let file = file(1 << 20);
        for (direct, registered) in [(false, false), (true, false), (false, true), (true, true)] {
            let job = Job { registered, ..job(file.path(), Pattern::RandRead, direct) };
            let sample = measure(&job).unwrap();
            let latency = sample.latency.clone().unwrap();
            assert!(sample.ops > 0 && latency.p50 > Duration::ZERO && latency.p99 >= latency.p50, "{sample:?}");
            assert!(sample.time >= Duration::from_millis(50) && sample.cpu.unwrap() > Duration::ZERO, "{sample:?}");
        }
        assert!(std::fs::read(file.path()).unwrap().iter().all(|&byte| byte == 0xff));
        for registered in [false, true] {
            measure(&Job { registered, ..job(file.path(), Pattern::Write, false) }).unwrap();
            assert!(std::fs::read(file.path()).unwrap().iter().any(|&byte| byte != 0xff));
            std::fs::write(file.path(), vec![0xff; 1 << 20]).unwrap();
        }
    }

    #[test]
    fn without_a_file_requests_do_nothing() {
        let job = Job { path: None, ..job(Path::new(""), Pattern::RandWrite, false) };
        let sample = measure(&job).unwrap();
        assert!(sample.ops > 0 && sample.syscalls.unwrap() > 0, "{sample:?}");
        let steps: u64 = sample.latency.unwrap().steps.iter().map(|&(_, count)| count).sum();
        assert_eq!(steps, sample.ops);
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error() {
        let file = file(8192);
        let error = measure(&job(file.path(), Pattern::Read, false)).unwrap_err();
        assert!(error.to_string().contains("ended after 0"), "{error:#}");
    }
}
