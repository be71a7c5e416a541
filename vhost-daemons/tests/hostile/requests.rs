//! Requests that cost the daemon much and their client nothing.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ringvm_backends::testing::driver::Buffer;
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::FrontendReq;
use vm_memory::{Bytes, GuestAddress};

use crate::common::client::{Client, FEATURES, GUEST, Memory, Ring, USER, longs, memfd, running, words};
use crate::common::target::Target;

pub(crate) fn whole_disk_reads_are_not_drained_for_a_client_that_has_gone(target: &Target) {
    for last in [None, Some((FrontendReq::GET_VRING_BASE, words(&[0, 0]))), Some((FrontendReq::RESET_DEVICE, vec![]))] {
        let (client, memory, mut ring) = running(&target.socket);
        assert!(ring.add_longest_reads(&memory) > 0);
        ring.driver.publish();
        ring.kick();
        // These have the daemon wait for all of them.
        if let Some((request, body)) = last {
            client.send(request, &body, &[]);
        }
        target.honest.is_served();
    }
    target.is_well();
}

pub(crate) fn whole_disk_reads_with_a_log_hold_up_nobody(target: &Target) {
    let (mut client, memory, mut ring) = running(&target.socket);
    let _log = client.log_writes();
    assert!(ring.add_longest_reads(&memory) > 0);
    ring.driver.publish();
    ring.kick();
    for _ in 0..20 {
        target.honest.is_served();
    }
    drop(client);
    target.is_well();
}

pub(crate) fn chains_over_very_many_regions_hold_up_nobody(target: &Target) {
    const REGIONS: u64 = 250;
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::ADD_MEM_REG, &memory.region(), &[memory.file.as_fd()]);
    // Adjacent in the guest, and apart for the host: each piece of a chain comes to pieces.
    let small = memfd(REGIONS * 4096, MemfdFlags::ALLOW_SEALING);
    for index in 0..REGIONS {
        let (guest, user) = (GUEST + (1 << 32) + index * 4096, USER + (1 << 32) + index * 8192);
        let region = longs(&[0, guest, 4096, user, (REGIONS - 1 - index) * 4096]);
        client.tell(FrontendReq::ADD_MEM_REG, &region, &[small.as_fd()]);
    }
    let mut ring = Ring::new(&memory, 0);
    ring.start(&mut client);
    let (header, table) = (GUEST + 0x20_0000, GUEST + 0x21_0000);
    memory.mem.write_slice(&[0; 16], GuestAddress(header)).unwrap();
    let mut buffers = vec![Buffer { addr: header, len: 16, writable: false }];
    let piece = Buffer { addr: GUEST + (1 << 32), len: (REGIONS * 4096) as u32, writable: true };
    buffers.extend(vec![piece; 1000]);
    buffers.push(Buffer { addr: header + 16, len: 1, writable: true });
    ring.serve_full(|driver| driver.add_indirect(table, &buffers));
    target.honest.is_served();
    drop(client);
    target.is_well();
}

pub(crate) fn a_flood_of_flushes_holds_up_nobody(target: &Target) {
    let (client, memory, mut ring) = running(&target.socket);
    let header = GUEST + 0x20_0000;
    memory.mem.write_slice(&[words(&[4, 0]), longs(&[0])].concat(), GuestAddress(header)).unwrap();
    let buffers =
        [Buffer { addr: header, len: 16, writable: false }, Buffer { addr: header + 16, len: 1, writable: true }];
    for _ in 0..20 {
        ring.serve_full(|driver| driver.add(&buffers));
        target.honest.is_served();
    }
    drop(client);
    target.is_well();
}

/// The handler of a fault looks through a table that changes at the same time.
pub(crate) fn faults_while_regions_come_and_go_end_one_connection(target: &Target) {
    for _ in 0..20 {
        let mut client = target.connect();
        client.negotiate(FEATURES);
        let memory = Memory::new(MemfdFlags::empty());
        client.tell(FrontendReq::ADD_MEM_REG, &memory.region(), &[memory.file.as_fd()]);
        let mut ring = Ring::new(&memory, 0);
        ring.start(&mut client);
        ring.works(1);
        let ends = Arc::<AtomicBool>::default();
        let told = Arc::clone(&ends);
        let changer = std::thread::spawn(move || {
            let file = memfd(4096, MemfdFlags::ALLOW_SEALING);
            let region = longs(&[0, GUEST + (1 << 32), 4096, USER + (1 << 32), 0]);
            while !told.load(Ordering::Acquire) && changes(&client, &region, &file) {}
            client
        });
        target.honest.is_served();
        rustix::fs::ftruncate(&memory.file, 0).unwrap();
        ring.kick();
        target.honest.is_served();
        ends.store(true, Ordering::Release);
        target.drops(changer.join().unwrap(), "it has cut its memory short");
    }
    target.is_well();
}

/// Adds a region and removes it; false once the connection has ended.
fn changes(client: &Client, region: &[u8], file: &impl AsFd) -> bool {
    client.send(FrontendReq::ADD_MEM_REG, region, &[file.as_fd()]) && client.send(FrontendReq::REM_MEM_REG, region, &[])
}
