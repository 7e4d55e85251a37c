//! Jinja2's filters, tests and functions, where minijinja's are others.

mod numbers;
mod texts;

use std::borrow::Cow;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, State, Value, filters};
use minijinja_contrib::globals::{cycler, joiner};

use super::{python, values};

/// The longest range that Jinja2's sandbox allows.
const MOST_RANGE: usize = 100_000;

pub(super) fn add(environment: &mut Environment<'_>) {
    environment.add_filter("looped", looped);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("join", join);
    environment.add_filter("list", list);
    environment.add_filter("reverse", reverse);
    environment.add_filter("items", |value: &Value| {
        Ok::<_, Error>(values::view_of(pairs(value)?, true))
    });
    environment.add_filter("dictsort", dictsort);
    environment.add_filter(
        "map",
        |state: &State<'_, '_>, value: Value, args: Rest<Value>| {
            Ok::<_, Error>(values::view_of(filters::map(state, value, args)?, true))
        },
    );
    add_selections(environment);
    texts::add(environment);
    numbers::add(environment);
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
    environment.add_test("mapping", |value: &Value| value.kind() == ValueKind::Map);
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    environment.add_function("range", range);
    environment.add_function("cycler", |items: Rest<Value>| cycler(items.0));
    environment.add_function("joiner", joiner);
}

/// What Jinja2 returns as generators.
fn add_selections(environment: &mut Environment<'_>) {
    type Name<'a> = Option<Cow<'a, str>>;
    environment.add_filter(
        "select",
        |state: &State<'_, '_>, value: Value, test: Name<'_>, args: Rest<Value>| {
            let items = filters::select(state, value, test, args)?;
            Ok::<_, Error>(values::view_of(items, true))
        },
    );
    environment.add_filter(
        "reject",
        |state: &State<'_, '_>, value: Value, test: Name<'_>, args: Rest<Value>| {
            let items = filters::reject(state, value, test, args)?;
            Ok::<_, Error>(values::view_of(items, true))
        },
    );
    environment.add_filter(
        "selectattr",
        |state: &State<'_, '_>,
         value: Value,
         name: Cow<'_, str>,
         test: Name<'_>,
         args: Rest<Value>| {
            let items = filters::selectattr(state, value, name, test, args)?;
            Ok::<_, Error>(values::view_of(items, true))
        },
    );
    environment.add_filter(
        "rejectattr",
        |state: &State<'_, '_>,
         value: Value,
         name: Cow<'_, str>,
         test: Name<'_>,
         args: Rest<Value>| {
            let items = filters::rejectattr(state, value, name, test, args)?;
            Ok::<_, Error>(values::view_of(items, true))
        },
    );
    environment.add_filter(
        "unique",
        |state: &State<'_, '_>, value: Value, kwargs: Kwargs| {
            let items = filters::unique(state, value, kwargs)?.try_iter()?;
            Ok::<_, Error>(values::view_of(items.collect(), true))
        },
    );
}

/// What a loop goes over: none is no list, as in Python.
fn looped(value: Value) -> Result<Value, Error> {
    if value.is_none() {
        return Err(python::error("'NoneType' object is not iterable"));
    }
    // minijinja does not know the last character of a text.
    match value.as_str() {
        Some(text) => Ok(values::list_of(text.chars().map(Value::from).collect())),
        None => Ok(value),
    }
}

fn length(value: &Value) -> Result<usize, Error> {
    if values::view(value).is_some_and(|view| view.is_generator) {
        return Err(python::error("a generator has no len()"));
    }
    match value.len() {
        Some(n) => Ok(n),
        None if value.is_undefined() => Ok(0),
        None if value.kind() == ValueKind::Iterable => Ok(value.try_iter()?.count()),
        None => Err(python::error(format!(
            "object of type {} has no len()",
            value.kind()
        ))),
    }
}

fn default(
    value: Value,
    other: Option<Value>,
    rest: Rest<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let named: Option<Value> = kwargs.get("boolean")?;
    let other = other.or(kwargs.get("default_value")?);
    kwargs.assert_all_used()?;
    let by_truth = named.or_else(|| rest.first().cloned());
    let by_truth = by_truth.is_some_and(|value| value.is_true());
    Ok(match value.is_undefined() || by_truth && !value.is_true() {
        true => other.unwrap_or_else(|| Value::from("")),
        false => value,
    })
}

fn join(value: &Value, separator: Option<&Value>, kwargs: Kwargs) -> Result<String, Error> {
    let separator = match separator {
        Some(separator) => python::text(separator),
        None => kwargs.get::<Option<String>>("d")?.unwrap_or_default(),
    };
    let attribute: Option<String> = kwargs.get("attribute")?;
    kwargs.assert_all_used()?;
    if value.is_none() {
        return Err(python::error("'NoneType' object is not iterable"));
    }
    let mut texts = Vec::new();
    for item in value.try_iter()? {
        texts.push(match &attribute {
            Some(name) => python::text(&item.get_item(&Value::from(name.as_str()))?),
            None => python::text(&item),
        });
    }
    Ok(texts.join(&separator))
}

fn list(value: &Value) -> Result<Value, Error> {
    match value.is_none() {
        true => Err(python::error("'NoneType' object is not iterable")),
        false => Ok(values::list_of(value.try_iter()?.collect())),
    }
}

fn pairs(value: &Value) -> Result<Vec<Value>, Error> {
    if value.is_undefined() {
        return Ok(Vec::new());
    }
    let pairs = match value.kind() {
        ValueKind::Map => value.as_object().and_then(|map| map.try_iter_pairs()),
        _ => None,
    };
    let pairs = pairs.ok_or_else(|| python::error("can only get item pairs from a mapping"))?;
    Ok(pairs
        .map(|(key, value)| values::tuple_of(vec![key, value]))
        .collect())
}

fn dictsort(value: &Value, kwargs: Kwargs) -> Result<Value, Error> {
    let sorted = filters::dictsort(value, kwargs)?;
    let pairs = sorted.try_iter()?.map(|pair| {
        let pair = pair.try_iter()?.collect();
        Ok(values::tuple_of(pair))
    });
    Ok(values::list_of(pairs.collect::<Result<_, Error>>()?))
}

fn reverse(value: &Value) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.chars().rev().collect::<String>().into());
    }
    if value.is_none() {
        return Err(python::error("argument must be iterable"));
    }
    let mut items: Vec<Value> = value.try_iter()?.collect();
    items.reverse();
    Ok(values::view_of(items, true))
}

/// Texts and dictionaries have a length and items, too.
fn is_sequence(value: &Value) -> bool {
    matches!(
        value.kind(),
        ValueKind::Seq
            | ValueKind::Iterable
            | ValueKind::Map
            | ValueKind::String
            | ValueKind::Undefined
    ) && values::view(value).is_none()
}

fn is_iterable(value: &Value) -> bool {
    is_sequence(value) || values::view(value).is_some()
}

fn range(first: i64, second: Option<i64>, step: Option<i64>) -> Result<Value, Error> {
    let (start, stop) = match second {
        Some(stop) => (first, stop),
        None => (0, first),
    };
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(python::error("range() arg 3 must not be zero"));
    }
    let mut numbers = Vec::new();
    let mut at = start;
    while if step > 0 { at < stop } else { at > stop } {
        if numbers.len() == MOST_RANGE {
            return Err(python::error(format!(
                "range: more than {MOST_RANGE} numbers"
            )));
        }
        numbers.push(Value::from(at));
        let Some(next) = at.checked_add(step) else {
            break;
        };
        at = next;
    }
    Ok(values::list_of(numbers))
}
