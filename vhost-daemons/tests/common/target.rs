//! A daemon that clients attack one after the other, and what must be so after each.

use std::path::PathBuf;

use super::client::{Client, running};
use super::{Daemon, image, scratch, wait};

/// A daemon under attack.
pub(crate) struct Target {
    pub(crate) daemon: Daemon,
    pub(crate) socket: PathBuf,
    /// Descriptors and mappings of the daemon without a client.
    pub(crate) before: (usize, usize),
    _dir: tempfile::TempDir,
}

impl Target {
    /// `ringvm-blk` with a disk of two queues.
    pub(crate) fn new() -> Self {
        Self::of("")
    }

    /// The same with more options of the disk.
    pub(crate) fn of(options: &str) -> Self {
        let dir = scratch();
        let socket = dir.path().join("b.sock");
        let disk = format!("path={},queues=2{options}", image(dir.path(), 16 << 20).display());
        let daemon = Daemon::blk(&socket, &disk);
        let before = (daemon.descriptors(), daemon.mappings());
        Self { daemon, socket, before, _dir: dir }
    }

    /// One more client.
    pub(crate) fn connect(&self) -> Client {
        Client::connect(&self.socket)
    }

    /// How many clients were dropped.
    pub(crate) fn dropped(&self) -> usize {
        self.daemon.count("dropping the client")
    }

    /// How many of them with a line that says `text`.
    pub(crate) fn dropped_for(&self, text: &str) -> usize {
        let said = self.daemon.said();
        said.iter().filter(|line| line.contains("dropping the client") && line.contains(text)).count()
    }

    /// The next client is served, and nothing of those before is left.
    pub(crate) fn is_well(&self) {
        let (client, memory, mut ring) = running(&self.socket);
        ring.works(0x5a);
        drop((client, memory, ring));
        wait("descriptors and mappings to be gone", || {
            (self.daemon.descriptors(), self.daemon.mappings()) == self.before
        });
        assert_eq!(self.daemon.count("panicked"), 0);
    }

    /// The client is dropped with one line that says `text`.
    pub(crate) fn drops(&self, mut client: Client, text: &str) {
        assert!(client.is_dropped(), "it is dropped for {text:?}");
        let lines = || -> Vec<String> {
            self.daemon.said().into_iter().filter(|line| line.contains("dropping the client")).collect()
        };
        wait("the line", || lines().last().is_some_and(|line| line.contains(text)));
    }
}

/// Every code, those that nobody knows included.
pub(crate) fn codes() -> impl Iterator<Item = u32> {
    (0..=46).chain([255, 1 << 16, u32::MAX])
}
