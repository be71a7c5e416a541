//! Sessions and daemons come to their end in time, whatever storage and clients do.

mod common;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::client::{Client, FEATURES, Memory, Ring, SIZE, longs, running, words};
use common::stuck::{self, Kind};
use common::stuck_disk::StuckDisk;
use common::{Daemon, image, scratch};
use rustix::fs::MemfdFlags;
use rustix::process::Signal;
use vhost::vhost_user::message::FrontendReq;

/// What a daemon may take for its end, and some more for a machine that is busy.
const END: Duration = Duration::from_secs(5 + 5);

#[test]
fn is_the_daemon_if_told_so() {
    stuck::serve_if_told();
}

/// Makes reads available, to a disk that does not answer them.
fn read(ring: &mut Ring, daemon: &Daemon, count: u64) {
    let before = daemon.count(" reads");
    for slot in 0..count {
        ring.add(slot, 0, None);
    }
    ring.driver.publish();
    ring.kick();
    daemon.wait_for(" reads", before + count as usize);
}

/// A write is answered.
fn writes(ring: &mut Ring) {
    ring.add(20, 0, Some(1));
    ring.driver.publish();
    ring.kick();
    ring.used();
    assert_eq!(ring.status(20), 0);
}

/// Waits for the daemon's end.
fn ends(daemon: Daemon, code: i32) -> Vec<String> {
    let begun = Instant::now();
    let (status, said) = daemon.end();
    assert!(begun.elapsed() < END, "{:?}: {}", begun.elapsed(), said.join("\n"));
    assert_eq!(status.code(), Some(code), "{}", said.join("\n"));
    said
}

/// A client with a table of requests in flight, and everything but rings.
fn with_table(socket: &Path, memory: &Memory, table: &mut Option<(Vec<u8>, OwnedFd)>) -> Client {
    let mut client = Client::connect(socket);
    client.negotiate(FEATURES);
    client.tell(FrontendReq::ADD_MEM_REG, &memory.region(), &[memory.file.as_fd()]);
    let (body, file) = table.get_or_insert_with(|| {
        let mut asked = longs(&[0, 0]);
        asked.extend([1, SIZE, 0, 0].iter().flat_map(|word: &u16| word.to_ne_bytes()));
        client.send(FrontendReq::GET_INFLIGHT_FD, &asked, &[]);
        let (_, body, mut files) = client.receive().expect("a table");
        (body, files.remove(0))
    });
    client.tell(FrontendReq::SET_INFLIGHT_FD, body, &[file.as_fd()]);
    client
}

#[test]
fn requests_of_a_client_that_has_gone_are_not_waited_for() {
    let dir = scratch();
    let daemon = stuck::daemon(dir.path(), &[Kind::Sleeps]);
    for _ in 0..2 {
        let (client, _memory, mut ring) = running(&dir.path().join("0.sock"));
        read(&mut ring, &daemon, 3);
        writes(&mut ring);
        drop(client);
    }
    daemon.terminate();
}

#[test]
fn requests_of_a_client_that_has_gone_stay_in_its_table() {
    let dir = scratch();
    let daemon = stuck::daemon(dir.path(), &[Kind::Sleeps]);
    let (memory, mut table) = (Memory::new(MemfdFlags::ALLOW_SEALING), None);
    let client = |table: &mut _| with_table(&dir.path().join("0.sock"), &memory, table);
    let mut first = client(&mut table);
    let mut ring = Ring::new(&memory, 0);
    ring.start(&mut first);
    read(&mut ring, &daemon, 3);
    drop(first);
    let mut second = client(&mut table);
    ring.start(&mut second);
    daemon.wait_for(" reads", 6);
    // A driver that resets the device wants none of them, and they are nobody's.
    for (served, (reset, body)) in
        [(9, (FrontendReq::SET_STATUS, longs(&[0]))), (12, (FrontendReq::RESET_DEVICE, Vec::new()))]
    {
        second.tell(reset, &body, &[]);
        ring = Ring::new(&memory, 0);
        second.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES]), &[]);
        ring.start(&mut second);
        writes(&mut ring);
        read(&mut ring, &daemon, 3);
        assert_eq!(daemon.count(" reads"), served);
    }
    drop(second);
    daemon.terminate();
}

#[test]
fn a_ring_that_drains_does_not_outlast_client_and_daemon() {
    let dir = scratch();
    let daemon = stuck::daemon(dir.path(), &[Kind::Sleeps]);
    for end in [true, false] {
        let (client, _memory, mut ring) = running(&dir.path().join("0.sock"));
        read(&mut ring, &daemon, 1);
        // Has it wait for all that is in flight.
        client.send(FrontendReq::GET_VRING_BASE, &words(&[0, 0]), &[]);
        if end {
            drop(client);
        } else {
            std::thread::sleep(Duration::from_millis(100));
            daemon.signal(Signal::TERM);
            assert!(ends(daemon, 0).iter().any(|line| line == "Sleeps is flushed"));
            return;
        }
    }
}

#[test]
fn a_message_that_does_not_come_holds_up_no_end() {
    let dir = scratch();
    let daemon = stuck::daemon(dir.path(), &[Kind::Answers]);
    let client = Client::connect(&dir.path().join("0.sock"));
    assert!(client.raw(&[1, 0, 0], &[]));
    std::thread::sleep(Duration::from_millis(100));
    daemon.signal(Signal::TERM);
    assert!(ends(daemon, 0).iter().all(|line| !line.contains("WARN")));
}

#[test]
fn a_state_that_does_not_come_holds_up_no_end() {
    let dir = scratch();
    let daemon = stuck::daemon(dir.path(), &[Kind::Answers]);
    let mut client = Client::connect(&dir.path().join("0.sock"));
    client.negotiate(FEATURES);
    let (out, into) = std::io::pipe().unwrap();
    client.send(FrontendReq::SET_DEVICE_STATE_FD, &words(&[1, 0]), &[out.as_fd()]);
    client.receive().expect("it is taken");
    client.send(FrontendReq::CHECK_DEVICE_STATE, &[], &[]);
    std::thread::sleep(Duration::from_millis(100));
    daemon.signal(Signal::TERM);
    ends(daemon, 0);
    drop(into);
}

#[test]
fn a_storage_that_never_answers_is_given_up_and_the_others_are_flushed() {
    let dir = scratch();
    let daemon = stuck::daemon(dir.path(), &[Kind::Hangs, Kind::FlushHangs, Kind::Sleeps, Kind::Answers]);
    let mut clients: Vec<_> = (0..4).map(|n| running(&dir.path().join(format!("{n}.sock")))).collect();
    for n in [0, 2] {
        read(&mut clients[n].2, &daemon, 1);
    }
    daemon.signal(Signal::TERM);
    let said = ends(daemon, 3);
    let lines = |text: &str| said.iter().filter(|line| line.contains(text)).count();
    for flushed in ["Hangs is flushed", "Sleeps is flushed", "Answers is flushed"] {
        assert_eq!(lines(flushed), 1, "{flushed}: {}", said.join("\n"));
    }
    assert_eq!(lines("disk0: given up with requests in flight; what was answered is on the disk"), 1);
    assert_eq!(lines("disk1: given up before it was flushed; what was written last may be lost"), 1);
    assert_eq!(lines("given up"), 2, "{}", said.join("\n"));
}

#[test]
fn a_second_signal_ends_a_daemon_at_once() {
    let dir = scratch();
    let daemon = stuck::daemon(dir.path(), &[Kind::FlushHangs]);
    let begun = Instant::now();
    daemon.signal(Signal::TERM);
    // Signals that come together are one.
    std::thread::sleep(Duration::from_millis(500));
    daemon.signal(Signal::INT);
    let said = ends(daemon, 3);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert_eq!(said.iter().filter(|line| line.contains("disk0: given up before it was flushed")).count(), 1);
}

#[test]
fn a_second_signal_is_no_failure_of_a_daemon_that_ends_in_time() {
    let dir = scratch();
    let daemon = stuck::daemon(dir.path(), &[Kind::Answers]);
    let _tenant = running(&dir.path().join("0.sock"));
    daemon.signal(Signal::TERM);
    daemon.signal(Signal::INT);
    assert!(!ends(daemon, 0).iter().any(|line| line.contains("given up")));
}

#[test]
fn what_does_not_answer_holds_up_the_next_client_but_not_the_end() {
    let dir = scratch();
    let daemon = stuck::daemon(dir.path(), &[Kind::Hangs]);
    let (client, _memory, mut ring) = running(&dir.path().join("0.sock"));
    read(&mut ring, &daemon, 1);
    drop(client);
    // What is in flight may still be written: nobody else is served meanwhile.
    daemon.wait_for("requests of the last client do not end; until they do, no other is served", 1);
    daemon.signal(Signal::TERM);
    assert!(ends(daemon, 3).iter().any(|line| line.contains("disk0: given up with requests in flight")));
}

#[test]
fn a_file_system_that_never_answers_is_given_up() {
    let disk = match StuckDisk::new() {
        Ok(disk) => disk,
        Err(error) => {
            let allowed = std::env::var("RINGVM_ALLOW_MISSING").unwrap_or_default();
            assert!(
                allowed.split(',').any(|name| name.trim() == "fuse"),
                "this needs `fuse`, which is missing: {error}"
            );
            return eprintln!("skipped, `fuse` is allowed to be missing: {error}");
        }
    };
    let dir = scratch();
    let socket = |n: u32| dir.path().join(format!("{n}.sock"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringvm-blk"));
    // One I/O thread each: a short write to a page cache keeps it.
    command.args(["--io-threads", "2"]);
    for (n, path) in [disk.path(), image(dir.path(), 1 << 20)].into_iter().enumerate() {
        command.arg("--socket").arg(socket(n as u32)).arg("--disk").arg(format!("path={}", path.display()));
    }
    let daemon = Daemon::spawn(&mut command);
    daemon.wait_for("is ready", 2);
    let mut clients: Vec<_> = (0..2).map(|n| running(&socket(n))).collect();
    for (_, _, ring) in &mut clients {
        writes(ring);
    }
    disk.stick();
    let (_, _, ring) = &mut clients[0];
    for slot in 0..3 {
        ring.add(slot, 0, None);
    }
    ring.driver.publish();
    ring.kick();
    clients[1].2.works(7);
    daemon.signal(Signal::TERM);
    let said = ends(daemon, 3);
    let given_up: Vec<_> = said.iter().filter(|line| line.contains("given up")).collect();
    assert_eq!(given_up.len(), 1, "{}", said.join("\n"));
    assert!(given_up[0].contains("disk0: given up before it was flushed; what was written last may be lost"));
}

#[test]
fn an_io_thread_that_panics_ends_the_daemon() {
    let dir = scratch();
    let daemon = stuck::daemon(dir.path(), &[Kind::Panics, Kind::Answers]);
    let (_client, _memory, mut ring) = running(&dir.path().join("0.sock"));
    ring.add(0, 0, None);
    ring.driver.publish();
    ring.kick();
    let said = ends(daemon, 1);
    assert!(said.iter().any(|line| line.contains("I/O thread 0 panicked")), "{}", said.join("\n"));
    assert!(said.iter().any(|line| line.contains("Answers is flushed")), "{}", said.join("\n"));
}
