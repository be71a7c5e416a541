//! CPU time that the host of a virtual machine gives to others while CPUs of this one have work to do: `steal` in proc(5). A run
//! that lost much of it says more about the host than about who was measured, and is repeated. What other processes of this machine
//! take is told too, but not held against a run: on a machine with CPUs to spare it does no harm.

use std::fs;

/// A run that lost a larger part of its CPU time is repeated.
pub const LIMIT: f64 = 0.03;
/// How often a run is repeated at most.
pub const MOST_REPEATS: u32 = 2;
/// Less can't be told from rounding, since both counts are in whole ticks.
const LEAST_TICKS: u64 = 2;

/// CPU time of all CPUs since the machine started, in clock ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticks {
    /// Something ran.
    used: u64,
    /// Something was to run, and the host did not let it.
    stolen: u64,
    /// Programs ran, interrupts aside.
    programs: u64,
    /// All that went by.
    all: u64,
}

impl Ticks {
    /// Asks the kernel; `None` where it does not tell.
    pub fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?)
    }

    /// The line of all CPUs in /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal. What follows is part of user and
    /// nice.
    fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let ticks: Vec<u64> = line.split_ascii_whitespace().map(|word| word.parse().ok()).collect::<Option<_>>()?;
        let [user, nice, system, idle, iowait, irq, softirq, stolen, ..] = ticks[..] else { return None };
        let sum = |some: &[u64]| some.iter().copied().fold(0, u64::saturating_add);
        let (programs, interrupts) = (sum(&[user, nice, system]), sum(&[irq, softirq]));
        let used = sum(&[programs, interrupts]);
        Some(Self { used, stolen, programs, all: sum(&[used, stolen, idle, iowait]) })
    }

    /// What part of the time in which something was to run since `earlier` the host took away. CPUs that were idle do not count:
    /// they had nothing to lose.
    pub fn lost_since(self, earlier: Self) -> f64 {
        let stolen = self.stolen.saturating_sub(earlier.stolen);
        if stolen < LEAST_TICKS {
            return 0.0;
        }
        let used = self.used.saturating_sub(earlier.used);
        stolen as f64 / used.saturating_add(stolen) as f64
    }
}

/// What was lost while something ran; `None` where the kernel does not tell.
pub(crate) fn lost_since(earlier: Option<Ticks>) -> Option<f64> {
    Some(Ticks::now()?.lost_since(earlier?))
}

/// CPU time of all programs, and what of it this one and those that it has started took, in clock ticks.
#[derive(Clone, Copy, Debug)]
pub struct Shares {
    ticks: Ticks,
    own: u64,
}

impl Shares {
    /// Asks the kernel; `None` where it does not tell.
    pub fn now() -> Option<Self> {
        Some(Self { ticks: Ticks::now()?, own: own_ticks(&fs::read_to_string("/proc/self/stat").ok()?)? })
    }

    /// What part of the time of all CPUs other programs took since `earlier`. Those that this one has started count as its own when
    /// they have ended.
    pub fn of_others_since(self, earlier: Self) -> f64 {
        let programs = self.ticks.programs.saturating_sub(earlier.ticks.programs);
        let others = programs.saturating_sub(self.own.saturating_sub(earlier.own));
        others as f64 / self.ticks.all.saturating_sub(earlier.ticks.all).max(1) as f64
    }
}

/// What other programs took while something ran; `None` where the kernel does not tell.
pub(crate) fn taken_since(earlier: Option<Shares>) -> Option<f64> {
    Some(Shares::now()?.of_others_since(earlier?))
}

/// The CPU time in /proc/self/stat: utime, stime, and those of children that were waited for, and of theirs.
fn own_ticks(stat: &str) -> Option<u64> {
    // The name, in parentheses, may hold anything; the times are the 12th to 15th words behind it.
    let words: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11).take(4).collect();
    let [user, system, of_children, of_childrens_system] = words[..] else { return None };
    [user, system, of_children, of_childrens_system].iter().map(|word| word.parse::<u64>().ok()).sum()
}

/// Whether so many runs of a round that lost too much are repeated: those of all contestants together or none, so that they still
/// take turns. After `done` runs no more than half as many have been repeated, and one round: a host that takes time from every
/// run does so at all points alike, and a measurement of it ends.
pub(crate) fn may_repeat(robbed: u64, contestants: u64, done: u64, repeated: u64) -> bool {
    robbed != 0 && repeated.saturating_add(robbed) <= contestants.saturating_add(done / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "cpu  146674 3861 22097 62474 2468 0 90 252 7 0\ncpu0 1 2 3 4 5 6 7 8 9 10\nintr 1\n";

    #[test]
    fn the_line_of_all_cpus_is_read() {
        let programs = 146_674 + 3_861 + 22_097;
        let (used, all) = (programs + 90, programs + 90 + 62_474 + 2_468 + 252);
        assert_eq!(Ticks::parse(STAT), Some(Ticks { used, stolen: 252, programs, all }));
        let ticks = Ticks { used: 1 + 2 + 3 + 6 + 7, stolen: 8, programs: 6, all: 36 };
        assert_eq!(Ticks::parse("cpu  1 2 3 4 5 6 7 8\n"), Some(ticks));
        for nonsense in ["", "cpu", "cpu  1 2 3 4 5 6 7\n", "cpu0 1 2 3 4 5 6 7 8\n", "cpu  1 2 x 4 5 6 7 8\n"] {
            assert_eq!(Ticks::parse(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn this_machine_tells() {
        assert!(lost_since(Ticks::now()).is_some_and(|lost| (0.0..=1.0).contains(&lost)));
        assert_eq!(lost_since(None), None);
    }

    #[test]
    fn what_was_lost_is_a_part_of_what_was_to_run() {
        let earlier = Ticks { used: 1_000, stolen: 50, programs: 1_000, all: 2_000 };
        let lost =
            |used: u64, stolen: u64| Ticks { used: 1_000 + used, stolen: 50 + stolen, ..earlier }.lost_since(earlier);
        assert!((lost(90, 10) - 0.1).abs() < 1e-9 && (lost(0, 10) - 1.0).abs() < 1e-9);
        assert_eq!((lost(90, 0), lost(0, 0), lost(3, 1)), (0.0, 0.0, 0.0));
        // A count that runs backwards, as that of some hosts does after a migration, is no theft.
        assert_eq!(Ticks { used: 0, stolen: 0, ..earlier }.lost_since(earlier), 0.0);
    }

    #[test]
    fn programs_are_told_from_others() {
        assert_eq!(own_ticks("7 (a) b) S 1 2 3 4 5 6 7 8 9 10 100 20 3 4000 5 6"), Some(4_123));
        assert_eq!((own_ticks("7 (a) S 1 2 3"), own_ticks("")), (None, None));
        let shares = |programs, own, all| Shares { ticks: Ticks { used: 0, stolen: 0, programs, all }, own };
        let earlier = shares(500, 100, 2_000);
        assert_eq!(shares(600, 150, 2_200).of_others_since(earlier), 0.25);
        // The counts of the machine are samples, those of a process are not.
        assert_eq!(shares(600, 201, 2_200).of_others_since(earlier), 0.0);
        assert_eq!(earlier.of_others_since(earlier), 0.0);
    }

    #[test]
    fn repeats_are_bounded_and_spread() {
        assert!(may_repeat(3, 3, 0, 0) && !may_repeat(4, 3, 0, 0) && !may_repeat(0, 3, 0, 0));
        assert!(!may_repeat(3, 3, 3, 3) && may_repeat(1, 3, 3, 3));
        // A host that takes time from every run.
        let (mut done, mut repeated) = (0, 0);
        for _ in 0..1_000 {
            done += 4;
            for _ in 0..MOST_REPEATS {
                if may_repeat(4, 4, done, repeated) {
                    repeated += 4;
                }
            }
        }
        assert!(repeated > done / 2 - 4 && repeated <= done / 2 + 4, "{repeated} of {done}");
    }
}
