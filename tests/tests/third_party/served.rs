//! A daemon of ours that is killed and started again, and what it says of its queues.

use std::time::Duration;

use ringvm_tests::native::{RingVm, Running};
use rustix::process::Signal;

use crate::ok;

const LIMIT: Duration = Duration::from_secs(30);

/// A running daemon, with the recipe for its successor. It is to say what happens (`-v`).
pub(crate) struct Daemon {
    make: Box<dyn Fn() -> RingVm>,
    running: Option<Running>,
}

impl Daemon {
    /// Starts the daemon that `make` describes, which is ready then.
    pub(crate) fn start(make: impl Fn() -> RingVm + 'static) -> Self {
        let mut daemon = Self { make: Box::new(make), running: None };
        daemon.begin();
        daemon
    }

    fn begin(&mut self) {
        let mut running = ok((self.make)().start());
        ok(running.expect_said(" is ready at ", 1, LIMIT));
        self.running = Some(running);
    }

    /// Kills it and waits until its process is gone.
    pub(crate) fn kill(&mut self) {
        let running = self.running.take().expect("it runs");
        ok(running.signal(Signal::KILL));
        let ended = ok(running.end(LIMIT));
        assert_eq!(ended.code(), 128 + 9, "it lived until it was killed: {}", ended.stderr);
    }

    /// Starts a successor, and waits until its client has found it.
    pub(crate) fn restart(&mut self) {
        assert!(self.running.is_none(), "it was killed");
        self.begin();
        let running = self.running.as_mut().expect("it was started just now");
        ok(running.expect_said("a client has connected", 1, LIMIT));
    }

    /// Ends it as an operator would; what it said.
    pub(crate) fn terminate(mut self) -> String {
        let running = self.running.take().expect("it runs");
        ok(running.signal(Signal::TERM));
        let ended = ok(running.end(LIMIT));
        assert_eq!(ended.code(), 0, "{}", ended.stderr);
        for bad in ["WARN", "ERROR", "panicked"] {
            assert!(!ended.stderr.contains(bad), "nothing to complain of: {}", ended.stderr);
        }
        ended.stderr
    }
}

/// The number of operations in the statistics behind `name`, such as `net0: queue 1`.
pub(crate) fn operations(said: &str, name: &str) -> u64 {
    let line = said.lines().rfind(|line| line.starts_with(&format!("{name}: ")));
    let line = line.unwrap_or_else(|| panic!("no statistics of {name} in {said}"));
    let count = line[name.len() + 2..].split_whitespace().next().and_then(|word| word.parse().ok());
    count.unwrap_or_else(|| panic!("no operations in {line}"))
}
