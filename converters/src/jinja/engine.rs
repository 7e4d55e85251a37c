//! Compiled templates, and rendering with the ranges that `{% generation %}` marks.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::SystemTime;

use indexmap::IndexMap;
use minijinja::{AutoEscape, Environment, Output, State, Template, Value as JinjaValue};
use serde_json::{Map, Value};

use super::{filters, methods, python, rewrite, time, tojson, values};

/// Templates that are compiled, by their names.
#[derive(Debug)]
pub struct Templates {
    environment: Environment<'static>,
    sources: IndexMap<String, String>,
}

/// A text, and what of it is marked as the model's own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// The byte ranges within `{% generation %}`, in order.
    pub generation: Vec<Range<usize>>,
}

impl Templates {
    /// Compiles every one of `sources`. `now` is asked for the time of each `strftime_now`.
    ///
    /// # Errors
    /// The name of each that is not valid Jinja, with the reason.
    pub fn compile(
        sources: IndexMap<String, String>,
        now: impl Fn() -> SystemTime + Send + Sync + 'static,
    ) -> Result<Self, Vec<(String, String)>> {
        let mut environment = environment(now);
        let mut problems = Vec::new();
        for (name, source) in &sources {
            let added = rewrite::to_minijinja(source).and_then(|source| {
                environment
                    .add_template_owned(name.clone(), source)
                    .map_err(|error| describe(&error))
            });
            if let Err(reason) = added {
                problems.push((name.clone(), reason));
            }
        }
        match problems.is_empty() {
            true => Ok(Self {
                environment,
                sources,
            }),
            false => Err(problems),
        }
    }

    /// The name and the text of each, as it was given.
    pub fn sources(&self) -> &IndexMap<String, String> {
        &self.sources
    }

    /// One of them as minijinja has it, to look at.
    pub fn compiled(&self, name: &str) -> Option<Template<'_, '_>> {
        self.environment.get_template(name).ok()
    }

    /// Whether one of them has generation markers.
    pub fn marks_generation(&self, name: &str) -> bool {
        self.sources
            .get(name)
            .is_some_and(|source| rewrite::marks_generation(source))
    }

    /// The text that `name` makes of `variables`.
    ///
    /// # Errors
    /// The template's own words where it raises them, else the engine's, with the line of the template.
    pub fn render(&self, name: &str, variables: &Map<String, Value>) -> Result<Rendered, String> {
        let markers = Markers::new();
        let mut context: IndexMap<&str, JinjaValue> = variables
            .iter()
            .map(|(name, value)| (name.as_str(), values::of_json(value)))
            .collect();
        context.insert(rewrite::BEGIN, markers.begin.as_str().into());
        context.insert(rewrite::END, markers.end.as_str().into());
        // minijinja may panic over what a template does; a panic must not end a server.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let template = self.environment.get_template(name)?;
            template.render(JinjaValue::from_iter(context))
        }));
        match outcome {
            Ok(Ok(text)) => Ok(markers.cut(text)),
            Ok(Err(error)) => Err(describe(&error)),
            Err(panic) => {
                let text = panic.downcast_ref::<String>().map(String::as_str);
                let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
                Err(format!(
                    "it cannot be rendered: {}",
                    text.unwrap_or("a panic")
                ))
            }
        }
    }
}

fn environment(now: impl Fn() -> SystemTime + Send + Sync + 'static) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_lstrip_blocks(true);
    environment.set_trim_blocks(true);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_formatter(print);
    environment.set_unknown_method_callback(methods::call);
    filters::add(&mut environment);
    environment.add_filter("tojson", tojson::filter);
    environment.add_function(
        "raise_exception",
        |message: JinjaValue| -> Result<JinjaValue, _> {
            Err(python::error(python::text(&message)))
        },
    );
    environment.add_function("strftime_now", move |format: String| {
        time::strftime(now(), &format).map_err(python::error)
    });
    environment
}

fn print(
    out: &mut Output<'_>,
    _: &State<'_, '_>,
    value: &JinjaValue,
) -> Result<(), minijinja::Error> {
    match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&python::text(value)),
    }
    .map_err(|_| python::error("the text cannot be written"))
}

/// The template's own words where it raised them, else the engine's; and the line of the template.
fn describe(error: &minijinja::Error) -> String {
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{detail} (line {line} of the template)"),
        None => detail,
    }
}

/// Texts that stand for the ends of marked ranges while a template is rendered; no conversation can hold them, as they are drawn anew.
struct Markers {
    begin: String,
    end: String,
}

impl Markers {
    fn new() -> Self {
        let drawn = || RandomState::new().build_hasher().finish();
        let (high, low) = (drawn(), drawn());
        Self {
            begin: format!("\u{fdd0}{high:x}{low:x}\u{fdd1}"),
            end: format!("\u{fdd0}{high:x}{low:x}\u{fdd2}"),
        }
    }

    fn cut(&self, text: String) -> Rendered {
        let mut rendered = Rendered::default();
        let mut rest = text.as_str();
        let mut open = Vec::new();
        while let Some(at) = rest.find(&self.begin[..self.begin.len() - '\u{fdd1}'.len_utf8()]) {
            rendered.text.push_str(&rest[..at]);
            rest = &rest[at..];
            if let Some(after) = rest.strip_prefix(&self.begin) {
                open.push(rendered.text.len());
                rest = after;
            } else if let Some(after) = rest.strip_prefix(&self.end) {
                let begin = open.pop().unwrap_or_default();
                rendered.generation.push(begin..rendered.text.len());
                rest = after;
            } else {
                break;
            }
        }
        rendered.text.push_str(rest);
        rendered.generation.sort_by_key(|range| range.start);
        rendered
    }
}
