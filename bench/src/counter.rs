//! System calls and exits of a VMM's threads, counted by the kernel at its tracepoints (perf_event_open(2)):
//! `raw_syscalls:sys_enter` and `kvm:kvm_exit`. Both slow what they count, so that this is for runs of their own. It takes root,
//! or CAP_PERFMON and a tracefs that may be read.

#![allow(unsafe_code, reason = "perf_event_open(2) has no safe wrapper among our dependencies")]

use std::fs;
use std::io;
use std::mem::size_of;
use std::os::fd::{FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags, openat};

use crate::{kernel_fs, process};

const SYSTEM_CALLS: &str = "events/raw_syscalls/sys_enter/id";
const EXITS: &str = "events/kvm/kvm_exit/id";

/// `struct perf_event_attr` in its first published size: all that counting takes.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    breakpoint_address: u64,
}

/// PERF_FLAG_FD_CLOEXEC.
const CLOSE_ON_EXEC: libc::c_ulong = 1 << 3;
const PERF_TYPE_TRACEPOINT: u32 = 2;
/// Bit 1: threads that are started later count too.
const INHERIT: u64 = 1 << 1;

/// What was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// System calls.
    pub syscalls: u64,
    /// Exits; `None` where this KVM does not tell.
    pub exits: Option<u64>,
}

/// Counters of all threads of some processes and of what they have started.
pub struct Counter {
    syscalls: Vec<OwnedFd>,
    exits: Vec<OwnedFd>,
}

impl Counter {
    /// Whether this host lets anything be counted.
    pub fn is_possible() -> bool {
        tracepoint(SYSTEM_CALLS).and_then(|id| open(id, std::process::id())).is_ok()
    }

    /// Counts from now on.
    ///
    /// # Errors
    /// There is no right to, or no such tracepoint.
    pub fn open(pids: &[u32]) -> io::Result<Self> {
        let all = pids.iter().flat_map(|&pid| std::iter::once(pid).chain(process::children(pid)));
        let threads: Vec<u32> = all.flat_map(threads).collect();
        // One that has ended since makes no calls any more.
        let ended = |opened: &io::Result<_>| opened.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::ESRCH));
        let on = |id| threads.iter().map(move |&thread| open(id, thread));
        let on_all = |id| on(id).filter(|opened| !ended(opened)).collect::<io::Result<Vec<_>>>();
        let exits = tracepoint(EXITS).and_then(on_all).unwrap_or_default();
        Ok(Self { syscalls: on_all(tracepoint(SYSTEM_CALLS)?)?, exits })
    }

    /// What was counted so far.
    ///
    /// # Errors
    /// A counter can't be read.
    pub fn read(&self) -> io::Result<Counts> {
        let sum = |counters: &[OwnedFd]| counters.iter().map(value).sum::<io::Result<u64>>();
        let exits = sum(&self.exits)?;
        // A guest that works exits, if only for its host's timer: a KVM that never says so has its own way to run guests.
        Ok(Counts { syscalls: sum(&self.syscalls)?, exits: (exits != 0).then_some(exits) })
    }
}

fn threads(pid: u32) -> Vec<u32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn tracepoint(path: &str) -> io::Result<u64> {
    let root = kernel_fs::open("tracefs").ok_or(io::ErrorKind::NotFound)?;
    let file = openat(&root, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let text = io::read_to_string(fs::File::from(file))?;
    text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

fn open(tracepoint: u64, thread: u32) -> io::Result<OwnedFd> {
    let attributes = Attributes {
        kind: PERF_TYPE_TRACEPOINT,
        size: size_of::<Attributes>() as u32,
        config: tracepoint,
        flags: INHERIT,
        ..Attributes::default()
    };
    let (any_cpu, no_group) = (-1, -1);
    // SAFETY: the attributes are `size` bytes long and alive across the call, which only reads them.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            thread as libc::pid_t,
            any_cpu,
            no_group,
            CLOSE_ON_EXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was made just now and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn value(counter: &OwnedFd) -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::io::read(counter, &mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_calls_of_all_threads_are_counted_where_that_is_allowed() {
        if !Counter::is_possible() {
            assert!(Counter::open(&[std::process::id()]).is_err());
            return;
        }
        let counter = Counter::open(&[std::process::id()]).unwrap();
        let before = counter.read().unwrap().syscalls;
        let call = || (0..1_000).for_each(|_| _ = rustix::process::getppid());
        call();
        std::thread::spawn(call).join().unwrap();
        let counted = counter.read().unwrap().syscalls - before;
        assert!(counted >= 2_000, "{counted}");
    }
}
