//! From figures to places in a plot, and where an axis has its ticks.

/// A linear axis from 0.
pub(super) struct Linear {
    /// What its end stands for.
    pub(super) end: f64,
    step: f64,
}

impl Linear {
    /// With room for `largest`, in up to six steps of 1, 2, 2.5 or 5 and zeroes.
    pub(super) fn new(largest: f64) -> Self {
        let largest = if largest.is_finite() && largest > 0.0 { largest } else { 1.0 };
        let rough = largest / 6.0;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|step| step * power).into_iter().find(|&step| step >= rough);
        let step = step.unwrap_or(rough);
        Self { end: (largest / step).ceil() * step, step }
    }

    /// Which part of the axis lies before a value.
    pub(super) fn part(&self, value: f64) -> f64 {
        if value.is_finite() { (value / self.end).clamp(0.0, 1.0) } else { 0.0 }
    }

    /// The values that are marked.
    pub(super) fn ticks(&self) -> Vec<f64> {
        let count = (self.end / self.step).round() as u32;
        (0..=count).map(|index| f64::from(index) * self.step).collect()
    }
}

/// A logarithmic axis.
pub(super) struct Logarithmic {
    start: f64,
    end: f64,
}

impl Logarithmic {
    /// From one value to another, a little apart at least.
    pub(super) fn new(start: f64, end: f64) -> Self {
        let start = if start.is_finite() && start > 0.0 { start } else { 1.0 };
        let end = if end.is_finite() { end.max(start * 1.5) } else { start * 1.5 };
        Self { start: start.ln(), end: end.ln() }
    }

    /// Which part of the axis lies before a value.
    pub(super) fn part(&self, value: f64) -> f64 {
        if value > 0.0 { ((value.ln() - self.start) / (self.end - self.start)).clamp(0.0, 1.0) } else { 0.0 }
    }

    /// The values that are marked: 1, 2 and 5 of each power of ten, or 1 alone where these are many.
    pub(super) fn ticks(&self) -> Vec<f64> {
        let (first, last) = ((self.start / 10_f64.ln()).floor() as i32, (self.end / 10_f64.ln()).ceil() as i32);
        let all = |digits: &[f64]| -> Vec<f64> {
            let ticks = (first..=last).flat_map(|power| digits.iter().map(move |digit| digit * 10_f64.powi(power)));
            ticks.filter(|tick| (self.start - 1e-9..=self.end + 1e-9).contains(&tick.ln())).collect()
        };
        let many = all(&[1.0, 2.0, 5.0]);
        if many.len() <= 8 { many } else { all(&[1.0]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_hold_the_largest() {
        assert_eq!(Linear::new(1_430.0).ticks(), [0.0, 250.0, 500.0, 750.0, 1_000.0, 1_250.0, 1_500.0]);
        assert!((Linear::new(1.01).end - 1.2).abs() < 1e-9);
        for value in [0.0, f64::NAN, f64::INFINITY, 1e-9, 7e12] {
            let axis = Linear::new(value);
            assert!(axis.end > 0.0 && (2..=7).contains(&axis.ticks().len()), "{value}: {:?}", axis.ticks());
            assert!(!value.is_finite() || axis.end >= value);
        }
    }

    #[test]
    fn powers_of_ten_are_marked() {
        let axis = Logarithmic::new(800.0, 30_000.0);
        assert_eq!(axis.ticks(), [1_000.0, 2_000.0, 5_000.0, 10_000.0, 20_000.0]);
        assert_eq!(Logarithmic::new(1.0, 1e6).ticks().len(), 7);
        assert!(axis.part(800.0) < 1e-9 && axis.part(30_000.0) > 1.0 - 1e-9 && axis.part(-1.0) == 0.0);
        assert!(Logarithmic::new(f64::NAN, f64::NAN).part(3.0).is_finite());
    }
}
