//! Whether an adapter fits a base model, from headers alone.

use crate::adapter::Adapter;
use crate::error::Result;
use crate::model_files::ModelFiles;
use crate::problem::{Problem, Problems};
use crate::targets::{Matcher, nearest};

const OTHER_BASE: &str = "use the base model that the adapter was trained on";

impl Adapter {
    /// Everything that keeps the adapter from fitting `base`: sites the base does not have, shapes that disagree, and
    /// modules that the configuration targets but the adapter has no tensors for. Only headers are read.
    ///
    /// # Errors
    /// If a pattern of the configuration cannot be used.
    pub fn check_against(&self, base: &ModelFiles) -> Result<Vec<Problem>> {
        if let Some(method) = base.quantization() {
            let at = base.dir().display().to_string();
            let message = format!(
                "the base is quantised ({method}), so its weights have other names and shapes"
            );
            let fix = "use the full-precision model";
            return Ok(vec![Problem::new("quantised-base", at, message, fix)]);
        }
        let linears = base.linear_modules();
        let mut problems = Vec::new();
        for site in &self.sites {
            let found = (site.out_features(), site.in_features());
            let module = linears.iter().find(|module| module.name == site.name);
            let (code, message) = match module {
                Some(module) if found == (module.out_features, module.in_features) => continue,
                Some(module) => {
                    let message = format!(
                        "the adapter is made for a weight of {} x {}, the base's is {} x {}",
                        found.0, found.1, module.out_features, module.in_features
                    );
                    ("shape", message)
                }
                None => {
                    let near = nearest(&site.name, &linears).into_iter();
                    let near: Vec<String> = near.map(|(near, _)| format!("`{near}`")).collect();
                    let message = "the base has no linear module of this name; nearest: ";
                    ("unknown-site", message.to_owned() + &near.join(", "))
                }
            };
            problems.push(Problem::new(code, &site.name, message, OTHER_BASE));
        }
        let matcher = Matcher::new(&self.config)?;
        for module in &linears {
            let has_tensors = self.sites.iter().any(|site| site.name == module.name);
            if matcher.matches(&module.name)? && !has_tensors {
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
        let dir = base.dir().display();
        let heading = format!("the adapter does not fit the base `{dir}`");
        Ok(Problems::refuse_any(heading, self.check_against(base)?)?)
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
