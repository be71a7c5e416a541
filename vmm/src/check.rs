//! `ringvm check`: this host's abilities, and advice on those that are missing.

mod net;

use std::io::{self, Write};

use ringvm_backends::io::reactor::{ReactorOptions, ReactorPool};
use rustix::process::{Resource, getrlimit};

use crate::exit::Exit;
use crate::kvm::probe;

/// Descriptors that a machine of some size needs.
const FILES: u64 = 1024;
/// Locked memory that its rings need where they count.
const LOCKED: u64 = 8 << 20;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    /// It is there.
    Good,
    /// ringvm runs, but not everything does.
    Limited,
    /// ringvm can't run.
    Missing,
}

struct Finding {
    level: Level,
    what: &'static str,
    text: String,
    advice: Option<String>,
}

impl Finding {
    fn good(what: &'static str, text: impl Into<String>) -> Self {
        Self { level: Level::Good, what, text: text.into(), advice: None }
    }

    fn bad(level: Level, what: &'static str, text: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { level, what, text: text.into(), advice: Some(advice.into()) }
    }
}

/// Prints the findings; the exit code tells whether ringvm can run.
#[must_use]
pub fn check() -> Exit {
    let mut findings = vec![kvm(), io_uring(), memory(), hugepages(), locked_memory(), open_files()];
    findings.extend(net::net());
    let mut text = String::new();
    for finding in &findings {
        let mark = match finding.level {
            Level::Good => "ok      ",
            Level::Limited => "limited ",
            Level::Missing => "MISSING ",
        };
        text += &format!("{mark} {}: {}\n", finding.what, finding.text);
        if let Some(advice) = &finding.advice {
            text += &format!("          {advice}\n");
        }
    }
    let usable = findings.iter().all(|finding| finding.level != Level::Missing);
    text += if usable { "ringvm can run on this host.\n" } else { "ringvm can't run on this host yet.\n" };
    // A closed standard output changes nothing about the answer, which is the exit code.
    drop(io::stdout().write_all(text.as_bytes()));
    if usable { Exit::Success } else { Exit::Host }
}

fn kvm() -> Finding {
    let report = probe::probe();
    if report.usable {
        Finding::good("KVM", report.text)
    } else {
        Finding::bad(Level::Missing, "KVM", report.text, report.advice.unwrap_or_default())
    }
}

fn io_uring() -> Finding {
    // The very thing a machine starts: a thread, its runtime and its ring.
    match ReactorPool::new(&ReactorOptions::default()) {
        Ok(_) => Finding::good("io_uring", "an I/O thread starts"),
        Err(error) => {
            let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
            let advice = match (disabled.trim(), error.raw_os_error()) {
                ("1" | "2", _) => "enable it: sysctl kernel.io_uring_disabled=0",
                (_, Some(libc::ENOSYS)) => "the kernel has none: 5.19 or later with CONFIG_IO_URING is needed",
                (_, Some(libc::EPERM | libc::EACCES)) => "a seccomp filter forbids it; let the container use io_uring",
                (_, Some(libc::ENOMEM)) => "raise the limit of locked memory (ulimit -l)",
                (_, Some(libc::EINVAL)) => "the kernel's is too old: 5.19 or later is needed",
                _ => "see dmesg",
            };
            Finding::bad(Level::Missing, "io_uring", format!("starting an I/O thread: {error}"), advice)
        }
    }
}

fn memory() -> Finding {
    let available = meminfo("MemAvailable").unwrap_or(0) >> 10;
    let text = format!("{available} MiB are available");
    if available >= 256 {
        Finding::good("memory", text)
    } else {
        Finding::bad(Level::Limited, "memory", text, "free some, or give guests little with --memory")
    }
}

fn hugepages() -> Finding {
    let (total, free) = (meminfo("HugePages_Total").unwrap_or(0), meminfo("HugePages_Free").unwrap_or(0));
    let size = meminfo("Hugepagesize").unwrap_or(0) >> 10;
    let text = format!("{free} of {total} pages of {size} MiB are free");
    if free > 0 {
        Finding::good("huge pages", text)
    } else {
        let advice = "only for --memory hugepages=: reserve some, e.g. sysctl vm.nr_hugepages=512";
        Finding::bad(Level::Limited, "huge pages", text, advice)
    }
}

/// Rings count against it before Linux 5.12, registered buffers still do.
fn locked_memory() -> Finding {
    let limit = getrlimit(Resource::Memlock).current;
    let text = limit.map_or("no limit".to_owned(), |limit| format!("at most {} KiB", limit >> 10));
    if limit.is_none_or(|limit| limit >= LOCKED) {
        Finding::good("locked memory", text)
    } else {
        let advice = format!("enough for few I/O threads: raise it for more (ulimit -l {})", LOCKED >> 10);
        Finding::bad(Level::Limited, "locked memory", text, advice)
    }
}

fn open_files() -> Finding {
    // ringvm takes all that it may have.
    let limit = getrlimit(Resource::Nofile).maximum;
    let text = limit.map_or("no limit".to_owned(), |limit| format!("at most {limit}"));
    if limit.is_none_or(|limit| limit >= FILES) {
        Finding::good("open files", text)
    } else {
        let advice = format!("enough for small machines: raise it for more queues (ulimit -n {FILES})");
        Finding::bad(Level::Limited, "open files", text, advice)
    }
}

/// A field of /proc/meminfo, in its own unit.
fn meminfo(field: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}
