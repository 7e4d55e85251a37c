//! Filters of numbers.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, Value};

use crate::jinja::python;

pub(super) fn add(environment: &mut Environment<'_>) {
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("round", round);
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
}

/// What is no number becomes `default`, or 0.
fn int(
    value: &Value,
    default: Option<Value>,
    base: Option<u32>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let default = default.or(kwargs.get("default")?);
    let base = base.or(kwargs.get("base")?).unwrap_or(10);
    kwargs.assert_all_used()?;
    if !(2..=36).contains(&base) {
        return Err(python::error("int: a base from 2 to 36"));
    }
    let number = match value.as_str() {
        Some(text) => i64::from_str_radix(text.trim(), base)
            .ok()
            .or_else(|| truncated(text.trim().parse().ok()?)),
        None if value.kind() == ValueKind::Bool => Some(i64::from(value.is_true())),
        None if value.is_integer() => return Ok(value.clone()),
        None => f64::try_from(value.clone()).ok().and_then(truncated),
    };
    Ok(match number {
        Some(number) => number.into(),
        None => default.unwrap_or_else(|| Value::from(0)),
    })
}

fn truncated(number: f64) -> Option<i64> {
    #[expect(clippy::cast_possible_truncation, reason = "only within the range")]
    (number.abs() < 9e18).then_some(number as i64)
}

/// What is no number becomes `default`, or 0.0.
fn float(value: &Value, default: Option<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = default.or(kwargs.get("default")?);
    kwargs.assert_all_used()?;
    let number = match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        None => f64::try_from(value.clone()).ok(),
    };
    Ok(match number {
        Some(number) => number.into(),
        None => default.unwrap_or_else(|| Value::from(0.0)),
    })
}

/// `round(precision=0, method='common')`: half to even, as in Python.
fn round(
    value: Value,
    precision: Option<i32>,
    method: Option<String>,
    kwargs: Kwargs,
) -> Result<f64, Error> {
    let precision = precision.or(kwargs.get("precision")?).unwrap_or(0);
    let method = method.or(kwargs.get("method")?);
    kwargs.assert_all_used()?;
    let number = f64::try_from(value)?;
    let scale = 10_f64.powi(precision);
    Ok(match method.as_deref().unwrap_or("common") {
        "ceil" => (number * scale).ceil() / scale,
        "floor" => (number * scale).floor() / scale,
        "common" => match usize::try_from(precision) {
            // The decimal digits that are written are those of the number itself, as Python rounds it.
            Ok(digits) => format!("{number:.digits$}").parse().unwrap_or(number),
            Err(_) => (number * scale).round_ties_even() / scale,
        },
        _ => return Err(python::error("round: method is common, ceil or floor")),
    })
}
