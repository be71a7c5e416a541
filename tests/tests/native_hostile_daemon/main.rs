//! A daemon that does everything wrong, one thing after the other, under a guest that has an honest disk as well: the honest one
//! loses nothing and does not wait, and the disk of the hostile daemon works again each time that it behaves.
//!
//! A man in the middle plays the hostile daemon: it passes messages between `ringvm` and a `ringvm-blk` until the moment of a
//! trigger has come (`triggers.rs`). The guest uses the disk and resets it all the time, so that each message comes soon, and each
//! lock, wait and answer of the frontend is met. RINGVM_TRIGGERS is a part of the names of those to be tried alone.

mod triggers;

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use ringvm_tests::embedded::{assert_success, disk, figure, guest, image, ready, succeed};
use ringvm_tests::host::say;
use ringvm_tests::interposer::{Interposer, Kept, Link, RESET_DEVICE, Side};
use ringvm_tests::native::{self, Place, Running};
use ringvm_tests::paths;
use rustix::process::Signal;
use tempfile::{NamedTempFile, TempDir};

/// For anything that takes milliseconds on an idle machine, and for whatever has a limit in `ringvm`.
const LIMIT: Duration = Duration::from_secs(60);
/// For an end that waits for nobody who hangs: above it on any machine, and below what a wait for a daemon once took.
const SOON: Duration = Duration::from_secs(20);
/// Something was given up.
const GAVE_UP: i32 = 3;
/// How long a connection goes on behind a trigger.
const AFTERWARDS: Duration = Duration::from_millis(100);
/// Attempts to come to the moment of a trigger: a connection may end before it.
const ATTEMPTS: usize = 20;

/// A `ringvm-blk` with its disk, a socket for the one in the middle, and what `ringvm` has of both and of an honest disk.
struct Stage {
    folder: TempDir,
    _images: [NamedTempFile; 2],
    daemon: Running,
    honest: String,
    hostile: String,
}

impl Stage {
    fn new() -> Stage {
        let folder = TempDir::new_in(paths::target()).expect("the target folder is writable");
        let (image, honest) = (image(16), image(32));
        let socket = folder.path().join("daemon.sock").display().to_string();
        let option = format!("path={},queues=2", image.path().display());
        let mut daemon = native::daemon("ringvm-blk", ["--socket", &socket, "--disk", &option])
            .and_then(native::RingVm::start)
            .expect("the daemon starts");
        daemon.expect_said(" is ready at ", 1, LIMIT).expect("the daemon comes up");
        let hostile = format!("socket={},queues=2", folder.path().join("ringvm.sock").display());
        let option = disk(&honest, Place::Process, "queues=1");
        Stage { folder, _images: [image, honest], daemon, honest: option, hostile }
    }

    /// Where the one in the middle listens, and where it connects.
    fn sockets(&self) -> (std::path::PathBuf, std::path::PathBuf) {
        (self.folder.path().join("ringvm.sock"), self.folder.path().join("daemon.sock"))
    }

    /// The guest with a job on both disks.
    fn start(&self, job: &str) -> Running {
        let disks = ["--disk", &self.honest, "--disk", &self.hostile];
        guest(job, &[&["--cpus", "2", "--stop-timeout", "15"][..], &disks].concat()).start().expect("it starts")
    }
}

/// Passes everything on until the guest has brought the disk up, used it and reset it. Panics if that does not come.
fn be_honest(interposer: &Interposer<'_>, kept: &mut Kept, after: &str) {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        let link = interposer.accept(kept, LIMIT);
        let mut link = link.unwrap_or_else(|error| panic!("after {after}: {error}"));
        let life = |link: &mut Link<'_>| {
            link.until_running()?;
            let over = link.until_answer(RESET_DEVICE)?;
            link.pass(Side::Daemon, &over)
        };
        if life(&mut link).is_some() {
            return;
        }
    }
    panic!("after {after} the disk is not served again");
}

/// Does what a trigger says over a new connection.
fn attack(interposer: &Interposer<'_>, kept: &mut Kept, name: &str, act: impl Fn(&mut Link<'_>) -> Option<()>) {
    for _ in 0..ATTEMPTS {
        let link = interposer.accept(kept, LIMIT);
        let mut link = link.unwrap_or_else(|error| panic!("before {name}: {error}"));
        if act(&mut link).is_some() {
            // Until then or until `ringvm` leaves, whichever comes first.
            link.pass_for(AFTERWARDS);
            return;
        }
    }
    panic!("{name}: its moment never came");
}

#[test]
fn every_trigger_of_a_hostile_daemon_leaves_the_honest_disk_alone() {
    if !ready() {
        return;
    }
    let stage = Stage::new();
    let (front, back) = stage.sockets();
    let interposer = Interposer::new(&front, &back).expect("a socket in a folder of ours");
    let job = "job=beside until=told rounds=100 depth=16 max=32k stall=30s";
    let mut running = stage.start(job);
    let mut kept = Kept::default();
    be_honest(&interposer, &mut kept, "the start");
    let early = running.holdings();
    let only = std::env::var("RINGVM_TRIGGERS").unwrap_or_default();
    let triggers: Vec<_> = triggers::all().into_iter().filter(|(name, _)| name.contains(&only)).collect();
    let start = Instant::now();
    for (name, act) in &triggers {
        let begin = Instant::now();
        attack(&interposer, &mut kept, name, act);
        let attacked = begin.elapsed();
        be_honest(&interposer, &mut kept, name);
        say(&format!("{name}: {} ms, served again after {} ms", attacked.as_millis(), begin.elapsed().as_millis()));
        assert!(native::is_alive(running.pid()), "{name} has ended ringvm: {}", running.said());
    }
    let took = start.elapsed();
    running.holdings().assert_flat(&early);
    running.tell_enough().expect("the guest works");
    let ended = serve_until(&interposer, kept, move || running.end(3 * LIMIT).expect("it ends"));
    assert_success(&ended);
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
    assert!(figure(&ended.stdout, "good_after") > 0, "the disk works again: {}", ended.stdout);
    assert!(figure(&ended.stdout, "sectors_checked") > 0, "{}", ended.stdout);
    let result = ended.stdout.lines().rfind(|line| line.contains(": result ")).unwrap_or_default();
    say(&format!("{} triggers in {:.1} s: {result}", triggers.len(), took.as_secs_f32()));
    let Stage { daemon, .. } = stage;
    daemon.signal(Signal::TERM).expect("it runs");
    assert_eq!(daemon.end(LIMIT).expect("it ends").code(), 0);
}

#[test]
fn no_trigger_of_a_hostile_daemon_keeps_the_end_waiting() {
    if !ready() {
        return;
    }
    let stage = Stage::new();
    let (front, back) = stage.sockets();
    let interposer = Interposer::new(&front, &back).expect("a socket in a folder of ours");
    for (name, act) in triggers::at_the_end() {
        let job = "job=beside until=told depth=16 max=32k stall=30s";
        let running = stage.start(job);
        let mut kept = Kept::default();
        let mut link = interposer.accept(&mut kept, LIMIT).expect("it connects");
        link.until_running().expect("the guest comes up");
        let (came, ended, took) = thread::scope(|scope| {
            let end = scope.spawn(|| {
                // Before, in or after the moment of the trigger.
                thread::sleep(native::random(Duration::from_millis(300)));
                running.signal(Signal::TERM).expect("it runs");
                let start = Instant::now();
                (running.end(SOON), start.elapsed())
            });
            let came = act(&mut link).is_some();
            link.pass_for(SOON);
            let (ended, took) = end.join().expect("the signal is sent");
            (came, ended, took)
        });
        let ended = ended.unwrap_or_else(|error| panic!("{name}: {error}"));
        // A vCPU may be left that waits for the hostile disk, and that disk itself, but nothing of the honest one.
        assert!([0, GAVE_UP].contains(&ended.code()), "{name}: {}: {}", ended.code(), ended.stderr);
        assert!(!ended.stderr.contains("disk0"), "{name}: {}", ended.stderr);
        let came = if came { "" } else { ", before its moment" };
        say(&format!("the end with {name} took {} ms{came}, code {}", took.as_millis(), ended.code()));
        drop(link);
        // A connection that came meanwhile is nobody's any more.
        while interposer.accept(&mut kept, Duration::ZERO).is_ok() {}
    }
    succeed("job=verify ops=200 depth=4", &["--disk", &stage.honest]);
}

/// Passes everything on while something happens.
fn serve_until<T: Send>(interposer: &Interposer<'_>, mut kept: Kept, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let (done, over) = mpsc::channel::<()>();
        let worker = scope.spawn(move || {
            let result = work();
            drop(done);
            result
        });
        while over.try_recv() != Err(mpsc::TryRecvError::Disconnected) {
            let Ok(mut link) = interposer.accept(&mut kept, Duration::from_millis(50)) else { continue };
            while over.try_recv() != Err(mpsc::TryRecvError::Disconnected)
                && link.pass_for(Duration::from_millis(50)).is_some()
            {}
        }
        worker.join().expect("the guest ends")
    })
}
