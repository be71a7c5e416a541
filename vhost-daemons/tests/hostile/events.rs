//! Descriptors that are shared: whatever their other owner does to flags and counters, it holds up nobody.

use std::os::fd::AsFd;

use rustix::fs::OFlags;
use vhost::vhost_user::message::FrontendReq;

use crate::common::client::{eventfd, longs, running};
use crate::common::target::Target;
use crate::common::wait;

/// Has reads and writes of an event wait, for everybody who holds it, with no room left in its counter.
fn clog(event: &impl AsFd) {
    let _ = rustix::io::read(event, &mut [0; 8]);
    rustix::io::write(event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let flags = rustix::fs::fcntl_getfl(event).unwrap();
    rustix::fs::fcntl_setfl(event, flags - OFlags::NONBLOCK).unwrap();
}

pub(crate) fn a_call_that_becomes_blocking_and_full_holds_up_nobody(target: &Target) {
    let (client, _memory, mut ring) = running(&target.socket);
    ring.driver.want_interrupts(true);
    clog(&ring.call);
    for slot in 0..8 {
        ring.add(slot, slot * 8, None);
        ring.driver.publish();
        ring.kick();
        ring.used();
    }
    target.honest.is_served();
    drop(client);
    target.is_well();
}

pub(crate) fn an_error_event_that_becomes_blocking_and_full_holds_up_nobody(target: &Target) {
    let (mut client, _memory, mut ring) = running(&target.socket);
    let err = eventfd();
    client.tell(FrontendReq::SET_VRING_ERR, &longs(&[0]), &[err.as_fd()]);
    clog(&err);
    ring.add(0, 0, None);
    // An index far beyond what is there: the ring is broken, and the event tells.
    ring.driver.write_avail_index(40_000);
    ring.kick();
    wait("the ring to be broken", || client.ask_number(FrontendReq::GET_STATUS) & 0x40 != 0);
    target.honest.is_served();
    drop(client);
    target.is_well();
}

pub(crate) fn an_event_of_the_log_that_becomes_blocking_and_full_holds_up_nobody(target: &Target) {
    let (mut client, _memory, mut ring) = running(&target.socket);
    let event = eventfd();
    client.tell(FrontendReq::SET_LOG_FD, &[], &[event.as_fd()]);
    clog(&event);
    let _log = client.log_writes();
    ring.works(0x77);
    target.honest.is_served();
    drop(client);
    target.is_well();
}

pub(crate) fn a_kick_that_never_ends_holds_up_nobody(target: &Target) {
    let (client, _memory, mut ring) = running(&target.socket);
    for value in 0..50 {
        clog(&ring.kick);
        ring.add(0, 8, Some(value));
        ring.driver.publish();
        // The counter is full: the other side has been told often enough.
        ring.used();
        assert_eq!(ring.status(0), 0);
    }
    target.honest.is_served();
    drop(client);
    target.is_well();
}
