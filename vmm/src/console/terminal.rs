//! Raw mode of the terminal, restored on every way out: normally, by a panic, by a fatal signal.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Once, OnceLock};

use ringvm_hosted::hosted::THREAD_PREFIX;
use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr,
};

/// The terminal as it was found. Set once, read by a signal handler.
static FOUND: OnceLock<Termios> = OnceLock::new();

/// Tells somebody that the size of the terminal has changed.
pub type Resized = Box<dyn Fn() + Send>;

/// Standard input in raw mode until this is dropped.
pub struct RawMode(());

impl RawMode {
    /// Puts standard input into raw mode, or returns `None` if it is no terminal of ours.
    ///
    /// Output processing stays on: the guest's CR LF comes out right, and so do our own lines.
    ///
    /// # Errors
    /// When the terminal refuses.
    pub fn enter() -> io::Result<Option<Self>> {
        if !is_interactive() {
            return Ok(None);
        }
        let stdin: BorrowedFd<'_> = stdin();
        let mut termios = tcgetattr(stdin)?;
        FOUND.get_or_init(|| termios.clone());
        restore_on_panic();
        fatal::install()?;
        termios.input_modes -= InputModes::BRKINT
            | InputModes::ICRNL
            | InputModes::IGNBRK
            | InputModes::IGNCR
            | InputModes::INLCR
            | InputModes::INPCK
            | InputModes::ISTRIP
            | InputModes::IXON
            | InputModes::PARMRK;
        termios.local_modes -=
            LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::IEXTEN | LocalModes::ISIG;
        termios.special_codes[SpecialCodeIndex::VMIN] = 1;
        termios.special_codes[SpecialCodeIndex::VTIME] = 0;
        tcsetattr(stdin, OptionalActions::Now, &termios)?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether a person types on standard input: it is a terminal, and this process is in its foreground. One in the
/// background is stopped when it touches the terminal.
#[must_use]
pub fn is_interactive() -> bool {
    let stdin = stdin();
    // A terminal that is not our controlling one has no foreground to be outside of.
    isatty(stdin) && tcgetpgrp(stdin).map_or(true, |foreground| foreground == getpgrp())
}

/// Puts the terminal back. Two system calls at most and no lock: safe in a signal handler.
pub(crate) fn restore() {
    if let Some(found) = FOUND.get() {
        // Nothing can be done if the terminal is gone.
        let _ = tcsetattr(stdin(), OptionalActions::Now, found);
    }
}

fn restore_on_panic() {
    static HOOKED: Once = Once::new();
    HOOKED.call_once(|| {
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // The machine goes on without a hosted backend, and with its console.
            let goes_on = std::thread::current().name().is_some_and(|name| name.starts_with(THREAD_PREFIX));
            if !goes_on {
                restore();
            }
            next(info);
        }));
    });
}

mod fatal {
    //! Signals that nothing survives: the terminal is restored, then they take their course.
    #![allow(unsafe_code, reason = "signal handlers are installed with sigaction")]

    use std::io;
    use std::mem::MaybeUninit;
    use std::ptr;
    use std::sync::OnceLock;

    const SIGNALS: [libc::c_int; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT];

    /// The actions that were set before, in the order of `SIGNALS`.
    static BEFORE: OnceLock<[libc::sigaction; SIGNALS.len()]> = OnceLock::new();

    /// Installs the handlers, once.
    pub(super) fn install() -> io::Result<()> {
        if BEFORE.get().is_some() {
            return Ok(());
        }
        let mut before = [const { MaybeUninit::<libc::sigaction>::zeroed() }; SIGNALS.len()];
        for (slot, signal) in before.iter_mut().zip(SIGNALS) {
            // SAFETY: the slot is room for one sigaction.
            if unsafe { libc::sigaction(signal, ptr::null(), slot.as_mut_ptr()) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: each was filled in by the loop above.
        BEFORE.get_or_init(|| before.map(|action| unsafe { action.assume_init() }));
        for signal in SIGNALS {
            // SAFETY: zero is a valid sigaction, and the handler is async-signal-safe: atomics and system calls only.
            // It runs on the alternate stack that Rust's own handler for stack overflows has set up.
            let installed = unsafe {
                let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
                action.sa_sigaction =
                    handler as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) as usize;
                action.sa_flags = libc::SA_ONSTACK | libc::SA_SIGINFO;
                libc::sigaction(signal, &raw const action, ptr::null_mut())
            };
            if installed != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }

    extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        super::restore();
        // SAFETY: the kernel passes a valid siginfo under SA_SIGINFO.
        let sent = unsafe { (*info).si_code } <= 0;
        let before = BEFORE.get().and_then(|all| SIGNALS.iter().position(|&other| other == signal).map(|n| &all[n]));
        // SAFETY: sigaction, signal and raise are async-signal-safe, and the action was in force before.
        unsafe {
            match before {
                // A fault comes again as soon as this handler returns, and then meets the action from before.
                Some(before) if !sent => {
                    libc::sigaction(signal, before, ptr::null_mut());
                }
                // One that was sent, by abort(3) or another process, does not: it ends the process when this returns.
                _ => {
                    libc::signal(signal, libc::SIG_DFL);
                    libc::raise(signal);
                }
            }
        }
    }
}
