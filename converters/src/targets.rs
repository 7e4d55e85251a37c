//! Which modules of a base model an adapter's configuration means, exactly as PEFT decides it.

use std::collections::BTreeMap;

use crate::config::{AdapterConfig, ExcludeModules, Pattern, TargetModules};
use crate::error::{Error, Result};
use crate::formats::peft::read::PREFIX;
use crate::problem::{Problem, Problems};
use crate::site_pattern::SitePatterns;

/// How many near names an error offers for one that is unknown.
const N_NEAREST: usize = 3;

/// The output head, which `all-linear` leaves out.
pub(crate) const OUTPUT_HEAD: &str = "lm_head";

/// A linear projection of a base model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearModule {
    /// Path of the module, such as `model.layers.0.self_attn.q_proj`.
    pub name: String,
    /// Length of the input.
    pub in_features: usize,
    /// Length of the output.
    pub out_features: usize,
}

/// Whether `module` is `name` or ends in it after a dot.
pub(crate) fn ends_in(module: &str, name: &str) -> bool {
    module
        .strip_suffix(name)
        .is_some_and(|head| head.is_empty() || head.ends_with('.'))
}

/// Modules by name or by pattern.
enum Rule<'a> {
    Names(&'a [String]),
    Pattern(Pattern<'a>),
    AllLinear,
}

impl<'a> Rule<'a> {
    fn pattern(setting: &'static str, pattern: &'a str) -> Result<Self> {
        let whole = format!("^(?:{pattern})\\z");
        Ok(Self::Pattern(Pattern::new(setting, pattern, &whole)?))
    }

    fn names(&self, module: &str) -> Result<bool> {
        match self {
            Self::Names(names) => Ok(names.iter().any(|name| ends_in(module, name))),
            Self::Pattern(pattern) => pattern.is_match(module),
            Self::AllLinear => Ok(module != OUTPUT_HEAD),
        }
    }
}

/// A configuration's target rules with their patterns compiled.
pub(crate) struct Matcher<'a> {
    targets: Rule<'a>,
    excluded: Rule<'a>,
    /// Layers to which targets are confined, unless there are none, and where a path has its layer's number.
    layers: &'a [usize],
    layer_patterns: Vec<Pattern<'a>>,
}

impl<'a> Matcher<'a> {
    pub(crate) fn new(config: &'a AdapterConfig) -> Result<Self> {
        let targets = match &config.target_modules {
            TargetModules::Regex(pattern) => Rule::pattern("target_modules", pattern)?,
            TargetModules::List(names) => Rule::Names(names),
            TargetModules::AllLinear => Rule::AllLinear,
        };
        let excluded = match &config.exclude_modules {
            Some(ExcludeModules::Regex(pattern)) => Rule::pattern("exclude_modules", pattern)?,
            Some(ExcludeModules::List(names)) => Rule::Names(names),
            None => Rule::Names(&[]),
        };
        let layers = config.layers_to_transform.as_deref().unwrap_or_default();
        let pattern = |text, expression: &str| Pattern::new("layers_pattern", text, expression);
        let layer_patterns = match &config.layers_pattern {
            _ if layers.is_empty() => Vec::new(),
            // Without a pattern the first numbered component counts, whatever precedes it.
            None => vec![pattern("", r"^.*?\.[^.]*\.(?P<idx>\d+)\.")?],
            Some(patterns) => patterns
                .iter()
                .map(|text| pattern(text, &format!(r"^(?:.*?\.)?{text}\.(?P<idx>\d+)\.")))
                .collect::<Result<_>>()?,
        };
        Ok(Self {
            targets,
            excluded,
            layers,
            layer_patterns,
        })
    }

    /// Whether the module carries the adapter.
    pub(crate) fn matches(&self, module: &str) -> Result<bool> {
        if self.excluded.names(module)? {
            return Ok(false);
        }
        match &self.targets {
            // PEFT does not confine modules that are named in full to certain layers.
            Rule::Names(names) if names.iter().any(|name| name == module) => Ok(true),
            Rule::Names(_) | Rule::AllLinear => {
                Ok(self.targets.names(module)? && self.in_layers(module)?)
            }
            // Layers beside a pattern are refused.
            Rule::Pattern(_) => self.targets.names(module),
        }
    }

    fn in_layers(&self, module: &str) -> Result<bool> {
        for pattern in &self.layer_patterns {
            let found = pattern.captures(module)?;
            // The first pattern that matches decides.
            if let Some(number) = found.and_then(|found| found.name("idx")?.as_str().parse().ok()) {
                return Ok(self.layers.contains(&number));
            }
        }
        Ok(self.layers.is_empty())
    }
}

impl AdapterConfig {
    /// The modules of a base that carry the adapter, in the order given.
    ///
    /// As PEFT decides: a list entry is a module's path or the end of it after a dot; a string is a regular expression
    /// that must match the whole path; `all-linear` is every module but `lm_head`; then `exclude_modules` and
    /// `layers_to_transform` apply. Unlike PEFT, an entry that names nothing is an error, and layers apply to `all-linear`, too.
    ///
    /// # Errors
    /// A refusal with every entry that names no module; `setting` for a pattern that cannot be
    /// used, for layers beside a pattern, or if nothing is left.
    ///
    /// ```
    /// use monteclora_converters::{AdapterConfig, LinearModule, TargetModules};
    /// let module = |name: &str| LinearModule { name: name.into(), in_features: 4, out_features: 4 };
    /// let base = [module("model.layers.0.self_attn.q_proj"), module("model.layers.1.self_attn.q_proj")];
    /// let mut config = AdapterConfig {
    ///     target_modules: TargetModules::List(vec!["q_proj".into()]),
    ///     layers_to_transform: Some(vec![1]),
    ///     ..AdapterConfig::default()
    /// };
    /// assert_eq!(config.resolve_targets(&base)?, ["model.layers.1.self_attn.q_proj"]);
    ///
    /// config.target_modules = TargetModules::List(vec!["qproj".into()]);
    /// let error = config.resolve_targets(&base).expect_err("no module of this name");
    /// assert!(error.to_string().contains("nearest: `q_proj` (2 sites)"));
    /// # Ok::<(), monteclora_converters::Error>(())
    /// ```
    pub fn resolve_targets(&self, base_linears: &[LinearModule]) -> Result<Vec<String>> {
        let is_pattern = matches!(self.target_modules, TargetModules::Regex(_));
        if is_pattern && self.layers_to_transform.is_some() {
            return Err(Error::setting(
                "layers_to_transform",
                "cannot be combined with a regular expression in target_modules; put the layers into the expression",
            ));
        }
        let matcher = Matcher::new(self)?;
        let names_any = |rule: &Rule<'_>| -> Result<bool> {
            for module in base_linears {
                if rule.names(&module.name)? {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        let mut unknown = Vec::new();
        match &self.target_modules {
            TargetModules::List(names) => {
                for name in names {
                    if !names_any(&Rule::Names(std::slice::from_ref(name)))? {
                        unknown.push(unknown_target(name, base_linears));
                    }
                }
            }
            TargetModules::Regex(pattern) if !names_any(&matcher.targets)? => {
                unknown.push(unknown_target(pattern, base_linears));
            }
            _ => {}
        }
        let heading = "target_modules names modules that the base does not have";
        Problems::refuse_any(heading, unknown)?;
        let mut sites = Vec::new();
        for module in base_linears {
            if matcher.matches(&module.name)? {
                sites.push(module.name.clone());
            }
        }
        let names: Vec<&str> = sites.iter().map(String::as_str).collect();
        let unused = self.without_effect(&names)?;
        if !sites.is_empty() && !unused.is_empty() {
            let problems = unused.into_iter().map(Problem::usage).collect();
            return Err(
                Problems::under("settings match no module that is adapted", problems).into(),
            );
        }
        if sites.is_empty() {
            return Err(Error::setting(
                "target_modules",
                "no linear module of the base is left; check exclude_modules and layers_to_transform",
            ));
        }
        Ok(sites)
    }
}

impl AdapterConfig {
    /// Targets `sites` by their whole paths and nothing else: where the base has parts that carry no adapter, leaf names could mean
    /// modules in there too.
    pub fn target_in_full(&mut self, sites: &[String]) {
        self.target_modules = TargetModules::List(sites.to_vec());
        self.exclude_modules = None;
        self.layers_to_transform = None;
        self.layers_pattern = None;
    }

    /// The entries of its settings that no module among `names` is matched by, a sentence each: PEFT passes over them.
    ///
    /// # Errors
    /// If a pattern cannot be used.
    pub fn without_effect(&self, names: &[&str]) -> Result<Vec<String>> {
        let mut entries: Vec<(String, &str)> = Vec::new();
        for (setting, unused, _) in self.unused_keys(names)? {
            entries.extend(unused.into_iter().map(|key| (key.clone(), setting)));
        }
        if let TargetModules::List(targets) = &self.target_modules {
            let is_unused = |target: &&String| !names.iter().any(|name| ends_in(name, target));
            let unused = targets.iter().filter(is_unused);
            entries.extend(unused.map(|target| (target.clone(), "target_modules")));
        }
        let wanted = self.layers_to_transform.iter().flatten();
        let is_unused = |layer: &&usize| {
            let segment = layer.to_string();
            !names
                .iter()
                .any(|name| name.split('.').any(|part| part == segment))
        };
        entries.extend(
            wanted
                .filter(is_unused)
                .map(|layer| (layer.to_string(), "layers_to_transform")),
        );
        let sentences = entries.into_iter().map(|(entry, setting)| {
            let plain = entry.trim_start_matches('^').replace('\\', "");
            let why = match plain.starts_with(PREFIX) {
                true => "; names in it do not begin with base_model.model.",
                false => "",
            };
            format!("{setting}: `{entry}` matches no module, so it has no effect{why}")
        });
        Ok(sentences.collect())
    }

    /// Of `rank_pattern` and `alpha_pattern`, those of which no key matches one of `names`.
    pub(crate) fn tables_without_effect(&self, names: &[&str]) -> Result<Vec<&'static str>> {
        let tables = self.unused_keys(names)?.into_iter();
        let unused = tables.filter(|(_, unused, n_keys)| unused.len() == *n_keys && *n_keys > 0);
        Ok(unused.map(|(setting, _, _)| setting).collect())
    }

    /// For each of the two tables: its name, the keys that match none of `names`, and the number of all keys.
    fn unused_keys(&self, names: &[&str]) -> Result<[(&'static str, Vec<&String>, usize); 2]> {
        let ranks = SitePatterns::new("rank_pattern", &self.rank_pattern)?.unused(names)?;
        let alphas = SitePatterns::new("alpha_pattern", &self.alpha_pattern)?.unused(names)?;
        let ranks = ranks
            .into_iter()
            .filter_map(|idx| Some(self.rank_pattern.get_index(idx)?.0));
        let alphas = alphas
            .into_iter()
            .filter_map(|idx| Some(self.alpha_pattern.get_index(idx)?.0));
        Ok([
            ("rank_pattern", ranks.collect(), self.rank_pattern.len()),
            ("alpha_pattern", alphas.collect(), self.alpha_pattern.len()),
        ])
    }
}

/// An entry of `target_modules` that names nothing, with the names it may stand for.
fn unknown_target(entry: &str, modules: &[LinearModule]) -> Problem {
    let near: Vec<String> = nearest(entry, modules)
        .iter()
        .map(|(name, n_sites)| {
            let plural = if *n_sites == 1 { "site" } else { "sites" };
            format!("`{name}` ({n_sites} {plural})")
        })
        .collect();
    let fix = match near.is_empty() {
        true => String::new(),
        false => format!("nearest: {}", near.join(", ")),
    };
    Problem::new("unknown-target", format!("`{entry}`"), "", fix).exit(2)
}

/// The real names most like `entry`, of as many components, with the number of modules each one names.
pub(crate) fn nearest(entry: &str, modules: &[LinearModule]) -> Vec<(String, usize)> {
    let n_components = entry.split('.').count();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for module in modules {
        let start = module
            .name
            .rmatch_indices('.')
            .nth(n_components - 1)
            .map_or(0, |(at, _)| at + 1);
        *counts.entry(&module.name[start..]).or_default() += 1;
    }
    let mut scored: Vec<(f64, &str, usize)> = counts
        .into_iter()
        .map(|(name, n_sites)| (strsim::jaro_winkler(entry, name), name, n_sites))
        .collect();
    scored.sort_by(|left, right| right.0.total_cmp(&left.0).then(left.1.cmp(right.1)));
    scored
        .into_iter()
        .take(N_NEAREST)
        .map(|(_, name, n_sites)| (name.to_owned(), n_sites))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Vec<LinearModule> {
        let mut names = vec!["lm_head".to_owned()];
        for layer in [0, 1, 11] {
            for leaf in [
                "self_attn.q_proj",
                "self_attn.v_proj",
                "mlp.experts.1.up_proj",
            ] {
                names.push(format!("model.layers.{layer}.{leaf}"));
            }
        }
        let module = |name| LinearModule {
            name,
            in_features: 2,
            out_features: 3,
        };
        names.into_iter().map(module).collect()
    }

    fn resolve(edit: impl FnOnce(&mut AdapterConfig)) -> Result<Vec<String>> {
        let mut config = AdapterConfig::default();
        edit(&mut config);
        config.resolve_targets(&base())
    }

    fn list(names: &[&str]) -> TargetModules {
        TargetModules::List(names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn a_list_entry_is_a_path_or_its_end() {
        let sites = resolve(|config| {
            config.target_modules = list(&["q_proj", "model.layers.1.self_attn.v_proj"])
        });
        assert_eq!(
            sites.expect("known"),
            [
                "model.layers.0.self_attn.q_proj",
                "model.layers.1.self_attn.q_proj",
                "model.layers.1.self_attn.v_proj",
                "model.layers.11.self_attn.q_proj"
            ]
        );
        assert_eq!(
            resolve(|config| config.target_modules = list(&["lm_head"])).expect("known"),
            ["lm_head"]
        );
        assert!(resolve(|config| config.target_modules = list(&["_proj"])).is_err());
    }

    #[test]
    fn a_pattern_must_match_the_whole_path() {
        let regex = |pattern: &str| {
            resolve(|config| config.target_modules = TargetModules::Regex(pattern.into()))
        };
        assert_eq!(
            regex(r".*\.1\..*q_proj").expect("known"),
            ["model.layers.1.self_attn.q_proj"]
        );
        assert!(regex("q_proj").is_err());
        assert_eq!(regex("lm_head|x").expect("known"), ["lm_head"]);
        assert!(regex("(").is_err());
    }

    #[test]
    fn all_linear_leaves_out_the_head_and_the_excluded() {
        let all = resolve(|config| config.target_modules = TargetModules::AllLinear).expect("some");
        assert_eq!(all.len(), 9);
        let some = resolve(|config| {
            config.target_modules = TargetModules::AllLinear;
            config.exclude_modules = Some(ExcludeModules::List(vec!["up_proj".into()]));
        });
        assert_eq!(some.expect("some").len(), 6);
        let some = resolve(|config| {
            config.target_modules = TargetModules::AllLinear;
            config.exclude_modules = Some(ExcludeModules::Regex(".*self_attn.*".into()));
        });
        assert_eq!(some.expect("some").len(), 3);
    }

    #[test]
    fn layers_confine_all_linear_and_are_refused_beside_a_pattern() {
        let of = |target_modules: TargetModules| {
            resolve(|config| {
                config.target_modules = target_modules;
                config.layers_to_transform = Some(vec![1]);
            })
        };
        let sites = of(TargetModules::AllLinear).expect("some");
        assert_eq!(sites.len(), 3);
        assert!(sites.iter().all(|site| site.starts_with("model.layers.1.")));
        let error = of(TargetModules::Regex(".*q_proj".into())).expect_err("refused");
        assert!(error.to_string().contains("layers_to_transform"), "{error}");
    }

    #[test]
    fn layers_count_the_first_number_and_spare_full_paths() {
        let sites = resolve(|config| {
            config.target_modules = list(&["up_proj", "model.layers.0.self_attn.q_proj"]);
            config.layers_to_transform = Some(vec![1]);
        });
        assert_eq!(
            sites.expect("known"),
            [
                "model.layers.0.self_attn.q_proj",
                "model.layers.1.mlp.experts.1.up_proj"
            ]
        );
        let by_pattern = |pattern: &str| {
            resolve(|config| {
                config.target_modules = list(&["up_proj"]);
                config.layers_to_transform = Some(vec![1]);
                config.layers_pattern = Some(vec![pattern.into()]);
            })
        };
        assert_eq!(
            by_pattern("layers").expect("known"),
            ["model.layers.1.mlp.experts.1.up_proj"]
        );
        assert_eq!(by_pattern("experts").expect("known").len(), 3);
        assert!(by_pattern("blocks").is_err());
    }

    #[test]
    fn every_unknown_entry_is_listed_with_its_nearest_names() {
        let error =
            resolve(|config| config.target_modules = list(&["qproj", "v_proj", "self_attn.vproj"]));
        let error = error.expect_err("two entries are unknown");
        let unknown = error.problems();
        assert_eq!(unknown.len(), 2);
        assert!(
            unknown[0]
                .to_string()
                .starts_with("`qproj`; nearest: `q_proj` (3 sites), `")
        );
        assert!(
            unknown[1]
                .to_string()
                .starts_with("`self_attn.vproj`; nearest: `self_attn.v_proj` (3 sites)")
        );
        assert_eq!(crate::exit_code(&error, |_| None), 2);
    }
}
