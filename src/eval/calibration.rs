//! `calibration.json`: the result of `calibrate` for an adapter on a base, and the check whether it applies now.

use std::path::{Path, PathBuf};

use anyhow::Result;
use monteclora_converters::files::sha256;
use monteclora_converters::{Adapter, Error, Problem, files};
use serde::{Deserialize, Serialize};

use super::abstention::Abstention;
use super::measures::{self, Outcome};
use super::temperature::BOUNDS;
use super::{LengthNormalisation, Prediction, fit_temperature, tempered};

/// The file's name.
pub const FILE: &str = "calibration.json";

/// The version of the file format.
const VERSION: u32 = 1;

/// The kind of answer that is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Judged {
    /// One of the row's choices.
    Choices,
    /// A generated answer. It is right if it equals the row's answer.
    Answers,
}

impl Judged {
    /// The name that the file uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Choices => "choices",
            Self::Answers => "answers",
        }
    }
}

/// Likelihood and calibration error of predictions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Fit {
    /// Mean negative log-likelihood, nats.
    pub nll: f64,
    /// Expected calibration error.
    pub ece: f64,
}

/// The calibration of one predictor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scaling {
    /// The temperature T: probabilities become `p^(1/T)`, normalised.
    pub temperature: f64,
    /// The scores on the rows of the fit, without the temperature.
    pub before: Fit,
    /// The scores on the same rows, with the temperature.
    pub after: Fit,
    /// The confidence below which no answer is given, if a target error was set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub abstention: Option<Abstention>,
}

/// Draws of a posterior: the first `n` under `seed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draws {
    /// Number of draws.
    pub n: usize,
    /// Their seed.
    pub seed: u64,
}

/// Everything that predictions depend on besides the rows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Circumstances {
    /// Fingerprint of the base.
    #[serde(rename = "base_fingerprint")]
    pub base: String,
    /// Fingerprint of the adapter's mean.
    #[serde(rename = "mean_fingerprint")]
    pub mean: String,
    /// Fingerprint of the whole adapter, its posterior included.
    #[serde(rename = "adapter_fingerprint")]
    pub adapter: String,
    /// SHA-256 of the chat template with its variables, if prompts are rendered with it.
    pub chat_template_sha256: Option<String>,
    /// Whether choices are compared by their likelihood per token.
    pub length_normalised: bool,
}

/// The rows of the fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rows {
    /// Number of rows.
    pub rows: usize,
    /// SHA-256 of the file.
    pub sha256: String,
    /// How they are judged.
    pub judged: Judged,
    /// SHA-256 of the system message that all rows share: `none` if no row has one, absent if they differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
}

impl Rows {
    /// The value of [`Self::system`] for rows with these system messages.
    pub fn common_system(systems: impl IntoIterator<Item = Option<String>>) -> Option<String> {
        let mut systems = systems
            .into_iter()
            .map(|system| named_system(system.as_deref()));
        let first = systems.next()?;
        systems.all(|other| other == first).then_some(first)
    }
}

/// The recorded form of a system message.
fn named_system(system: Option<&str>) -> String {
    system.map_or("none".to_owned(), |text| sha256(text.trim().as_bytes()))
}

/// The whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    version: u32,
    /// Version of the program.
    monteclora: String,
    /// The circumstances that the calibration applies to.
    #[serde(flatten)]
    pub circumstances: Circumstances,
    /// The rows of the fit.
    pub data: Rows,
    /// The calibration of the base model.
    pub base_scaling: Scaling,
    /// The calibration of the posterior mean.
    pub mean_scaling: Scaling,
    /// The draws that were averaged.
    pub draws: Option<Draws>,
    /// The calibration of the average over the draws.
    pub posterior_scaling: Option<Scaling>,
}

/// The parts of a calibration that apply to the present evaluation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Applicable {
    /// The calibration of the base model.
    pub base: Option<Scaling>,
    /// The calibration of the posterior mean.
    pub mean: Option<Scaling>,
    /// The calibration of the average over the draws.
    pub posterior: Option<Scaling>,
    /// How the rows of the fit were judged.
    pub judged: Option<Judged>,
    /// As [`Rows::system`].
    pub system: Option<String>,
    /// Why a part does not apply: the rest of a sentence that begins with the file's name.
    pub why_not: Option<String>,
}

impl Applicable {
    /// The calibration of the average over `draws`, or of the mean if `draws` is `None`, and how its rows were judged.
    pub fn asked(self, draws: Option<Draws>) -> Option<(Judged, Scaling)> {
        let scaling = match draws {
            Some(_) => self.posterior,
            None => self.mean,
        };
        self.judged.zip(scaling)
    }

    /// Whether the rows of the fit have this system message. The calibration does not apply to questions with another
    /// one. True if the calibration names no common system message.
    pub fn knows_system(&self, system: Option<&str>) -> bool {
        let own = self.system.as_ref();
        own.is_none_or(|own| *own == named_system(system))
    }

    /// The same parts if the rows of the fit were judged by `judged`, otherwise none.
    #[must_use]
    pub fn of(self, judged: Judged) -> Self {
        match self.judged == Some(judged) {
            true => self,
            false => Self::default(),
        }
    }
}

impl Scaling {
    /// Fits a temperature to `predictions`.
    ///
    /// # Errors
    /// As [`fit_temperature`].
    pub fn fit(predictions: &[Prediction], ece_bins: usize) -> Result<Self> {
        let temperature = fit_temperature(predictions)?;
        let fit = |predictions: &[Prediction]| {
            let outcomes = measures::outcomes(predictions);
            Fit {
                nll: measures::negative_log_likelihood(predictions).unwrap_or_default(),
                ece: measures::expected_calibration_error(&outcomes, ece_bins).unwrap_or_default(),
            }
        };
        Ok(Self {
            temperature,
            before: fit(predictions),
            after: fit(&tempered(predictions, temperature)),
            abstention: None,
        })
    }

    /// The outcomes of `predictions` after temperature scaling.
    pub fn outcomes(&self, predictions: &[Prediction]) -> Vec<Outcome> {
        measures::outcomes(&tempered(predictions, self.temperature))
    }
}

impl Circumstances {
    /// The circumstances of `adapter` on the base model with the fingerprint `base`.
    pub fn new(
        base: String,
        adapter: &Adapter,
        chat_template_sha256: Option<String>,
        normalisation: LengthNormalisation,
    ) -> Self {
        Self {
            base,
            mean: adapter.collapse().fingerprint(),
            adapter: adapter.fingerprint(),
            chat_template_sha256,
            length_normalised: normalisation == LengthNormalisation::Tokens,
        }
    }
}

/// The path of the calibration of `adapter`, in the adapter's directory.
///
/// # Errors
/// Returns an error if `adapter` is a file.
pub fn path_of(adapter: &Path) -> Result<PathBuf> {
    if adapter.is_file() {
        let message = format!(
            "`{}` is one file, and a calibration lies beside an adapter, in its directory",
            adapter.display()
        );
        let fix = "give a directory; `monteclora convert --to lora` makes one";
        return Err(Problem::new("one-file", "-a", message, fix).exit(2).into());
    }
    Ok(adapter.join(FILE))
}

impl Calibration {
    /// Creates a calibration of this program's version.
    pub fn new(
        circumstances: Circumstances,
        data: Rows,
        [base_scaling, mean_scaling]: [Scaling; 2],
        posterior: Option<(Draws, Scaling)>,
    ) -> Self {
        let (draws, posterior_scaling) = posterior.unzip();
        Self {
            version: VERSION,
            monteclora: env!("CARGO_PKG_VERSION").to_owned(),
            circumstances,
            data,
            base_scaling,
            mean_scaling,
            draws,
            posterior_scaling,
        }
    }

    /// Reads `calibration.json` in the directory `adapter`, if it exists.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read, has another format version or holds values that `calibrate` never
    /// writes.
    pub fn beside(adapter: &Path) -> Result<Option<Self>, Error> {
        let path = adapter.join(FILE);
        let refuse = |what: String| {
            let fix = "make it again with `monteclora calibrate`, or remove it";
            Problem::new("calibration", format!("`{}`", path.display()), what, fix)
        };
        if path.exists() && !path.is_file() {
            return Err(refuse("not a regular file".to_owned()).into());
        }
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound || adapter.is_file() => {
                return Ok(None);
            }
            Err(e) => return Err(refuse(format!("cannot be read: {e}")).into()),
        };
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| refuse(format!("no calibration: {e}")))?;
        if !value.is_object() {
            return Err(refuse("no calibration: expected an object".to_owned()).into());
        }
        if value.get("version").is_none() {
            tracing::warn!(
                "`{}` is no calibration of this program: it is not used",
                path.display()
            );
            return Ok(None);
        }
        if value["version"] != VERSION {
            let found = &value["version"];
            return Err(refuse(format!("version {found}, this program reads {VERSION}")).into());
        }
        let found: Self =
            serde_json::from_value(value).map_err(|e| refuse(format!("no calibration: {e}")))?;
        let scalings = [&found.base_scaling, &found.mean_scaling];
        for scaling in scalings.into_iter().chain(&found.posterior_scaling) {
            let [low, high] = BOUNDS;
            let temperature = scaling.temperature;
            if !(0.999 * low..=1.001 * high).contains(&temperature) {
                let what = format!("temperature {temperature} is not between {low} and {high}");
                return Err(refuse(what).into());
            }
            let Some(abstention) = scaling.abstention else {
                continue;
            };
            if let Some(threshold) = abstention.threshold {
                let target = abstention.target_error;
                let is_checked = abstention.checked_on > 0
                    && abstention.error_bound.is_some_and(|bound| bound <= target);
                let is_share = |share: f64| (0.0..=1.0).contains(&share);
                if !is_share(threshold) || !is_share(target) || target == 0.0 {
                    let what = "a threshold and its target are not between 0 and 1".to_owned();
                    return Err(refuse(what).into());
                }
                if !is_checked {
                    let what = "a threshold that no rows were found to bear out".to_owned();
                    return Err(refuse(what).into());
                }
            }
        }
        if found.draws.is_some() != found.posterior_scaling.is_some() {
            let what = "draws without a temperature of theirs, or the other way round".to_owned();
            return Err(refuse(what).into());
        }
        Ok(Some(found))
    }

    /// Writes the calibration to the file `path`, and replaces an existing file.
    ///
    /// # Errors
    /// Returns an error if the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        files::write_json(path, self)
    }

    /// The parts that apply under `now`. The average applies only if it was fitted with the same `draws`.
    pub fn applicable(&self, now: &Circumstances, draws: Option<Draws>) -> Applicable {
        let was = &self.circumstances;
        let unlike = [
            (was.base != now.base, "for another base"),
            (was.mean != now.mean, "for another adapter"),
            (
                was.chat_template_sha256.is_some() != now.chat_template_sha256.is_some(),
                "with the chat template where now there is none, or the other way round",
            ),
            (
                was.chat_template_sha256 != now.chat_template_sha256,
                "with another chat template, or other variables of it",
            ),
            (
                was.length_normalised != now.length_normalised,
                "with another setting of --length-normalised",
            ),
        ];
        if let Some((_, why)) = unlike.into_iter().find(|(differs, _)| *differs) {
            return Applicable {
                why_not: Some(format!("was made {why}")),
                ..Applicable::default()
            };
        }
        let mut found = Applicable {
            base: Some(self.base_scaling.clone()),
            mean: Some(self.mean_scaling.clone()),
            judged: Some(self.data.judged),
            system: self.data.system.clone(),
            ..Applicable::default()
        };
        if let Some(draws) = draws {
            match self.draws {
                Some(own) if own == draws && was.adapter == now.adapter => {
                    found.posterior.clone_from(&self.posterior_scaling);
                }
                Some(own) => {
                    found.why_not = Some(match was.adapter == now.adapter {
                        true => format!(
                            "is of the average of {} draws of seed {}, not of {} of seed {}",
                            own.n, own.seed, draws.n, draws.seed
                        ),
                        false => "is of another posterior around the same mean".to_owned(),
                    });
                }
                None => {
                    found.why_not = Some("is of the posterior mean, not of an average".to_owned());
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scaling(temperature: f64) -> Scaling {
        let fit = Fit { nll: 1.0, ece: 0.1 };
        Scaling {
            temperature,
            before: fit,
            after: fit,
            abstention: None,
        }
    }

    fn circumstances() -> Circumstances {
        Circumstances {
            base: "base".to_owned(),
            mean: "mean".to_owned(),
            adapter: "adapter".to_owned(),
            chat_template_sha256: Some("template".to_owned()),
            length_normalised: false,
        }
    }

    fn calibration(draws: Option<Draws>) -> Calibration {
        let rows = Rows {
            rows: 3,
            sha256: "data".to_owned(),
            judged: Judged::Choices,
            system: None,
        };
        let posterior = draws.map(|draws| (draws, scaling(3.0)));
        Calibration::new(
            circumstances(),
            rows,
            [scaling(1.0), scaling(2.0)],
            posterior,
        )
    }

    #[test]
    fn it_holds_for_what_it_was_made_for_and_for_nothing_else() {
        let draws = Some(Draws { n: 4, seed: 1 });
        let made = calibration(draws);
        let whole = made.applicable(&circumstances(), draws);
        let temperature = |scaling: Option<Scaling>| scaling.map(|s| s.temperature);
        assert_eq!(
            [whole.base, whole.mean, whole.posterior].map(temperature),
            [Some(1.0), Some(2.0), Some(3.0)]
        );
        assert_eq!(whole.why_not, None);
        // Other draws, another posterior around the mean: base and mean stay as they are.
        let other = Some(Draws { n: 4, seed: 2 });
        let posterior = Circumstances {
            adapter: "another".to_owned(),
            ..circumstances()
        };
        for found in [
            made.applicable(&circumstances(), other),
            made.applicable(&posterior, draws),
            calibration(None).applicable(&circumstances(), draws),
        ] {
            assert!(found.mean.is_some() && found.posterior.is_none());
            assert!(found.why_not.is_some());
        }
        assert_eq!(made.applicable(&circumstances(), None).why_not, None);
        let changes: [fn(&mut Circumstances); 5] = [
            |c| c.base.clear(),
            |c| c.mean.clear(),
            |c| c.chat_template_sha256 = Some("another".to_owned()),
            |c| c.chat_template_sha256 = None,
            |c| c.length_normalised = true,
        ];
        for change in changes {
            let mut now = circumstances();
            change(&mut now);
            let found = made.applicable(&now, draws);
            assert!(found.base.is_none() && found.mean.is_none() && found.posterior.is_none());
            assert!(found.why_not.is_some());
        }
    }

    #[test]
    fn it_is_read_as_it_was_written_and_damage_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(Calibration::beside(dir.path()).expect("none"), None);
        let path = path_of(dir.path()).expect("a directory");
        let made = calibration(Some(Draws { n: 4, seed: 1 }));
        made.write(&path).expect("written");
        assert_eq!(Calibration::beside(dir.path()).expect("read"), Some(made));
        std::fs::write(&path, "{\"of\": \"another program\"}").expect("written");
        assert_eq!(Calibration::beside(dir.path()).expect("left alone"), None);
        for damage in ["{", "{\"version\": 1}", "{\"version\": 2}"] {
            std::fs::write(&path, damage).expect("written");
            let error = Calibration::beside(dir.path())
                .expect_err("damaged")
                .to_string();
            assert!(error.contains("calibration.json") && error.contains("monteclora calibrate"));
        }
        assert!(path_of(&path).is_err());
    }
}
