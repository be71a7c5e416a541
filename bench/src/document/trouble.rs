//! The part of a document that says what went wrong without ending the measurement: contestants that failed, and CPU time that the
//! host took away.

use serde::{Deserialize, Serialize};

use super::{Document, Run, Series};
use crate::steal;

/// A contestant that failed and was not measured from then on.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Who.
    pub name: String,
    /// What was measured then, where that is not all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// What it failed with, in one line.
    pub why: String,
}

/// What was done about CPU time that the host took away. What each run lost is told with it.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Steal {
    /// Runs that lost more, in per cent of their CPU time, were repeated.
    pub limit_percent: f64,
    /// How many that were, repeats that were repeated included.
    pub repeated: u64,
}

/// What the runs of a document have lost, to the host or to other programs.
#[derive(Clone, Copy, Debug)]
pub struct Lost<'a> {
    /// How many lost more than they should.
    pub above: usize,
    /// The most, in per cent.
    pub most: f64,
    /// Where that was.
    pub worst: &'a Series,
}

impl Steal {
    /// Nothing was repeated yet.
    pub(super) fn none_yet() -> Self {
        Self { limit_percent: steal::LIMIT * 100.0, repeated: 0 }
    }
}

impl Document {
    /// Whether a contestant has failed.
    pub fn is_removed(&self, name: &str) -> bool {
        self.removed.iter().any(|removed| removed.name == name)
    }

    /// What the runs have lost of some kind; `None` if no run tells.
    pub fn most_lost(&self, limit_percent: f64, kind: impl Fn(&Run) -> Option<f64>) -> Option<Lost<'_>> {
        let all = self.series.iter().flat_map(|series| series.runs.iter().map(move |run| (run, series)));
        let told: Vec<_> = all.filter_map(|(run, series)| Some((kind(run)?, series))).collect();
        let above = told.iter().filter(|(lost, _)| *lost > limit_percent).count();
        let (most, worst) = told.into_iter().max_by(|one, other| one.0.total_cmp(&other.0))?;
        Some(Lost { above, most, worst })
    }
}

impl std::fmt::Display for Removed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.at {
            Some(at) => write!(f, "{} at {at}: {}", self.name, self.why),
            None => write!(f, "{}: {}", self.name, self.why),
        }
    }
}
