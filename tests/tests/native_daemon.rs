//! Daemons that die, hang or stay away under a guest on the host's own KVM: the guest only sees a pause, and ending never
//! needs them.
//!
//! The guest checks all that it reads against a model of its own, and ends with an error for a request that does not come
//! back, comes back twice, or brings or leaves anything but what it should.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::{Duration, Instant};

use ringvm_tests::embedded::{assert_success, disk, figure, guest, image, net, ready, succeed};
use ringvm_tests::host::say;
use ringvm_tests::native::{self, Ended, Place, Running, child_after, random, send};
use ringvm_tests::paths;
use rustix::process::Signal;
use tempfile::{NamedTempFile, TempDir};

/// For anything that takes milliseconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(60);
/// For a guest's whole job while daemons come and go.
const JOB_LIMIT: Duration = Duration::from_secs(300);
/// For an end that waits for nobody: well below any limit of a wait for a daemon.
const AT_ONCE: Duration = Duration::from_secs(8);
const AWAY: &str = " is away (";
const BACK: &str = " is back";

/// Checks that each absence of the daemon was said once, and then its return. Returns how many there were.
#[track_caller]
fn assert_told_once(said: &str) -> usize {
    let told: Vec<_> = said.lines().filter(|line| line.contains(AWAY) || line.contains(BACK)).collect();
    for pair in told.chunks(2) {
        assert!(pair.len() == 2 && pair[0].contains(AWAY) && pair[1].contains(BACK), "{pair:?} in {said}");
    }
    told.len() / 2
}

/// A guest with a job on two queues, which has begun it.
fn begun(job: &str, disk: &str) -> Running {
    let mut running = guest(&format!("{job} queues=2"), &["--disk", disk]).start().expect("it starts");
    running.expect("ringvm-guest: start job=", LIMIT).expect("the guest comes up");
    running
}

/// Lets a guest with `until=told` come to the end of its job, which must go well.
fn end_well(mut running: Running) -> Ended {
    running.tell_enough().expect("the guest works");
    let ended = running.end(JOB_LIMIT).expect("it ends");
    assert_success(&ended);
    ended
}

/// Kills the daemon of `running` so many times, each at a random moment of its service. `before` is how often it was killed
/// already; returns the daemons that died.
fn kill(running: &mut Running, before: usize, kills: usize) -> BTreeSet<u32> {
    let mut killed = BTreeSet::new();
    let mut last = 0;
    for count in before + 1..=before + kills {
        last = child_after(running.pid(), last, LIMIT).expect("a daemon is started");
        sleep(random(Duration::from_millis(10)));
        send(last, Signal::KILL);
        killed.insert(last);
        running.expect_said(BACK, count, LIMIT).expect("the daemon comes back");
    }
    killed
}

#[test]
fn pitfall_51_two_hundred_kills_lose_nothing_double_nothing_and_hang_nobody() {
    if !ready() {
        return;
    }
    let image = image(64);
    let mut running = begun("job=verify depth=32 until=told", &disk(&image, Place::Daemon, "queues=2"));
    let mut killed = kill(&mut running, 0, 20);
    let early = running.holdings();
    killed.extend(kill(&mut running, 20, 180));
    let late = running.holdings();
    assert_eq!(killed.len(), 200, "each time another daemon");
    late.assert_flat(&early);
    let ended = end_well(running);
    assert_eq!(assert_told_once(&ended.stderr), 200);
    for kind in ["reads", "writes", "discards", "write_zeroes", "flushes", "sectors_checked"] {
        assert!(figure(&ended.stdout, kind) > 0, "{kind} in {}", ended.stdout);
    }
    say(&format!("200 kills: {early:?} after 20, {late:?} after 200"));
}

#[test]
fn pitfall_48_no_interrupt_is_lost_when_the_daemon_is_killed() {
    if !ready() {
        return;
    }
    for words in ["irq=1", "irq=1 event_idx=0"] {
        let image = image(64);
        let disk = disk(&image, Place::Daemon, "queues=2,direct=on");
        let mut running = begun(&format!("job=verify depth=8 until=told {words}"), &disk);
        kill(&mut running, 0, 60);
        let ended = end_well(running);
        assert_eq!(assert_told_once(&ended.stderr), 60);
        assert!(figure(&ended.stdout, "irqs") > 0, "{}", ended.stdout);
    }
}

#[test]
fn a_daemon_that_is_killed_while_it_comes_up_is_one_absence() {
    if !ready() {
        return;
    }
    let image = image(64);
    let mut running = begun("job=verify depth=32 until=told", &disk(&image, Place::Daemon, "queues=2"));
    let mut last = 0;
    for _ in 0..12 {
        let back = running.said().matches(BACK).count();
        for _ in 0..5 {
            last = child_after(running.pid(), last, LIMIT).expect("a daemon is started");
            sleep(random(Duration::from_millis(6)));
            send(last, Signal::KILL);
        }
        // On a busy machine none may have come up, and the guest does not wait for ever.
        running.expect_said(BACK, back + 1, LIMIT).expect("the daemon comes back");
    }
    let ended = end_well(running);
    let absences = assert_told_once(&ended.stderr);
    assert!((1..=60).contains(&absences), "{absences} absences: {}", ended.stderr);
    say(&format!("60 kills, {absences} absences"));
}

/// A disk that a daemon of the test's own serves at a socket.
struct Served {
    folder: TempDir,
    image: NamedTempFile,
    daemon: Option<Running>,
}

impl Served {
    fn new() -> Served {
        let folder = TempDir::new_in(paths::target()).expect("the target folder is writable");
        let mut served = Served { folder, image: image(64), daemon: None };
        served.start();
        served
    }

    fn socket(&self) -> String {
        self.folder.path().join("disk.sock").display().to_string()
    }

    /// `--disk` of the frontend.
    fn option(&self) -> String {
        format!("socket={},queues=2", self.socket())
    }

    fn start(&mut self) {
        let disk = format!("path={},queues=2", self.image.path().display());
        let arguments = ["--socket", &self.socket(), "--disk", &disk];
        let mut daemon =
            native::daemon("ringvm-blk", arguments).and_then(native::RingVm::start).expect("the daemon starts");
        daemon.expect_said(" is ready at ", 1, LIMIT).expect("the daemon comes up");
        self.daemon = Some(daemon);
    }

    fn kill(&mut self) {
        let daemon = self.daemon.take().expect("it was started");
        daemon.signal(Signal::KILL).expect("it runs");
        assert_eq!(daemon.end(LIMIT).expect("it ends").code(), 128 + 9);
    }
}

#[test]
fn a_daemon_of_somebody_else_is_waited_for_and_comes_back() {
    if !ready() {
        return;
    }
    let mut served = Served::new();
    let mut running = begun("job=verify depth=32 until=told", &served.option());
    for count in 1..=30 {
        sleep(random(Duration::from_millis(20)));
        served.kill();
        // Once for longer than any pause between two attempts.
        sleep(if count == 10 { Duration::from_secs(3) } else { random(Duration::from_millis(30)) });
        served.start();
        running.expect_said(BACK, count, LIMIT).expect("the daemon comes back");
    }
    let ended = end_well(running);
    assert_eq!(assert_told_once(&ended.stderr), 30);
}

#[test]
fn resets_while_the_daemon_is_away_need_nobody_and_lose_nothing() {
    if !ready() {
        return;
    }
    let mut served = Served::new();
    // A round ends after a while, whether or not anything came back, and with it all that was in flight.
    let job = "job=reset until=told rounds=20 time=50ms depth=16 ops=2000 stall=60s";
    let mut running = begun(job, &served.option());
    for count in 1..=3 {
        sleep(random(Duration::from_millis(200)));
        served.kill();
        sleep(Duration::from_millis(400));
        served.start();
        running.expect_said(BACK, count, LIMIT).expect("the daemon comes back");
    }
    let ended = end_well(running);
    assert!(figure(&ended.stdout, "abandoned") > 0, "resets met requests in flight: {}", ended.stdout);
    assert_eq!(assert_told_once(&ended.stderr), 3);
}

#[test]
fn pitfall_51_guests_end_and_restart_without_a_daemon() {
    if !ready() {
        return;
    }
    // A guest that gives up and powers off, with requests in flight.
    let mut served = Served::new();
    let mut running = begun("job=rand-write time=600s depth=32 stall=1s", &served.option());
    served.kill();
    running.expect("FAILED stall", LIMIT).expect("the guest gives up");
    assert_eq!(running.end(AT_ONCE).expect("powering off needs no daemon").code(), 0);

    // One that is ended by a signal.
    for signal in [Signal::TERM, Signal::INT] {
        served.start();
        let mut running = begun("job=rand-write time=600s depth=32", &served.option());
        served.kill();
        running.expect_said(AWAY, 1, LIMIT).expect("it notices");
        running.signal(signal).expect("it runs");
        assert_eq!(running.end(AT_ONCE).expect("ending needs no daemon").code(), 0);
    }

    // One that restarts.
    served.start();
    let mut running = guest("job=reboot", &["--disk", &served.option()]).start().expect("it starts");
    running.expect_count("ringvm-guest: hello", 3, LIMIT).expect("it restarts with a daemon");
    served.kill();
    running.expect_said(AWAY, 1, LIMIT).expect("it notices");
    let so_far = running.shown().matches("ringvm-guest: hello").count();
    running.expect_count("ringvm-guest: hello", so_far + 5, LIMIT).expect("it restarts without a daemon");
    running.signal(Signal::TERM).expect("it runs");
    assert_eq!(running.end(AT_ONCE).expect("ending needs no daemon").code(), 0);
}

#[test]
fn pitfall_54_a_daemon_that_hangs_is_not_waited_for_for_ever() {
    if !ready() {
        return;
    }
    let image = image(64);
    let disk = disk(&image, Place::Daemon, "queues=2");
    // A while of silence is a pause.
    let running = begun("job=verify depth=32 until=told", &disk);
    let daemon = child_after(running.pid(), 0, LIMIT).expect("a daemon is started");
    for _ in 0..3 {
        sleep(random(Duration::from_millis(200)));
        send(daemon, Signal::STOP);
        sleep(Duration::from_millis(500));
        send(daemon, Signal::CONT);
    }
    let ended = end_well(running);
    assert_eq!(assert_told_once(&ended.stderr), 0, "nobody was away: {}", ended.stderr);

    // For ever is not.
    let running = begun("job=rand-write time=600s depth=32", &disk);
    let daemon = child_after(running.pid(), 0, LIMIT).expect("a daemon is started");
    send(daemon, Signal::STOP);
    let start = Instant::now();
    running.signal(Signal::TERM).expect("it runs");
    let ended = running.end(Duration::from_secs(150)).expect("it ends without the daemon's answer");
    assert_eq!(ended.code(), 0, "{}", ended.stderr);
    say(&format!("a hung daemon is given up after {:.1} s", start.elapsed().as_secs_f32()));
    // And the image is free.
    succeed("job=verify ops=200 depth=4", &["--disk", &disk]);
}

#[test]
fn a_nic_goes_on_when_its_daemon_is_killed() {
    if !ready() {
        return;
    }
    let folder = TempDir::new_in(paths::target()).expect("the target folder is writable");
    let link = net(&format!("link={},queues=2", folder.path().join("link").display()), Place::Daemon);
    let job = "job=net-tx size=1500 time=1s pairs=2 until=told";
    let mut running = guest(job, &["--net", &link]).start().expect("it starts");
    running.expect("ringvm-guest: start job=net-tx", LIMIT).expect("the guest comes up");
    kill(&mut running, 0, 30);
    let ended = end_well(running);
    assert_eq!(assert_told_once(&ended.stderr), 30);
    assert!(figure(&ended.stdout, "frames") > 0, "{}", ended.stdout);
}

#[test]
fn every_way_to_name_a_daemon_leads_to_it_again_and_again() {
    if !ready() {
        return;
    }
    let served = Served::new();
    let typed = format!("type=blk,socket={},queues=2", served.socket());
    for _ in 0..2 {
        for way in [["--disk", &served.option()], ["--vhost-user", &typed]] {
            let said = succeed("job=verify queues=2 depth=16 ops=2000", &way);
            assert!(figure(&said, "sectors_checked") > 0, "{said}");
        }
    }
    let socket = served.folder.path().join("net.sock").display().to_string();
    let mut daemon = native::daemon("ringvm-net", ["--socket", &socket, "--net", "loopback=on,queues=2"])
        .and_then(native::RingVm::start)
        .expect("the daemon starts");
    daemon.expect_said(" is ready at ", 1, LIMIT).expect("the daemon comes up");
    for _ in 0..2 {
        for way in [["--net", &format!("socket={socket}")], ["--vhost-user", &format!("type=net,socket={socket}")]] {
            for pairs in [1, 2] {
                let said = succeed(&format!("job=net-echo frames=20000 pairs={pairs}"), &way);
                assert_eq!((figure(&said, "frames"), figure(&said, "lost")), (20_000, 0), "{said}");
            }
        }
    }
    daemon.signal(Signal::TERM).expect("it runs");
    assert_eq!(daemon.end(AT_ONCE).expect("it ends").code(), 0);
}
