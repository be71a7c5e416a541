//! Ctrl-C: what was made and started for a measurement must not outlive it.

use std::path::{Path, PathBuf};
use std::process;
use std::sync::Mutex;
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

static SCRATCH: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Removes the scratch file and ends the program when it is interrupted. (VMMs end with their parent: see `run`.)
pub fn install() {
    // Without handlers the worst is a file that stays behind.
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP]) else { return };
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            if let Ok(Some(path)) = SCRATCH.lock().as_deref() {
                let _ = std::fs::remove_file(path);
            }
            process::exit(128 + signal);
        }
    });
}

/// Names the file that goes when the program is interrupted.
pub(crate) fn remove_on_signal(path: Option<&Path>) {
    if let Ok(mut scratch) = SCRATCH.lock() {
        *scratch = path.map(Path::to_owned);
    }
}
