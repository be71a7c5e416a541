//! DPDK's virtio-user driver in testpmd over `ringvm-net`: packets over one and two pairs, none lost, and through a kill.

use std::path::Path;
use std::time::{Duration, Instant};

use ringvm_tests::host::{Need, need, say};
use ringvm_tests::native::{Ended, Running, daemon, program};
use rustix::process::Signal;

use crate::served::{Daemon, operations};
use crate::{alone, ok, scratch};

const LIMIT: Duration = Duration::from_secs(30);
/// What testpmd's count of received packets stands behind, in what it shows each second.
const RECEIVED: &str = "RX-packets:";
/// testpmd's burst, of which it sends one per queue at first and then what it receives.
const BURST: u64 = 32;

/// testpmd with one port of so many pairs.
fn testpmd(socket: &Path, device: &str, pairs: u16, more: &str) -> Running {
    let cpus = ok(rustix::thread::sched_getaffinity(None));
    let cpus: Vec<_> = (0..1024).filter(|&cpu| cpus.is_set(cpu)).collect();
    let (first, last) = (cpus[0], cpus[cpus.len() - 1]);
    // Lines as they come, although nobody sees a terminal.
    let mut words =
        "--pdeathsig KILL stdbuf -oL dpdk-testpmd --no-huge --no-shconf -m 256 --no-pci --no-telemetry".to_owned();
    words += &format!(" --lcores=0@{first},1@{last}");
    words += &format!(" --vdev net_virtio_user0,path={},queues={pairs},queue_size=256{device}", socket.display());
    words += &format!(" -- --rxq={pairs} --txq={pairs} --nb-cores=1 --total-num-mbufs=16384 --stats-period=1 {more}");
    ok(program("setpriv", words.split_whitespace()).start())
}

/// The number behind the last `name` that testpmd has shown.
fn figure(shown: &str, name: &str) -> Option<u64> {
    shown.rsplit_once(name)?.1.split_whitespace().next()?.parse().ok()
}

/// Waits until testpmd has received so many packets.
fn received(testpmd: &mut Running, packets: u64) -> u64 {
    let deadline = Instant::now() + LIMIT;
    loop {
        let shown = testpmd.shown();
        match figure(&shown, RECEIVED) {
            Some(count) if count >= packets => return count,
            _ => assert!(Instant::now() < deadline, "no {packets} packets: {shown}{}", testpmd.said()),
        }
        ok(testpmd.expect_count(RECEIVED, shown.matches(RECEIVED).count() + 1, LIMIT));
    }
}

/// Ends testpmd as its operator would.
fn end(testpmd: Running) -> Ended {
    ok(testpmd.signal(Signal::INT));
    let ended = ok(testpmd.end(LIMIT));
    assert_eq!(ended.code(), 0, "{}{}", ended.stdout, ended.stderr);
    ended
}

fn ready() -> bool {
    need(Need::IoUring) && need(Need::Dpdk)
}

#[test]
fn testpmd_moves_packets_with_one_pair_and_two_and_loses_none() {
    if !ready() {
        return;
    }
    let _alone = alone();
    for pairs in [1, 2] {
        let folder = scratch();
        let socket = folder.path().join("n.sock");
        let (path, net) = (socket.display().to_string(), format!("loopback=on,queues={pairs}"));
        let served =
            Daemon::start(move || ok(daemon("ringvm-net", ["-v", "--stats", "--socket", &path, "--net", &net])));
        // Everything that is received is sent again, for ever.
        let mut running = testpmd(&socket, "", pairs, "--forward-mode=io --tx-first");
        received(&mut running, 200_000);
        let shown = end(running).stdout;
        let said = served.terminate();
        let count = |name| figure(&shown, name).unwrap_or_else(|| panic!("no {name} in {shown}"));
        let (rx, tx) = (count("RX-total:"), count("TX-total:"));
        assert_eq!((count("RX-dropped:"), count("TX-dropped:")), (0, 0), "{shown}");
        assert!(rx <= tx && tx - rx <= BURST * u64::from(pairs), "{rx} received of {tx}: {shown}");
        // It ends with a burst or two still in its rings.
        let sent = operations(&said, "net0: sent");
        assert!(sent <= tx && tx - sent <= BURST * u64::from(pairs), "{sent} of {tx} sent: {said}");
        assert!((rx..=sent).contains(&operations(&said, "net0: received")), "{rx} to {sent} received: {said}");
        for queue in 0..pairs * 2 {
            let moved = operations(&said, &format!("net0: queue {queue}"));
            assert!(moved >= 10_000, "queue {queue} moved {moved} packets: {said}");
        }
        say(&format!("testpmd, {pairs} pairs: {tx} packets sent, {rx} received"));
    }
}

/// virtio-user connects once as a client; as a server it takes whoever comes next.
#[test]
fn testpmd_moves_packets_through_kills_of_the_daemon() {
    if !ready() {
        return;
    }
    let _alone = alone();
    for pairs in [1, 2] {
        let folder = scratch();
        let socket = folder.path().join("n.sock");
        let mut running = testpmd(&socket, ",server=1", pairs, "--forward-mode=flowgen");
        let (path, net) = (socket.display().to_string(), format!("loopback=on,queues={pairs}"));
        let mut served = Daemon::start(move || {
            ok(daemon("ringvm-net", ["-v", "--stats", "--client", "--socket", &path, "--net", &net]))
        });
        let mut count = received(&mut running, 50_000);
        for _ in 0..2 {
            served.kill();
            served.restart();
            // The first that it shows may still be what it had before.
            let shown = running.shown().matches(RECEIVED).count();
            ok(running.expect_count(RECEIVED, shown + 2, LIMIT));
            count = received(&mut running, 0);
            count = received(&mut running, count + 50_000);
        }
        let ended = end(running);
        assert_eq!(ended.stderr.matches("reconnection succeeds").count(), 2, "{}", ended.stderr);
        let said = served.terminate();
        for queue in 0..pairs * 2 {
            let moved = operations(&said, &format!("net0: queue {queue}"));
            assert!(moved >= 1_000, "queue {queue} moved {moved} packets since the last kill: {said}");
        }
        say(&format!("testpmd, {pairs} pairs: {count} packets received through two kills"));
    }
}
