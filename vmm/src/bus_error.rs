//! Memory that can't be touched: a huge page that a daemon has given back and the host no longer has, a memory error of the
//! hardware. The thread that touches it gets SIGBUS and can't go on, but the machine ends in order: the other devices are stopped
//! and flushed, and the process exits as for any failure of the host.
#![allow(unsafe_code, reason = "signal handlers have no safe wrapper that tells the address")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use vmm_sys_util::eventfd::EventFd;

use crate::events::{Ending, Events};

/// Raised by the handler.
static RAISED: OnceLock<EventFd> = OnceLock::new();
/// Where the last access was.
static ADDRESS: AtomicUsize = AtomicUsize::new(0);

/// Has a SIGBUS of any thread but the main one end the machine. The first call decides which.
///
/// # Errors
/// When the host has no thread or descriptor left.
pub fn watch(events: Events) -> io::Result<()> {
    let event = EventFd::new(libc::EFD_CLOEXEC)?;
    let heard = event.try_clone()?;
    if RAISED.set(event).is_err() {
        return Ok(());
    }
    thread::Builder::new().name("bus-error".into()).spawn(move || {
        if heard.read().is_ok() {
            let address = ADDRESS.load(Ordering::Acquire);
            events.end(Ending::HostFailure(format!(
                "memory at {address:#x} can't be reached (SIGBUS): the host has no page for it, or its hardware has failed; \
                 see the kernel's log"
            )));
        }
    })?;
    // SAFETY: all fields are numbers, sets of them or absent pointers, for which zero is valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler keeps to what is allowed in one.
    let done = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

extern "C" fn on_sigbus(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure.
    let code = unsafe { (*info).si_code };
    let of_memory = matches!(code, libc::BUS_ADRERR | libc::BUS_MCEERR_AR | libc::BUS_MCEERR_AO);
    // SAFETY: these calls have no preconditions. The main thread is the one that ends the machine.
    let on_main = unsafe { libc::gettid() == libc::getpid() };
    match RAISED.get() {
        Some(event) if of_memory && (!on_main || code == libc::BUS_MCEERR_AO) => {
            // SAFETY: with these codes the kernel fills in the address.
            ADDRESS.store(unsafe { (*info).si_addr() } as usize, Ordering::Release);
            let one = 1u64;
            // SAFETY: eight bytes that live across the call.
            let _ = unsafe { libc::write(event.as_raw_fd(), (&raw const one).cast(), 8) };
            if code == libc::BUS_MCEERR_AO {
                // The kernel reports a bad page early (BUS_MCEERR_AO), to any thread; none has touched it yet.
                return;
            }
            loop {
                // SAFETY: the thread waits for the end of the process; signals that kick it return here.
                unsafe { libc::pause() };
            }
        }
        // The signal comes once more when this handler returns, and takes its default action.
        // SAFETY: the default action is always valid, and raising a signal is allowed in a handler.
        _ => unsafe {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            libc::raise(libc::SIGBUS);
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

    use super::*;

    #[test]
    fn memory_that_can_not_be_touched_ends_the_machine_and_not_the_process() {
        let file = memfd_create("gone", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 4096).unwrap();
        let mapped = FileOffset::new(file.try_clone().unwrap().into(), 0);
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), 4096, Some(mapped))]).unwrap();
        ftruncate(&file, 0).unwrap();
        let (events, endings) = Events::channel();
        watch(events).unwrap();
        // It stays where it touches the memory, until the process ends.
        thread::spawn(move || memory.read_obj::<u64>(GuestAddress(64)));
        let Ok(Ending::HostFailure(what)) = endings.recv_timeout(Duration::from_secs(60)) else {
            panic!("the end of the machine is asked for");
        };
        assert!(what.contains("SIGBUS"), "{what}");
    }
}
