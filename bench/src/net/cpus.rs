//! Who has which CPUs while frames come in: their source has one to itself, whoever takes them has the others. Threads that
//! move between CPUs cost each other more or less from run to run otherwise, and it is not the taker that is measured then.

use std::io;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Keeps the calling thread, and what it starts, off the CPU of the source.
#[derive(Debug)]
pub(super) struct Apart {
    before: CpuSet,
    source: CpuSet,
}

impl Apart {
    /// Sets the last CPU of this thread apart. `None` where there is no other.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn new() -> io::Result<Option<Self>> {
        let before = sched_getaffinity(None)?;
        let mut cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| before.is_set(cpu));
        let Some(last) = cpus.next_back().filter(|_| before.count() > 1) else { return Ok(None) };
        let (mut takers, mut source) = (before, CpuSet::new());
        takers.unset(last);
        source.set(last);
        sched_setaffinity(None, &takers)?;
        Ok(Some(Self { before, source }))
    }

    /// The source's CPU.
    pub(super) fn source(&self) -> CpuSet {
        self.source
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        // It was so before.
        let _ = sched_setaffinity(None, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_and_takers_share_no_cpu_and_afterwards_all_is_as_before() {
        let before = sched_getaffinity(None).unwrap();
        let apart = Apart::new().unwrap();
        assert_eq!(apart.is_some(), before.count() > 1);
        if let Some(apart) = apart {
            let takers = sched_getaffinity(None).unwrap();
            assert_eq!((takers.count(), apart.source().count()), (before.count() - 1, 1));
            assert!((0..CpuSet::MAX_CPU).all(|cpu| !(takers.is_set(cpu) && apart.source().is_set(cpu))));
        }
        assert!((0..CpuSet::MAX_CPU).all(|cpu| sched_getaffinity(None).unwrap().is_set(cpu) == before.is_set(cpu)));
    }
}
