//! The NIC on the host's own KVM, with the embedded guest as its driver, over ports that need no rights.
//!
//! The guest numbers its frames, fills each with a pattern that follows from the number, and ends with an error for one that is
//! lost, spoilt or comes twice: frames are never sent again, so that nothing can hide a loss.

use std::time::Duration;

use ringvm_tests::embedded::{assert_success, figure, guest, net, ready, succeed};
use ringvm_tests::native::{Ended, Place};
use ringvm_tests::paths;
use tempfile::TempDir;

/// Ten million frames take half a minute on an idle host of two CPUs, and some minutes on one that is busy.
const LIMIT: Duration = Duration::from_secs(400);

/// Runs a test with the NIC in every place.
fn everywhere(test: impl Fn(Place)) {
    if ready() {
        Place::ALL.into_iter().for_each(test);
    }
}

fn assert_intact(said: &str, frames: u64) {
    assert_eq!(figure(said, "frames"), frames, "{said}");
    assert!(figure(said, "bytes") >= frames * 60, "{said}");
    for (key, expected) in [("lost", 0), ("corrupted", 0), ("reordered", 0)] {
        assert_eq!(figure(said, key), expected, "{key} in {said}");
    }
    println!("{}", said.lines().rfind(|line| line.contains(": result ")).unwrap_or_default());
}

/// Echoes frames of 60 to 1514 bytes on one pair. The looped port holds a few frames only (net.unix.max_dgram_qlen), so that
/// both directions wait for each other all the time.
fn echo_frames(count: u64, place: Place) {
    let port = net("loopback=on", place);
    let running = guest(&format!("job=net-echo frames={count} size=random"), &["--net", &port]).start();
    let ended = running.and_then(|running| running.end(LIMIT)).expect("it ends");
    assert_success(&ended);
    assert_intact(&ended.stdout, count);
}

#[test]
fn ten_million_frames_of_mixed_sizes_echo_without_loss() {
    if ready() {
        echo_frames(10_000_000, Place::Process);
    }
}

#[test]
fn two_million_frames_of_mixed_sizes_echo_without_loss_through_a_daemon() {
    if ready() {
        echo_frames(2_000_000, Place::Daemon);
    }
}

#[test]
fn two_pairs_echo_without_loss_on_one_io_thread_and_on_two() {
    everywhere(|place| {
        for threads in ["1", "2"] {
            let options = ["--cpus", "2", "--net", &net("loopback=on,queues=2", place), "--io-threads", threads];
            let said = succeed("job=net-echo frames=500000 pairs=2 cpus=2", &options);
            assert_eq!(figure(&said, "pairs"), 2);
            assert_intact(&said, 500_000);
        }
    });
}

#[test]
fn long_frames_span_receive_buffers_and_echo_without_loss() {
    everywhere(|place| {
        // 65,000 bytes in buffers of 1 KiB are more than 63 of them; without merging, each buffer holds whatever comes.
        for words in ["bs=1024 depth=256", "bs=4096 depth=64", "mrg=0 depth=256"] {
            let job = format!("job=net-echo frames=50000 jumbo=1 {words}");
            let said = succeed(&job, &["--net", &net("loopback=on", place)]);
            assert!(figure(&said, "bytes") > 50_000 * 2_000, "long frames are among them: {said}");
            assert_intact(&said, 50_000);
        }
    });
}

#[test]
fn every_feature_can_be_left_out_and_queues_have_any_size() {
    everywhere(|place| {
        for words in [
            "event_idx=0",
            "mrg=0 qsize=1024",
            "event_idx=0 mrg=0 qsize=256",
            "qsize=64",
            "qsize=2 mrg=0",
            "size=60",
            "size=65000",
        ] {
            let said = succeed(
                &format!("job=net-echo frames=20000 {words}"),
                &["--net", &net("loopback=on,queue-size=4096", place)],
            );
            assert_intact(&said, 20_000);
        }
    });
}

#[test]
fn two_vms_exchange_frames_over_a_link() {
    everywhere(|place| {
        let folder = TempDir::new_in(paths::target()).expect("the target folder is writable");
        for (pairs, words) in [(1, "frames=200000"), (2, "frames=100000"), (1, "frames=20000 jumbo=1")] {
            let net = net(&format!("link={},queues={pairs}", folder.path().join("link").display()), place);
            let start = |role: &str| {
                let job = format!("job=net-peer role={role} pairs={pairs} depth=256 {words}");
                guest(&job, &["--net", &net]).start().expect("it starts")
            };
            // The second comes to a first that has been calling for a while.
            let mut first = start("a");
            first.expect("start job=net-peer", LIMIT).expect("the guest comes up");
            let second = start("b");
            let frames = words.split(['=', ' ']).nth(1).and_then(|n| n.parse().ok()).expect("as written above");
            for running in [first, second] {
                let ended: Ended = running.end(LIMIT).expect("it ends");
                assert_success(&ended);
                assert_intact(&ended.stdout, frames);
            }
        }
        let left = folder
            .path()
            .read_dir()
            .expect("it is ours")
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let sockets: Vec<_> = left.filter(|name| !name.ends_with(".lock")).collect();
        assert!(sockets.is_empty(), "the link's sockets are gone with the VMs: {sockets:?}");
    });
}

#[test]
fn pitfall_43_frames_and_headers_that_lie_are_dropped_and_sound_ones_still_come_back() {
    everywhere(|place| {
        let said = succeed("job=net-hostile stall=10s", &["--net", &net("loopback=on", place)]);
        let acts = figure(&said, "acts");
        assert!(acts >= 18, "{said}");
        let outcome = |what: &str| said.matches(&format!(" outcome={what}")).count() as u64;
        assert_eq!(outcome("echoed"), 2, "headers in several descriptors are no malice: {said}");
        assert_eq!(outcome("dropped"), acts - 2, "none of the others needs a reset: {said}");
    });
}

#[test]
fn a_peer_that_never_comes_and_a_port_without_an_echo_are_told() {
    everywhere(|place| {
        let folder = TempDir::new_in(paths::target()).expect("the target folder is writable");
        let net = net(&format!("link={}", folder.path().join("link").display()), place);
        for (job, what) in [
            ("job=net-peer role=a frames=10 stall=300ms", "FAILED peer where=pair:0"),
            ("job=net-echo frames=10 stall=300ms", "FAILED stall where=pair:0"),
            ("job=net-rx stall=300ms", "FAILED stall where=receive"),
        ] {
            let ended = guest(job, &["--net", &net]).run().expect("it ends");
            assert!(ended.stdout.contains(what), "{}{}", ended.stdout, ended.stderr);
        }
    });
}

#[test]
fn floods_are_counted() {
    everywhere(|place| {
        let folder = TempDir::new_in(paths::target()).expect("the target folder is writable");
        let net = net(&format!("link={}", folder.path().join("link").display()), place);
        let counted = |said: &str| {
            let (frames, bytes) = (figure(said, "frames"), figure(said, "bytes"));
            assert!(frames > 0 && bytes == frames * 1_500, "{said}");
            assert!(figure(said, "fps") > 0 && figure(said, "bps") > 0, "{said}");
        };
        // Nobody hears: each frame is dropped by the device, and its descriptor returned.
        counted(&succeed("job=net-tx size=1500 time=200ms", &["--net", &net]));
        // Somebody does, for a part of the time.
        let receiver = guest("job=net-rx time=500ms", &["--net", &net]).start().expect("it starts");
        let mut sender = guest("job=net-tx size=1500 until=told", &["--net", &net]).start().expect("it starts");
        let heard = receiver.end(LIMIT).expect("it ends");
        sender.tell_enough().expect("the guest works");
        for ended in [heard, sender.end(LIMIT).expect("it ends")] {
            assert_success(&ended);
            counted(&ended.stdout);
        }
    });
}
