//! Whether standard output was open when the process began.
//!
//! The standard library opens /dev/null on a closed descriptor before `main`, so that has to be looked at earlier.
#![allow(unsafe_code, reason = "a function in .init_array, which runs before main")]

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::stdio::stdout;

static CLOSED: AtomicBool = AtomicBool::new(false);

// SAFETY: the section holds pointers to functions that the C runtime calls once before main; this one calls fcntl only.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

extern "C" fn look() {
    // SAFETY: F_GETFD takes no pointer, and a bad descriptor is what is asked about.
    let flags = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) };
    CLOSED.store(flags < 0, Ordering::Relaxed);
}

/// Whether standard output can be written to.
///
/// # Errors
/// When it was closed, or is a pipe without a reader.
pub fn check_output() -> io::Result<()> {
    if CLOSED.load(Ordering::Relaxed) {
        return Err(io::Error::other("standard output is closed"));
    }
    let stdout = stdout();
    let mut fds = [PollFd::new(&stdout, PollFlags::OUT)];
    poll(&mut fds, Some(&Timespec::default()))?;
    if fds[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL) {
        return Err(io::Error::other("nobody reads standard output (a broken pipe)"));
    }
    Ok(())
}
