//! A NIC on a tap: addresses, traffic both ways with every offload on and off in turn, intact data, and a tap that goes away.
//! L1 is the network's other end; nothing of it is seen outside.

use std::time::Duration;

use ringvm_tests::Result;
use ringvm_tests::lab::{Exit, Guest, Lab, lab, vm};
use ringvm_tests::streams::Streamed;

const HOST: &str = "10.9.0.1";
const GUEST: &str = "10.9.0.2";
const LIMIT: Duration = Duration::from_secs(240);
/// How much is streamed each way.
const STREAM: u64 = 1 << 30;
const STREAM_LIMIT: Duration = Duration::from_secs(600);

/// A guest with one NIC of so many queue pairs on the tap `vm0`, both ends with an address. It has a vCPU per pair: L1 has
/// one CPU, and two vCPUs that take turns on it halve the rates.
fn boot(lab: &mut Lab, pairs: u16, more: &str) -> Result<Guest> {
    let net = format!("tap=vm0,mac=52:54:00:0a:09:02,queues={pairs}{more}");
    let mut guest = lab.boot(&vm().cpus(u32::from(pairs)).net(&net).arg("--stats"))?;
    lab.run(&format!("ip addr add {HOST}/24 dev vm0"))?;
    guest.run(&format!("ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up"))?;
    guest.run(&format!("ping -c 3 -W 5 {HOST}"))?;
    Ok(guest)
}

/// Moves data for some seconds and gives what each stream brought to its receiver, in Mbit/s.
fn streams(guest: &mut Guest, seconds: u32, options: &str) -> Result<Vec<f64>> {
    let said = guest.run_for(LIMIT, &format!("iperf3 -c {HOST} -t {seconds} -f m --connect-timeout 5000 {options}"))?;
    let received = said.lines().filter(|line| line.trim_end().ends_with("receiver") && !line.contains("SUM"));
    let rates = received.map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        let unit = words.iter().position(|&word| word == "Mbits/sec");
        unit.and_then(|at| words[at - 1].parse::<f64>().ok()).unwrap_or_else(|| panic!("no rate in {line}"))
    });
    let rates: Vec<_> = rates.collect();
    assert!(!rates.is_empty(), "iperf3 {options} tells of no receiver: {said}");
    Ok(rates)
}

/// Moves data out of the guest and into it; Mbit/s of each.
fn traffic(guest: &mut Guest, options: &str) -> Result<(f64, f64)> {
    let mut both_ways = [0.0; 2];
    for (rate, direction) in both_ways.iter_mut().zip(["", "-R"]) {
        *rate = streams(guest, 1, &format!("{options} {direction}"))?.iter().sum();
        assert!(*rate > 0.0, "nothing arrives with iperf3 {options} {direction}");
    }
    Ok(both_ways.into())
}

/// Frames that the guest's driver counts in a direction, over all queues, and those that L1 counts at the other end.
fn frames(lab: &Lab, guest: &mut Guest, ours: &str, theirs: &str) -> Result<(u64, u64)> {
    let counters = guest.run("ethtool -S eth0")?;
    let queues = counters.lines().filter_map(|line| {
        let (name, value) = line.trim().split_once(": ")?;
        (name.starts_with(&format!("{ours}_queue_")) && name.ends_with("_packets"))
            .then(|| value.parse::<u64>().ok())?
    });
    let there = lab.run(&format!("cat /sys/class/net/vm0/statistics/{theirs}_packets"))?;
    Ok((queues.sum(), there.parse().unwrap_or_else(|_| panic!("a number of frames: {there}"))))
}

/// What a queue of the guest's NIC has counted.
fn queue_counter(guest: &mut Guest, name: &str) -> Result<u64> {
    let value = guest.run(&format!("ethtool -S eth0 | sed -n 's/^ *{name}: //p'"))?;
    Ok(value.parse().unwrap_or_else(|_| panic!("{name} is `{value}`")))
}

#[test]
fn a_guest_gets_an_address_and_moves_tcp_and_udp_with_one_and_two_queue_pairs() {
    lab(|lab| {
        for (pairs, mtu) in [(1, 1400), (2, 9000)] {
            let mut guest = boot(lab, pairs, &format!(",mtu={mtu}"))?;
            assert_eq!(guest.run("cat /sys/class/net/eth0/address")?, "52:54:00:0a:09:02");
            assert_eq!(guest.run("cat /sys/class/net/eth0/carrier /sys/class/net/eth0/mtu")?, format!("1\n{mtu}"));
            assert_eq!(lab.run("cat /sys/class/net/vm0/mtu")?, mtu.to_string());
            assert_eq!(guest.run("cat /sys/class/net/eth0/speed /sys/class/net/eth0/duplex")?, "10000\nfull");
            // A packet that fills the MTU, uncut, and back.
            guest.run(&format!("ping -c 3 -W 5 -s {} {HOST}", mtu - 28))?;
            let queues = guest.run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l")?;
            assert_eq!(queues, pairs.to_string());
            let vectors = guest.run("grep -c -E 'virtio[0-9]+-(input|output)' /proc/interrupts")?;
            assert_eq!(vectors, (pairs * 2).to_string());
            lab.run(&format!(
                "printf 'start {GUEST}\\nend {GUEST}\\ninterface vm0\\npidfile /run/udhcpd.pid\\nlease_file /run/leases\\n' >/run/udhcpd.conf && \
                 touch /run/leases && udhcpd -S /run/udhcpd.conf"
            ))?;
            let lease = guest.run_for(LIMIT, "ip addr flush dev eth0; echo 'echo \"$1 $ip\"' >/tmp/lease && chmod +x /tmp/lease && sed -i '1i #!/bin/sh' /tmp/lease && udhcpc -i eth0 -n -q -f -s /tmp/lease 2>/dev/null")?;
            lab.run("kill $(cat /run/udhcpd.pid)")?;
            assert!(lease.contains(&format!("bound {GUEST}")), "{lease}");
            guest.run(&format!("ip addr add {GUEST}/24 dev eth0"))?;
            lab.run("iperf3 -s -D -I /run/iperf3.pid")?;
            let tcp = traffic(&mut guest, &format!("-P {pairs}"))?;
            let udp = traffic(&mut guest, &format!("-u -b 20M -P {pairs}"))?;
            lab.run("kill $(cat /run/iperf3.pid)")?;
            println!("{pairs} pairs, Mbit/s out of the guest and into it: TCP {tcp:?}, UDP {udp:?}");
            // Each queue carries what its CPU sends, and what comes back for it.
            for queue in 0..pairs {
                let names = ["rx", "tx"].map(|way| format!("{way}_queue_{queue}_packets"));
                let before = [queue_counter(&mut guest, &names[0])?, queue_counter(&mut guest, &names[1])?];
                guest.run(&format!("taskset {} ping -c 5 -W 5 {HOST}", 1 << queue))?;
                // The tap learns where a flow comes from with its first frames.
                for ((name, before), least) in names.iter().zip(before).zip([3, 5]) {
                    let more = queue_counter(&mut guest, name)? - before;
                    assert!(more >= least, "{name} rose by {more} during five pings on CPU {queue}");
                }
            }
            // Both ends count the same; a frame may be under way, and a transmitted one is counted once it is given back.
            for (ours, theirs) in [("rx", "tx"), ("tx", "rx")] {
                let mut counted = frames(lab, &mut guest, ours, theirs)?;
                for _ in 0..20 {
                    if counted.0 == counted.1 {
                        break;
                    }
                    guest.run(&format!("ping -c 1 -W 5 {HOST}"))?;
                    counted = frames(lab, &mut guest, ours, theirs)?;
                }
                assert_eq!(counted.0, counted.1, "{ours} in the guest and {theirs} of its tap");
            }
            let statistics = guest.statistics("received")?;
            assert!(statistics.contains("net0: sent: ") && statistics.contains("net0: received: "), "{statistics}");
            // Down and up again from the guest.
            guest.run("ip link set eth0 down")?;
            assert_ne!(guest.status(&format!("ping -c 1 -W 1 {HOST}"))?.0, 0, "the link is down");
            guest.run(&format!("ip link set eth0 up && ping -c 3 -W 5 {HOST}"))?;
            assert_eq!(guest.power_off()?, Exit::Code(0));
        }
        Ok(())
    });
}

/// ethtool's name of an offload, and the line in which `ethtool -k` says what became of it.
const OFFLOADS: [(&str, &str); 9] = [
    ("tx", "tx-checksumming"),
    ("sg", "scatter-gather"),
    ("tso", "tcp-segmentation-offload"),
    ("gso", "generic-segmentation-offload"),
    ("gro", "generic-receive-offload"),
    ("rx", "rx-checksumming"),
    ("tx-tcp6-segmentation", "tx-tcp6-segmentation"),
    ("tx-udp-segmentation", "tx-udp-segmentation"),
    ("rx-gro-hw", "rx-gro-hw"),
];

#[test]
fn pitfall_36_every_offload_can_be_off_with_one_and_two_queue_pairs() {
    lab(|lab| {
        let mut table = format!("{:<6} {:<22} {:<16} {:>9} {:>9}\n", "pairs", "offload", "", "Mbit out", "Mbit in");
        for pairs in [1, 2] {
            let mut guest = boot(lab, pairs, "")?;
            lab.run("iperf3 -s -D -I /run/iperf3.pid")?;
            let streams = format!("-P {pairs}");
            let mut row = |name: &str, state: &str, (out, into): (f64, f64)| {
                table += &format!("{pairs:<6} {name:<22} {state:<16} {out:>9.0} {into:>9.0}\n");
            };
            row("everything", "on", traffic(&mut guest, &streams)?);
            for (name, line) in OFFLOADS {
                let state = format!("ethtool -k eth0 | sed -n 's/^\\t*{line}: //p'");
                let before = guest.run(&state)?;
                // One that this driver or this host's tap lacks says so; that is in the table too.
                guest.status(&format!("ethtool -K eth0 {name} off 2>&1"))?;
                let now = guest.run(&state)?;
                assert!(now.starts_with("off") || now == "on [fixed]", "{name}: {before}, then {now}");
                row(name, &now, traffic(&mut guest, &streams)?);
                guest.status(&format!("ethtool -K eth0 {name} on 2>&1"))?;
                assert_eq!(guest.run(&state)?, before, "{name} is as it was");
            }
            lab.run("kill $(cat /run/iperf3.pid)")?;
            assert_eq!(guest.power_off()?, Exit::Code(0));
        }
        println!("{table}");
        Ok(())
    });
}

#[test]
fn pitfall_40_only_the_pairs_that_the_guest_serves_are_attached_before_and_after_every_change() {
    lab(|lab| {
        let mut guest = boot(lab, 2, "")?;
        lab.run("iperf3 -s -D -I /run/iperf3.pid")?;
        // The tap's queues in sysfs are those that are attached: frames are spread over them.
        let attached = |lab: &Lab| lab.run("ls -d /sys/class/net/vm0/queues/rx-* | wc -l");
        assert_eq!(attached(lab)?, "2");
        for count in [1, 2, 1, 2] {
            guest.run(&format!("ethtool -L eth0 combined {count}"))?;
            assert_eq!(attached(lab)?, count.to_string());
            // With a queue that nobody serves, some of the streams would bring nothing.
            let rates = streams(&mut guest, 3, "-P 8 -R")?;
            assert!(rates.len() == 8 && rates.iter().all(|&rate| rate > 0.0), "{count} pairs: {rates:?} Mbit/s");
        }
        assert_ne!(guest.status("ethtool -L eth0 combined 3 2>&1")?.0, 0, "more than there are");
        guest.run(&format!("ping -c 3 -W 5 {HOST}"))?;
        // Nobody serves the second while the guest starts again; then its driver takes both.
        guest.start("reboot -f")?;
        lab.run("n=0; until [ $(ls -d /sys/class/net/vm0/queues/rx-* | wc -l) = 1 ]; do n=$((n + 1)); [ $n -lt 200 ] || exit 1; sleep 0.05; done")?;
        guest.ready()?;
        guest.run(&format!("ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up && ping -c 3 -W 5 {HOST}"))?;
        assert_eq!(attached(lab)?, "2");
        lab.run("kill $(cat /run/iperf3.pid)")?;
        assert_eq!(guest.power_off()?, Exit::Code(0));
        Ok(())
    });
}

#[test]
fn a_gibibyte_of_random_data_arrives_intact_both_ways() {
    lab(|lab| {
        let mut guest = boot(lab, 1, "")?;
        let offloads = guest.run("ethtool -k eth0")?;
        for on in ["tcp-segmentation-offload: on", "tx-checksumming: on", "rx-gro-hw: on"] {
            assert!(offloads.contains(on), "{on} in {offloads}");
        }
        for (host, port, verb, counter) in [("send", 7000, "receive", "rx"), ("receive", 7001, "send", "tx")] {
            let packets = format!("cat /sys/class/net/eth0/statistics/{counter}_packets");
            let before: u64 = guest.run(&packets)?.parse().expect("a number");
            lab.run(&format!(
                "lab-stream listen {HOST}:{port} {host} {STREAM} >/run/stream 2>&1 & echo $! >/run/stream.pid"
            ))?;
            let here = guest.run_for(STREAM_LIMIT, &format!("lab-stream connect {HOST}:{port} {verb} {STREAM}"))?;
            lab.run(
                "n=0; while [ -d /proc/$(cat /run/stream.pid) ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n + 1)); done",
            )?;
            let there = lab.run("cat /run/stream")?;
            let [in_guest, in_l1] = [&here, &there].map(|said| Streamed::read(said, STREAM));
            assert_eq!(in_guest.sum, in_l1.sum, "the guest {verb}s: {here}; L1: {there}");
            let after: u64 = guest.run(&packets)?.parse().expect("a number");
            let mean = STREAM / (after - before).max(1);
            let rate = in_guest.rate();
            println!("the guest {verb}s {} MiB: {rate:.1} MiB/s, {mean} bytes per frame", STREAM >> 20);
            // With segments cut by nobody on the way, frames are many times as long as the MTU.
            assert!(mean > 4 * 1500, "{mean} bytes per frame: segmentation is not offloaded");
        }
        assert_eq!(guest.power_off()?, Exit::Code(0));
        Ok(())
    });
}

#[test]
fn pitfall_35_a_tap_that_goes_away_is_a_link_that_is_down() {
    lab(|lab| {
        let mut guest = boot(lab, 1, "")?;
        lab.run("ip link set vm0 down")?;
        assert_ne!(guest.status(&format!("ping -c 1 -W 1 {HOST}"))?.0, 0, "the tap is down");
        lab.run("ip link set vm0 up")?;
        guest.run(&format!("ping -c 3 -W 5 {HOST}"))?;
        lab.run("ip link del vm0")?;
        guest.run("n=0; while [ \"$(cat /sys/class/net/eth0/carrier)\" = 1 ] && [ $n -lt 100 ]; do sleep 0.1; n=$((n + 1)); done")?;
        assert_eq!(guest.run("cat /sys/class/net/eth0/carrier")?, "0");
        // Nothing spins: the I/O threads use next to no time while nothing comes.
        let busy = |lab: &Lab, pid: i32| -> Result<u64> {
            let ticks = lab.run(&format!(
                "for t in /proc/{pid}/task/*; do case $(cat $t/comm) in io*) cut -d' ' -f14,15 $t/stat;; esac; done"
            ))?;
            Ok(ticks.split_whitespace().filter_map(|n| n.parse::<u64>().ok()).sum())
        };
        let before = busy(lab, guest.pid())?;
        guest.run("sleep 3")?;
        let after = busy(lab, guest.pid())?;
        assert!(after - before < 100, "{before} -> {after} ticks of 10 ms in three seconds");
        assert_eq!(guest.power_off()?, Exit::Code(0));
        Ok(())
    });
}
