//! `ringvm-vsock` with a client of ours: what a device of another crate's kind can't do is neither offered nor served.

mod common;

use std::os::fd::AsFd;
use std::process::Command;

use common::client::{Client, PROTOCOL_FEATURES, eventfd, longs, memfd, words};
use common::{Daemon, scratch};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::FrontendReq;

/// INFLIGHT_SHMFD, LOG_SHMFD, DEVICE_STATE, and both bits of rings that stop with requests left.
const RECOVERY: u64 = 1 << 12 | 1 << 1 | 1 << 19 | 1 << 20 | 1 << 23;
/// MQ, REPLY_ACK, CONFIG.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9;
const LOG_ALL: u64 = 1 << 26;
const VERSION_1: u64 = 1 << 32;

#[test]
fn what_is_not_offered_is_not_served() {
    let dir = scratch();
    let (socket, host) = (dir.path().join("vhost"), dir.path().join("v"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringvm-vsock"));
    let vsock = format!("cid=3,socket={}", host.display());
    let daemon = Daemon::spawn(command.arg("--socket").arg(&socket).args(["--vsock", &vsock]));
    daemon.wait_for("is ready", 1);
    let connect = || {
        let mut client = Client::connect(&socket);
        client.send(FrontendReq::SET_OWNER, &[], &[]);
        client.send(FrontendReq::SET_PROTOCOL_FEATURES, &longs(&[PROTOCOL]), &[]);
        client.acks = true;
        client
    };
    let mut client = connect();
    let features = client.ask_number(FrontendReq::GET_FEATURES);
    assert_eq!(features & (VERSION_1 | PROTOCOL_FEATURES | LOG_ALL), VERSION_1 | PROTOCOL_FEATURES);
    assert_eq!(client.ask_number(FrontendReq::GET_PROTOCOL_FEATURES) & (RECOVERY | PROTOCOL), PROTOCOL);
    assert!(!client.try_tell(FrontendReq::SET_FEATURES, &longs(&[VERSION_1 | PROTOCOL_FEATURES | LOG_ALL]), &[]));
    assert!(!client.try_tell(FrontendReq::SET_PROTOCOL_FEATURES, &longs(&[PROTOCOL | 1 << 12]), &[]));
    let memory = memfd(1 << 20, MemfdFlags::ALLOW_SEALING);
    let event = eventfd();
    let table = [longs(&[1 << 20, 0]), words(&[3 | 256 << 16])].concat();
    // These have no answer of their own.
    for (request, body, file) in
        [(FrontendReq::SET_INFLIGHT_FD, table.clone(), &memory), (FrontendReq::SET_LOG_FD, Vec::new(), &event)]
    {
        assert!(!client.try_tell(request, &body, &[file.as_fd()]), "{request:?}");
    }
    drop(client);
    // An answer to these could not say so: the connection ends.
    for (request, body, file) in [
        (FrontendReq::GET_INFLIGHT_FD, table, None),
        (FrontendReq::SET_LOG_BASE, longs(&[1 << 20, 0]), Some(&memory)),
        (FrontendReq::SET_DEVICE_STATE_FD, words(&[0, 0]), Some(&event)),
        (FrontendReq::CHECK_DEVICE_STATE, Vec::new(), None),
    ] {
        let mut client = connect();
        let files: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        client.send(request, &body, &files);
        assert!(client.is_dropped(), "{request:?}");
    }
    // The next client is served.
    assert_eq!(connect().ask_number(FrontendReq::GET_QUEUE_NUM), 3);
    daemon.terminate();
}
