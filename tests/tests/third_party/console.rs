//! `ringvm-console` under Linux's driver: megabytes both ways, and a shell that one client after another talks to. QEMU 7.2 has
//! neither a vhost-user console nor a device for any backend, so User Mode Linux stands for all foreign frontends here.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use ringvm_tests::host::{Need, need, say};
use ringvm_tests::native::{daemon, program};
use ringvm_tests::paths;

use crate::qemu::Guest;
use crate::served::Daemon;
use crate::{alone, ok, scratch, uml};

/// The work takes some seconds on an idle machine.
const LIMIT: Duration = Duration::from_secs(120);
/// What the console keeps for its reader: the guest's output is never dropped if it waits for a word after so much, however
/// long the reader is not scheduled.
const WINDOW: usize = 64 << 10;
const WINDOWS: usize = 64;

#[test]
fn user_mode_linux_has_a_console() {
    if !(need(Need::IoUring) && need(Need::Uml)) {
        return;
    }
    let _alone = alone();
    let folder = scratch();
    let (vhost, login) = (folder.path().join("vhost.sock"), folder.path().join("login.sock"));
    let options = [vhost.display().to_string(), format!("socket={}", login.display())];
    let served =
        Daemon::start(move || ok(daemon("ringvm-console", ["-v", "--socket", &options[0], "--console", &options[1]])));
    let mut guest = uml::boot(uml::CONSOLE, &vhost, &[]);
    for after in ["a boot", "a reboot"] {
        let begun = Instant::now();
        megabytes(&mut guest, &login);
        let seconds = begun.elapsed().as_secs_f32();
        say(&format!(
            "User Mode Linux, console, {} MiB in and out after {after}: {seconds:.1} s",
            (WINDOW * WINDOWS) >> 20
        ));
        shell(&mut guest, &login);
        if after == "a boot" {
            guest.reboot();
        }
    }
    guest.power_off();
    served.terminate();
    assert!(!login.exists(), "the daemon has removed its socket");
}

/// The guest keeps what it is sent, and sends it back.
fn megabytes(guest: &mut Guest, login: &Path) {
    let total = WINDOW * WINDOWS;
    let mut sent = vec![0; total];
    ok(std::fs::File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut sent)));
    let begun = guest.begin(&format!(
        "exec 3<>/dev/hvc0; stty raw -echo <&3; echo ready >&3; head -c {total} <&3 >/dev/shm/all; n=0; \
         while [ $n -lt {WINDOWS} ]; do \
           dd if=/dev/shm/all bs={WINDOW} skip=$n count=1 2>/dev/null >&3; IFS= read -r word <&3; n=$((n + 1)); \
         done; rm /dev/shm/all"
    ));
    let mut client = ok(UnixStream::connect(login));
    ok(client.set_read_timeout(Some(LIMIT)).and_then(|()| client.set_write_timeout(Some(LIMIT))));
    // Its terminal is raw then. The last thing that a shell has said may come before that.
    let mut heard = Vec::new();
    while !heard.ends_with(b"ready\n") {
        let mut byte = [0];
        ok(client.read_exact(&mut byte));
        heard.extend(byte);
    }
    ok(client.write_all(&sent));
    let mut received = vec![0; WINDOW];
    for (n, window) in sent.chunks(WINDOW).enumerate() {
        ok(client.read_exact(&mut received));
        let wrong = window.iter().zip(&received).position(|(sent, received)| sent != received);
        assert_eq!(wrong.map(|at| n * WINDOW + at), None, "the first wrong byte");
        ok(client.write_all(b"next\n"));
    }
    guest.finish(&begun, LIMIT);
}

/// A shell answers one client after another.
fn shell(guest: &mut Guest, login: &Path) {
    guest.run("setsid sh </dev/hvc0 >/dev/hvc0 2>&1 &");
    for (words, answer) in [("echo answer-$((40 + 2))", "answer-42"), ("cat /proc/version", "Linux version")] {
        let address = format!("unix:{}", login.display());
        let ended = ok(program(ok(paths::helper("lab-stream")), ["talk", &address, words, answer]).run());
        assert_eq!(ended.code(), 0, "{}", ended.stderr);
        assert!(ended.stdout.contains(answer), "{}", ended.stdout);
    }
}
