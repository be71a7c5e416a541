//! A network of the test's own: daemons, their taps and iperf3's server live in it, and it ends with the test.

use std::time::Duration;

use ringvm_tests::native::{RingVm, Running, program};
use ringvm_tests::{Result, host, paths};

use crate::ok;

const LIMIT: Duration = Duration::from_secs(30);

/// A network namespace, held by a process that ends with its stdin.
pub(crate) struct Network(Running);

impl Network {
    pub(crate) fn new() -> Self {
        let user: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--user", "--map-root-user"] };
        let hold = "PATH=$PATH:/usr/sbin:/sbin; ip link set lo up; echo ready; exec cat";
        let mut holder = ok(program("unshare", user.iter().chain(&["--net", "sh", "-ec", hold])).start());
        ok(holder.expect("ready\n", LIMIT));
        Self(holder)
    }

    /// The words in front of a program that shall run in here.
    pub(crate) fn enter(&self) -> Vec<String> {
        let user: &[&str] =
            if rustix::process::geteuid().is_root() { &[] } else { &["--user", "--preserve-credentials"] };
        let words = ["--pdeathsig", "KILL", "nsenter", "--target"].map(str::to_owned).into_iter();
        let words = words.chain([self.0.pid().to_string(), "--net".to_owned()]);
        words.chain(user.iter().map(|&word| word.to_owned())).collect()
    }

    /// Runs a shell command in here, to its end; its stdout.
    pub(crate) fn run(&self, command: &str) -> String {
        let script = format!("PATH=$PATH:/usr/sbin:/sbin; {command}");
        let ended = ok(self.program("sh", &["-ec", &script]).run());
        assert_eq!(ended.code(), 0, "{command}: {}{}", ended.stdout, ended.stderr);
        ended.stdout.trim_end().to_owned()
    }

    /// A program that shall run in here.
    pub(crate) fn program(&self, name: &str, arguments: &[&str]) -> RingVm {
        let name = host::program(name).unwrap_or_else(|| name.into());
        let words = self.enter().into_iter().chain([name.display().to_string()]);
        program("setpriv", words.chain(arguments.iter().map(|&word| word.to_owned())))
    }

    /// The words that start a daemon of ours in here.
    pub(crate) fn daemon(&self, name: &str) -> Result<Vec<String>> {
        let path = paths::daemon(name)?;
        Ok(self.enter().into_iter().chain([path.display().to_string()]).collect())
    }
}
