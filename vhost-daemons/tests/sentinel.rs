//! `--sentinel-fd`: what tells whoever starts daemons that the kernel has ended all that one had in flight.

mod common;

use std::io::Read;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use common::{Daemon, scratch};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

#[test]
fn a_sentinel_is_held_by_the_rings_alone_and_ends_with_them() {
    for signal in [Signal::KILL, Signal::TERM] {
        let folder = scratch();
        let mut command = Command::new("sh");
        // The sentinel is its standard output as we see it.
        command.args(["-c", "exec \"$0\" \"$@\" 7>&1 >/dev/null", env!("CARGO_BIN_EXE_ringvm-blk")]);
        command.args(["--sentinel-fd", "7", "--disk", "storage=null,size=1M", "--io-threads", "2", "--socket"]);
        let mut daemon = Daemon::spawn(command.arg(folder.path().join("s")).stdout(Stdio::piped()));
        daemon.wait_for("is ready", 1);
        let mut sentinel = daemon.child.stdout.take().expect("it is piped");
        let pipe = std::fs::read_link(format!("/proc/self/fd/{}", sentinel.as_raw_fd())).unwrap();
        let open: Vec<_> = std::fs::read_dir(format!("/proc/{}/fd", daemon.child.id()))
            .unwrap()
            .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
            .collect();
        assert!(!open.contains(&pipe), "no descriptor is left: {open:?}");
        let mut fds = [PollFd::new(&sentinel, PollFlags::empty())];
        assert_eq!(poll(&mut fds, Some(&Timespec::default())), Ok(0), "and it is open");
        daemon.signal(signal);
        let mut said = Vec::new();
        sentinel.read_to_end(&mut said).unwrap();
        assert_eq!(said, b"");
        daemon.end();
    }
}
