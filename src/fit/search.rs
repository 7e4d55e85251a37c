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
use crate::eval::{
    ChoiceRows, EvalOptions, Predictor, Scored, fit_temperature, measures, posterior_draws, score,
    tempered,
};
use crate::model::{ActiveAdapter, Decoder};

/// Least and largest scale that is tried.
const BOUNDS: [f64; 2] = [1e-4, 0.3];

/// Width of the interval of `ln sigma` at which a bisection ends: the scale is known to about an eighth.
const TOLERANCE: f64 = 0.25;

/// Ratio of neighbouring scales of the coarse search.
const COARSE: f64 = 4.0;

/// Scales of the golden-section search between them, after the first two.
const FINE_STEPS: u64 = 3;

/// Change of the average's log-likelihood, with and without a temperature, as a share, below which noise does nothing that matters.
const SLIGHT: f64 = 0.005;

/// Accuracy that the average may lose against the mean.
const ALLOWED_LOSS: f64 = 0.01;

/// By what a scale is judged.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Criterion {
    /// The least negative log-likelihood of the average over the draws. Of choices it is the one after a temperature fitted on the
    /// same rows, and scales that cost more than a hundredth of accuracy do not count.
    Nll,
    /// The largest scale whose average has a negative log-likelihood at most this share above the mean's, among those that cost at
    /// most a hundredth of the accuracy on choices.
    Tolerance(f64),
}

/// What one scale does to the average over the draws.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Whose scale it is; none for the mean, without noise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub geometry: Option<Geometry>,
    /// The scale.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sigma: Option<f64>,
    /// The criterion's negative log-likelihood, nats: see [`Criterion`].
    pub nll: f64,
    /// Of choices, the same without the temperature.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nll_untempered: Option<f64>,
    /// Of choices, the temperature.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Of choices, the share of rows whose most likely choice is right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
}

impl Evaluation {
    /// Whether `other` answers as well as this one, nearly.
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

/// The outcome of a search.
#[derive(Debug)]
pub struct Fitted {
    /// The geometry that was kept.
    pub geometry: Geometry,
    /// The scale.
    pub sigma: f64,
    /// Every scale that was tried, in order.
    pub evaluations: Vec<Evaluation>,
    /// The mean without noise.
    pub before: Evaluation,
    /// The average at the scale that was kept.
    pub after: Evaluation,
    /// The posterior.
    pub adapter: Adapter,
    /// See [`ScaledPosterior::rounding`].
    pub rounding: f64,
    /// See [`ScaledPosterior::zero_modules`].
    pub zero_modules: Vec<String>,
    /// Seconds of the search.
    pub seconds: f64,
}

/// The search was told to stop.
#[derive(Debug, Clone, Copy)]
pub struct Stopped;

impl std::fmt::Display for Stopped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the search was stopped")
    }
}

impl std::error::Error for Stopped {}

/// What is searched on.
pub struct Search<'a> {
    /// The base.
    pub decoder: &'a Decoder,
    /// The adapter, whose mean stays.
    pub adapter: &'a Adapter,
    /// Held-out rows.
    pub data: &'a Dataset,
    /// Which of them.
    pub rows: &'a [usize],
    /// Their choices.
    pub choices: &'a ChoiceRows,
    /// How they are scored.
    pub options: EvalOptions,
    /// Draws whose average is judged, the same for each scale.
    pub n_draws: usize,
    /// Their seed.
    pub seed: u64,
    /// By what scales are judged.
    pub criterion: Criterion,
    /// Set to stop.
    pub interrupt: &'a AtomicBool,
    /// Told of every scale.
    pub watch: &'a dyn Fn(&Evaluation),
}

/// Scales of one geometry.
struct Family<'a> {
    search: &'a Search<'a>,
    before: &'a Evaluation,
    geometry: Geometry,
    posterior: ScaledPosterior,
    tried: RefCell<Vec<Evaluation>>,
}

impl Search<'_> {
    /// How many scales are tried as a rule, the mean's pass included.
    pub fn n_evaluations(n_geometries: usize, criterion: Criterion) -> usize {
        let width = (BOUNDS[1] / BOUNDS[0]).ln();
        let n = match criterion {
            // As a rule; where noise still matters at the least scale there are more.
            Criterion::Nll => 4 + 1 + FINE_STEPS,
            Criterion::Tolerance(_) => 2 + (width / TOLERANCE).log2().ceil() as u64,
        };
        n_geometries * n as usize + 1
    }

    /// Searches the scale of one geometry, or of both and keeps the one whose average has the lower negative log-likelihood.
    ///
    /// # Errors
    /// [`Stopped`]; those of the adapter, of the data and of the decoder.
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
            // One that costs accuracy is kept only where nothing else is left.
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

    /// What `predictor` makes of the rows.
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
            self.data,
            self.rows,
            self.choices,
            &self.options,
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
    /// The average over the draws at `sigma`.
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

    /// The least negative log-likelihood among all scales that are tried: first coarse ones, each a quarter of the one before, from the
    /// widest to one that hardly changes the average (the effect is of the second order, so that narrower ones
    /// change nothing); then those of a golden-section search over `ln sigma` around the best of them. Where none is allowed, the
    /// least scale.
    ///
    /// A search of the whole interval would begin where noise is too small to matter, and lose its way there.
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

    /// The best of the scales that were tried and may be kept.
    fn least_allowed(&self) -> Option<Evaluation> {
        let tried = self.tried.borrow();
        let allowed = tried.iter().filter(|e| self.before.allows(e));
        allowed.min_by(|a, b| a.nll.total_cmp(&b.nll)).copied()
    }

    /// The largest scale of a bisection over `ln sigma` whose average is at most `share` worse than the mean.
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

/// Carries an error of ours through the search.
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
        // Too wide: the answers change. The wider, the worse, so that the search turns back.
        Ok(match self.before.allows(&found) {
            true => found.nll,
            false => 1e6 * (1.0 + log_sigma - BOUNDS[0].ln()),
        })
    }
}
