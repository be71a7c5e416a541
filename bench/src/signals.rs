//! Ctrl-C: what was made and started for a measurement must not outlive it.

use std::path::{Path, PathBuf};
use std::process;
use std::sync::Mutex;
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Files and directories that go when the program is interrupted.
static TEMPORARY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes what is temporary and ends the program when it is interrupted. (VMMs end with their parent: see `run`.)
pub fn install() {
    // Without handlers the worst is a file that stays behind.
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP]) else { return };
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            if let Ok(paths) = TEMPORARY.lock() {
                for path in paths.iter() {
                    let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
                }
            }
            process::exit(128 + signal);
        }
    });
}

/// Names a file or directory of ours that goes when the program is interrupted.
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
