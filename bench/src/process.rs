//! What a VMM's process costs, from /proc: CPU time by thread, and memory besides the guest's RAM.

use std::fs;
use std::io;
use std::time::Duration;

use crate::vmm::Kind;

/// CPU time of a process so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuTime {
    /// Threads that run a vCPU: the guest's own work, and its polling, are in there.
    pub vcpus: Duration,
    /// All other threads: the VMM's I/O, and the kernel's workers for it.
    pub others: Duration,
}

impl CpuTime {
    /// Adds up the threads of a VMM, which comes first, of the daemons that serve it, and of what they have started.
    ///
    /// # Errors
    /// One of them is gone.
    pub fn of(pids: &[u32], kind: Kind) -> io::Result<Self> {
        let (mut vcpus, mut all) = (Duration::ZERO, Duration::ZERO);
        for (index, &pid) in pids.iter().enumerate() {
            if index == 0 {
                vcpus = threads_time(pid, |name| kind.is_vcpu(name))?;
            }
            all += threads_time(pid, |_| true)?;
            for child in children(pid) {
                all += threads_time(child, |_| true).unwrap_or_default();
            }
        }
        Ok(Self { vcpus, others: all.saturating_sub(vcpus) })
    }

    /// What was spent since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self { vcpus: self.vcpus.saturating_sub(earlier.vcpus), others: self.others.saturating_sub(earlier.others) }
    }
}

/// The processes that a process has started.
pub(crate) fn children(pid: u32) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    // Each thread has its own; kernels without CONFIG_PROC_CHILDREN don't tell.
    let lists = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// CPU time so far of those threads of a process whose names `count` takes.
///
/// # Errors
/// The process is gone.
pub fn threads_time(pid: u32, count: impl Fn(&str) -> bool) -> io::Result<Duration> {
    let mut sum = Duration::ZERO;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let task = task?.path();
        // A thread may end at any moment: then it is not counted.
        let (Ok(name), Some(time)) = (fs::read_to_string(task.join("comm")), thread_time(&task)) else { continue };
        if count(name.trim_end()) {
            sum += time;
        }
    }
    Ok(sum)
}

/// To the nanosecond where the kernel keeps scheduler statistics, else in clock ticks.
fn thread_time(task: &std::path::Path) -> Option<Duration> {
    if let Ok(text) = fs::read_to_string(task.join("schedstat"))
        && let Some(nanoseconds) = text.split_ascii_whitespace().next().and_then(|word| word.parse().ok())
    {
        return Some(Duration::from_nanos(nanoseconds));
    }
    let stat = fs::read_to_string(task.join("stat")).ok()?;
    // The name, in parentheses, may hold anything; utime and stime are the 12th and 13th words behind it.
    let mut words = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let ticks = words.next()?.parse::<u64>().ok()? + words.next()?.parse::<u64>().ok()?;
    Some(Duration::from_nanos(ticks * 1_000_000_000 / rustix::param::clock_ticks_per_second()))
}

/// Resident bytes of a process and its daemons besides the guest's RAM.
///
/// ringvm's RAM is the mapping of the memfd `ringvm-memory`. Other VMMs do not name theirs: there the mappings that are at
/// least half as large as the RAM are taken for it.
///
/// # Errors
/// The process is gone.
pub fn memory_beyond_ram(pid: u32, kind: Kind, ram: u64) -> io::Result<u64> {
    let beyond = |smaps: &str| -> u64 {
        mappings(smaps).filter(|mapping| !mapping.is_ram(kind, ram)).map(|mapping| mapping.resident).sum()
    };
    let own = beyond(&fs::read_to_string(format!("/proc/{pid}/smaps"))?);
    let smaps = children(pid).into_iter().filter_map(|child| fs::read_to_string(format!("/proc/{child}/smaps")).ok());
    Ok(own + smaps.map(|smaps| beyond(&smaps)).sum::<u64>())
}

struct Mapping<'a> {
    name: &'a str,
    size: u64,
    resident: u64,
}

impl Mapping<'_> {
    fn is_ram(&self, kind: Kind, ram: u64) -> bool {
        match kind {
            Kind::Ringvm | Kind::RingvmDaemon | Kind::StorageDaemon => self.name.starts_with("/memfd:ringvm-memory"),
            _ => self.size >= ram / 2,
        }
    }
}

/// The mappings of an smaps file. A line that starts one has its range first, with a `-`; the others are `Name: value`.
fn mappings(smaps: &str) -> impl Iterator<Item = Mapping<'_>> {
    let mut lines = smaps.lines().peekable();
    std::iter::from_fn(move || {
        let head = lines.next()?;
        let name = head.splitn(6, ' ').nth(5).unwrap_or("").trim();
        let mut mapping = Mapping { name, size: 0, resident: 0 };
        while let Some((key, value)) = lines.peek().and_then(|line| line.split_once(':')) {
            if key.contains('-') {
                break;
            }
            let bytes = || value.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0) * 1024;
            match key {
                "Size" => mapping.size = bytes(),
                "Rss" => mapping.resident = bytes(),
                _ => {}
            }
            lines.next();
        }
        Some(mapping)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0c8a00000-55d0c8b00000 r-xp 00000000 fe:00 1234                       /usr/bin/ringvm
Size:               1024 kB
Rss:                 512 kB
VmFlags: rd ex mr
7f0000000000-7f0010000000 rw-s 00000000 00:01 77                         /memfd:ringvm-memory (deleted)
Size:             262144 kB
Rss:              131072 kB
7f0020000000-7f0020001000 rw-p 00000000 00:00 0
Size:                  4 kB
Rss:                   4 kB
";

    #[test]
    fn the_guests_memory_is_not_the_vmms() {
        let sum = |kind, ram| -> u64 {
            mappings(SMAPS).filter(|mapping| !mapping.is_ram(kind, ram)).map(|mapping| mapping.resident).sum()
        };
        assert_eq!(mappings(SMAPS).count(), 3);
        assert_eq!(sum(Kind::Ringvm, 256 << 20), 516 << 10);
        assert_eq!(sum(Kind::Qemu, 256 << 20), 516 << 10);
        assert_eq!(sum(Kind::Qemu, 1 << 40), (516 + 131_072) << 10);
    }

    #[test]
    fn a_daemon_counts_with_the_one_who_started_it() {
        let mut child = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        assert!(children(std::process::id()).contains(&child.id()));
        assert!(CpuTime::of(&[std::process::id()], Kind::RingvmDaemon).unwrap().others > Duration::ZERO);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn this_process_has_used_time_and_memory() {
        let pid = std::process::id();
        let spin = std::time::Instant::now();
        while spin.elapsed() < Duration::from_millis(30) {}
        assert!(CpuTime::of(&[pid], Kind::Ringvm).unwrap().others > Duration::ZERO);
        assert!(memory_beyond_ram(pid, Kind::Ringvm, 1 << 30).unwrap() > 0);
    }
}
