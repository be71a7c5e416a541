//! What a client shares and passes: memory of odd kinds, descriptors of odd kinds, and more of either than is good for the others
//! who are served by the same process.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use crate::common::client::{
    Client, FEATURES, GUEST, MEMORY, Memory, Ring, SIZE, SKIP_DRAIN, USER, longs, memfd, running, words,
};
use crate::common::target::Target;
use crate::common::{Daemon, image, scratch, wait};
use rustix::fs::{MemfdFlags, fallocate};
use rustix::process::Signal;
use vhost::vhost_user::message::FrontendReq;

/// The smallest of the huge pages of x86. Files are made of them and mapped also where the host has none.
const HUGE: u64 = 2 << 20;

/// The payload of ADD_MEM_REG.
fn region(guest: u64, size: u64, user: u64, offset: u64) -> Vec<u8> {
    longs(&[0, guest, size, user, offset])
}

pub(crate) fn a_hugetlb_region_of_part_of_a_page_is_refused(target: &Target) {
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let file = memfd(2 * HUGE, MemfdFlags::HUGETLB);
    for (size, offset) in [(4096, 0), (HUGE - 1, 0), (HUGE + 4096, 0), (HUGE, 4096), (HUGE + 1, HUGE - 1)] {
        let body = region(GUEST, size, USER, offset);
        assert!(!client.try_tell(FrontendReq::ADD_MEM_REG, &body, &[file.as_fd()]), "{size} bytes at {offset}");
    }
    assert_eq!(target.daemon.mappings(), target.before.1, "what is refused is not mapped");
    drop(client);
    target.is_well();
}

pub(crate) fn a_hugetlb_region_without_pages_ends_the_connection_only(target: &Target) {
    let mut client = target.connect();
    client.negotiate(FEATURES);
    // A hole, as if its owner had punched it; on a host without huge pages nobody can fill it.
    let file = memfd(2 * HUGE, MemfdFlags::HUGETLB | MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::ADD_MEM_REG, &region(GUEST, 2 * HUGE, USER, 0), &[file.as_fd()]);
    assert_eq!(target.daemon.mappings(), target.before.1 + 1);
    let memory = Memory::new(MemfdFlags::empty());
    for (request, body, file) in Ring::new(&memory, 0).messages() {
        client.send(request, &body, file.as_slice());
    }
    let has_pages = std::fs::read_to_string("/proc/sys/vm/nr_hugepages").is_ok_and(|count| count.trim() != "0");
    if !has_pages {
        target.drops(client, "it has cut its memory short");
    }
    target.is_well();
}

pub(crate) fn tables_and_logs_of_huge_pages_are_unmapped(target: &Target) {
    let file = memfd(HUGE, MemfdFlags::HUGETLB);
    for _ in 0..4 {
        let mut client = target.connect();
        client.negotiate(FEATURES);
        let mut table = longs(&[4096, 64]);
        table.extend([1u16, SIZE, 0, 0].map(u16::to_ne_bytes).as_flattened());
        client.tell(FrontendReq::SET_INFLIGHT_FD, &table, &[file.as_fd()]);
        client.send(FrontendReq::SET_LOG_BASE, &longs(&[4096, 4096]), &[file.as_fd()]);
        assert!(client.receive().is_some());
    }
    target.is_well();
}

pub(crate) fn memory_that_somebody_stands_behind_is_refused(target: &Target) {
    let dir = scratch();
    // A file on a disk stands for any that is no memory: the kernel does not say what a file server would do.
    let path = image(dir.path(), 1 << 20);
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut client = target.connect();
    client.negotiate(FEATURES);
    for (request, body) in [
        (FrontendReq::ADD_MEM_REG, region(GUEST, 1 << 20, USER, 0)),
        (FrontendReq::SET_MEM_TABLE, [words(&[1, 0]), region(GUEST, 1 << 20, USER, 0)[8..].to_vec()].concat()),
        (FrontendReq::SET_INFLIGHT_FD, [longs(&[4096, 0]), words(&[1 | 64 << 16, 0])].concat()),
    ] {
        assert!(!client.try_tell(request, &body, &[file.as_fd()]), "{request:?}");
    }
    target.daemon.wait_for("neither shared memory nor", 3);
    client.send(FrontendReq::SET_LOG_BASE, &longs(&[4096, 0]), &[file.as_fd()]);
    assert!(client.is_dropped());
    target.is_well();
}

pub(crate) fn a_table_that_is_cut_short_ends_the_connection_only(target: &Target) {
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::SET_MEM_TABLE, &memory.table(), &[memory.file.as_fd()]);
    // As DPDK makes it: nobody can seal it.
    let file = memfd(4096, MemfdFlags::empty());
    let mut table = longs(&[4096, 0]);
    table.extend([1u16, SIZE, 0, 0].map(u16::to_ne_bytes).as_flattened());
    client.tell(FrontendReq::SET_INFLIGHT_FD, &table, &[file.as_fd()]);
    let mut ring = Ring::new(&memory, 0);
    ring.start(&mut client);
    ring.works(3);
    rustix::fs::ftruncate(&file, 0).unwrap();
    ring.add(0, 8, Some(4));
    ring.driver.publish();
    ring.kick();
    target.drops(client, "it has cut its memory short");
    target.is_well();
}

pub(crate) fn a_table_padded_to_72_bytes_is_taken(target: &Target) {
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    // User Mode Linux has room for two regions in the message, and often one of them.
    let table = [memory.table(), vec![0; 32]].concat();
    assert_eq!(table.len(), 72);
    client.tell(FrontendReq::SET_MEM_TABLE, &table, &[memory.file.as_fd()]);
    let mut ring = Ring::new(&memory, 0);
    ring.start(&mut client);
    ring.works(9);
    drop(client);
    target.is_well();
}

pub(crate) fn regions_keep_no_descriptors(target: &Target) {
    let mut client = target.connect();
    client.negotiate(FEATURES);
    let held = target.daemon.descriptors();
    for index in 0..100 {
        let file = memfd(4096, MemfdFlags::ALLOW_SEALING);
        let at = index * 4096;
        client.tell(FrontendReq::ADD_MEM_REG, &region(GUEST + at, 4096, USER + at, 0), &[file.as_fd()]);
    }
    assert_eq!((target.daemon.descriptors(), target.daemon.mappings()), (held, target.before.1 + 100));
    drop(client);
    target.is_well();
}

/// The lines about mappings of a client's memory in a file of /proc.
fn flags_of_memory(daemon: &Daemon) -> Vec<String> {
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", daemon.child.id())).unwrap();
    let mut ours = false;
    let mut found = Vec::new();
    for line in maps.lines() {
        if line.split(' ').next().is_some_and(|word| word.contains('-')) {
            ours = line.contains("memfd:client");
        } else if ours && line.starts_with("VmFlags:") {
            found.push(line.to_owned());
        }
    }
    found
}

pub(crate) fn client_memory_is_left_out_of_core_dumps(target: &Target) {
    let (client, _memory, mut ring) = running(&target.socket);
    ring.works(1);
    let flags = flags_of_memory(&target.daemon);
    // The honest tenant's, and this one's.
    assert!(flags.len() == 2 && flags.iter().all(|flags| flags.contains(" dd")), "{flags:?}");
    drop(client);
    target.is_well();
}

/// The limit of open descriptors: soft and hard.
fn limits(daemon: &Daemon) -> Vec<String> {
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.child.id())).unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().skip(3).take(2).map(str::to_owned).collect()
}

/// A daemon with so many disks, started by a shell that runs `first` before.
fn daemon_of(dir: &std::path::Path, disks: usize, first: &str, more: &[&str]) -> Daemon {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{first}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_ringvm-blk")]).args(more);
    for disk in 0..disks {
        command.arg("--socket").arg(dir.join(format!("{disk}.sock")));
        command.args(["--disk", "storage=null,size=16M"]);
    }
    let daemon = Daemon::spawn(&mut command);
    daemon.wait_for("is ready", disks);
    daemon
}

#[test]
fn the_limit_of_descriptors_is_raised() {
    let dir = scratch();
    let daemon = daemon_of(dir.path(), 1, "ulimit -S -n 100", &[]);
    let limits = limits(&daemon);
    assert_eq!(limits[0], limits[1], "soft and hard");
    daemon.terminate();
}

#[test]
fn messages_that_are_kept_keep_no_descriptors() {
    let dir = scratch();
    let daemon = daemon_of(dir.path(), 1, "ulimit -n 100", &[]);
    let mut client = Client::connect(&dir.path().join("0.sock"));
    client.negotiate(FEATURES);
    let file = memfd(4096, MemfdFlags::empty());
    let files: Vec<BorrowedFd<'_>> = vec![file.as_fd(); 30];
    // Those are taken together, and would bring more descriptors than there may be.
    for _ in 0..20 {
        client.send_code(SKIP_DRAIN, 0, &words(&[0, 0]), &files);
    }
    assert!(client.is_dropped());
    daemon.wait_for("30 descriptors came with it, at most 0 can", 1);
    daemon.terminate();
}

#[test]
fn one_clients_regions_take_no_room_from_another() {
    const CLIENTS: usize = 5;
    const REGIONS: u64 = 256;
    let dir = scratch();
    let daemon = daemon_of(dir.path(), CLIENTS, "true", &[]);
    let file = memfd(REGIONS * 4096, MemfdFlags::ALLOW_SEALING);
    let clients: Vec<Client> = (0..CLIENTS)
        .map(|index| {
            let mut client = Client::connect(&dir.path().join(format!("{index}.sock")));
            client.negotiate(FEATURES);
            for index in 0..REGIONS {
                let at = index * 4096;
                let body = region(GUEST + 2 * at, 4096, USER + 2 * at, at);
                client.tell(FrontendReq::ADD_MEM_REG, &body, &[file.as_fd()]);
            }
            client
        })
        .collect();
    drop(clients);
    wait("the clients to be gone", || daemon.mappings() == 0);
    daemon.terminate();
}

/// A TCP socket whose last close waits for a peer that never reads.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    while std::io::Write::write(&mut &stream, &[0; 1 << 16]).is_ok() {}
    stream.set_nonblocking(false).unwrap();
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::from_secs(3600))).unwrap();
    (stream.into(), peer)
}

pub(crate) fn descriptors_whose_close_waits_keep_nobody_waiting(target: &Target) {
    let (mut client, _memory, mut ring) = running(&target.socket);
    let mut peers = Vec::new();
    for (request, body) in [
        (FrontendReq::ADD_MEM_REG, region(GUEST + (1 << 32), 4096, USER + (1 << 32), 0)),
        (FrontendReq::SET_VRING_CALL, longs(&[1])),
        (FrontendReq::SET_FEATURES, longs(&[FEATURES])),
    ] {
        let (socket, peer) = lingering();
        peers.push(peer);
        // The daemon's close is to be the last: it sleeps until ours is over.
        target.daemon.signal(Signal::STOP);
        let stat = format!("/proc/{}/stat", target.daemon.child.id());
        wait("the daemon to stop", || std::fs::read_to_string(&stat).unwrap().contains(") T "));
        assert!(client.send_code(request.into(), crate::common::client::NEED_REPLY, &body, &[socket.as_fd()]));
        drop(socket);
        target.daemon.signal(Signal::CONT);
        let (code, answer, _) = client.receive().expect("an answer");
        assert_eq!((code, answer), (request.into(), longs(&[1])), "it is refused");
        ring.works(5);
    }
    drop(client);
    target.is_well();
    drop(peers);
}

/// What a file has allocated, in bytes.
fn allocated(file: &OwnedFd) -> u64 {
    rustix::fs::fstat(file).unwrap().st_blocks as u64 * 512
}

#[test]
fn memory_that_is_held_is_no_more_than_was_allowed() {
    let dir = scratch();
    let socket = dir.path().join("b.sock");
    let disk = format!("path={}", image(dir.path(), 16 << 20).display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringvm-blk"));
    command.arg("--socket").arg(&socket).args(["--disk", &disk, "--hold-memory=100M"]);
    let daemon = Daemon::spawn(&mut command);
    daemon.wait_for("is ready", 1);
    let mut client = Client::connect(&socket);
    client.negotiate(FEATURES);
    let memory = Memory::new(MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::ADD_MEM_REG, &memory.region(), &[memory.file.as_fd()]);
    // Nothing of it is allocated.
    let sparse = memfd(1 << 40, MemfdFlags::ALLOW_SEALING);
    client.tell(FrontendReq::ADD_MEM_REG, &region(GUEST + (1 << 40), 1 << 40, USER + (1 << 41), 0), &[sparse.as_fd()]);
    let mut ring = Ring::new(&memory, 0);
    ring.start(&mut client);
    daemon.wait_for("does not hold all of the guest's memory", 1);
    ring.works(7);
    assert!(allocated(&sparse) <= 100 << 20, "{} bytes", allocated(&sparse));
    assert!(allocated(&memory.file) <= MEMORY);
    drop(client);
    daemon.terminate();
}

pub(crate) fn a_guard_covers_the_end_of_a_region_that_is_no_page(target: &Target) {
    let mut client = target.connect();
    client.negotiate(FEATURES);
    // As libblkio shares it: a length that is no multiple of a page.
    let file = memfd(MEMORY, MemfdFlags::empty());
    fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, MEMORY).unwrap();
    let size = MEMORY - 1000;
    client.tell(FrontendReq::ADD_MEM_REG, &region(GUEST, size, USER, 0), &[file.as_fd()]);
    rustix::fs::ftruncate(&file, 0).unwrap();
    let memory = Memory::new(MemfdFlags::empty());
    for (request, body, file) in Ring::new(&memory, 0).messages() {
        client.send(request, &body, file.as_slice());
    }
    target.drops(client, "it has cut its memory short");
    target.is_well();
}
