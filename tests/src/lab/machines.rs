//! The warm L1 machines of a test binary: as many as the host has CPUs, memory and room for, each started when a test finds none
//! idle, and each serving one test after another.

use std::collections::VecDeque;
use std::fs;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use rustix::fs::statvfs;

use super::Lab;
use super::payload::Payload;
use crate::{Error, Result, host, paths};

/// What a machine's memory, its share of the page cache and QEMU take.
const MEMORY: u64 = 5 << 30;
/// What its disk comes to hold.
const DISK: u64 = 4 << 30;

static MACHINES: Mutex<Machines> =
    Mutex::new(Machines { parts: None, started: 0, most: usize::MAX, idle: VecDeque::new() });
static FREED: Condvar = Condvar::new();

struct Machines {
    /// What they are made of, or why there are none.
    parts: Option<std::result::Result<Arc<Parts>, String>>,
    started: usize,
    most: usize,
    /// The one that has been idle for longest comes first.
    idle: VecDeque<Lab>,
}

struct Parts {
    payload: Arc<Payload>,
    folder: PathBuf,
    most: usize,
    /// Held as long as the process lives: the lab's folder serves one at a time.
    _lock: fs::File,
}

/// A machine while a test has it. Dropped, it is there for the next.
pub(super) struct Lease(Option<Lab>);

impl Deref for Lease {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        self.0.as_ref().expect("it is there until the lease ends")
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Lab {
        self.0.as_mut().expect("it is there until the lease ends")
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        lock().idle.extend(self.0.take());
        FREED.notify_one();
    }
}

/// A start that has not succeeded. Dropped, there are fewer machines from then on.
struct Start;

impl Drop for Start {
    fn drop(&mut self) {
        let mut machines = lock();
        machines.started -= 1;
        machines.most = machines.started;
        FREED.notify_all();
    }
}

/// A machine for a test: an idle one, or one more, or the next that is given back.
pub(super) fn take() -> std::result::Result<Lease, String> {
    let mut machines = lock();
    loop {
        let parts = match machines.parts.get_or_insert_with(|| prepare().map(Arc::new).map_err(|e| e.to_string())) {
            Ok(parts) => Arc::clone(parts),
            Err(why) => return Err(why.clone()),
        };
        machines.most = machines.most.min(parts.most);
        if let Some(lab) = machines.idle.pop_front() {
            return Ok(Lease(Some(lab)));
        }
        if machines.started < machines.most {
            machines.started += 1;
            let folder = parts.folder.join(format!("machine{}", machines.started));
            drop(machines);
            let start = Start;
            let why = match Lab::start(Arc::clone(&parts.payload), &folder) {
                Ok(lab) => {
                    std::mem::forget(start);
                    return Ok(Lease(Some(lab)));
                }
                Err(e) => e.to_string(),
            };
            drop(start);
            machines = lock();
            if machines.most == 0 {
                machines.parts = Some(Err(why));
            } else {
                host::say(&format!("lab: going on with {} machines, as one more did not start: {why}", machines.most));
            }
        } else if machines.most == 0 {
            return Err("a machine could not be started for another test".into());
        } else {
            machines = FREED.wait(machines).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn lock() -> MutexGuard<'static, Machines> {
    MACHINES.lock().unwrap_or_else(PoisonError::into_inner)
}

fn prepare() -> Result<Parts> {
    let lock = claim()?;
    let folder = paths::lab().join("run");
    let payload = Arc::new(Payload::build(&folder)?);
    let most = most(&folder);
    Ok(Parts { payload, folder, most, _lock: lock })
}

/// How many machines the host has CPUs, memory and room for, one at least: an L1 has one CPU.
fn most(folder: &Path) -> usize {
    let number = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let free =
        info.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse().ok());
    // A container may be given less than the host has; "max" is no number.
    let limit = number("/sys/fs/cgroup/memory.max").unwrap_or(u64::MAX);
    let memory = free.map_or(0, |kib: u64| kib << 10).min(limit) / MEMORY;
    let disk = statvfs(folder).map_or(0, |disk| disk.f_bavail * disk.f_frsize) / DISK;
    let cpus = available_parallelism().map_or(1, usize::from);
    cpus.min(usize::try_from(memory.min(disk)).unwrap_or(usize::MAX)).max(1)
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
