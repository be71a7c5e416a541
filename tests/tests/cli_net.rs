//! Bad input to `--net`, and what `ringvm check` says of taps: one clear line with what was tried, on what, and what to do.
//! Taps are made in a network of each test's own, which ends with it.

use ringvm_tests::embedded::{assert_success, kernel};
use ringvm_tests::host::{Need, need};
use ringvm_tests::native::{Ended, isolated, ringvm};

/// The configuration can't work.
const CONFIGURATION: i32 = 2;
/// Without any capability, as any user but root is.
const UNPRIVILEGED: &str = "setpriv --inh-caps=-all --bounding-set=-all";

fn arguments<'a>(net: &'a str, job: &'a str) -> Vec<&'a str> {
    let kernel = kernel().to_str().expect("a path of ours is text");
    vec!["run", "--kernel", kernel, "--cmdline", job, "--memory", "256M", "--serial", "stdio", "--net", net]
}

/// `ringvm run` with this NIC and a guest that would power off at once.
fn run(net: &str) -> Ended {
    ringvm(arguments(net, "job=none")).and_then(|vm| vm.run()).unwrap_or_else(|e| panic!("{e}"))
}

/// The same with taps of its own.
fn run_with(setup: &str, wrapper: &str, net: &str) -> Ended {
    isolated(setup, wrapper, arguments(net, "job=none")).and_then(|vm| vm.run()).unwrap_or_else(|e| panic!("{e}"))
}

fn check(setup: &str, wrapper: &str) -> String {
    let ended = isolated(setup, wrapper, ["check"]).and_then(|vm| vm.run()).unwrap_or_else(|e| panic!("{e}"));
    assert!([0, 3].contains(&ended.code()) && ended.stderr.is_empty(), "{}{}", ended.stdout, ended.stderr);
    ended.stdout
}

fn ready() -> bool {
    need(Need::Kvm) && need(Need::IoUring) && need(Need::Tap)
}

#[test]
fn options_that_are_unknown_or_cannot_be() {
    let ports = "give one of tap=, fds=, link=";
    for (net, words) in [
        ("speed=1,tap=a", &["there is no key `speed`", "the keys are tap, fds, link"][..]),
        ("queues=2", &["no port is named", ports]),
        ("", &["no port is named", ports]),
        ("loopback=off", &["no port is named", ports]),
        ("loopback=perhaps", &["`perhaps` is neither on nor off"]),
        ("tap=a,link=b", &["more than one port is named", ports]),
        ("tap=a,loopback=on", &["more than one port is named", ports]),
        ("tap=a,tap=b", &["tap"]),
        ("tap=a,mac=01:00:5e:00:00:01", &["mac=01:00:5e:00:00:01", "multicast", "must be even"]),
        ("tap=a,mac=00:00:00:00:00:00", &["mac=00:00:00:00:00:00", "leave it out"]),
        ("tap=a,mac=52:54:00", &["mac=52:54:00 ", "like 52:54:00:12:34:56"]),
        ("tap=a,mtu=67", &["mtu=67", "68 to 65520"]),
        ("tap=a,mtu=65521", &["mtu=65521", "68 to 65520"]),
        ("tap=a,mtu=70000", &["mtu", "70000", "out of range"]),
        ("tap=a,mtu=large", &["mtu", "`large`"]),
        ("tap=a,queues=0", &["queues=0", "1 to 32"]),
        ("tap=a,queues=33", &["queues=33", "1 to 32"]),
        ("tap=a,queue-size=100", &["queue-size=100", "power of two from 64 to 4096"]),
        ("tap=a,queue-size=32", &["queue-size=32", "power of two from 64 to 4096"]),
        ("tap=a,queue-size=8192", &["queue-size=8192", "power of two from 64 to 4096"]),
        ("fds=[3,4]", &["2 descriptors for queues=1", "one for each"]),
        ("fds=[x]", &["fds", "`x`"]),
    ] {
        let ended = run(net);
        ended.assert_refused(CONFIGURATION, words);
        // What was given stands in the line, said once.
        assert!(ended.stderr.starts_with(&format!("ringvm: --net {net}: ")), "{}", ended.stderr);
    }
}

#[test]
fn names_and_descriptors_that_are_no_tap() {
    if !(need(Need::Kvm) && need(Need::IoUring)) {
        return;
    }
    for name in ["", "a-name-too-long-", "a/b", "vm%d"] {
        run(&format!("tap={name}")).assert_refused(CONFIGURATION, &[&format!("tap {name}"), "1 to 15 printable"]);
    }
    run("tap=/dev/no-such-tap").assert_refused(CONFIGURATION, &["/dev/no-such-tap", "No such file", "/dev/tapN"]);
    run("tap=/dev/null").assert_refused(CONFIGURATION, &["/dev/null", "it is no tap"]);
    run("fds=[1]").assert_refused(CONFIGURATION, &["fd 1", "0, 1 and 2"]);
    run("fds=[-1]").assert_refused(CONFIGURATION, &["fd"]);
    run("fds=[9999]").assert_refused(CONFIGURATION, &["fd 9999", "Bad file descriptor"]);
    run("link=/no-such-folder/link").assert_refused(CONFIGURATION, &["/no-such-folder/link", "No such file"]);
    if !need(Need::Tap) {
        return;
    }
    let open = "exec 7<>/dev/null 8<>/dev/net/tun";
    run_with(open, "", "fds=[7]").assert_refused(CONFIGURATION, &["fd 7", "it is no tap"]);
    // Of the driver, but of no interface.
    run_with(open, "", "fds=[8]").assert_refused(CONFIGURATION, &["fd 8", "it is no tap"]);
    run_with(open, "", "fds=[8,8],queues=2").assert_refused(CONFIGURATION, &["fd 8", "named twice"]);
}

#[test]
fn taps_of_another_kind_or_in_use() {
    if !ready() {
        return;
    }
    let taps = "ip tuntap add single mode tap vnet_hdr; ip tuntap add many mode tap vnet_hdr multi_queue; \
                ip tuntap add ip0 mode tun";
    for (net, name) in
        [("tap=single,queues=2", "tap single"), ("tap=many", "tap many"), ("tap=ip0", "tap ip0"), ("tap=lo", "tap lo")]
    {
        let words = [name, "attaching to the interface", "Invalid argument", "other flags", "multi_queue"];
        run_with(taps, "", net).assert_refused(CONFIGURATION, &words);
    }
    // Another VM has it: its carrier is on as long as somebody is attached.
    let used = "\"$0\" run --kernel KERNEL --cmdline 'job=net-rx time=30s stall=30s' --memory 256M --serial null \
                --net tap=vm0 </dev/null >/dev/null 2>&1 & \
                n=0; until ip link show vm0 2>/dev/null | grep -q LOWER_UP; do \
                n=$((n + 1)); [ $n -lt 100 ] || exit 99; sleep 0.1; done";
    let used = used.replace("KERNEL", kernel().to_str().expect("a path of ours is text"));
    let words = ["tap vm0", "attaching to the interface", "busy", "another process uses it"];
    run_with(&used, "", "tap=vm0").assert_refused(CONFIGURATION, &words);
}

#[test]
fn a_user_without_rights_is_told_what_to_ask_for_and_can_use_a_tap_of_its_own() {
    if !ready() {
        return;
    }
    let mine = "ip tuntap add mine mode tap user 0 vnet_hdr";
    let words = ["tap vm0", "not permitted", "ip tuntap add NAME mode tap user USER"];
    run_with("", UNPRIVILEGED, "tap=vm0").assert_refused(CONFIGURATION, &words);
    if rustix::process::geteuid().is_root() {
        // Whoever is not root has no other users in a namespace of his own.
        let theirs = "ip tuntap add theirs mode tap user 65534 vnet_hdr";
        let words = ["tap theirs", "not permitted", "ip tuntap add NAME mode tap user USER"];
        run_with(theirs, UNPRIVILEGED, "tap=theirs").assert_refused(CONFIGURATION, &words);
    }
    // Its own, but down.
    let words = ["tap mine", "bringing the interface up", "not permitted", "ip link set NAME up"];
    run_with(mine, UNPRIVILEGED, "tap=mine").assert_refused(CONFIGURATION, &words);
    let closed = "mount -t tmpfs none /dev/net; touch /dev/net/tun; chmod 0 /dev/net/tun";
    let words = ["tap vm0", "opening /dev/net/tun", "Permission denied", "fds="];
    run_with(closed, UNPRIVILEGED, "tap=vm0").assert_refused(CONFIGURATION, &words);
    let words = ["tap vm0", "opening /dev/net/tun", "No such file", "modprobe tun"];
    run_with("mount -t tmpfs none /dev/net", "", "tap=vm0").assert_refused(CONFIGURATION, &words);
    // As the README has it: made and brought up by root beforehand.
    for (mine, net, pairs) in [
        ("ip tuntap add mine mode tap user 0 vnet_hdr; ip link set mine up", "tap=mine", "1"),
        ("ip tuntap add mine mode tap user 0 vnet_hdr multi_queue; ip link set mine up", "tap=mine,queues=2", "2"),
    ] {
        let job = format!("job=net-tx size=1500 time=100ms pairs={pairs}");
        let ended = isolated(mine, UNPRIVILEGED, arguments(net, &job)).and_then(|vm| vm.run());
        assert_success(&ended.unwrap_or_else(|e| panic!("{e}")));
    }
}

#[test]
fn check_names_what_the_host_lacks_for_nics() {
    if !need(Need::Tap) {
        return;
    }
    let all = check("", "");
    for word in
        ["tap: /dev/net/tun opens", "tap rights: this user may create taps", "vnet headers, multi-queue", "TSO4"]
    {
        assert!(all.contains(word), "`{word}` in {all}");
    }
    // Each host has it, or is told that it has not.
    assert_eq!(all.matches("USO").count(), if all.contains("missing: USO") { 2 } else { 1 }, "{all}");
    let none = check("", UNPRIVILEGED);
    for word in ["limited  tap rights", "CAP_NET_ADMIN is missing", "ip tuntap add NAME", "tap features: not tried"] {
        assert!(none.contains(word), "`{word}` in {none}");
    }
    let closed = check("mount -t tmpfs none /dev/net; touch /dev/net/tun; chmod 0 /dev/net/tun", UNPRIVILEGED);
    assert!(closed.contains("limited  tap: opening /dev/net/tun: Permission denied"), "{closed}");
    let absent = check("mount -t tmpfs none /dev/net", "");
    assert!(
        absent.contains("limited  tap: opening /dev/net/tun: No such file") && absent.contains("modprobe tun"),
        "{absent}"
    );
    assert!(!absent.contains("tap features"), "{absent}");
    // What is asked leaves nothing behind.
    let left = "ip link show check0 2>/dev/null && exit 98; :";
    check(&format!("\"$0\" check >/dev/null || :; {left}"), "");
}
