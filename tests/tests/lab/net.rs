//! A NIC on a tap: addresses, traffic both ways with every offload on and off in turn, intact data, and a tap that goes away.
//! L1 is the network's other end; nothing of it is seen outside.

use std::time::Duration;

use ringvm_tests::Result;
use ringvm_tests::lab::{Exit, Guest, Lab, lab, vm};

const HOST: &str = "10.9.0.1";
const GUEST: &str = "10.9.0.2";
const LIMIT: Duration = Duration::from_secs(240);

/// A guest with one NIC of so many queue pairs on the tap `vm0`, both ends with an address.
fn boot(lab: &mut Lab, pairs: u16, more: &str) -> Result<Guest> {
    let net = format!("tap=vm0,mac=52:54:00:0a:09:02,queues={pairs}{more}");
    let mut guest = lab.boot(&vm().cpus(2).arg("--net").arg(&net).arg("--stats"))?;
    lab.run(&format!("ip addr add {HOST}/24 dev vm0"))?;
    guest.run(&format!("ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up"))?;
    guest.run(&format!("ping -c 3 -W 5 {HOST}"))?;
    Ok(guest)
}

/// Moves data both ways for a moment; iperf3 fails if none arrives.
fn traffic(guest: &mut Guest, options: &str) -> Result<()> {
    for direction in ["", "-R"] {
        guest.run_for(
            LIMIT,
            &format!("iperf3 -c {HOST} -t 1 --connect-timeout 5000 {options} {direction} >/dev/null"),
        )?;
    }
    Ok(())
}

#[test]
fn a_guest_gets_an_address_and_moves_tcp_and_udp_with_one_and_two_queue_pairs() {
    lab(|lab| {
        for pairs in [1, 2] {
            let mut guest = boot(lab, pairs, ",mtu=1500")?;
            assert_eq!(guest.run("cat /sys/class/net/eth0/address")?, "52:54:00:0a:09:02");
            assert_eq!(guest.run("cat /sys/class/net/eth0/carrier /sys/class/net/eth0/mtu")?, "1\n1500");
            assert_eq!(guest.run("cat /sys/class/net/eth0/speed /sys/class/net/eth0/duplex")?, "10000\nfull");
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
            let streams = format!("-P {pairs}");
            traffic(&mut guest, &streams)?;
            traffic(&mut guest, &format!("-u -b 20M {streams}"))?;
            lab.run("kill $(cat /run/iperf3.pid)")?;
            let counters = guest.run("ethtool -S eth0")?;
            for queue in 0..pairs {
                assert!(counters.contains(&format!("rx_queue_{queue}_packets")), "{counters}");
            }
            let statistics = guest.statistics("received")?;
            assert!(statistics.contains("net0: sent: ") && statistics.contains("net0: received: "), "{statistics}");
            assert_eq!(guest.power_off()?, Exit::Code(0));
        }
        Ok(())
    });
}

#[test]
fn every_offload_can_be_off() {
    lab(|lab| {
        let mut guest = boot(lab, 1, "")?;
        lab.run("iperf3 -s -D -I /run/iperf3.pid")?;
        let mut table = String::new();
        for feature in
            ["", "tx", "sg", "tso", "gso", "gro", "rx", "tx-tcp6-segmentation", "tx-udp-segmentation", "rx-gro-hw"]
        {
            // Some are fixed in a driver of this age; that is in the table too.
            let (code, said) = match feature {
                "" => (0, String::new()),
                feature => guest.status(&format!("ethtool -K eth0 {feature} off 2>&1"))?,
            };
            traffic(&mut guest, "")?;
            let name = if feature.is_empty() { "everything on" } else { feature };
            let how = if code == 0 { "off" } else { "can't be off" };
            table += &format!("{name:<24} {how:<14} data both ways {}\n", said.lines().next().unwrap_or_default());
            if !feature.is_empty() {
                guest.status(&format!("ethtool -K eth0 {feature} on 2>&1"))?;
            }
        }
        println!("{table}");
        lab.run("kill $(cat /run/iperf3.pid)")?;
        assert_eq!(guest.power_off()?, Exit::Code(0));
        Ok(())
    });
}

#[test]
fn random_data_arrives_intact_both_ways() {
    lab(|lab| {
        let mut guest = boot(lab, 1, "")?;
        assert!(guest.run("ethtool -k eth0")?.contains("tcp-segmentation-offload: on"));
        let file = lab.path("random");
        lab.run(&format!("dd if=/dev/urandom of={file} bs=1M count=16 2>/dev/null"))?;
        let sum = lab.run(&format!("md5sum <{file}"))?;
        // nc ends when the other side has nothing more to send, so nobody says that before the receiver has it all.
        lab.run("mkfifo /run/open")?;
        guest.run("mkfifo /tmp/open")?;
        // Out of the host.
        lab.run(&format!("(nc -l -p 7000 <{file} >/dev/null 2>&1 &)"))?;
        assert_eq!(guest.run_for(LIMIT, &format!("sleep 1; nc {HOST} 7000 0<>/tmp/open | md5sum"))?, sum);
        // And back into it, the guest passing on what comes.
        lab.run(&format!("(nc -l -p 7001 <{file} >/dev/null 2>&1 &)"))?;
        lab.run("(nc -l -p 7002 0<>/run/open | md5sum >/run/sum &)")?;
        guest.run_for(LIMIT, &format!("sleep 1; nc {HOST} 7001 0<>/tmp/open | nc {HOST} 7002"))?;
        lab.run("while pidof md5sum >/dev/null; do sleep 0.2; done")?;
        assert_eq!(lab.run("cat /run/sum")?, sum);
        assert_eq!(guest.power_off()?, Exit::Code(0));
        Ok(())
    });
}

#[test]
fn pitfall_35_a_tap_that_goes_away_is_a_link_that_is_down() {
    lab(|lab| {
        let mut guest = boot(lab, 1, "")?;
        lab.run("ip link set vm0 down")?;
        guest.status(&format!("ping -c 1 -W 1 {HOST}"))?;
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
