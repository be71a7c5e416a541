//! `ringvm-console` with a client of ours: a console in another process, whose people come and go.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::client::{Client, GUEST, Memory, PROTOCOL_FEATURES, Ring, longs, words};
use common::{Daemon, PATIENCE, scratch, wait};
use ringvm_backends::testing::driver::Buffer;
use rustix::fs::MemfdFlags;
use rustix::termios::{Winsize, tcsetwinsize};
use vhost::vhost_user::message::FrontendReq;
use vm_memory::{Bytes, GuestAddress};

const RX_DATA: u64 = GUEST + 0x20_0000;
const TX_DATA: u64 = GUEST + 0x30_0000;
/// VERSION_1 and the vhost-user bit.
const FEATURES: u64 = 1 << 32 | PROTOCOL_FEATURES;
/// VIRTIO_CONSOLE_F_SIZE, which a terminal has.
const SIZE: u64 = 1;
/// MQ, REPLY_ACK, CONFIG.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9;

/// A frontend with both queues of a console.
struct Guest {
    client: Client,
    memory: Memory,
    rx: Ring,
    tx: Ring,
}

impl Guest {
    /// Takes the features, and those of `more`: SIZE or none.
    fn connect(socket: &Path, more: u64) -> Self {
        let mut client = Client::connect(socket);
        client.send(FrontendReq::SET_OWNER, &[], &[]);
        let features = FEATURES | more;
        assert_eq!(client.ask_number(FrontendReq::GET_FEATURES) & (FEATURES | SIZE), features);
        assert_eq!(client.ask_number(FrontendReq::GET_PROTOCOL_FEATURES) & PROTOCOL, PROTOCOL);
        client.send(FrontendReq::SET_PROTOCOL_FEATURES, &longs(&[PROTOCOL]), &[]);
        client.acks = true;
        client.tell(FrontendReq::SET_FEATURES, &longs(&[features]), &[]);
        assert_eq!(client.ask_number(FrontendReq::GET_QUEUE_NUM), 2);
        let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
        client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
        let (rx, tx) = (Ring::new(&memory, 0), Ring::new(&memory, 1));
        rx.start(&mut client);
        tx.start(&mut client);
        Self { client, memory, rx, tx }
    }

    fn say(&mut self, text: &[u8]) {
        self.memory.mem.write_slice(text, GuestAddress(TX_DATA)).unwrap();
        self.tx.driver.add(&[Buffer { addr: TX_DATA, len: text.len() as u32, writable: false }]).unwrap();
        self.tx.driver.publish();
        self.tx.kick();
        wait("the output is taken", || self.tx.driver.next_used().is_some());
    }

    fn hear(&mut self, count: usize) -> Vec<u8> {
        let mut heard = Vec::new();
        while heard.len() < count {
            self.rx.driver.add(&[Buffer { addr: RX_DATA, len: 64, writable: true }]).unwrap();
            self.rx.driver.publish();
            self.rx.kick();
            let mut used = None;
            wait("there is input", || {
                used = self.rx.driver.next_used();
                used.is_some()
            });
            let mut piece = vec![0; used.unwrap().1 as usize];
            self.memory.mem.read_slice(&mut piece, GuestAddress(RX_DATA)).unwrap();
            heard.extend(piece);
        }
        assert!(Ring::called(&self.rx.call, Duration::from_secs(5)));
        heard
    }
}

fn daemon(socket: &Path, console: &str) -> Daemon {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringvm-console"));
    let daemon = Daemon::spawn(command.arg("--socket").arg(socket).args(["--console", console]));
    daemon.wait_for("is ready", 1);
    daemon
}

#[test]
fn a_client_of_the_console_outlives_the_frontend() {
    let dir = scratch();
    let (socket, login) = (dir.path().join("v"), dir.path().join("login"));
    let daemon = daemon(&socket, &format!("socket={}", login.display()));
    // Before anybody looks, and before there is a guest at all.
    let mut person = UnixStream::connect(&login).unwrap();
    person.set_read_timeout(Some(PATIENCE)).unwrap();
    person.write_all(b"early").unwrap();
    for round in 0..3 {
        let mut guest = Guest::connect(&socket, 0);
        let mut got = [0; 6];
        guest.say(b"login:");
        person.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"login:");
        if round > 0 {
            person.write_all(b"again").unwrap();
        }
        assert_eq!(guest.hear(5), if round == 0 { *b"early" } else { *b"again" });
        // There is no terminal, so no size, and no more of the space than there is.
        let config = guest.client.ask(FrontendReq::GET_CONFIG, &words(&[0, 12, 0]));
        assert_eq!(config[12..], [0; 12]);
    }
    drop(person);
    let mut guest = Guest::connect(&socket, 0);
    guest.say(b"kept");
    let mut next = UnixStream::connect(&login).unwrap();
    let mut got = [0; 4];
    next.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"kept");
    daemon.terminate();
    assert!(!login.exists());
}

#[test]
fn a_pseudoterminal_is_named_and_a_file_is_filled() {
    let dir = scratch();
    let socket = dir.path().join("v");
    let pty = daemon(&socket, "pty");
    let said = pty.said();
    let line = said.iter().find_map(|line| line.split_once(" is the terminal ")).expect("the terminal is named");
    let mut guest = Guest::connect(&socket, SIZE);
    guest.say(b"hello");
    let mut slave = File::options()
        .read(true)
        .write(true)
        .custom_flags(rustix::fs::OFlags::NOCTTY.bits() as i32)
        .open(line.1)
        .unwrap();
    let mut got = [0; 5];
    slave.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    let size = Winsize { ws_col: 132, ws_row: 43, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&slave, size).unwrap();
    slave.write_all(b"\x03\r").unwrap();
    assert_eq!(guest.hear(2), b"\x03\r");
    wait("the size of the terminal is told", || {
        let config = guest.client.ask(FrontendReq::GET_CONFIG, &words(&[0, 12, 0]));
        config[12..] == [132, 0, 43, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    });
    pty.terminate();

    let (socket, log) = (dir.path().join("w"), dir.path().join("log"));
    let file = daemon(&socket, &format!("file={},max=6", log.display()));
    let mut guest = Guest::connect(&socket, 0);
    guest.say(b"first");
    guest.say(b"second");
    assert!(file.terminate().iter().any(|line| line.contains("grown to its limit")));
    assert_eq!(std::fs::read(&log).unwrap(), b"firsts");
}

#[test]
fn what_cannot_be_a_console_is_refused_in_a_line() {
    let dir = scratch();
    for (console, reason) in [
        ("", "no end on the host"),
        ("tty", "`tty` is not one of stdio, pty, null"),
        ("socket=/nowhere/at/all", "No such file"),
        ("pty,file=log", "more than one end"),
        ("file=log,max=0", "max=0"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringvm-console"));
        let command = command.arg("--socket").arg(dir.path().join("v")).args(["--console", console]);
        let (status, said) = Daemon::spawn(command).end();
        assert_eq!(status.code(), Some(2), "{console}: {said:?}");
        assert!(said.len() == 1 && said[0].contains(reason), "{console}: {said:?}");
    }
}

#[test]
fn a_frontend_changes_its_memory_while_the_queues_are_stopped() {
    let dir = scratch();
    let socket = dir.path().join("v");
    let daemon = daemon(&socket, "null");
    let mut guest = Guest::connect(&socket, 0);
    for _ in 0..3 {
        guest.say(b"some output");
        for index in [0, 1] {
            guest.client.ask(FrontendReq::GET_VRING_BASE, &words(&[index, 0]));
        }
        let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
        guest.client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
        let (rx, tx) = (Ring::new(&memory, 0), Ring::new(&memory, 1));
        rx.start(&mut guest.client);
        tx.start(&mut guest.client);
        guest = Guest { memory, rx, tx, ..guest };
    }
    guest.say(b"more output");
    let said = daemon.terminate();
    assert!(!said.iter().any(|line| line.contains("still in use")), "{said:?}");
}
