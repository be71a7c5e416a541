//! Readers that are absent, come later, vanish and come again.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::super::backlog::CAPACITY;
use super::*;

fn client(path: &Path) -> UnixStream {
    let client = UnixStream::connect(path).unwrap();
    client.set_nonblocking(true).unwrap();
    client
}

/// Reads until `count` bytes have come.
fn read_all(rig: &mut Rig, from: &mut impl Read, count: usize) -> Vec<u8> {
    let mut got = Vec::new();
    rig.until(|_| {
        drain(from, &mut got);
        got.len() >= count
    });
    got
}

/// Sends more than is kept, and returns what is.
fn send_too_much(rig: &mut Rig) -> Vec<u8> {
    let text = text(3 * CAPACITY + 17);
    rig.send_all(&text, 5000, || {});
    text[text.len() - CAPACITY..].to_vec()
}

#[test]
fn a_client_of_the_socket_gets_the_newest_output_and_types() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    let mut rig = Rig::new(socket_at(&path));
    for _ in 0..3 {
        let kept = send_too_much(&mut rig);
        assert_eq!(rig.pump(), 0);
        let mut first = client(&path);
        assert!(read_all(&mut rig, &mut first, kept.len()) == kept);
        first.write_all(b"typed").unwrap();
        let before = rig.received.len();
        rig.receive(before + 5, 64);
        assert_eq!(&rig.received[before..], b"typed");
        rig.send(b"more", &[2, 2]);
        assert_eq!(read_all(&mut rig, &mut first, 4), b"more");
        rig.sent();
        drop(first);
        rig.pump();
        assert_eq!(rig.pump(), 0);
    }
    drop(rig);
    assert!(!path.exists());
}

#[test]
fn a_second_client_is_refused_while_the_first_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    let mut rig = Rig::new(socket_at(&path));
    let mut first = client(&path);
    rig.pump();
    let mut second = client(&path);
    rig.pump();
    second.set_nonblocking(false).unwrap();
    assert_eq!(second.read(&mut [0; 1]).unwrap(), 0);
    rig.send(b"for the first", &[13]);
    assert_eq!(read_all(&mut rig, &mut first, 13), b"for the first");
    // The first goes and a third comes before the console looks.
    drop(first);
    let mut third = client(&path);
    rig.pump();
    rig.send(b"for the third", &[13]);
    assert_eq!(read_all(&mut rig, &mut third, 13), b"for the third");
}

#[test]
fn a_client_that_is_slow_loses_nothing_and_one_that_vanishes_frees_the_queue() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    let mut rig = Rig::new(socket_at(&path));
    let mut slow = client(&path);
    rig.pump();
    let text = text(0x4000);
    let mut count = 0;
    // Until the socket and the backlog are full.
    while rig.send(&text, &[0x4000]) {
        rig.pump();
        rig.sent();
        count += 1;
        assert!(count < 1000, "the socket has no end");
    }
    let got = read_all(&mut rig, &mut slow, count * text.len());
    assert!(got == text.repeat(count));
    rig.sent();
    while rig.send(&text, &[0x4000]) {
        rig.pump();
        rig.sent();
    }
    drop(slow);
    rig.pump();
    rig.sent();
    assert_eq!(rig.tx.in_flight(), 0);
    assert_eq!(read_all(&mut rig, &mut client(&path), CAPACITY).len(), CAPACITY);
}

#[test]
fn input_of_a_client_that_goes_at_once_arrives() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    let mut rig = Rig::new(socket_at(&path));
    client(&path).write_all(b"one ").unwrap();
    rig.pump();
    let mut second = client(&path);
    rig.pump();
    second.write_all(b"two").unwrap();
    rig.receive(7, 3);
    assert_eq!(rig.received, b"one two");
    // A client that has said everything still reads.
    second.shutdown(std::net::Shutdown::Write).unwrap();
    rig.pump();
    assert_eq!(rig.pump(), 0);
    rig.send(b"answer", &[6]);
    assert_eq!(read_all(&mut rig, &mut second, 6), b"answer");
}

#[test]
fn sockets_in_use_and_long_paths_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.sock");
    let options = |path: &Path| ConsoleOptions { socket: Some(path.into()), ..ConsoleOptions::default() };
    let refused = || End::open("console7", &checked(options(&path))).unwrap_err().to_string();
    let first = socket_at(&path);
    let in_use = "another process listens there; end it, or give another socket=";
    assert_eq!(refused(), format!("console7: {}: {in_use}", path.display()));
    // One that an ended process has left is not in use.
    std::fs::rename(&path, dir.path().join("moved")).unwrap();
    drop(first);
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    drop(socket_at(&path));
    Checked::new(options(&dir.path().join("x".repeat(200)))).unwrap_err();
    std::fs::write(&path, "a file").unwrap();
    let error = refused();
    assert!(
        error.starts_with("console7: ") && error.ends_with("a file that is no socket is there; give another socket="),
        "{error}"
    );
}

#[test]
fn links_in_the_place_of_files_are_refused_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.log");
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).unwrap();
    let options = checked(ConsoleOptions { file: Some(path.clone()), ..ConsoleOptions::default() });
    let text = format!("console0: {}: it is a symbolic link; name the file itself", path.display());
    assert_eq!(End::open("console0", &options).unwrap_err().to_string(), text);
}

#[test]
fn a_pseudoterminal_is_opened_and_closed_and_opened_again() {
    let mut rig = Rig::new(pty());
    let path = rig.console.slave().unwrap().to_owned();
    for round in 0..5 {
        assert_eq!(rig.pump(), 0, "nothing happens while it is closed");
        let kept = send_too_much(&mut rig);
        let mut slave = terminal(&path);
        assert!(read_all(&mut rig, &mut slave, kept.len()) == kept, "round {round}");
        // Raw mode: no echo, no translation.
        slave.write_all(b"a\rb\n\x03").unwrap();
        let before = rig.received.len();
        rig.receive(before + 5, 64);
        assert_eq!(&rig.received[before..], b"a\rb\n\x03");
        rig.send(b"\nno translation\n", &[16]);
        assert_eq!(read_all(&mut rig, &mut slave, 16), b"\nno translation\n");
        rig.sent();
        drop(slave);
        rig.pump();
    }
}

#[test]
fn a_pseudoterminal_whose_reader_is_slow_loses_nothing() {
    let mut rig = Rig::new(pty());
    let mut slave = terminal(rig.console.slave().unwrap());
    rig.pump();
    let text = text(0x4000);
    let mut count = 0;
    while rig.send(&text, &[0x4000]) {
        rig.pump();
        rig.sent();
        count += 1;
        assert!(count < 1000, "the terminal has no end");
    }
    assert!(read_all(&mut rig, &mut slave, count * text.len()) == text.repeat(count));
}

#[test]
fn a_file_grows_to_its_limit_and_the_guest_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.log");
    for max in [1, 4096, 100_000, 1 << 20] {
        let end = open(ConsoleOptions { file: Some(path.clone()), max, ..ConsoleOptions::default() });
        let mut rig = Rig::new(end);
        let text = text(300_000);
        rig.send_all(&text, 7777, || {});
        assert_eq!(rig.pump(), 0);
        drop(rig);
        assert!(std::fs::read(&path).unwrap() == text[..text.len().min(max as usize)]);
    }
}

#[test]
fn an_output_without_a_reader_is_given_up() {
    let (read, write) = pipe();
    let mut rig = Rig::new(End::descriptors(null_input(), write));
    drop(read);
    rig.pump();
    rig.send_all(&text(300_000), 4096, || {});
    assert_eq!(rig.pump(), 0);
}

#[test]
fn the_rest_of_the_output_is_written_when_the_console_ends() {
    let (read, write) = pipe();
    rustix::pipe::fcntl_setpipe_size(&write, 4096).unwrap();
    let mut rig = Rig::new(End::descriptors(null_input(), write));
    let text = text(60_000);
    rig.send(&text, &[60_000]);
    assert_eq!(rig.sent(), 1);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        File::from(read).read_to_end(&mut all).unwrap();
        all
    });
    drop(rig);
    assert!(reader.join().unwrap() == text);
    // A reader that does not read is not waited for without end.
    let (_read, write) = pipe();
    let mut rig = Rig::new(End::descriptors(null_input(), write));
    rig.send(&[0; 0x20_000], &[0x20_000]);
    let start = Instant::now();
    drop(rig);
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_slow_reader_of_the_rest_is_waited_for_less_than_a_hosted_device_is() {
    let (read, write) = pipe();
    rustix::pipe::fcntl_setpipe_size(&write, 4096).unwrap();
    let mut rig = Rig::new(End::descriptors(null_input(), write));
    rig.send(&text(60_000), &[60_000]);
    // It reads now and then, and would take three seconds for everything.
    let reader = std::thread::spawn(move || {
        let (mut read, mut count) = (File::from(read), 0);
        let mut piece = [0; 4096];
        while let Ok(some @ 1..) = read.read(&mut piece) {
            count += some;
            std::thread::sleep(Duration::from_millis(200));
        }
        count
    });
    let start = Instant::now();
    drop(rig);
    let elapsed = start.elapsed();
    assert!((Duration::from_millis(600)..Duration::from_secs(10)).contains(&elapsed), "{elapsed:?}");
    let count = reader.join().unwrap();
    assert!((4096..60_000).contains(&count), "{count} bytes were read");
}

#[test]
fn nothing_is_a_place_too() {
    let mut rig = Rig::new(open(ConsoleOptions { kind: Some(Kind::Null), ..ConsoleOptions::default() }));
    rig.offer_input(0, 100);
    rig.send_all(&text(300_000), 60_000, || {});
    assert_eq!(rig.pump(), 0);
    assert_eq!(rig.rx.used_index(), 0);
}
