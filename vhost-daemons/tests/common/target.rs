//! A daemon that clients attack one after the other beside a tenant who does nothing wrong, and what must be so after each.

use std::path::PathBuf;
use std::process::Command;

use super::client::{Client, running};
use super::honest::Honest;
use super::{Daemon, scratch, wait};

/// A daemon under attack: `ringvm-blk` with one I/O thread and two disks of two queues, one of them in honest hands.
pub(crate) struct Target {
    pub(crate) daemon: Daemon,
    /// The socket of the disk that is attacked.
    pub(crate) socket: PathBuf,
    /// Descriptors and mappings of the daemon without an attacker.
    pub(crate) before: (usize, usize),
    pub(crate) honest: Honest,
    _dir: tempfile::TempDir,
}

impl Target {
    pub(crate) fn new() -> Self {
        let dir = scratch();
        let mut command = Command::new(env!("CARGO_BIN_EXE_ringvm-blk"));
        command.args(["--io-threads", "1"]);
        for name in ["honest", "attacked"] {
            let image = dir.path().join(name);
            std::fs::File::create(&image).and_then(|file| file.set_len(16 << 20)).expect("an image");
            command.arg("--socket").arg(image.with_extension("sock"));
            command.arg("--disk").arg(format!("path={},queues=2", image.display()));
        }
        let daemon = Daemon::spawn(&mut command);
        daemon.wait_for("is ready", 2);
        let honest = Honest::connect(&dir.path().join("honest.sock"));
        honest.is_served();
        let before = (daemon.descriptors(), daemon.mappings());
        Self { daemon, socket: dir.path().join("attacked.sock"), before, honest, _dir: dir }
    }

    /// One more client.
    pub(crate) fn connect(&self) -> Client {
        Client::connect(&self.socket)
    }

    /// Counts and looks at lines of the daemon from here on only.
    pub(crate) fn begin(&self) {
        self.daemon.forget();
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

    /// The honest tenant and the next client are served, and nothing of the clients before is left.
    pub(crate) fn is_well(&self) {
        self.honest.is_served();
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

    /// Ends the tenant, who has lost nothing, and the daemon.
    pub(crate) fn end(self) {
        let longest = self.honest.end();
        eprintln!("the honest tenant waited for {longest:?} at most");
        self.daemon.terminate();
    }
}

/// Every code, those that nobody knows included.
pub(crate) fn codes() -> impl Iterator<Item = u32> {
    (0..=46).chain([255, 1 << 16, u32::MAX])
}
