//! The daemons with the frontend of the `vhost` crate, and what the devices themselves see of the protocol.

mod common;

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::client::{Client, FEATURES, GUEST, Memory, PROTOCOL_FEATURES, Ring, event, longs, words};
use common::{Daemon, image, scratch, wait};
use ringvm_backends::testing::driver::Buffer;
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{FrontendReq, VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

#[test]
fn the_frontend_of_the_vhost_crate_drives_a_disk() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    let daemon = Daemon::blk(&socket, &format!("path={},queues=2", image(dir.path(), 16 << 20).display()));
    for _ in 0..2 {
        let mut frontend = Frontend::connect(&socket, 2).unwrap();
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_eq!(offered & FEATURES, FEATURES);
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::LOG_SHMFD));
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(FEATURES).unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), 2);
        assert!(frontend.get_max_mem_slots().unwrap() >= 32);
        let (_, config) = frontend.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap();
        assert_eq!(config, (16u64 << 20 >> 9).to_le_bytes());
        let (inflight, file) = frontend.get_inflight_fd(&VhostUserInflight::new(0, 0, 2, 64)).unwrap();
        frontend.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
        let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
        let region = memory.mem.find_region(GuestAddress(GUEST)).unwrap();
        let region = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        frontend.set_mem_table(&[region]).unwrap();
        let mut rings = [Ring::new(&memory, 0), Ring::new(&memory, 1)];
        for ring in &rings {
            let (index, at) = (ring.index as usize, ring.driver.ring());
            let user = |guest: u64| memory.mem.get_host_address(GuestAddress(guest)).unwrap() as u64;
            let config = VringConfigData {
                queue_max_size: at.size,
                queue_size: at.size,
                flags: 0,
                desc_table_addr: user(at.desc),
                used_ring_addr: user(at.used),
                avail_ring_addr: user(at.avail),
                log_addr: None,
            };
            frontend.set_vring_num(index, at.size).unwrap();
            frontend.set_vring_addr(index, &config).unwrap();
            frontend.set_vring_base(index, 0).unwrap();
            frontend.set_vring_call(index, &event(&ring.call)).unwrap();
            frontend.set_vring_kick(index, &event(&ring.kick)).unwrap();
            frontend.set_vring_enable(index, true).unwrap();
        }
        rings[0].works(1);
        rings[1].works(2);
        assert_eq!(frontend.get_vring_base(1).unwrap(), 2);
        frontend.reset_device().unwrap();
    }
    let said = daemon.terminate();
    assert_eq!(said.len(), 1, "{}", said.join("\n"));
}

/// The other side of a vring pair of a NIC, with frames of any bytes.
fn send(ring: &mut Ring, memory: &Memory, at: u64, frame: &[u8]) {
    memory.mem.write_slice(&[0; 12], GuestAddress(at)).unwrap();
    memory.mem.write_slice(frame, GuestAddress(at + 12)).unwrap();
    ring.driver.add(&[Buffer { addr: at, len: 12 + frame.len() as u32, writable: false }]).unwrap();
    ring.driver.publish();
    ring.kick();
    ring.used();
}

fn post(ring: &mut Ring, at: u64) {
    ring.driver.add(&[Buffer { addr: at, len: 2048, writable: true }]).unwrap();
    ring.driver.publish();
    ring.kick();
}

/// VERSION_1 and MRG_RXBUF, without a control queue: that is the frontend's.
const NET_FEATURES: u64 = 1 << 32 | 1 << 15 | PROTOCOL_FEATURES;

#[test]
fn a_nic_echoes_over_vhost_user_with_data_queues_only() {
    for (pairs, features) in [(1, NET_FEATURES), (2, NET_FEATURES | 1 << 22)] {
        let dir = scratch();
        let socket = dir.path().join("n.sock");
        let daemon = Daemon::net(&socket, &format!("loopback=on,queues={pairs}"));
        let before = daemon.descriptors();
        for _ in 0..2 {
            let mut client = Client::connect(&socket);
            client.negotiate(features);
            assert_eq!(client.ask_number(FrontendReq::GET_QUEUE_NUM), pairs, "net counts pairs");
            let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
            client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
            let mut rings: Vec<Ring> = (0..2 * pairs as u32).map(|index| Ring::new(&memory, index)).collect();
            for ring in &rings {
                ring.start(&mut client);
            }
            for pair in 0..pairs as usize {
                let at = GUEST + 0x20_0000 + pair as u64 * 0x1_0000;
                for round in 0..10u8 {
                    let frame: Vec<u8> = (0..500u32).map(|i| (i as u8).wrapping_mul(7) ^ round).collect();
                    post(&mut rings[2 * pair], at);
                    send(&mut rings[2 * pair + 1], &memory, at + 0x4000, &frame);
                    rings[2 * pair].used();
                    let mut got = vec![0; frame.len()];
                    memory.mem.read_slice(&mut got, GuestAddress(at + 12)).unwrap();
                    assert!(got == frame, "pair {pair}, frame {round}");
                }
            }
            drop(client);
            wait("descriptors to be gone", || daemon.descriptors() == before);
        }
        daemon.terminate();
    }
}

#[test]
fn the_channel_to_the_frontend_goes_with_it() {
    let dir = scratch();
    let socket = dir.path().join("n.sock");
    let link = dir.path().join("link");
    let daemon = Daemon::net(&socket, &format!("link={}", link.display()));
    let mut client = Client::connect(&socket);
    client.negotiate(NET_FEATURES | 1 << 16);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    client.tell(FrontendReq::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    drop(theirs);
    let config = client.ask(FrontendReq::GET_CONFIG, &[words(&[0, 8, 0]), vec![0; 8]].concat());
    assert_eq!(config[12 + 6] & 1, 1, "the link is up");
    drop(client);
    ours.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    assert_eq!(ours.read(&mut [0; 16]).unwrap(), 0);
    drop(daemon);
}

#[test]
fn a_disk_remembers_nothing_of_the_client_before() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    let daemon = Daemon::blk(&socket, &format!("path={}", image(dir.path(), 1 << 20).display()));
    let writeback = |client: &mut Client| client.ask(FrontendReq::GET_CONFIG, &words(&[32, 1, 0]))[12];
    // CONFIG_WCE.
    let features = FEATURES | 1 << 11;
    let mut client = Client::connect(&socket);
    client.negotiate(features);
    assert_eq!(writeback(&mut client), 1);
    client.tell(FrontendReq::SET_CONFIG, &[words(&[32, 1, 0]), vec![0]].concat(), &[]);
    assert_eq!(writeback(&mut client), 0);
    client.tell(FrontendReq::SET_FEATURES, &longs(&[features]), &[]);
    drop(client);
    let mut client = Client::connect(&socket);
    client.negotiate(features);
    assert_eq!(writeback(&mut client), 1);
    drop(client);
    daemon.terminate();
}
