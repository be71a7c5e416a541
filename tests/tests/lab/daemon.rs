//! Daemons that are killed in the middle of a stock guest's work: fio's checksums, a file system, TCP.

use std::time::Duration;

use ringvm_tests::Result;
use ringvm_tests::lab::{Exit, Guest, Lab, disk, lab, vm};
use ringvm_tests::native::Place;
use ringvm_tests::ongoing;
use rustix::process::Signal;

/// TCG in TCG.
const LIMIT: Duration = Duration::from_secs(240);
const HOST: &str = "10.9.0.1";
const GUEST: &str = "10.9.0.2";

/// Does `work` in the guest while `disturb` is done so many times, each once `busy` holds, and the line with `sign` was
/// said of the time before. Returns what the work has said.
fn through(
    guest: &mut Guest,
    times: usize,
    sign: &str,
    (work, busy): (&str, &str),
    mut disturb: impl FnMut(&mut Guest) -> Result<()>,
) -> Result<String> {
    let told = |guest: &Guest| guest.stderr().matches(sign).count();
    let before = told(guest);
    guest.run(&ongoing::start(work))?;
    for time in 1..=times {
        guest.listen(Duration::from_millis(700))?;
        guest.run(&format!("until {busy}; do {{ {}; }} || exit 1; sleep 0.1; done", ongoing::GOES_ON))?;
        guest.run(ongoing::GOES_ON)?;
        disturb(guest)?;
        for _ in 0..300 {
            if told(guest) == before + time {
                break;
            }
            guest.listen(Duration::from_millis(100))?;
        }
        assert_eq!(told(guest), before + time, "`{sign}` is said: {}", guest.stderr());
    }
    guest.run_for(LIMIT, ongoing::FINISH)
}

/// Starts work in the guest, kills the daemon so many times meanwhile, each time once it serves again and `busy` succeeds in the
/// guest, and lets the work come to its end, which must be a success. Gives what it printed when it was done for the last time.
fn through_kills(lab: &Lab, guest: &mut Guest, daemon: &str, kills: usize, work: &str, busy: &str) -> Result<String> {
    let kill = |_: &mut Guest| lab.run(&format!("kill -9 $(pidof {daemon})")).map(drop);
    let said = through(guest, kills, " is back", (work, busy), kill)?;
    let told = |what: &str| guest.stderr().matches(what).count();
    assert_eq!(told(" is away ("), told(" is back"), "each absence is said once: {}", guest.stderr());
    Ok(said)
}

#[test]
fn pitfall_51_fio_verifies_through_kills_of_the_daemon() {
    lab(|lab| {
        let image = lab.image("128M")?;
        let served = disk(&image).place(Place::Daemon).queues(2);
        let mut guest = lab.boot(&vm().cpus(2).memory("640M").fio().disk(served))?;
        let fio = "fio --name=verify --filename=/dev/vda --rw=randwrite --bsrange=4k-160k --blockalign=4k --direct=1 \
                   --ioengine=libaio --iodepth=16 --iomem_align=4k --thread --numjobs=2 --cpus_allowed=0,1 \
                   --cpus_allowed_policy=split --size=24M --offset_increment=64M --fsync=32 --verify=crc32c --do_verify=1 \
                   --verify_fatal=1 --randrepeat=0";
        let said = through_kills(lab, &mut guest, "ringvm-blk", 5, fio, "pidof fio")?;
        assert_eq!(said.matches("err= 0").count(), 2, "both jobs without errors:\n{said}");
        assert_eq!(guest.power_off()?, Exit::Code(0));
        Ok(())
    });
}

#[test]
fn pitfall_51_a_file_system_is_whole_after_kills_of_the_daemon() {
    lab(|lab| {
        let image = lab.image("256M")?;
        let machine = vm().disk(disk(&image).place(Place::Daemon).queues(2));
        let mut guest = lab.boot(&machine)?;
        guest.run("mkfs.ext4 -q /dev/vda && mount -t ext4 /dev/vda /mnt")?;
        // Copies that each reach the disk, and are read back from it.
        let work = "for n in 1 2; do rm -rf /mnt/$n && mkdir /mnt/$n && cp -a /bin /lib /modules /mnt/$n/ && sync && \
                    echo 3 >/proc/sys/vm/drop_caches || exit 1; done";
        through_kills(lab, &mut guest, "ringvm-blk", 4, work, "true")?;
        let sums = "find bin lib modules -type f -exec md5sum {} + | sort -k 2 | md5sum";
        let whole = guest.run_for(LIMIT, &format!("cd / && {sums}"))?;
        for copy in 1..=2 {
            assert_eq!(guest.run_for(LIMIT, &format!("cd /mnt/{copy} && {sums}"))?, whole, "copy {copy}");
        }
        guest.run("cd / && umount /mnt")?;
        assert_eq!(guest.power_off()?, Exit::Code(0));
        lab.run(&format!("e2fsck -fn {}", image.path))?;
        Ok(())
    });
}

/// A guest with a NIC on the tap `vm0` of L1, which serves iperf3.
fn networked(lab: &mut Lab, place: Place, pairs: u32) -> Result<Guest> {
    let net = format!("tap=vm0,mac=52:54:00:0a:09:02,queues={pairs}");
    let mut guest = lab.boot(&vm().cpus(pairs).net_in(place, &net))?;
    lab.run(&format!("ip addr add {HOST}/24 dev vm0"))?;
    guest.run(&format!("ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up && ping -c 3 -W 5 {HOST}"))?;
    assert_eq!(guest.run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l")?, pairs.to_string());
    lab.run("iperf3 -s -D -I /run/iperf3.pid")?;
    Ok(guest)
}

/// A command that streams for some seconds. The server may not know yet that the client before it has gone. Each time
/// something must arrive.
fn iperf3(pairs: u32, direction: &str) -> String {
    format!(
        "sleep 1; iperf3 -c {HOST} -t 6 -f m -P {pairs} {direction} >/tmp/iperf3; code=$?; cat /tmp/iperf3; \
         [ $code = 0 ] && grep receiver /tmp/iperf3 | grep -v -q ' 0.00 Mbits/sec'"
    )
}

fn tell_rate(pairs: u32, said: &str) {
    let received = said.lines().rfind(|line| line.trim_end().ends_with("receiver"));
    println!("{pairs} pairs: {}", received.unwrap_or_else(|| panic!("no receiver in {said}")));
}

#[test]
fn iperf3_goes_on_while_its_nic_moves_between_process_and_daemon() {
    lab(|lab| {
        let mut guest = networked(lab, Place::Process, 2)?;
        for direction in ["", "-R"] {
            let moved = |guest: &mut Guest| guest.signal(Signal::USR2);
            // Away and back, twice.
            let said = through(&mut guest, 4, "net0: moved to ", (&iperf3(2, direction), "pidof iperf3"), moved)?;
            tell_rate(2, &said);
        }
        guest.run(&format!("ping -c 3 -W 5 {HOST}"))?;
        lab.run("kill $(cat /run/iperf3.pid)")?;
        println!("{}", guest.stderr());
        assert_eq!(guest.power_off()?, Exit::Code(0));
        Ok(())
    });
}

#[test]
fn pitfall_51_iperf3_goes_on_through_kills_of_the_daemon_with_one_and_two_queue_pairs() {
    lab(|lab| {
        for pairs in [1, 2] {
            let mut guest = networked(lab, Place::Daemon, pairs)?;
            for direction in ["", "-R"] {
                let iperf3 = iperf3(pairs, direction);
                let said = through_kills(lab, &mut guest, "ringvm-net", 3, &iperf3, "pidof iperf3")?;
                tell_rate(pairs, &said);
            }
            guest.run(&format!("ping -c 3 -W 5 {HOST}"))?;
            lab.run("kill $(cat /run/iperf3.pid)")?;
            assert_eq!(guest.power_off()?, Exit::Code(0));
            // The kernel lets go of what an io_uring held a moment after its process has ended, and of the tap with it.
            lab.run(
                "n=0; while [ -e /sys/class/net/vm0 ]; do n=$((n + 1)); [ $n -lt 200 ] || exit 1; sleep 0.05; done",
            )?;
        }
        Ok(())
    });
}
