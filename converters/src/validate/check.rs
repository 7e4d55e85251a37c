//! Whether an adapter fits a base model, from headers alone.

use std::collections::{BTreeMap, BTreeSet};

use crate::adapter::Adapter;
use crate::architecture::Wrapper;
use crate::error::Result;
use crate::model_files::ModelFiles;
use crate::module_path::{base_of, front, layer_of, one_for_all, other_front, unwrapped};
use crate::problem::{Problem, Problems};
use crate::targets::{LinearModule, Matcher, nearest};

const OTHER_BASE: &str = "use the base model that the adapter was trained on";

/// Why a base has no module of a name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Cause {
    /// A wrapper's segment, and its maker.
    Wrapper(&'static str, &'static str),
    /// What stands before the layers in the adapter, and in the base.
    Front(String, String),
    /// More layers than the base has, which is this many.
    Layer(usize),
}

impl Cause {
    fn of<'a>(name: &'a str, linears: &'a [LinearModule], known: &BTreeSet<&str>) -> Option<Self> {
        let (plain, wrappers) = unwrapped(name);
        if let (Some(wrapper), true) = (wrappers.first(), known.contains(plain.as_str())) {
            return Some(Self::Wrapper(wrapper.segment, wrapper.made_by));
        }
        let names = linears.iter().map(|module| module.name.as_str());
        if let Some(other) = other_front(name, names) {
            return Some(Self::Front(front(name).to_owned(), front(other).to_owned()));
        }
        let (before, number, after) = layer_of(name)?;
        let layers = linears.iter().filter_map(|module| {
            let (other_before, layer, other_after) = layer_of(&module.name)?;
            ((other_before, other_after) == (before, after)).then_some(layer)
        });
        let n_layers = layers.max()? + 1;
        (number >= n_layers).then_some(Self::Layer(n_layers))
    }

    fn problem(&self, names: &[String]) -> Option<Problem> {
        let first = names.first()?;
        let (message, fix) = match self {
            Self::Wrapper(segment, made_by) => (
                format!(
                    "`{segment}.` in the name comes from a wrapper ({made_by}); the base has the module without it"
                ),
                "monteclora convert ADAPTER -o DIR --to lora writes the names without it"
                    .to_owned(),
            ),
            Self::Front(ours, theirs) => {
                let other_base = format!("{OTHER_BASE}, or train on this one");
                let of_theirs = base_of(&format!("{theirs}layers."));
                let (trained_on, fix) = match (base_of(first), of_theirs) {
                    _ if Wrapper::with_stored(first).is_some() => (
                        ", so it was trained before transformers 4.52, where modules have other names".to_owned(),
                        "merge it with the versions of transformers and PEFT that made it, or train on this one"
                            .to_owned(),
                    ),
                    (Some(base), _) => (format!(", so it was trained on {base}"), other_base),
                    (None, Some(_)) => {
                        let itself = ", so it was trained on the language model by itself";
                        (itself.to_owned(), other_base)
                    }
                    (None, None) => (String::new(), other_base),
                };
                (
                    format!(
                        "the adapter's names begin with {}, the base's with {}{trained_on}",
                        shown(ours),
                        shown(theirs)
                    ),
                    fix,
                )
            }
            Self::Layer(n_layers) => (
                format!("the base has {n_layers} layers, 0 to {}", n_layers - 1),
                OTHER_BASE.to_owned(),
            ),
        };
        one_for_all("unknown-site", names, message, fix)
    }
}

fn shown(front: &str) -> String {
    match front {
        "" => "no prefix (`layers.`)".to_owned(),
        front => format!("`{front}layers.`"),
    }
}

impl Adapter {
    /// Everything that keeps the adapter from fitting `base`: sites the base does not have, shapes that disagree, and
    /// modules that the configuration targets but the adapter has no tensors for. Only headers are read.
    ///
    /// # Errors
    /// If a pattern of the configuration cannot be used.
    pub fn check_against(&self, base: &ModelFiles) -> Result<Vec<Problem>> {
        if base.blocks().is_none()
            && let Some(method) = base.quantization()
        {
            let at = base.place().display().to_string();
            let message = format!(
                "the base is quantised ({method}), so its weights have other names and shapes"
            );
            let fix = "use the full-precision model";
            return Ok(vec![Problem::new("quantised-base", at, message, fix)]);
        }
        let family = base.family();
        self.check(&base.linear_modules(), |name| {
            family.is_some_and(|family| family.is_in_mixture(name))
        })
    }

    /// As [`Self::check_against`], for a base that has these linear modules.
    ///
    /// # Errors
    /// If a pattern of the configuration cannot be used.
    pub fn check_modules(&self, linears: &[LinearModule]) -> Result<Vec<Problem>> {
        self.check(linears, |_| false)
    }

    /// Modules that `is_optional` says need no tensors although a name targets them: transformers holds experts and routers as
    /// parameters, which no name of a module reaches.
    fn check(
        &self,
        linears: &[LinearModule],
        is_optional: impl Fn(&str) -> bool,
    ) -> Result<Vec<Problem>> {
        let by_name: BTreeMap<&str, &LinearModule> = linears
            .iter()
            .map(|module| (module.name.as_str(), module))
            .collect();
        let known: BTreeSet<&str> = by_name.keys().copied().collect();
        let mut problems = Vec::new();
        let mut by_cause: BTreeMap<Cause, Vec<String>> = BTreeMap::new();
        for site in &self.sites {
            let found = (site.out_features(), site.in_features());
            let (code, message) = match by_name.get(site.name.as_str()) {
                Some(module) if found == (module.out_features, module.in_features) => continue,
                Some(module) => {
                    let message = format!(
                        "the adapter is made for a weight of {} x {}, the base's is {} x {}",
                        found.0, found.1, module.out_features, module.in_features
                    );
                    ("shape", message)
                }
                None => {
                    if let Some(cause) = Cause::of(&site.name, linears, &known) {
                        by_cause.entry(cause).or_default().push(site.name.clone());
                        continue;
                    }
                    let near = nearest(&site.name, linears).into_iter();
                    let near: Vec<String> = near.map(|(near, _)| format!("`{near}`")).collect();
                    let message = "the base has no linear module of this name; nearest: ";
                    ("unknown-site", message.to_owned() + &near.join(", "))
                }
            };
            problems.push(Problem::new(code, &site.name, message, OTHER_BASE));
        }
        let is_named_otherwise = by_cause
            .keys()
            .any(|cause| !matches!(cause, Cause::Layer(_)));
        let of_causes = by_cause
            .iter()
            .filter_map(|(cause, names)| cause.problem(names));
        problems.splice(0..0, of_causes.collect::<Vec<_>>());
        if is_named_otherwise {
            // That targeted modules have no tensors follows from it.
            return Ok(problems);
        }
        let adapted: BTreeSet<&str> = self.sites.iter().map(|site| site.name.as_str()).collect();
        let matcher = Matcher::new(&self.config)?;
        for module in linears {
            let is_missing = !adapted.contains(module.name.as_str()) && !is_optional(&module.name);
            if is_missing && matcher.matches(&module.name)? {
                let message =
                    "targeted by the configuration, but the adapter has no tensors for it";
                let fix = format!("{OTHER_BASE}, or correct target_modules");
                problems.push(Problem::new("missing-site", &module.name, message, fix));
            }
        }
        Ok(problems)
    }

    /// [`Self::check_against`] as an error.
    ///
    /// # Errors
    /// With everything that does not fit.
    pub fn require_fit(&self, base: &ModelFiles) -> Result<()> {
        let dir = base.place().display();
        let heading = format!("the adapter does not fit the base `{dir}`");
        Ok(Problems::refuse_any(heading, self.check_against(base)?)?)
    }

    /// [`Self::check_modules`] as an error.
    ///
    /// # Errors
    /// With everything that does not fit.
    pub fn require_modules(&self, linears: &[LinearModule]) -> Result<()> {
        let heading = "the adapter does not fit the base";
        Ok(Problems::refuse_any(heading, self.check_modules(linears)?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    #[test]
    fn fixtures_fit_their_base_and_resolve_to_their_sites() {
        for case in &fixtures::usable() {
            let base = ModelFiles::open(&case.model_dir).expect("a model");
            let adapter = Adapter::read_dir(&case.dir).expect("a good adapter");
            assert_eq!(
                adapter.check_against(&base).expect("valid patterns"),
                [],
                "{}",
                case.name
            );
            let resolved = adapter
                .config
                .resolve_targets(&base.linear_modules())
                .expect("known targets");
            let sites: Vec<&str> = adapter
                .sites
                .iter()
                .map(|site| site.name.as_str())
                .collect();
            assert_eq!(resolved, sites, "{}", case.name);
        }
    }

    #[test]
    fn every_misfit_is_reported() {
        let case = fixtures::named("monteclora");
        let base = ModelFiles::open(&case.model_dir).expect("a model");
        let adapter = fixtures::small_adapter(8, false);
        let problems = adapter.check_against(&base).expect("plain names");
        let n_shape = problems
            .iter()
            .filter(|problem| problem.code == "shape")
            .count();
        let n_missing = problems
            .iter()
            .filter(|problem| problem.code == "missing-site")
            .count();
        // The small adapter has two layers of k and q with other sizes; the models have three.
        assert_eq!((n_shape, n_missing), (4, 2), "{problems:?}");
        let mut adapter = adapter;
        for site in &mut adapter.sites {
            site.name = site.name.replace("self_attn", "attention");
        }
        let problems = adapter.check_against(&base).expect("plain names");
        assert_eq!(
            problems
                .iter()
                .filter(|problem| problem.code == "unknown-site")
                .count(),
            4
        );
    }
}
