//! The state of a device over pipes of the frontend's, from one daemon to another.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use common::client::{Client, FEATURES, Memory, Ring, longs, memfd, running, words};
use common::{Daemon, PATIENCE, image, scratch};
use rustix::fs::MemfdFlags;
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection as Direction, VhostTransferStatePhase as Phase,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

/// CONFIG_WCE.
const WCE: u64 = 1 << 11;
const NO_FD: u64 = 1 << 8;

fn daemon(dir: &Path, name: &str) -> (Daemon, Client) {
    let socket = dir.join(name);
    let path = dir.join(format!("{name}.img"));
    std::fs::rename(image(dir, 1 << 20), &path).unwrap();
    let daemon = Daemon::blk(&socket, &format!("path={}", path.display()));
    (daemon, Client::connect(&socket))
}

fn writeback(client: &mut Client) -> u8 {
    client.ask(FrontendReq::GET_CONFIG, &words(&[32, 1, 0]))[12]
}

/// SET_DEVICE_STATE_FD.
fn begin(client: &mut Client, direction: u32, phase: u32, file: Option<BorrowedFd<'_>>) -> u64 {
    client.send(FrontendReq::SET_DEVICE_STATE_FD, &words(&[direction, phase]), file.as_slice());
    let (code, body, files) = client.receive().expect("it is answered");
    assert_eq!((code, files.len()), (FrontendReq::SET_DEVICE_STATE_FD.into(), 0));
    u64::from_ne_bytes(body.try_into().unwrap())
}

fn save(client: &mut Client) -> Vec<u8> {
    let (mut out, into) = std::io::pipe().unwrap();
    assert_eq!(begin(client, 0, 0, Some(into.as_fd())), NO_FD);
    drop(into);
    let mut state = Vec::new();
    out.read_to_end(&mut state).unwrap();
    assert_eq!(client.ask_number(FrontendReq::CHECK_DEVICE_STATE), 0);
    state
}

/// Whether the state is taken.
fn load(client: &mut Client, state: &[u8]) -> bool {
    let (out, mut into) = std::io::pipe().unwrap();
    assert_eq!(begin(client, 1, 0, Some(out.as_fd())), NO_FD);
    drop(out);
    // The other side need not read on what it will not take.
    let written = into.write_all(state);
    drop(into);
    client.ask_number(FrontendReq::CHECK_DEVICE_STATE) == 0 && written.is_ok()
}

#[test]
fn a_disk_goes_from_one_daemon_to_another() {
    let dir = scratch();
    let (from, mut client) = daemon(dir.path(), "from");
    client.negotiate(FEATURES | WCE);
    client.tell(FrontendReq::SET_CONFIG, &[words(&[32, 1, 0]), vec![0]].concat(), &[]);
    let state = save(&mut client);
    assert_eq!(save(&mut client), state, "as often as it is asked for");
    // Before the features, as QEMU does, and behind them.
    for early in [true, false] {
        let (to, mut client) = daemon(dir.path(), if early { "early" } else { "late" });
        if early {
            assert!(load(&mut client, &state));
        }
        client.negotiate(FEATURES | WCE);
        if !early {
            assert_eq!(writeback(&mut client), 1);
            assert!(load(&mut client, &state));
        }
        assert_eq!(client.ask_number(FrontendReq::CHECK_DEVICE_STATE), 0, "it stays so");
        assert_eq!(writeback(&mut client), 0);
        client.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES | WCE]), &[]);
        assert_eq!(writeback(&mut client), 0, "until rings run features may be said again");
        let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
        client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
        let mut ring = Ring::new(&memory, 0);
        ring.start(&mut client);
        ring.works(1);
        assert_eq!(writeback(&mut client), 0);
        // Another driver.
        client.ask(FrontendReq::GET_VRING_BASE, &words(&[0, 0]));
        client.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES | WCE]), &[]);
        assert_eq!(writeback(&mut client), 1, "what was loaded is not loaded again");
        drop(client);
        to.terminate();
    }
    drop(client);
    from.terminate();
}

#[test]
fn a_disk_goes_over_sockets_too() {
    let dir = scratch();
    let (from, mut client) = daemon(dir.path(), "from");
    client.negotiate(FEATURES | WCE);
    client.tell(FrontendReq::SET_CONFIG, &[words(&[32, 1, 0]), vec![0]].concat(), &[]);
    // Cloud Hypervisor passes one end of a pair and keeps both.
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    assert_eq!(begin(&mut client, 0, 0, Some(theirs.as_fd())), NO_FD);
    let mut state = Vec::new();
    ours.read_to_end(&mut state).unwrap();
    assert_eq!(client.ask_number(FrontendReq::CHECK_DEVICE_STATE), 0);
    let (to, mut client) = daemon(dir.path(), "to");
    client.negotiate(FEATURES | WCE);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    assert_eq!(begin(&mut client, 1, 0, Some(theirs.as_fd())), NO_FD);
    ours.write_all(&state).unwrap();
    ours.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.ask_number(FrontendReq::CHECK_DEVICE_STATE), 0);
    assert_eq!(writeback(&mut client), 0);
    drop(client);
    to.terminate();
    from.terminate();
}

#[test]
fn a_reset_forgets_a_state_that_was_loaded() {
    let dir = scratch();
    let (daemon, mut client) = daemon(dir.path(), "b");
    client.negotiate(FEATURES | WCE);
    client.tell(FrontendReq::SET_CONFIG, &[words(&[32, 1, 0]), vec![0]].concat(), &[]);
    let state = save(&mut client);
    for reset in [FrontendReq::RESET_DEVICE, FrontendReq::SET_STATUS] {
        assert!(load(&mut client, &state));
        client.tell(reset, &longs(&[0]), &[]);
        client.tell(FrontendReq::SET_FEATURES, &longs(&[FEATURES | WCE]), &[]);
        assert_eq!(writeback(&mut client), 1);
    }
    drop(client);
    daemon.terminate();
}

#[test]
fn the_frontend_of_the_vhost_crate_moves_a_nic() {
    let dir = scratch();
    let sockets = ["from", "to"].map(|name| dir.path().join(name));
    let daemons = [("from", "52:54:00:00:00:01"), ("to", "52:54:00:00:00:02")]
        .map(|(name, mac)| Daemon::net(&dir.path().join(name), &format!("loopback=on,mac={mac}")));
    let frontends = sockets.map(|socket| {
        let mut frontend = Frontend::connect(socket, 2).unwrap();
        frontend.set_owner().unwrap();
        frontend.get_features().unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        // VERSION_1 and MAC.
        frontend.set_features(1 << 32 | 1 << 30 | 1 << 5).unwrap();
        frontend
    });
    let [from, mut to] = frontends;
    let config = |frontend: &mut Frontend| {
        let flags = vhost::vhost_user::message::VhostUserConfigFlags::empty();
        frontend.get_config(0, 6, flags, &[0; 6]).unwrap().1
    };
    assert_eq!(config(&mut to)[5], 2);
    let (mut out, into) = std::io::pipe().unwrap();
    assert!(from.set_device_state_fd(Direction::SAVE, Phase::STOPPED, OwnedFd::from(into)).unwrap().is_none());
    let mut state = Vec::new();
    out.read_to_end(&mut state).unwrap();
    from.check_device_state().unwrap();
    let (out, mut into) = std::io::pipe().unwrap();
    assert!(to.set_device_state_fd(Direction::LOAD, Phase::STOPPED, OwnedFd::from(out)).unwrap().is_none());
    into.write_all(&state).unwrap();
    drop(into);
    to.check_device_state().unwrap();
    assert_eq!(config(&mut to), [0x52, 0x54, 0, 0, 0, 1]);
    drop((from, to));
    for daemon in daemons {
        daemon.terminate();
    }
}

#[test]
fn pitfall_59_a_state_from_elsewhere_is_refused_and_the_session_goes_on() {
    let dir = scratch();
    let (daemon, mut client) = daemon(dir.path(), "b");
    client.negotiate(FEATURES | WCE);
    let state = save(&mut client);
    let mut newer = state.clone();
    newer[8] += 1;
    for bad in [&[][..], &state[1..], &state[..state.len() - 1], &[0; 100], &newer, &vec![7; 1 << 20]] {
        assert!(!load(&mut client, bad), "{} bytes", bad.len());
        assert_ne!(client.ask_number(FrontendReq::CHECK_DEVICE_STATE), 0, "it stays so");
    }
    assert!(load(&mut client, &state));
    drop(client);
    assert_eq!(daemon.count("panicked"), 0);
    assert_eq!(daemon.count("dropping"), 0);
    daemon.terminate();
}

#[test]
fn a_transfer_that_can_not_be_is_refused() {
    let dir = scratch();
    let (daemon, client) = daemon(dir.path(), "b");
    drop(client);
    let (mut client, _memory, mut ring) = running(&dir.path().join("b"));
    assert_ne!(client.ask_number(FrontendReq::CHECK_DEVICE_STATE), 0, "nothing was moved");
    let (out, into) = std::io::pipe().unwrap();
    for direction in [0, 1] {
        assert_eq!(begin(&mut client, direction, 0, Some(into.as_fd())), NO_FD | 1, "a ring runs");
    }
    ring.works(4);
    client.ask(FrontendReq::GET_VRING_BASE, &words(&[0, 0]));
    assert_eq!(begin(&mut client, 0, 1, Some(into.as_fd())), NO_FD | 1, "no such phase");
    assert_eq!(begin(&mut client, 2, 0, Some(into.as_fd())), NO_FD | 1, "no such direction");
    assert_eq!(begin(&mut client, 1, 0, None), NO_FD | 1, "no descriptor");
    let file = memfd(4096, MemfdFlags::empty());
    assert_eq!(begin(&mut client, 1, 0, Some(file.as_fd())), NO_FD | 1, "no pipe");
    assert_eq!(begin(&mut client, 0, 0, Some(out.as_fd())), NO_FD | 1, "the wrong end of one");
    assert_ne!(client.ask_number(FrontendReq::CHECK_DEVICE_STATE), 0);
    // Rings that run before the state is there run without it.
    let (out, mut into) = std::io::pipe().unwrap();
    assert_eq!(begin(&mut client, 1, 0, Some(out.as_fd())), NO_FD);
    let base = words(&[0, ring.driver.used_index().into()]);
    client.tell(FrontendReq::SET_VRING_BASE, &base, &[]);
    client.tell(FrontendReq::SET_VRING_KICK, &longs(&[0]), &[ring.kick.as_fd()]);
    into.write_all(b"anything").unwrap();
    drop((into, out));
    assert_ne!(client.ask_number(FrontendReq::CHECK_DEVICE_STATE), 0);
    ring.works(5);
    drop(client);
    assert_eq!(daemon.count("panicked"), 0);
    daemon.terminate();
}

#[test]
fn pitfall_54_a_pipe_that_is_never_closed_is_given_up() {
    let dir = scratch();
    let (daemon, mut client) = daemon(dir.path(), "b");
    client.negotiate(FEATURES);
    // A client that goes is not waited for.
    let (out, into) = std::io::pipe().unwrap();
    assert_eq!(begin(&mut client, 1, 0, Some(out.as_fd())), NO_FD);
    drop(client);
    let begun = Instant::now();
    let mut client = Client::connect(&dir.path().join("b"));
    client.negotiate(FEATURES);
    assert!(begun.elapsed() < Duration::from_secs(5));
    // One that asks is told in time.
    assert_eq!(begin(&mut client, 1, 0, Some(out.as_fd())), NO_FD);
    assert_ne!(client.ask_number(FrontendReq::CHECK_DEVICE_STATE), 0);
    assert!(begun.elapsed() < PATIENCE);
    drop((client, into));
    daemon.terminate();
}
