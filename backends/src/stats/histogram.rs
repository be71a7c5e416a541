//! A log-linear histogram of latencies: 128 steps per power of two, so that a quantile is within 0.8 %.
//!
//! We do not use a crate's histogram because it computes its bounds with logarithms: for that one call every process
//! of ours would map the mathematical library, half a megabyte.

mod steps;

const BITS: u32 = 7;
/// Values up to 2^36, 68 s in nanoseconds, are told apart; larger ones count as that.
const STEPPED: usize = (36 - BITS as usize + 1) << BITS;

/// Counts per step, in a unit of the caller's.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64]>,
    len: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; STEPPED].into_boxed_slice(), len: 0, max: 0 }
    }
}

impl Histogram {
    /// Counts `value` so many times.
    pub fn record(&mut self, value: u64, times: u64) {
        self.counts[step(value)] += times;
        self.len += times;
        self.max = self.max.max(value);
    }

    /// Adds another histogram's counts.
    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.len += other.len;
        self.max = self.max.max(other.max);
    }

    /// How many values were counted.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there was none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The largest value; 0 if there was none.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The value that this part of all values, from 0 to 1, does not exceed; 0 if there was none.
    #[must_use]
    pub fn quantile(&self, part: f64) -> u64 {
        let wanted = ((self.len as f64 * part).ceil() as u64).max(1);
        let mut seen = 0;
        for (index, &count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return if index == STEPPED - 1 { self.max } else { (low(index + 1) - 1).min(self.max) };
            }
        }
        self.max
    }
}

fn step(value: u64) -> usize {
    steps::step::<BITS>(value).min(STEPPED - 1)
}

/// The least value of a step.
fn low(index: usize) -> u64 {
    steps::low::<BITS>(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_in_order_and_begin_where_they_say() {
        for index in 0..STEPPED - 1 {
            assert_eq!(step(low(index)), index);
            assert_eq!(step(low(index + 1) - 1), index);
        }
        assert_eq!(step(u64::MAX), STEPPED - 1);
    }

    #[test]
    fn quantiles_are_within_one_per_cent() {
        let mut histogram = Histogram::default();
        assert_eq!((histogram.quantile(0.5), histogram.is_empty()), (0, true));
        (1..=100_000).for_each(|value| histogram.record(value, 1));
        for (part, exact) in [(0.5, 50_000_u64), (0.9, 90_000), (0.99, 99_000), (0.999, 99_900), (1.0, 100_000)] {
            let got = histogram.quantile(part);
            assert!(got >= exact && (got - exact) * 100 <= exact, "{part}: {got}, not {exact}");
        }
        assert_eq!((histogram.len(), histogram.max()), (100_000, 100_000));
    }

    #[test]
    fn many_at_once_and_another_count_as_each_would() {
        let (mut one, mut other) = (Histogram::default(), Histogram::default());
        one.record(5_000, 3);
        other.record(7, 4);
        other.record(u64::MAX, 1);
        one.merge(&other);
        assert_eq!((one.len(), one.max()), (8, u64::MAX));
        assert_eq!((one.quantile(0.5), one.quantile(0.51)), (7, 5_023));
        assert_eq!(one.quantile(0.99), u64::MAX);
    }
}
