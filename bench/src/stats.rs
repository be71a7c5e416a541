//! Figures over several runs.

use serde::{Deserialize, Serialize};

/// A figure over several runs.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Spread {
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// Of some values; `None` if there are none.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            *values.get(middle)?
        } else {
            f64::midpoint(*values.get(middle.checked_sub(1)?)?, *values.get(middle)?)
        };
        Some(Self { median, least: *values.first()?, most: *values.last()? })
    }

    /// Whether no value of one lies among those of the other.
    pub fn is_apart_from(self, other: Self) -> bool {
        self.least > other.most || self.most < other.least
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(Spread::of(vec![]), None);
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Some(Spread { median: 2.0, least: 1.0, most: 3.0 }));
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]), Some(Spread { median: 2.5, least: 1.0, most: 4.0 }));
    }

    #[test]
    fn spreads_are_apart_or_not() {
        let of = |values: &[f64]| Spread::of(values.to_vec()).unwrap();
        assert!(of(&[1.0, 2.0]).is_apart_from(of(&[2.1, 3.0])) && of(&[5.0]).is_apart_from(of(&[4.0])));
        assert!(!of(&[1.0, 2.0]).is_apart_from(of(&[2.0, 3.0])) && !of(&[1.0, 9.0]).is_apart_from(of(&[4.0])));
    }
}
