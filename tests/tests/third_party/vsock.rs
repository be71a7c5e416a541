//! `ringvm-vsock` under Linux's driver, in QEMU and in User Mode Linux: data both ways over connections that either side makes,
//! many connections at once, programs that vanish in the middle, and a reboot.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ringvm_tests::host::{Need, need, say};
use ringvm_tests::native::{Running, daemon, program};
use ringvm_tests::paths;
use ringvm_tests::streams::{Streamed, is_of_a_lost_peer};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::qemu::{Guest, machine};
use crate::served::Daemon;
use crate::{alone, ok, scratch, uml};

/// For what takes some seconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(120);
/// Connections that are open at once, beside the streams that move data meanwhile.
const CLIENTS: usize = 40;
const STREAMS: usize = 6;
/// What each of those streams moves: more than the buffers on its way hold.
const PIECE: u64 = 1 << 20;
/// More than a stream moves before its peer vanishes.
const ENDLESS: u64 = 1 << 40;

#[test]
fn a_debian_guest_in_qemu_has_sockets_to_the_host() {
    if !(need(Need::IoUring) && need(Need::Lab)) {
        return;
    }
    let _alone = alone();
    suite("QEMU", 24 << 20, |socket| machine().vsock(socket).boot(false));
}

#[test]
fn user_mode_linux_has_sockets_to_the_host() {
    if !(need(Need::IoUring) && need(Need::Uml)) {
        return;
    }
    let _alone = alone();
    suite("User Mode Linux", 256 << 20, |socket| uml::boot(uml::VSOCK, socket, &[]));
}

/// All of it with a guest that `boot` starts over the daemon's socket. Four streams move so many bytes.
fn suite(name: &str, bytes: u64, boot: impl FnOnce(&Path) -> Guest) {
    let folder = scratch();
    let (vhost, socket) = (folder.path().join("vhost.sock"), folder.path().join("v.sock"));
    let options = [vhost.display().to_string(), format!("cid=3,socket={}", socket.display())];
    let served =
        Daemon::start(move || ok(daemon("ringvm-vsock", ["-v", "--socket", &options[0], "--vsock", &options[1]])));
    let mut guest = boot(&vhost);
    let begun = Instant::now();
    streams(name, &mut guest, &socket, bytes);
    many_at_once(&mut guest, &socket);
    a_peer_vanishes(&mut guest, &socket);
    streams(name, &mut guest, &socket, PIECE);
    reboot(&mut guest, &socket);
    streams(name, &mut guest, &socket, PIECE);
    guest.power_off();
    served.terminate();
    assert!(!socket.exists(), "the daemon has removed its socket");
    say(&format!("{name}, vsock: {:.1} s with a reboot", begun.elapsed().as_secs_f32()));
}

/// Where a program of the host listens for the guest's connections to a port.
fn at_port(socket: &Path, port: usize) -> PathBuf {
    PathBuf::from(format!("{}_{port}", socket.display()))
}

/// `lab-stream` on the host.
fn lab_stream(words: [&str; 4]) -> Running {
    ok(program(ok(paths::helper("lab-stream")), words).start())
}

/// Waits for the host's end of a stream; what it said.
fn finish(running: Running) -> String {
    let ended = ok(running.end(LIMIT));
    assert_eq!(ended.code(), 0, "{}", ended.stderr);
    ended.stdout
}

/// One stream after another, each way and made by each side. Both ends must have seen the same bytes.
fn streams(name: &str, guest: &mut Guest, socket: &Path, bytes: u64) {
    let (to, from) = (at_port(socket, 5000), at_port(socket, 5001));
    let (to, from) = (format!("unix:{}", to.display()), format!("unix:{}", from.display()));
    let (hybrid, amount) = (format!("hybrid:{}", socket.display()), bytes.to_string());
    let ways = [
        (["listen", &to, "receive"], "connect vsock:2:5000 send"),
        (["listen", &from, "send"], "connect vsock:2:5001 receive"),
        (["connect", &format!("{hybrid}:6000"), "receive"], "listen vsock:3:6000 send"),
        (["connect", &format!("{hybrid}:6001"), "send"], "listen vsock:3:6001 receive"),
    ];
    for ([side, address, direction], there) in ways {
        if side == "listen" {
            // That of the last time.
            _ = std::fs::remove_file(address.trim_start_matches("unix:"));
        }
        let running = lab_stream([side, address, direction, &amount]);
        let theirs = guest.run_for(LIMIT, &format!("lab-stream {there} {amount}"));
        let ours = finish(running);
        let (here, far) = (Streamed::read(&ours, bytes), Streamed::read(&theirs, bytes));
        assert_eq!(here.sum, far.sum, "the host: {ours}; the guest, {there}: {theirs}");
        if bytes > PIECE {
            say(&format!("{name}, {there}: {:.0} MiB/s", here.rate()));
        }
    }
}

/// A program of the host that listens at a port, with a limit of time for each wait.
fn listen(socket: &Path, port: usize) -> UnixListener {
    let listener = ok(UnixListener::bind(at_port(socket, port)));
    ok(set_socket_timeout(&listener, Timeout::Recv, Some(LIMIT)));
    listener
}

/// The next connection of the guest's.
fn accept(listener: &UnixListener) -> UnixStream {
    let (stream, _) = ok(listener.accept().map_err(|e| format!("the guest does not connect: {e}")));
    ok(stream.set_read_timeout(Some(LIMIT)).and_then(|()| stream.set_write_timeout(Some(LIMIT))));
    stream
}

/// Connections that are all open before the first one gets its answer, while streams move data both ways beside them.
fn many_at_once(guest: &mut Guest, socket: &Path) {
    let listener = listen(socket, 7000);
    let to = (1..=STREAMS).map(|n| {
        let address = format!("unix:{}", at_port(socket, 7100 + n).display());
        lab_stream(["listen", &address, "receive", &PIECE.to_string()])
    });
    let from = (1..=STREAMS).map(|n| {
        let address = format!("hybrid:{}:{}", socket.display(), 7200 + n);
        lab_stream(["connect", &address, "send", &PIECE.to_string()])
    });
    let ends: Vec<_> = to.chain(from).collect();
    let begun = guest.begin(&format!(
        "cd /dev/shm; for n in $(seq {CLIENTS}); do \
           lab-stream talk vsock:2:7000 ask-$n answer-$n. >talk-$n 2>&1 & \
         done; \
         for n in $(seq {STREAMS}); do \
           lab-stream connect vsock:2:$((7100 + n)) send {PIECE} >to-$n 2>&1 & \
           lab-stream listen vsock:3:$((7200 + n)) receive {PIECE} >from-$n 2>&1 & \
         done; \
         wait; for n in $(seq {STREAMS}); do cat to-$n; done; for n in $(seq {STREAMS}); do cat from-$n; done; \
         for n in $(seq {CLIENTS}); do cat talk-$n; done; rm to-* from-* talk-*"
    ));
    let clients: Vec<_> = (0..CLIENTS).map(|_| accept(&listener)).collect();
    let ours: Vec<_> = ends.into_iter().map(finish).collect();
    for mut client in clients {
        let mut line = String::new();
        ok(BufReader::new(&client).read_line(&mut line));
        let number = line.trim_end().strip_prefix("ask-");
        let number = number.unwrap_or_else(|| panic!("a client asks {line:?}"));
        ok(client.write_all(format!("answer-{number}.").as_bytes()));
    }
    let said = guest.finish(&begun, LIMIT);
    let theirs: Vec<_> = said.lines().collect();
    assert_eq!(theirs.len(), 2 * STREAMS + CLIENTS, "{said}");
    let (theirs, answers) = theirs.split_at(2 * STREAMS);
    for (ours, theirs) in ours.iter().zip(theirs) {
        let (here, far) = (Streamed::read(ours, PIECE), Streamed::read(theirs, PIECE));
        assert_eq!(here.sum, far.sum, "the host: {ours}; the guest: {theirs}");
    }
    for (n, answer) in (1..).zip(answers) {
        assert_eq!(*answer, format!("answer-{n}."));
    }
}

/// A program is killed in the middle of a stream, on either side. The other side hears of it.
fn a_peer_vanishes(guest: &mut Guest, socket: &Path) {
    let listener = listen(socket, 7001);
    let mut some = vec![0; PIECE as usize];

    let begun = guest.begin(&format!("! lab-stream connect vsock:2:7001 send {ENDLESS}"));
    let mut client = accept(&listener);
    ok(client.read_exact(&mut some));
    // With bytes in it that were not read, as the kernel closes the sockets of a killed process.
    drop(client);
    let said = guest.finish(&begun, LIMIT);
    assert!(is_of_a_lost_peer(&said), "the guest's program says {said}");

    guest.run(&format!("lab-stream connect vsock:2:7001 send {ENDLESS} >/dev/null 2>&1 & echo $! >/dev/shm/pid"));
    let mut client = accept(&listener);
    ok(client.read_exact(&mut some));
    guest.run("kill -9 $(cat /dev/shm/pid)");
    // What was under way comes, then the end.
    while ok(client.read(&mut some)) > 0 {}
}

/// A connection ends with the guest that has it.
fn reboot(guest: &mut Guest, socket: &Path) {
    let listener = listen(socket, 7002);
    guest.run("lab-stream talk vsock:2:7002 ask answer >/dev/null 2>&1 &");
    let mut client = BufReader::new(accept(&listener));
    let mut line = String::new();
    ok(client.read_line(&mut line));
    assert_eq!(line, "ask\n");
    guest.reboot();
    let mut rest = Vec::new();
    ok(client.read_to_end(&mut rest));
    assert_eq!(rest, b"");
}
