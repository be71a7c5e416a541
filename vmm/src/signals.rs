//! Signals of the process, turned into events.

use std::io;

use ringvm_backends::program::SignalThread;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};

use crate::events::{Ending, Events};

/// Starts to listen: SIGTERM, SIGINT, SIGQUIT and SIGHUP end the machine, SIGUSR1 asks for statistics, SIGUSR2 for disks to
/// change their place.
///
/// # Errors
/// When the host has no thread or descriptor left.
pub fn listen(events: Events) -> io::Result<SignalThread> {
    let mut wanted = vec![SIGTERM, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2];
    if !is_ignored(SIGHUP) {
        // nohup(1) means that it shall go on.
        wanted.push(SIGHUP);
    }
    SignalThread::start(&wanted, move |signal| match signal {
        SIGUSR1 => events.statistics(),
        SIGUSR2 => events.change_places(),
        SIGINT => events.end(Ending::Signal("SIGINT")),
        SIGQUIT => events.end(Ending::Signal("SIGQUIT")),
        SIGHUP => events.end(Ending::Signal("SIGHUP")),
        _ => events.end(Ending::Signal("SIGTERM")),
    })
}

#[allow(unsafe_code, reason = "asking for a signal's action has no safe wrapper")]
fn is_ignored(signal: i32) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the room is that of a sigaction, and none is set.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: zeroed is a valid sigaction, and the call filled it in.
    asked == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}
