//! Ctrl-C: a measurement ends at once and leaves what it has measured so far; what was made and started for it does not
//! outlive it.

use std::path::{Path, PathBuf};
use std::process;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;

use anyhow::{Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Files and directories that go when the program ends at the second signal.
static TEMPORARY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
/// The signal that came; 0 if none did.
static CAUGHT: AtomicI32 = AtomicI32::new(0);

/// At the first signal has [`interrupted`] say so; at the second removes what is temporary and ends the program. (VMMs end
/// with their parent: see `run`.)
pub fn install() {
    // Without handlers the worst is a file that stays behind.
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP]) else { return };
    thread::spawn(move || {
        for signal in signals.forever() {
            if CAUGHT.swap(signal, Ordering::Relaxed) == 0 {
                continue;
            }
            if let Ok(paths) = TEMPORARY.lock() {
                for path in paths.iter() {
                    let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
                }
            }
            process::exit(128 + signal);
        }
    });
}

/// The exit code of a program that a signal has interrupted; `None` if none did.
pub fn interrupted() -> Option<u8> {
    match CAUGHT.load(Ordering::Relaxed) {
        0 => None,
        signal => Some(128 + signal as u8),
    }
}

/// Ends what takes long.
///
/// # Errors
/// A signal has come.
#[inline]
pub(crate) fn check() -> Result<()> {
    if CAUGHT.load(Ordering::Relaxed) != 0 {
        bail!("interrupted");
    }
    Ok(())
}

/// Names a file or directory of ours that goes when the program is ended by a signal.
pub(crate) fn remove_on_signal(path: &Path) {
    if let Ok(mut paths) = TEMPORARY.lock() {
        paths.push(path.to_owned());
    }
}

/// Takes [`remove_on_signal`] back.
pub(crate) fn keep_on_signal(path: &Path) {
    if let Ok(mut paths) = TEMPORARY.lock() {
        paths.retain(|known| known != path);
    }
}
