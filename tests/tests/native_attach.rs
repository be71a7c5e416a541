//! A disk that comes to a running machine and leaves it, again and again: nothing of it stays, and its image is locked exactly as
//! long as it is there. Alone in its process, whose descriptors, threads and mappings are counted.

#[path = "common/in_process.rs"]
mod in_process;

use std::fs;
use std::time::{Duration, Instant};

use in_process::{Guest, LIMIT, is_locked};
use ringvm::machine::Running;
use ringvm_backends::block::{BlockDevice, BlockOptions};
use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use ringvm_tests::embedded::{image, ready};

const ROUNDS: usize = 1000;
/// What is set up once is there after so many.
const WARM: usize = 10;

/// What this process and its machine hold.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    threads: Vec<String>,
    mappings: usize,
    routes: usize,
}

fn held(running: &Running) -> Held {
    let tasks = fs::read_dir("/proc/self/task").expect("Linux lists threads");
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    let mut threads: Vec<String> = tasks.filter_map(|task| task.ok().map(name)).collect();
    threads.sort();
    Held {
        descriptors: fs::read_dir("/proc/self/fd").expect("Linux lists descriptors").count(),
        threads,
        mappings: fs::read_to_string("/proc/self/maps").expect("Linux lists mappings").lines().count(),
        routes: running.interrupt_routes(),
    }
}

/// What is held once the disk's own thread has ended: the kernel lists it for a moment more.
fn settled(running: &Running) -> Held {
    let deadline = Instant::now() + LIMIT;
    loop {
        let now = held(running);
        if !now.threads.iter().any(|name| name.starts_with("dev-")) {
            return now;
        }
        assert!(Instant::now() < deadline, "{now:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until as much is held as before.
fn expect_held(running: &Running, before: &Held) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let now = held(running);
        if now == *before {
            return;
        }
        assert!(Instant::now() < deadline, "{before:?} -> {now:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_disk_comes_and_goes_a_thousand_times() {
    if !ready() {
        return;
    }
    let image = image(1);
    let pool = ReactorPool::new(&ReactorOptions::default()).expect("I/O threads");
    let guest = Guest::start(&format!("job=hotplug rounds={ROUNDS}"));
    guest.expect("start job=hotplug");
    let options = BlockOptions { path: Some(image.path().into()), ..BlockOptions::default() };
    let mut before = None;
    for round in 0..ROUNDS {
        if round == WARM {
            before = Some(settled(&guest.running));
        }
        assert!(!is_locked(image.path()), "round {round}: no disk, no lock");
        let disk = BlockDevice::open("disk9", &options, &pool).expect("the image is free");
        let bdf = guest.attach(Box::new(disk)).expect("it is attached");
        guest.expect(&format!("let-go round={round} slot={}", bdf.slot));
        assert!(is_locked(image.path()), "round {round}: locked as long as it is there");
        drop(guest.detach("disk9").expect("it is there"));
        // The next one has the same slot: the guest is to see that this one is not there.
        guest.expect(&format!("gone round={round}"));
        if let Some(before) = &before {
            expect_held(&guest.running, before);
        }
    }
    eprintln!("{ROUNDS} times; before and after: {before:?}");
    guest.expect("result job=hotplug");
    guest.stop();
}
