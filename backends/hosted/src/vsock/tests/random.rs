//! Guests that send anything, and programs that do what they like: the device goes on, keeps little, and gives every chain
//! back.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use proptest::prelude::*;
use vhost_user_backend::VhostUserBackend;

use super::rig::{CID, Rig};
use crate::vsock::connection::BUF_ALLOC;
use crate::vsock::muxer::Limits;
use crate::vsock::packet::{HOST_CID, Header};

/// What one of them does.
#[derive(Clone, Debug)]
enum Step {
    /// A packet, whose chain is cut into these pieces.
    Packet {
        header: Header,
        data: usize,
        pieces: Vec<usize>,
    },
    /// A descriptor of anything.
    Chain {
        addr: u64,
        len: u32,
        writable: bool,
    },
    /// A client and its line.
    Client(String),
    /// A client or program writes, reads, or goes.
    Write(usize, usize),
    Read(usize),
    Close(usize),
    /// Receive buffers are withheld, or given again.
    Refill(bool),
    /// The driver is stopped and begins anew.
    Reset,
}

fn header() -> impl Strategy<Value = Header> {
    let cids = (prop_oneof![9 => Just(CID), 1 => 0..50_u64], prop_oneof![9 => Just(HOST_CID), 1 => 0..50_u64]);
    // Few ports, so that connections are met again. Those of the host's clients begin at 1 << 30.
    let host = prop_oneof![5 => 50..53_u32, 4 => (1 << 30)..(1 << 30) + 4_u32, 1 => any::<u32>()];
    let rest =
        (prop_oneof![9 => Just(1_u16), 1 => any::<u16>()], prop_oneof![9 => 1..8_u16, 1 => any::<u16>()], 0..5_u32);
    let credit =
        (prop_oneof![Just(0), Just(1000), Just(1 << 18), any::<u32>()], prop_oneof![3 => Just(0), 1 => any::<u32>()]);
    (cids, 1..4_u32, host, rest, credit).prop_map(|((src_cid, dst_cid), src_port, dst_port, rest, credit)| {
        let ((kind, op, flags), (buf_alloc, fwd_cnt)) = (rest, credit);
        Header { src_cid, dst_cid, src_port, dst_port, len: 0, kind, op, flags, buf_alloc, fwd_cnt }
    })
}

fn step() -> impl Strategy<Value = Step> {
    let line = prop_oneof![4 => "CONNECT [1-3]\n[a-z]{0,8}", 1 => "[A-Z0-9 \n]{0,40}"];
    prop_oneof![
        12 => (header(), prop_oneof![3 => 0..100_usize, 1 => 0..70_000_usize], prop::collection::vec(0..60_usize, 0..6))
            .prop_map(|(header, data, pieces)| Step::Packet { header, data, pieces }),
        1 => (prop_oneof![0..(20_u64 << 20), any::<u64>()], any::<u32>(), any::<bool>())
            .prop_map(|(addr, len, writable)| Step::Chain { addr, len, writable }),
        2 => line.prop_map(Step::Client),
        2 => (any::<usize>(), 1..100_000_usize).prop_map(|(who, len)| Step::Write(who, len)),
        2 => any::<usize>().prop_map(Step::Read),
        1 => any::<usize>().prop_map(Step::Close),
        1 => any::<bool>().prop_map(Step::Refill),
        1 => prop_oneof![9 => Just(Step::Refill(true)), 1 => Just(Step::Reset)],
    ]
}

fn limits() -> Limits {
    Limits { connections: 8, handshakes: 3, replies: 16, ..Limits::default() }
}

fn run(steps: Vec<Step>) {
    let mut rig = Rig::with(limits());
    let listeners: Vec<_> = (50..52).map(|port| UnixListener::bind(rig.path_of(port)).unwrap()).collect();
    listeners.iter().for_each(|listener| listener.set_nonblocking(true).unwrap());
    let mut ends: Vec<UnixStream> = Vec::new();
    for step in steps {
        match step {
            // The driver has no room for more than it was given back.
            Step::Packet { .. } | Step::Chain { .. } if rig.tx.in_flight() > 8 => {}
            Step::Packet { header, data, pieces } => {
                rig.put(header, &vec![1; data], &pieces);
                rig.kick_tx();
            }
            Step::Chain { addr, len, writable } => {
                rig.tx.add(&[ringvm_backends::testing::driver::Buffer { addr, len, writable }]).unwrap();
                rig.kick_tx();
            }
            Step::Client(line) => {
                let mut client = rig.client();
                // The device may have dropped it already.
                let _ = client.write_all(line.as_bytes());
                ends.push(client);
            }
            Step::Write(who, len) if !ends.is_empty() => {
                let at = who % ends.len();
                ends[at].set_nonblocking(true).unwrap();
                let _ = ends[at].write(&vec![2; len]);
            }
            Step::Read(who) if !ends.is_empty() => {
                let at = who % ends.len();
                ends[at].set_nonblocking(true).unwrap();
                let _ = ends[at].read(&mut vec![0; 100_000]);
            }
            Step::Close(who) if !ends.is_empty() => drop(ends.swap_remove(who % ends.len())),
            Step::Write(..) | Step::Read(_) | Step::Close(_) => {}
            Step::Refill(refills) => {
                rig.refills = refills;
                rig.refill();
                rig.collect();
            }
            Step::Reset => {
                rig.stop();
                rig.vsock.reset_device();
                rig.restart();
            }
        }
        ends.extend(listeners.iter().filter_map(|listener| Some(listener.accept().ok()?.0)));
        rig.turn();
        let (connections, handshakes, kept) = rig.held();
        assert!(connections + handshakes <= limits().connections && handshakes <= limits().handshakes);
        assert!(kept <= connections * BUF_ALLOC as usize);
        assert!(rig.waiting() <= limits().replies + 3 * limits().connections);
        while rig.try_next().is_some() {}
    }
    // With buffers, whatever the guest has sent comes back.
    rig.feed();
    rig.turn();
    assert_eq!(rig.tx.in_flight(), 0);
    drop(ends);
    rig.turn();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn the_device_bears_anything(steps in prop::collection::vec(step(), 1..60)) {
        run(steps);
    }
}
