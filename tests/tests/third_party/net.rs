//! A stock Debian guest in QEMU moves TCP both ways through `ringvm-net` and a tap, while the daemon is killed and started again.

use std::thread::sleep;
use std::time::{Duration, Instant};

use ringvm_tests::host::{Need, need, say};
use ringvm_tests::native::program;

use crate::network::Network;
use crate::qemu::{Guest, machine};
use crate::served::{Daemon, operations};
use crate::{alone, ok, scratch};

const HOST: &str = "10.9.0.1";
const GUEST: &str = "10.9.0.2";
const MAC: &str = "52:54:00:0a:09:02";
const LIMIT: Duration = Duration::from_secs(90);
/// How long a stream lasts that is interrupted, in seconds.
const SECONDS: u32 = 10;

#[test]
fn a_debian_guest_in_qemu_moves_tcp_both_ways_with_one_pair_through_kills() {
    streams(1);
}

#[test]
fn a_debian_guest_in_qemu_moves_tcp_both_ways_with_two_pairs_through_kills() {
    streams(2);
}

fn streams(pairs: u16) {
    if !(need(Need::IoUring) && need(Need::Lab) && need(Need::Tap)) {
        return;
    }
    let _alone = alone();
    let folder = scratch();
    let socket = folder.path().join("n.sock");
    let network = Network::new();
    // The tap stays when the daemon does not.
    let flags = if pairs > 1 { "vnet_hdr multi_queue" } else { "vnet_hdr" };
    network.run(&format!("ip tuntap add vm0 mode tap {flags}; ip addr add {HOST}/24 dev vm0; ip link set vm0 up"));
    let words = ok(network.daemon("ringvm-net"));
    let (path, net) = (socket.display().to_string(), format!("tap=vm0,queues={pairs}"));
    let mut served = Daemon::start(move || {
        let options = ["-v", "--stats", "--socket", &path, "--net", &net].map(str::to_owned);
        program("setpriv", words.iter().cloned().chain(options))
    });
    let _server = ok(network.program("iperf3", &["-s"]).start());

    let mut guest = machine().nic(&socket, pairs, MAC).boot(false);
    assert_eq!(guest.run("cat /sys/class/net/eth0/address"), MAC);
    guest.run(&format!("ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up && ping -c 3 -W 5 {HOST}"));
    if pairs > 1 {
        guest.run(&format!("ethtool -L eth0 combined {pairs}"));
    }
    let queues = guest.run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l");
    assert_eq!(queues, pairs.to_string());
    for direction in ["", "-R"] {
        let rate = through_kills(&mut guest, &mut served, &format!("{direction} -P {pairs}"));
        say(&format!("{pairs} pairs, iperf3 {direction}: {rate:.0} Mbit/s with two kills in {SECONDS} s"));
    }
    // Each pair carries what its CPU sends.
    for cpu in 0..pairs {
        guest.run(&format!("taskset {} ping -c 5 -W 5 {HOST}", 1 << cpu));
    }
    network.run(&format!("busybox ping -c 3 -W 5 {GUEST}"));
    guest.power_off();
    let said = served.terminate();
    for queue in 0..pairs * 2 {
        assert!(operations(&said, &format!("net0: queue {queue}")) > 0, "queue {queue} moved nothing: {said}");
    }
}

/// Moves data for some seconds in which the daemon is killed twice; the rate at the receiver over all.
fn through_kills(guest: &mut Guest, served: &mut Daemon, options: &str) -> f64 {
    let begun = Instant::now();
    let iperf =
        guest.begin(&format!("iperf3 -c {HOST} -t {SECONDS} -f m --forceflush --connect-timeout 5000 {options}"));
    for _ in 0..2 {
        sleep(Duration::from_millis(1500));
        assert!(guest.runs(&iperf), "{}", guest.shown(&iperf));
        served.kill();
        sleep(Duration::from_millis(200));
        served.restart();
    }
    assert!(begun.elapsed() < Duration::from_secs(u64::from(SECONDS)), "killed in the middle: {:?}", begun.elapsed());
    let said = guest.finish(&iperf, LIMIT);
    let rate = |line: &str| -> f64 {
        let words: Vec<_> = line.split_whitespace().collect();
        let unit = words.iter().position(|&word| word == "Mbits/sec");
        unit.and_then(|at| words[at - 1].parse().ok()).unwrap_or_else(|| panic!("no rate in {line}"))
    };
    let whole = said.lines().filter(|line| line.trim_end().ends_with("receiver") && !line.contains("SUM"));
    let whole: f64 = whole.map(rate).sum();
    assert!(whole > 0.0, "nothing arrived: {said}");
    // The last two seconds are after the last return.
    let begins = |line: &str| -> Option<f64> { line.split_once(']')?.1.trim_start().split_once('-')?.0.parse().ok() };
    let late = |line: &&str| begins(line).is_some_and(|second| second > f64::from(SECONDS) - 2.5);
    let last = said.lines().filter(|line| late(line) && !line.contains("SUM"));
    let last: f64 = last.filter(|line| line.contains("Mbits/sec")).map(rate).sum();
    assert!(last > 0.0, "nothing moved after the last kill: {said}");
    whole
}
