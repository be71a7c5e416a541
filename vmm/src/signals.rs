//! Signals of the process, turned into events.

use std::io;

use ringvm_cli::program::{Endings, SignalThread};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};

use crate::console::terminal::{self, Resized};
use crate::events::{Ending, Events};
use crate::exit::Exit;
use crate::operator::{Wish, Wishes};

/// Starts to listen: SIGTERM, SIGINT, SIGQUIT and SIGHUP end the machine. The second of them, unless it is SIGHUP,
/// ends the process at once. SIGUSR1 asks for statistics, SIGUSR2 asks devices to change their place. SIGWINCH calls
/// `resized`, if there is something to call.
///
/// # Errors
/// When the host has no thread or descriptor left.
pub fn listen(events: Events, wishes: Wishes, resized: Option<Resized>) -> io::Result<SignalThread> {
    let mut wanted = vec![SIGTERM, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2];
    if !is_ignored(SIGHUP) {
        // Ignored under nohup(1): the program is to go on then.
        wanted.push(SIGHUP);
    }
    wanted.extend(resized.is_some().then_some(SIGWINCH));
    let mut endings = Endings::default();
    SignalThread::start(&wanted, move |signal| {
        let name = match signal {
            SIGUSR1 => return wishes.add(Wish::Statistics),
            SIGUSR2 => return wishes.add(Wish::Move),
            SIGWINCH => return resized.iter().for_each(|resized| resized()),
            SIGINT => "SIGINT",
            SIGQUIT => "SIGQUIT",
            SIGHUP => "SIGHUP",
            _ => "SIGTERM",
        };
        if endings.is_second(signal) {
            terminal::restore();
            eprintln!("ringvm: a second signal, {name}, ends it at once; what the guest wrote last may be lost");
            std::process::exit(Exit::Host as i32);
        }
        events.end(Ending::Signal(name));
    })
}

#[allow(unsafe_code, reason = "asking for a signal's action has no safe wrapper")]
fn is_ignored(signal: i32) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the buffer has room for a sigaction, and the call sets none.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: zeroed is a valid sigaction, and the call filled it in.
    asked == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}
