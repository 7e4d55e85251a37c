//! The settings that are searched: keys of run.toml with their ranges, and how a point of the unit cube becomes values.

use std::path::Path;

use indexmap::IndexMap;
use monteclora_converters::Problem;
use serde::{Deserialize, Serialize};

/// The range of one key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum Range {
    /// A real number from `low` to `high`.
    #[serde(alias = "uniform")]
    Float {
        /// Lowest value.
        low: f64,
        /// Highest value.
        high: f64,
        /// Whether it is searched by its logarithm, as [`Range::Log`]; `low` is above 0 then.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        log: bool,
    },
    /// A real number above 0, searched by its logarithm.
    #[serde(alias = "loguniform")]
    Log {
        /// Lowest value, above 0.
        low: f64,
        /// Highest value.
        high: f64,
    },
    /// A whole number from `low` to `high`.
    #[serde(alias = "int")]
    Integer {
        /// Lowest value.
        low: i64,
        /// Highest value.
        high: i64,
        /// Whether it is searched by its logarithm; `low` is at least 1 then.
        #[serde(default)]
        log: bool,
    },
    /// One of the given values, which have no order.
    Categorical {
        /// The values, as TOML has them.
        #[serde(alias = "choices")]
        values: Vec<toml::Value>,
    },
}

/// A key that is searched.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Parameter {
    /// Dotted path in run.toml, such as `train.learning_rate`.
    pub key: String,
    /// Its range.
    pub range: Range,
}

/// What is searched.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Space {
    /// The parameters, in the order of the file.
    pub parameters: Vec<Parameter>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SpaceFile {
    parameters: IndexMap<String, Range>,
}

/// Significant digits of a real value: more make no difference to a run, and are hard to read.
const DIGITS: i32 = 4;

impl Range {
    /// Number of values, for ranges that are counted.
    pub fn n_values(&self) -> Option<u64> {
        match self {
            Self::Float { .. } | Self::Log { .. } => None,
            Self::Integer { low, high, .. } => Some(high.abs_diff(*low).saturating_add(1)),
            Self::Categorical { values } => Some(values.len() as u64),
        }
    }

    /// Whether the values have no order.
    pub fn is_categorical(&self) -> bool {
        matches!(self, Self::Categorical { .. })
    }

    /// What is wrong with the range.
    fn fault(&self) -> Option<String> {
        let ordered = |low: f64, high: f64| low < high;
        let is_finite = match self {
            Self::Float { low, high, .. } | Self::Log { low, high } => {
                low.is_finite() && high.is_finite()
            }
            _ => true,
        };
        let fault = match self {
            _ if !is_finite => "low and high must be finite",
            Self::Float { low, high, .. } if !ordered(*low, *high) => "low must be below high",
            Self::Log { low, high } if !ordered(*low, *high) || *low <= 0.0 => {
                "low must be above 0 and below high"
            }
            Self::Integer { low, high, .. } if low >= high => "low must be below high",
            Self::Integer { low, log: true, .. } if *low < 1 => "low must be at least 1 with log",
            Self::Categorical { values } if values.len() < 2 => "give at least two values",
            _ => return None,
        };
        Some(fault.to_owned())
    }

    /// The value at `u` of the unit interval.
    pub fn value(&self, u: f64) -> toml::Value {
        let u = u.clamp(0.0, 1.0);
        let between = |low: f64, high: f64| low + u * (high - low);
        match self {
            Self::Float { low, high, .. } => rounded(between(*low, *high), *low, *high).into(),
            Self::Log { low, high } => {
                rounded(between(low.ln(), high.ln()).exp(), *low, *high).into()
            }
            Self::Integer { low, high, log } => {
                // Every whole number has an equal part of the interval.
                let (least, most) = (*low as f64 - 0.5, *high as f64 + 0.5);
                let value = match log {
                    true => between(least.max(0.5).ln(), most.ln()).exp(),
                    false => between(least, most),
                };
                (value.round() as i64).clamp(*low, *high).into()
            }
            Self::Categorical { values } => {
                let at = (u * values.len() as f64) as usize;
                values[at.min(values.len() - 1)].clone()
            }
        }
    }

    /// The middle of the part of the unit interval that gives `value`; `None` if the range does not have it.
    pub fn place(&self, value: &toml::Value) -> Option<f64> {
        let number = || value.as_float().or(value.as_integer().map(|n| n as f64));
        let within = |value: f64, low: f64, high: f64| {
            (low..=high)
                .contains(&value)
                .then(|| (value - low) / (high - low))
        };
        match self {
            Self::Float { low, high, .. } => within(number()?, *low, *high),
            Self::Log { low, high } => within(number()?.ln(), low.ln(), high.ln()),
            Self::Integer { low, high, log } => {
                let value = value.as_integer().filter(|n| (*low..=*high).contains(n))? as f64;
                let (least, most) = (*low as f64 - 0.5, *high as f64 + 0.5);
                match log {
                    true => within(value.ln(), least.max(0.5).ln(), most.ln()),
                    false => within(value, least, most),
                }
            }
            Self::Categorical { values } => {
                let at = values.iter().position(|known| known == value)? as f64;
                Some((at + 0.5) / values.len() as f64)
            }
        }
    }
}

/// `value` with a few significant digits, within its range.
fn rounded(value: f64, low: f64, high: f64) -> f64 {
    let text = format!("{value:.*e}", DIGITS as usize - 1);
    text.parse().unwrap_or(value).clamp(low, high)
}

/// What is wrong with a file that is TOML, if it is one of the usual mistakes.
fn misread(text: &str) -> Option<String> {
    let file: toml::Table = text.parse().ok()?;
    let parameters = file.get("parameters")?.as_table()?;
    parameters.iter().find_map(|(key, range)| match range {
        toml::Value::Array(values) => {
            let values: Vec<String> = values.iter().map(ToString::to_string).collect();
            Some(format!(
                "{key:?}: a list; write {{ type = \"categorical\", values = [{}] }}",
                values.join(", ")
            ))
        }
        toml::Value::Table(inner) if !inner.contains_key("type") => {
            let (leaf, _) = inner.iter().find(|(_, range)| range.is_table())?;
            Some(format!(
                "{key}.{leaf} is not in quotes; write \"{key}.{leaf}\""
            ))
        }
        _ => None,
    })
}

impl Space {
    /// Reads a TOML file with a table `[parameters]`: keys of run.toml, each with its range.
    ///
    /// # Errors
    /// Returns an error that names the file and every parameter that is wrong.
    pub fn read(path: &Path) -> Result<Self, Problem> {
        Self::parse(&Self::text(path)?, &path.display().to_string())
    }

    /// The text of the file, for [`Self::parse`].
    ///
    /// # Errors
    /// Returns an error that names the file.
    pub fn text(path: &Path) -> Result<String, Problem> {
        let wrong = |error| Problem::usage(format!("cannot read `{}`: {error}", path.display()));
        std::fs::read_to_string(path).map_err(wrong)
    }

    /// As [`Self::read`], from text; `name` stands for the file in messages.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn parse(text: &str, name: &str) -> Result<Self, Problem> {
        const FORM: &str = "write [parameters] with lines such as \"train.learning_rate\" = { type = \"log\", low = 1e-5, high = 1e-3 }; types are float, log, integer and categorical, the last with values = [...]";
        let file: SpaceFile = toml::from_str(text).map_err(|error| {
            let what = misread(text).unwrap_or_else(|| error.to_string().trim().to_owned());
            Problem::usage(format!("{name}: {what}; {FORM}"))
        })?;
        let parameters = file.parameters.into_iter();
        let parameters: Vec<Parameter> = parameters
            .map(|(key, range)| match range {
                Range::Float {
                    low,
                    high,
                    log: true,
                } => (key, Range::Log { low, high }),
                range => (key, range),
            })
            .map(|(key, range)| Parameter { key, range })
            .collect();
        if parameters.is_empty() {
            return Err(Problem::usage(format!("{name}: no parameter; {FORM}")));
        }
        let faults = parameters.iter().filter_map(|parameter| {
            Some(format!("{}: {}", parameter.key, parameter.range.fault()?))
        });
        let faults: Vec<String> = faults.collect();
        match faults.is_empty() {
            true => Ok(Self { parameters }),
            false => Err(Problem::usage(format!("{name}: {}", faults.join("; ")))),
        }
    }

    /// The values at a point of the unit cube, one per parameter.
    pub fn values(&self, point: &[f64]) -> Vec<toml::Value> {
        let parameters = self.parameters.iter().zip(point);
        parameters
            .map(|(parameter, u)| parameter.range.value(*u))
            .collect()
    }

    /// The point of `values`.
    pub fn point(&self, values: &[toml::Value]) -> Option<Vec<f64>> {
        let parameters = self.parameters.iter().zip(values);
        parameters
            .map(|(parameter, value)| parameter.range.place(value))
            .collect()
    }

    /// Number of different points, if all ranges are counted.
    pub fn n_points(&self) -> Option<u64> {
        self.parameters.iter().try_fold(1u64, |n, parameter| {
            n.checked_mul(parameter.range.n_values()?)
        })
    }

    /// The settings as `--set` takes them.
    pub fn settings(&self, values: &[toml::Value]) -> Vec<String> {
        let parameters = self.parameters.iter().zip(values);
        parameters
            .map(|(parameter, value)| format!("{}={value}", parameter.key))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
[parameters]
"train.learning_rate" = { type = "log", low = 1e-5, high = 1e-3 }
"lora.r" = { type = "integer", low = 4, high = 64, log = true }
"lora.lora_dropout" = { type = "float", low = 0.0, high = 0.2 }
"lora.method" = { type = "categorical", values = ["lora", "monteclora"] }
"#;

    #[test]
    fn values_cover_their_ranges_and_lead_back() {
        let space = Space::parse(FILE, "space.toml").expect("valid");
        assert_eq!(space.n_points(), None);
        let (low, high) = (space.values(&[0.0; 4]), space.values(&[1.0; 4]));
        assert_eq!(low[0].as_float(), Some(1e-5));
        assert_eq!(high[0].as_float(), Some(1e-3));
        assert_eq!(
            (low[1].as_integer(), high[1].as_integer()),
            (Some(4), Some(64))
        );
        assert_eq!(high[3].as_str(), Some("monteclora"));
        assert_eq!(space.values(&[0.5; 4])[0].as_float(), Some(1e-4));
        for at in 0..=40 {
            let u = f64::from(at) / 40.0;
            let values = space.values(&[u; 4]);
            let point = space.point(&values).expect("within");
            assert_eq!(space.values(&point), values, "{u}");
        }
        let settings = space.settings(&low);
        assert_eq!(settings[1], "lora.r=4");
        assert_eq!(settings[3], "lora.method=\"lora\"");
    }

    /// The words of other programs.
    #[test]
    fn other_words_mean_the_same() {
        let parse = |text: &str| {
            let space = Space::parse(&format!("[parameters]\n{text}"), "space.toml");
            space.expect("valid").parameters[0].range.clone()
        };
        for (other, ours) in [
            (
                "a = { type = \"int\", low = 1, high = 4 }",
                "a = { type = \"integer\", low = 1, high = 4 }",
            ),
            (
                "a = { type = \"float\", low = 1.0, high = 4.0, log = true }",
                "a = { type = \"log\", low = 1.0, high = 4.0 }",
            ),
            (
                "a = { type = \"categorical\", choices = [1, 2] }",
                "a = { type = \"categorical\", values = [1, 2] }",
            ),
        ] {
            assert_eq!(parse(other), parse(ours));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("", "parameters"),
            ("[parameters]", "no parameter"),
            (
                "[parameters]\na = { type = \"log\", low = 0, high = 1 }",
                "a: low must be above 0",
            ),
            (
                "[parameters]\na = { type = \"float\", low = 2.0, high = 1.0 }",
                "a: low must be below",
            ),
            (
                "[parameters]\na = { type = \"categorical\", values = [1] }",
                "two values",
            ),
            (
                "[parameters]\na = { type = \"normal\", low = 1, high = 2 }",
                "normal",
            ),
            (
                "[parameters]\na = { type = \"float\", low = 1, high = 2, step = 1 }",
                "step",
            ),
        ] {
            let error = Space::parse(text, "space.toml").expect_err(text);
            assert!(error.to_string().contains(part), "{error}");
            assert!(error.to_string().contains("space.toml"), "{error}");
        }
    }
}
