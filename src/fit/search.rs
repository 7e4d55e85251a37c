//! The search over the scale of the noise.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Result, bail};
use argmin::core::{CostFunction, Error, Executor};
use argmin::solver::goldensectionsearch::GoldenSectionSearch;
use monteclora_adapters::methods::monteclora::{Geometry, ScaledPosterior};
use monteclora_converters::{Adapter, Problem};
use serde::{Deserialize, Serialize};

use crate::data::Dataset;
use crate::distributed::Communicator;
use crate::eval::{
    ChoiceRows, EvalOptions, Predictor, Scored, Selection, fit_temperature, measures,
    posterior_draws, score, tempered,
};
use crate::model::{ActiveAdapter, Decoder};

/// Least and largest scale of the search.
const BOUNDS: [f64; 2] = [1e-4, 0.3];

/// Width of the interval of `ln sigma` at which a bisection ends: the largest tolerated scale is then at most `e^0.25`
/// times the kept one.
const TOLERANCE: f64 = 0.25;

/// Ratio of neighbouring scales in the coarse search.
const COARSE: f64 = 4.0;

/// Iterations of the golden-section search between coarse scales, after its first two scales.
const FINE_STEPS: u64 = 3;

/// Relative change of the average's log-likelihood, with and without a temperature, below which noise has no effect
/// that matters.
const SLIGHT: f64 = 0.005;

/// The largest accepted loss of accuracy of the average against the mean.
const ALLOWED_LOSS: f64 = 0.01;

/// The criterion that a scale is judged by.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Criterion {
    /// The scale with the least negative log-likelihood of the average over the draws. If rows have choices, the
    /// likelihood is the one after a temperature that is fitted on the same rows, and scales that lower the accuracy by
    /// more than 0.01 are excluded.
    Nll,
    /// The largest scale at which the negative log-likelihood of the average is at most this share above the mean's.
    /// Scales that lower the accuracy on choices by more than 0.01 are excluded.
    Tolerance(f64),
}

/// The scores of the average over the draws at one scale.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The geometry of the scale. `None` for the mean without noise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub geometry: Option<Geometry>,
    /// The scale.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigma: Option<f64>,
    /// The criterion's negative log-likelihood, nats: see [`Criterion`].
    pub nll: f64,
    /// For choices, the negative log-likelihood without the temperature, if one is fitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nll_untempered: Option<f64>,
    /// For choices, the temperature, if one is fitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// For choices, the share of rows whose most likely choice is right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
}

impl Evaluation {
    /// Whether the accuracy of `other` is at most [`ALLOWED_LOSS`] below the accuracy of this evaluation.
    fn allows(&self, other: &Self) -> bool {
        match (other.accuracy, self.accuracy) {
            (Some(now), Some(before)) => now >= before - ALLOWED_LOSS - 1e-9,
            _ => true,
        }
    }

    /// The negative log-likelihood without any temperature.
    fn untempered(&self) -> f64 {
        self.nll_untempered.unwrap_or(self.nll)
    }
}

/// The result of a search.
#[derive(Debug)]
pub struct Fitted {
    /// The geometry that was kept.
    pub geometry: Geometry,
    /// The scale.
    pub sigma: f64,
    /// The evaluations of all scales that were tried, in order.
    pub evaluations: Vec<Evaluation>,
    /// The evaluation of the mean without noise.
    pub before: Evaluation,
    /// The evaluation of the average at the scale that was kept.
    pub after: Evaluation,
    /// The adapter with the posterior at the scale that was kept.
    pub adapter: Adapter,
    /// See [`ScaledPosterior::rounding`].
    pub rounding: f64,
    /// See [`ScaledPosterior::zero_modules`].
    pub zero_modules: Vec<String>,
    /// Seconds of the search.
    pub seconds: f64,
}

/// The search was interrupted.
#[derive(Debug, Clone, Copy)]
pub struct Stopped;

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the search was stopped")
    }
}

impl std::error::Error for Stopped {}

/// The inputs and settings of a search.
pub struct Search<'a> {
    /// The base model.
    pub decoder: &'a Decoder,
    /// The adapter. Its mean is kept.
    pub adapter: &'a Adapter,
    /// Held-out rows.
    pub data: &'a Dataset,
    /// The indices of the examples to use.
    pub rows: &'a [usize],
    /// The choices of the rows.
    pub choices: &'a ChoiceRows,
    /// How the rows are scored.
    pub options: EvalOptions,
    /// Number of draws in the average, with the same random numbers for each scale.
    pub n_draws: usize,
    /// Their seed.
    pub seed: u64,
    /// The criterion that scales are judged by.
    pub criterion: Criterion,
    /// The caller sets this flag to stop the search.
    pub interrupt: &'a AtomicBool,
    /// The ranks among which the rows are divided.
    pub ranks: &'a dyn Communicator,
    /// Receives the evaluation of the mean and of every scale.
    pub watch: &'a dyn Fn(&Evaluation),
}

/// The scales of one geometry.
struct Family<'a> {
    search: &'a Search<'a>,
    before: &'a Evaluation,
    geometry: Geometry,
    posterior: ScaledPosterior,
    tried: RefCell<Vec<Evaluation>>,
}

impl Search<'_> {
    /// The usual number of evaluations, the one of the mean included.
    pub fn n_evaluations(n_geometries: usize, criterion: Criterion) -> usize {
        let width = (BOUNDS[1] / BOUNDS[0]).ln();
        let n = match criterion {
            // If noise still matters at the fourth coarse scale, there are more.
            Criterion::Nll => 4 + 1 + FINE_STEPS,
            Criterion::Tolerance(_) => 2 + (width / TOLERANCE).log2().ceil() as u64,
        };
        n_geometries * n as usize + 1
    }

    /// Searches the scale of each geometry, and keeps the geometry whose average has the least negative log-likelihood.
    ///
    /// # Errors
    /// Returns [`Stopped`] if the caller sets `interrupt`, or an error if `geometries` is empty, the adapter does not
    /// fit the decoder, no scale is tolerated, or the rows cannot be scored.
    pub fn run(&self, geometries: &[Geometry]) -> Result<Fitted> {
        let began = Instant::now();
        let mean = ActiveAdapter::from_adapter(
            self.adapter,
            self.decoder.config(),
            self.decoder.device(),
        )?;
        let before = self.evaluation(None, Predictor::One(&mean))?;
        (self.watch)(&before);
        let mut evaluations = Vec::new();
        let mut best: Option<(Evaluation, ScaledPosterior)> = None;
        for geometry in geometries {
            let posterior = ScaledPosterior::new(self.adapter, *geometry)?;
            let family = Family {
                search: self,
                before: &before,
                geometry: *geometry,
                posterior,
                tried: RefCell::default(),
            };
            let found = match self.criterion {
                Criterion::Nll => family.least_nll()?,
                Criterion::Tolerance(share) => family.largest_tolerated(share)?,
            };
            evaluations.extend(family.tried.into_inner());
            // A scale that costs accuracy is kept only if nothing else is left.
            let rank = |e: &Evaluation| (!before.allows(e), e.nll);
            if best
                .as_ref()
                .is_none_or(|(best, _)| rank(&found) < rank(best))
            {
                best = Some((found, family.posterior));
            }
        }
        let Some((after, posterior)) = best else {
            bail!("no geometry was searched");
        };
        let (geometry, sigma) = (
            after.geometry.unwrap_or(Geometry::Rows),
            after.sigma.unwrap_or(BOUNDS[0]),
        );
        Ok(Fitted {
            geometry,
            sigma,
            evaluations,
            before,
            after,
            adapter: posterior.at(sigma)?,
            rounding: posterior.rounding,
            zero_modules: posterior
                .zero_modules()
                .into_iter()
                .map(str::to_owned)
                .collect(),
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    /// Scores the rows with `predictor`.
    fn evaluation(
        &self,
        scale: Option<(Geometry, f64)>,
        predictor: Predictor<'_>,
    ) -> Result<Evaluation> {
        self.go_on()?;
        let (model, done) = (self.decoder, |_| self.go_on());
        let scored = score(
            model,
            &[predictor],
            Selection {
                data: self.data,
                rows: self.rows,
                choices: self.choices,
            },
            &self.options,
            self.ranks,
            done,
        )?;
        self.judge(scale, &scored[0])
    }

    fn go_on(&self) -> Result<()> {
        match self.interrupt.load(Ordering::Relaxed) {
            true => bail!(Stopped),
            false => Ok(()),
        }
    }

    fn judge(&self, scale: Option<(Geometry, f64)>, scored: &Scored) -> Result<Evaluation> {
        let (geometry, sigma) = scale.unzip();
        let predictions = scored.predictions();
        if predictions.is_empty() {
            return Ok(Evaluation {
                geometry,
                sigma,
                nll: scored.loss(),
                nll_untempered: None,
                temperature: None,
                accuracy: None,
            });
        }
        let untempered = measures::negative_log_likelihood(&predictions).unwrap_or_default();
        let accuracy = measures::accuracy(&measures::outcomes(&predictions));
        let (nll, temperature) = match self.criterion {
            Criterion::Tolerance(_) => (untempered, None),
            Criterion::Nll => {
                let temperature = fit_temperature(&predictions)?;
                let tempered = tempered(&predictions, temperature);
                let nll = measures::negative_log_likelihood(&tempered).unwrap_or_default();
                (nll, Some(temperature))
            }
        };
        Ok(Evaluation {
            geometry,
            sigma,
            nll,
            nll_untempered: temperature.map(|_| untempered),
            temperature,
            accuracy,
        })
    }
}

impl Family<'_> {
    /// Evaluates the average over the draws at `sigma`, or returns the earlier evaluation of this scale.
    fn evaluate(&self, sigma: f64) -> Result<Evaluation> {
        let tried = self
            .tried
            .borrow()
            .iter()
            .find(|e| {
                e.sigma
                    .is_some_and(|known| (known / sigma).ln().abs() < 1e-9)
            })
            .copied();
        if let Some(known) = tried {
            return Ok(known);
        }
        let search = self.search;
        let adapter = self.posterior.at(sigma)?;
        let draws = posterior_draws(&adapter, search.decoder, search.seed, search.n_draws)?;
        let scale = Some((self.geometry, sigma));
        let found = search.evaluation(scale, Predictor::Average(&draws))?;
        (search.watch)(&found);
        self.tried.borrow_mut().push(found);
        Ok(found)
    }

    /// The evaluation with the least negative log-likelihood of all allowed scales. If no scale is allowed, the least
    /// scale.
    ///
    /// The search tries coarse scales first, each a quarter of the one before, from the widest to one that hardly
    /// changes the average. The effect of noise is of second order, so still narrower scales change nothing. A
    /// golden-section search over `ln sigma` around the best coarse scale follows.
    ///
    /// A golden-section search of the whole interval would start where noise is too small to matter, and could not find
    /// the minimum from there.
    fn least_nll(&self) -> Result<Evaluation> {
        let mut sigma = BOUNDS[1];
        loop {
            let found = self.evaluate(sigma)?;
            let change = |of: fn(&Evaluation) -> f64| (of(&found) / of(self.before)).ln().abs();
            let is_slight = change(|e| e.nll).max(change(Evaluation::untempered)) < SLIGHT;
            if (is_slight && self.before.allows(&found)) || sigma <= BOUNDS[0] {
                break;
            }
            sigma = (sigma / COARSE).max(BOUNDS[0]);
        }
        let Some((coarse, centre)) = self.least_allowed().and_then(|e| Some((e, e.sigma?))) else {
            return self.evaluate(BOUNDS[0]);
        };
        let [low, high] =
            [centre / COARSE, centre * COARSE].map(|s| s.clamp(BOUNDS[0], BOUNDS[1]).ln());
        let solver = GoldenSectionSearch::new(low, high)?.with_tolerance(f64::MIN_POSITIVE)?;
        let found = Executor::new(self, solver)
            .configure(|state| state.param(centre.ln()).max_iters(FINE_STEPS))
            .run();
        if let Err(error) = found {
            return Err(unwrapped(error));
        }
        Ok(self.least_allowed().unwrap_or(coarse))
    }

    /// The best evaluation of the allowed scales that were tried.
    fn least_allowed(&self) -> Option<Evaluation> {
        let tried = self.tried.borrow();
        let allowed = tried.iter().filter(|e| self.before.allows(e));
        allowed.min_by(|a, b| a.nll.total_cmp(&b.nll)).copied()
    }

    /// The largest scale at which the average is at most `share` worse than the mean, by bisection over `ln sigma`.
    fn largest_tolerated(&self, share: f64) -> Result<Evaluation> {
        let most = self.before.nll * (1.0 + share);
        let [low, high] = BOUNDS;
        let top = self.evaluate(high)?;
        let is_tolerated = |found: &Evaluation| found.nll <= most && self.before.allows(found);
        if is_tolerated(&top) {
            return Ok(top);
        }
        let mut tolerated = self.evaluate(low)?;
        let (mut below, mut above) = (low.ln(), high.ln());
        if !is_tolerated(&tolerated) {
            let problem = format!(
                "even the least scale, {low}, costs more than a share of {share} of the negative log-likelihood, or more than a hundredth of the accuracy"
            );
            let fix = "give more rows or draws, or a larger --tolerance";
            return Err(Problem::new("tolerance", "--tolerance", problem, fix)
                .exit(5)
                .into());
        }
        while above - below > TOLERANCE {
            let middle = 0.5 * (below + above);
            let found = self.evaluate(middle.exp())?;
            if is_tolerated(&found) {
                (below, tolerated) = (middle, found);
            } else {
                above = middle;
            }
        }
        Ok(tolerated)
    }
}

/// Carries an [`anyhow::Error`] through argmin's error type.
#[derive(Debug)]
struct Carried(std::sync::Mutex<Option<anyhow::Error>>);

impl std::fmt::Display for Carried {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a scale could not be evaluated")
    }
}

impl std::error::Error for Carried {}

fn unwrapped(error: Error) -> anyhow::Error {
    let carried = error.downcast_ref::<Carried>();
    let inner = carried.and_then(|c| c.0.lock().ok()?.take());
    inner.unwrap_or_else(|| anyhow::anyhow!("{error}"))
}

impl CostFunction for &Family<'_> {
    type Param = f64;
    type Output = f64;

    fn cost(&self, log_sigma: &f64) -> std::result::Result<f64, Error> {
        let found = self.evaluate(log_sigma.exp());
        let found = found.map_err(|e| Error::new(Carried(std::sync::Mutex::new(Some(e)))))?;
        // The scale is too wide: the answers change. The cost grows with the scale, so that the search turns back.
        Ok(match self.before.allows(&found) {
            true => found.nll,
            false => 1e6 * (1.0 + log_sigma - BOUNDS[0].ln()),
        })
    }
}
