//! The table of served names: which engine answers for which public name, and how this changes without losing a
//! request.

mod alive;
mod engine;
mod memory;
mod reaper;
mod scored;
mod slots;
mod state;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use indexmap::IndexMap;
use parking_lot::RwLock;
use serde::Serialize;
use tokio::sync::Mutex;

use crate::config::{ModelConfig, ServeConfig};
use crate::error::{Error, Result, code};
use crate::quirks_0_8::split_models::allow_another_model;
use alive::Readiness;
use engine::{Checked, EngineSettings, Host, Wanted};
pub(crate) use engine::{Generation, Lease};
use memory::Memory;
pub(crate) use scored::Scored;
use scored::SharedBase;
pub use scored::generation_of;
pub(crate) use slots::blocking;
use state::{Change, RunTimeState, StateFile, declared};

/// All models and adapters that are served.
pub(crate) struct Registry {
    table: RwLock<Table>,
    /// Locked during a change, so that changes happen one after the other.
    plan: Mutex<Plan>,
    host: Host,
    readiness: Readiness,
}

struct Table {
    names: IndexMap<String, Lease>,
    default_model: String,
}

struct Plan {
    models: Vec<ModelConfig>,
    settings: EngineSettings,
    state: RunTimeState,
    state_file: Option<StateFile>,
}

/// An adapter to be loaded at run time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AdapterLoad<'a> {
    pub(crate) name: &'a str,
    pub(crate) source: &'a Path,
    /// The base model. The default is the base of this name in serve.toml, else the base of the adapter that it
    /// replaces, else the default model or its base.
    pub(crate) model: Option<&'a str>,
    /// Whether it may replace an adapter of the same name.
    pub(crate) in_place: bool,
    /// The generation that it must replace; `none` if there must be none.
    pub(crate) expected: Option<&'a str>,
}

/// The result of applying a changed configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Applied {
    /// New names.
    pub loaded: Vec<String>,
    /// Names that now answer from another generation.
    pub replaced: Vec<String>,
    /// Removed names.
    pub removed: Vec<String>,
    /// Unchanged names.
    pub kept: Vec<String>,
}

impl Registry {
    /// Loads the models and adapters of `config` and of the state file. It checks all of them before it loads the
    /// first.
    pub(crate) async fn load(config: &ServeConfig) -> Result<Self> {
        let state_file = StateFile::of(config);
        let mut recorded = RunTimeState::default();
        if let Some(file) = &state_file {
            recorded = file.read()?;
            // A state file that cannot be written is reported now, not when the first adapter is loaded.
            file.write(&recorded)?;
        }
        let plan = Plan::of(config, recorded.clone(), state_file);
        let checked = plan.check().await?;
        if checked.len() > 1 {
            allow_another_model()?;
        }
        let total = checked.iter().map(Checked::bytes).sum();
        let memory = Memory::new(config.max_memory, config.reclaim);
        memory.check("all models and adapters", total)?;
        let first = config.models.first();
        let first =
            first.ok_or_else(|| Error::setting("models", "at least one model is needed"))?;
        let registry = Self {
            table: RwLock::new(Table {
                names: IndexMap::new(),
                default_model: config.default_model.clone(),
            }),
            plan: Mutex::new(plan),
            host: Host::start(memory)?,
            readiness: Readiness::default(),
        };
        for (n_served, checked) in checked.into_iter().enumerate() {
            let parent = shared_base(
                &registry.table.read().names,
                checked.wanted.parent.as_deref(),
            );
            registry.publish(registry.host.add(checked, n_served, parent).await?);
        }
        // The threads are started now, not when the first adapter is loaded.
        let settings = EngineSettings::of(config);
        let ready = registry.host.keep_one_ready(&first.device, settings);
        if let Err(error) = ready.await {
            tracing::warn!(%error, "nothing can be loaded while this lasts");
        }
        // The state is recorded only when everything is served: a configuration that cannot be served must not change
        // the record.
        registry.plan.lock().await.record(&recorded)?;
        Ok(registry)
    }

    /// The current generation of `name`; without a name, or for `default`, that of the default model.
    pub(crate) fn lease(&self, name: Option<&str>) -> Option<Lease> {
        let table = self.table.read();
        let name = match name {
            None | Some("default") => &table.default_model,
            Some(name) => name,
        };
        table.names.get(name).cloned()
    }

    /// All served generations, bases before their adapters.
    pub(crate) fn list(&self) -> Vec<Lease> {
        self.table.read().names.values().cloned().collect()
    }

    /// The number of generations in memory and the estimated bytes of their weights. It includes generations that only
    /// finish their last requests.
    pub(crate) fn in_use(&self) -> (usize, u64) {
        self.host.memory.in_use()
    }

    /// Applies `config`: loads what is new or has changed, removes what is gone, and leaves the rest alone.
    ///
    /// Adapters that were loaded or unloaded at run time stay so, unless `config` gives their name another source.
    /// Everything new is loaded before anything old is released. On failure nothing changes.
    pub(crate) async fn apply(&self, config: &ServeConfig) -> Result<Applied> {
        let mut plan = self.plan.lock().await;
        // The location of the state file does not change while the server runs.
        let next = Plan::of(config, plan.state.clone(), plan.state_file.clone());
        let mut applied = Applied::default();
        let mut names = IndexMap::new();
        let mut new_bases = HashSet::new();
        let mut kept = Vec::new();
        let mut n_wanted = self.table.read().names.len();
        for checked in next.check().await? {
            let name = checked.wanted.name().to_owned();
            let current = self.table.read().names.get(&name).cloned();
            let parent = checked.wanted.parent.as_ref();
            let parent_stays = parent.is_none_or(|parent| !new_bases.contains(parent));
            let lease = match current {
                Some(lease) if parent_stays && checked.is(&lease) => {
                    kept.push((lease.clone(), checked));
                    applied.kept.push(name.clone());
                    lease
                }
                other => {
                    let list = match other {
                        Some(_) => &mut applied.replaced,
                        None => &mut applied.loaded,
                    };
                    list.push(name.clone());
                    new_bases.insert(name.clone());
                    let parent = shared_base(&names, checked.wanted.parent.as_deref());
                    let lease = self.host.add(checked, n_wanted, parent).await?;
                    n_wanted += 1;
                    lease
                }
            };
            names.insert(name, lease);
        }
        next.record(&plan.state)?;
        for (lease, checked) in kept {
            lease.set_source(&checked);
        }
        let former = self.list().into_iter().map(|lease| lease.name.clone());
        applied.removed = former.filter(|name| !names.contains_key(name)).collect();
        *self.table.write() = Table {
            names,
            default_model: config.default_model.clone(),
        };
        *plan = next;
        tracing::info!(?applied, "configuration applied");
        Ok(applied)
    }

    /// Loads an adapter. Running requests finish on the generation they began with. On failure the old generation stays
    /// in service.
    pub(crate) async fn load_adapter(&self, load: AdapterLoad<'_>) -> Result<Lease> {
        let mut plan = self.plan.lock().await;
        let current = self.table.read().names.get(load.name).cloned();
        let default_model = self.table.read().default_model.clone();
        check_expected(load.name, current.as_ref(), load.expected)?;
        let in_place = load.in_place || load.expected.is_some();
        if current.as_ref().is_some_and(|lease| lease.parent.is_none()) {
            return Err(not_an_adapter(load.name));
        }
        if current.is_some() && !in_place {
            let taken = "is already served; unload it first, or load in place";
            let message = format!("the name `{}` {taken}", load.name);
            return Err(Error::refused(code::NAME_TAKEN, message));
        }
        let declared_parent = declared(&plan.models, load.name).map(|(parent, _)| parent);
        let served_parent = current.as_ref().and_then(|lease| lease.parent.as_deref());
        // The default model may be an adapter that is not served now.
        let default =
            declared(&plan.models, &default_model).map_or(&*default_model, |(parent, _)| parent);
        let parent = load
            .model
            .or(declared_parent)
            .or(served_parent)
            .unwrap_or(default);
        if let Some(declared) = declared_parent.filter(|declared| *declared != parent) {
            let message = format!(
                "serve.toml has `{}` on the base `{declared}`; load it there, or change the file",
                load.name
            );
            return Err(Error::setting("model", message));
        }
        let model = plan
            .models
            .iter()
            .find(|model| model.name == parent)
            .ok_or_else(|| Error::unknown_name(parent))?;
        let wanted = Wanted::new(model, Some((load.name, load.source)), plan.settings)?;
        let checked = blocking(move || wanted.check()).await?;
        let change = Change {
            parent: model.name.clone(),
            path: Some(match &plan.state_file {
                Some(file) => file.relative(load.source),
                None => load.source.to_path_buf(),
            }),
            generation: Some(checked.hash.clone()),
            replaces: declared(&plan.models, load.name).map(|(_, source)| source.to_path_buf()),
        };
        match current.filter(|lease| checked.is(lease)) {
            Some(lease) => {
                plan.change(load.name, Some(change))?;
                lease.set_source(&checked);
                Ok(lease)
            }
            None => {
                let (n_wanted, parent) = {
                    let names = &self.table.read().names;
                    (
                        names.len(),
                        shared_base(names, checked.wanted.parent.as_deref()),
                    )
                };
                let lease = self.host.add(checked, n_wanted, parent).await?;
                plan.change(load.name, Some(change))?;
                Ok(self.publish(lease))
            }
        }
    }

    /// Stops serving the adapter `name`; running requests finish.
    pub(crate) async fn unload_adapter(&self, name: &str, expected: Option<&str>) -> Result<Lease> {
        let mut plan = self.plan.lock().await;
        let current = self.table.read().names.get(name).cloned();
        check_expected(name, current.as_ref(), expected)?;
        let lease = current.ok_or_else(|| Error::unknown_name(name))?;
        let Some(parent) = lease.parent.clone() else {
            return Err(not_an_adapter(name));
        };
        let change = declared(&plan.models, name).map(|(_, source)| Change {
            parent,
            path: None,
            generation: None,
            replaces: Some(source.to_path_buf()),
        });
        plan.change(name, change)?;
        let mut table = self.table.write();
        table.names.shift_remove(name);
        if table.default_model == name {
            tracing::warn!(
                name,
                "the default model is unloaded: requests that name none are refused"
            );
        }
        Ok(lease)
    }

    fn publish(&self, lease: Lease) -> Lease {
        self.table
            .write()
            .names
            .insert(lease.name.clone(), lease.clone());
        tracing::info!(name = lease.name, generation = lease.hash, "serving");
        lease
    }
}

impl Plan {
    /// The plan of `config`, with those changes in `state` that `config` has not superseded.
    fn of(config: &ServeConfig, mut state: RunTimeState, state_file: Option<StateFile>) -> Self {
        for name in state.prune(&config.models) {
            tracing::warn!(
                name,
                "a change made at run time gives way to the changed configuration"
            );
        }
        Self {
            models: config.models.clone(),
            settings: EngineSettings::of(config),
            state,
            state_file,
        }
    }

    /// Checks everything that must be served, bases before their adapters. The error holds every problem.
    async fn check(&self) -> Result<Vec<Checked>> {
        let mut errors = Vec::new();
        let mut checked = Vec::new();
        for (name, wanted, from_state) in self.wanted() {
            match blocking(move || wanted?.check()).await {
                Ok(found) => {
                    if let Some(change) = from_state
                        && !change.generation.as_ref().is_some_and(|g| found.is_generation(g))
                    {
                        tracing::warn!(name, generation = found.hash, "the adapter has changed since it was loaded");
                    }
                    checked.push(found);
                }
                Err(error) => errors.push(match (from_state, &self.state_file) {
                    (Some(_), Some(file)) => Error::config(
                        &file.path,
                        format!(
                            "the adapter `{name}`, loaded at run time, cannot be served again: {error}; restore it, or remove its entry"
                        ),
                    ),
                    _ => Error::Of {
                        name,
                        problem: Box::new(error),
                    },
                }),
            }
        }
        Error::all(errors)?;
        Ok(checked)
    }

    /// The models that the file declares, after the changes made at run time. Each entry comes with its change, if any.
    fn wanted(&self) -> Vec<(String, Result<Wanted>, Option<&Change>)> {
        let mut wanted = Vec::new();
        for model in &self.models {
            let base = Wanted::new(model, None, self.settings);
            wanted.push((model.name.clone(), base, None));
            // Adapters in the order of the file, then those added at run time.
            let declared = model.adapters.iter().map(|(alias, source)| {
                let change = self.state.adapters.get(alias);
                (alias.as_str(), Some(source.as_path()), change)
            });
            let added = self.state.adapters.iter().filter(|(alias, change)| {
                let mut declared = model.adapters.iter().map(|(alias, _)| alias);
                change.parent == model.name && !declared.any(|declared| declared == *alias)
            });
            let added = added.map(|(alias, change)| (alias.as_str(), None, Some(change)));
            for (alias, source, change) in declared.chain(added) {
                if change.is_some_and(|change| change.path.is_none()) {
                    continue;
                }
                let recorded = change.and_then(|change| {
                    let file = self.state_file.as_ref()?;
                    Some(file.root.join(change.path.as_ref()?))
                });
                if let Some(source) = recorded.as_deref().or(source) {
                    let adapter = Wanted::new(model, Some((alias, source)), self.settings);
                    wanted.push((alias.to_owned(), adapter, change));
                }
            }
        }
        wanted
    }

    /// Records a change of `name`, or removes the record of `name`. On failure the state stays as it was.
    fn change(&mut self, name: &str, change: Option<Change>) -> Result<()> {
        let former = self.state.clone();
        match change {
            Some(change) => self.state.adapters.insert(name.to_owned(), change),
            None => self.state.adapters.remove(name),
        };
        let outcome = self.record(&former);
        if outcome.is_err() {
            self.state = former;
        }
        outcome
    }

    /// Writes the state file if the state differs from `former`.
    fn record(&self, former: &RunTimeState) -> Result<()> {
        match &self.state_file {
            Some(file) if self.state != *former => file.write(&self.state),
            _ => Ok(()),
        }
    }
}

/// The copy of the base `parent` that scores answers, if there is one.
fn shared_base(names: &IndexMap<String, Lease>, parent: Option<&str>) -> Option<Arc<SharedBase>> {
    let scored = names.get(parent?)?.scored.as_ref()?;
    Some(scored.base.clone())
}

fn not_an_adapter(name: &str) -> Error {
    let message = format!("`{name}` is a base model, not an adapter; give another name");
    Error::setting("lora_name", message)
}

fn check_expected(name: &str, current: Option<&Lease>, expected: Option<&str>) -> Result<()> {
    let found = current.map_or("none", |lease| lease.hash.as_str());
    match expected {
        Some(expected) if expected != found => Err(Error::refused(
            code::GENERATION_MOVED,
            format!("`{name}` is at generation {found}, not {expected}"),
        )),
        _ => Ok(()),
    }
}
