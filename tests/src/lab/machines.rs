//! The warm L1 machines of a test binary: as many as the host has CPUs and memory for, each started when a test finds none
//! idle, and each serving one test after another.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use super::Lab;
use super::payload::Payload;
use crate::{Error, Result, host, paths};

/// What a machine's memory, its share of the page cache and QEMU take, in KiB.
const MEMORY: u64 = 5 << 20;

static MACHINES: Mutex<Machines> = Mutex::new(Machines { parts: None, started: 0, most: 0, idle: Vec::new() });
static FREED: Condvar = Condvar::new();

struct Machines {
    /// What they are made of, or why there are none.
    parts: Option<std::result::Result<Arc<Parts>, String>>,
    started: usize,
    most: usize,
    idle: Vec<Lab>,
}

struct Parts {
    payload: Arc<Payload>,
    folder: PathBuf,
    /// Held as long as the process lives: the lab's folder serves one at a time.
    _lock: fs::File,
}

/// A machine for a test: an idle one, or one more, or the next that is given back.
pub(super) fn take() -> std::result::Result<Lab, String> {
    let mut machines = lock();
    let parts = match machines.parts.get_or_insert_with(|| prepare().map(Arc::new).map_err(|e| e.to_string())) {
        Ok(parts) => Arc::clone(parts),
        Err(why) => return Err(why.clone()),
    };
    if machines.most == 0 {
        machines.most = most();
    }
    loop {
        if let Some(lab) = machines.idle.pop() {
            return Ok(lab);
        }
        if machines.started < machines.most {
            machines.started += 1;
            let folder = parts.folder.join(format!("machine{}", machines.started));
            drop(machines);
            let started = Lab::start(Arc::clone(&parts.payload), &folder).map_err(|e| e.to_string());
            let why = match started {
                Ok(lab) => return Ok(lab),
                Err(why) => why,
            };
            machines = lock();
            machines.started -= 1;
            machines.most = machines.started;
            if machines.most == 0 {
                machines.parts = Some(Err(why.clone()));
                FREED.notify_all();
                return Err(why);
            }
            host::say(&format!("lab: going on with {} machines, as one more did not start: {why}", machines.most));
        } else {
            machines = FREED.wait(machines).unwrap_or_else(PoisonError::into_inner);
            if let Some(Err(why)) = &machines.parts {
                return Err(why.clone());
            }
        }
    }
}

/// Gives a machine back for the next test.
pub(super) fn give_back(lab: Lab) {
    lock().idle.push(lab);
    FREED.notify_one();
}

fn lock() -> MutexGuard<'static, Machines> {
    MACHINES.lock().unwrap_or_else(PoisonError::into_inner)
}

fn prepare() -> Result<Parts> {
    let lock = claim()?;
    let folder = paths::lab().join("run");
    Ok(Parts { payload: Arc::new(Payload::build(&folder)?), folder, _lock: lock })
}

/// A CPU for each, as an L1 has one, and memory.
fn most() -> usize {
    let free = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free =
        free.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse().ok());
    let room = free.map_or(1, |free: u64| usize::try_from(free / MEMORY).unwrap_or(usize::MAX));
    available_parallelism().map_or(1, usize::from).min(room).max(1)
}

/// One test process at a time uses the lab's folder.
fn claim() -> Result<fs::File> {
    let path = paths::lab().join("lock");
    fs::create_dir_all(paths::lab()).map_err(Error::file("creating", paths::lab()))?;
    let file = fs::File::create(&path).map_err(Error::file("creating", &path))?;
    if file.try_lock().is_err() {
        host::say("lab: another test run is using the lab; waiting for its end");
        let deadline = Instant::now() + Duration::from_secs(1200);
        while file.try_lock().is_err() {
            if Instant::now() > deadline {
                return Err(Error::Missing(format!("{} is locked by another test run for 20 minutes", path.display())));
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }
    Ok(file)
}
