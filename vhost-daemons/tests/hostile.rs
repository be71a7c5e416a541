//! Clients that attack a daemon which serves somebody else on the same I/O thread. Whatever they do, the other is served, and
//! the daemon ends when it is told to.

mod common;

use std::process::Command;

use common::client::{Client, Memory, Ring, running};
use common::honest::Honest;
use common::{Daemon, scratch};
use rustix::fs::OFlags;
use vhost::vhost_user::message::FrontendReq;

/// A daemon of one I/O thread with two disks, one of them in honest hands.
struct House {
    daemon: Daemon,
    dir: tempfile::TempDir,
    honest: Honest,
}

impl House {
    fn new() -> Self {
        let dir = scratch();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringvm-blk"));
        command.args(["--io-threads", "1"]);
        for name in ["honest", "hostile"] {
            let image = dir.path().join(name);
            std::fs::File::create(&image).and_then(|file| file.set_len(16 << 20)).unwrap();
            command.arg("--socket").arg(image.with_extension("sock"));
            command.arg("--disk").arg(format!("path={},queues=2", image.display()));
        }
        let daemon = Daemon::spawn(&mut command);
        daemon.wait_for("is ready", 2);
        let honest = Honest::connect(&dir.path().join("honest.sock"));
        Self { daemon, dir, honest }
    }

    /// Everything that a client of the other disk can have.
    fn attacker(&self) -> (Client, Memory, Ring) {
        running(&self.dir.path().join("hostile.sock"))
    }

    /// The honest tenant is served, also once the attacker has gone, and the daemon ends when it is told to.
    fn stands(self) {
        self.honest.is_served();
        let (client, memory, mut ring) = self.attacker();
        ring.works(0x3c);
        drop((client, memory, ring));
        eprintln!("the honest tenant waited for {:?} at most", self.honest.end());
        self.daemon.terminate();
    }
}

/// Has reads and writes of an event wait, for everybody who holds it, with no room left in its counter.
fn clog(event: &impl std::os::fd::AsFd) {
    let _ = rustix::io::read(event, &mut [0; 8]);
    rustix::io::write(event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let flags = rustix::fs::fcntl_getfl(event).unwrap();
    rustix::fs::fcntl_setfl(event, flags - OFlags::NONBLOCK).unwrap();
}

#[test]
fn a_call_that_becomes_blocking_and_full_holds_up_nobody() {
    let house = House::new();
    let (client, _memory, mut ring) = house.attacker();
    ring.driver.want_interrupts(true);
    clog(&ring.call);
    for slot in 0..8 {
        ring.add(slot, slot * 8, None);
        ring.driver.publish();
        ring.kick();
        ring.used();
    }
    house.honest.is_served();
    drop(client);
    house.stands();
}

#[test]
fn an_error_event_that_becomes_blocking_and_full_holds_up_nobody() {
    let house = House::new();
    let (mut client, _memory, mut ring) = house.attacker();
    let err = common::client::eventfd();
    client.tell(FrontendReq::SET_VRING_ERR, &common::client::longs(&[0]), &[std::os::fd::AsFd::as_fd(&err)]);
    clog(&err);
    ring.add(0, 0, None);
    // An index far beyond what is there: the ring is broken, and the event tells.
    ring.driver.write_avail_index(40_000);
    ring.kick();
    common::wait("the ring to be broken", || {
        u64::from_ne_bytes(client.ask(FrontendReq::GET_STATUS, &[]).try_into().unwrap()) & 0x40 != 0
    });
    house.honest.is_served();
    drop(client);
    house.stands();
}

#[test]
fn a_full_queue_of_whole_disk_reads_is_not_drained_for_a_client_that_has_gone() {
    let house = House::new();
    for ends in 0..3 {
        let (client, memory, mut ring) = house.attacker();
        let slots = ring.add_longest_reads(&memory);
        ring.driver.publish();
        ring.kick();
        match ends {
            0 => {}
            // Has the daemon wait for all of them.
            1 => drop(client.send(FrontendReq::GET_VRING_BASE, &common::client::words(&[0, 0]), &[])),
            _ => drop(client.send(FrontendReq::RESET_DEVICE, &[], &[])),
        }
        house.honest.is_served();
        assert!(slots > 0);
    }
    house.stands();
}
