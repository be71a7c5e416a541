//! A log-linear histogram of latencies: 64 steps per power of two, so that a percentile is within 1.6 %. The host's
//! plain ring uses this very file.

#[path = "../../../backends/src/stats/histogram/steps.rs"]
mod steps;

const BITS: u32 = 6;
const STEPS: usize = 1 << BITS;
/// Values up to 2^40 are told apart; larger ones count as that.
const BUCKETS: usize = (40 - BITS as usize + 1) * STEPS;

/// Buckets that are told as one.
const GROUP: usize = STEPS / 16;

/// Counts per bucket. The unit is the caller's.
#[derive(Clone)]
pub struct Hist {
    counts: [u32; BUCKETS],
    total: u64,
    max: u64,
}

impl Default for Hist {
    fn default() -> Self {
        Self { counts: [0; BUCKETS], total: 0, max: 0 }
    }
}

impl Hist {
    /// Counts one value.
    #[inline(always)]
    pub fn record(&mut self, value: u64) {
        self.counts[bucket(value)] += 1;
        self.total += 1;
        self.max = self.max.max(value);
    }

    /// Adds another histogram's counts.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
        self.max = self.max.max(other.max);
    }

    /// The value that `per_mille` thousandths of all values do not exceed; 0 if nothing was counted.
    pub fn percentile(&self, per_mille: u64) -> u64 {
        let wanted = (self.total * per_mille).div_ceil(1_000).max(1);
        let mut seen = 0;
        for (index, &count) in self.counts.iter().enumerate() {
            seen += u64::from(count);
            if seen >= wanted {
                return middle(index).min(self.max);
            }
        }
        self.max
    }

    /// The largest value.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// What was counted in 16 steps per power of two, as far as there is something: the first value beyond the step, and how
    /// many values lie in it.
    pub fn groups(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.counts.chunks_exact(GROUP).enumerate().filter_map(|(index, counts)| {
            let sum: u64 = counts.iter().map(|&count| u64::from(count)).sum();
            (sum != 0).then(|| (low((index + 1) * GROUP), sum))
        })
    }
}

#[inline(always)]
fn bucket(value: u64) -> usize {
    steps::step::<BITS>(value).min(BUCKETS - 1)
}

/// The middle of a bucket's range.
fn middle(index: usize) -> u64 {
    if index < STEPS {
        return index as u64;
    }
    let shift = (index / STEPS - 1) as u32;
    low(index) + (1_u64 << shift) / 2
}

/// The least value of a bucket.
fn low(index: usize) -> u64 {
    steps::low::<BITS>(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_hold_their_middles() {
        for index in 0..BUCKETS - 1 {
            assert_eq!(bucket(middle(index)), index);
            assert!(middle(index) < middle(index + 1));
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn groups_hold_all_values_below_their_ends() {
        let mut hist = Hist::default();
        let values = [0, 3, 4, 63, 64, 1_000, 1_000_000, (1 << 39) + 1];
        values.iter().for_each(|&value| hist.record(value));
        let groups: Vec<_> = hist.groups().collect();
        assert!(groups.is_sorted_by_key(|&(end, _)| end));
        let mut seen = 0;
        for &(end, count) in &groups {
            seen += count;
            let below = values.iter().filter(|&&value| value < end).count();
            assert_eq!(seen, below as u64, "{groups:?}");
        }
        assert_eq!(seen, values.len() as u64);
    }

    #[test]
    fn percentiles_are_within_two_per_cent() {
        let mut hist = Hist::default();
        (1..=100_000).for_each(|value| hist.record(value));
        for (per_mille, exact) in [(500, 50_000_u64), (900, 90_000), (990, 99_000), (999, 99_900)] {
            let got = hist.percentile(per_mille);
            assert!(got.abs_diff(exact) * 50 <= exact, "{per_mille}: {got}, not {exact}");
        }
        assert_eq!(hist.max(), 100_000);
        let mut both = hist.clone();
        both.merge(&hist);
        assert_eq!(both.percentile(500), hist.percentile(500));
        assert_eq!(Hist::default().percentile(500), 0);
    }
}
