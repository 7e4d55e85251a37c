//! Learning-rate schedules with linear warm-up, as in transformers.

use crate::config::LrSchedulerType;

/// A schedule over a known number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub shape: LrSchedulerType,
    /// Number of steps of linear warm-up.
    pub warmup_steps: u64,
    /// Number of steps, warm-up included.
    pub total_steps: u64,
}

impl Schedule {
    /// A schedule with `ceil(warmup_ratio * total_steps)` steps of warm-up.
    pub fn new(shape: LrSchedulerType, warmup_ratio: f64, total_steps: u64) -> Self {
        Self {
            shape,
            warmup_steps: (warmup_ratio * total_steps as f64).ceil() as u64,
            total_steps,
        }
    }

    /// Factor on the learning rate for update `step`, counted from 0.
    ///
    /// The warm-up starts at `1 / warmup_steps`. It starts at 0 in transformers, but an update with learning rate 0 is
    /// wasted.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return (step + 1) as f64 / self.warmup_steps as f64;
        }
        let span = (self.total_steps.saturating_sub(self.warmup_steps)).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / span).min(1.0);
        match self.shape {
            LrSchedulerType::Constant => 1.0,
            LrSchedulerType::Linear => 1.0 - progress,
            LrSchedulerType::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warms_up_and_falls_to_zero() {
        for shape in [LrSchedulerType::Linear, LrSchedulerType::Cosine] {
            let schedule = Schedule::new(shape, 0.1, 100);
            assert_eq!(schedule.factor(0), 0.1);
            assert_eq!(schedule.factor(4), 0.5);
            assert_eq!(schedule.factor(9), 1.0);
            assert_eq!(schedule.factor(10), 1.0);
            assert!((schedule.factor(55) - 0.5).abs() < 1e-12);
            assert!(schedule.factor(100).abs() < 1e-12);
            assert!((11u64..=100).all(|s| schedule.factor(s) < schedule.factor(s - 1)));
        }
        assert_eq!(
            Schedule::new(LrSchedulerType::Constant, 0.0, 10).factor(0),
            1.0
        );
        assert_eq!(
            Schedule::new(LrSchedulerType::Linear, 0.0, 1).factor(0),
            1.0
        );
    }
}
