//! Dictionaries and lists that print, compare and answer as Python's do.

use std::fmt;
use std::sync::Arc;

use indexmap::IndexMap;
use minijinja::value::{Enumerator, Object, ObjectRepr};
use minijinja::{Error, State, Value as JinjaValue};
use serde_json::Value;

use super::python;

/// What `dict` has besides its keys: `x.items` is the method, whatever keys there are.
const DICT_METHODS: [&str; 11] = [
    "clear",
    "copy",
    "fromkeys",
    "get",
    "items",
    "keys",
    "pop",
    "popitem",
    "setdefault",
    "update",
    "values",
];

/// A value of a conversation.
pub(super) fn of_json(value: &Value) -> JinjaValue {
    match value {
        Value::Null => JinjaValue::from(()),
        Value::Bool(value) => (*value).into(),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => number.into(),
            (None, Some(number)) => number.into(),
            (None, None) => number.as_f64().unwrap_or(f64::NAN).into(),
        },
        Value::String(text) => text.as_str().into(),
        Value::Array(list) => list_of(list.iter().map(of_json).collect()),
        Value::Object(map) => {
            let entries = map.iter().map(|(key, value)| (key.clone(), of_json(value)));
            JinjaValue::from_object(Dict(entries.collect()))
        }
    }
}

/// A list.
pub(super) fn list_of(items: Vec<JinjaValue>) -> JinjaValue {
    JinjaValue::from_object(List {
        items,
        is_tuple: false,
    })
}

/// A tuple.
pub(super) fn tuple_of(items: Vec<JinjaValue>) -> JinjaValue {
    JinjaValue::from_object(List {
        items,
        is_tuple: true,
    })
}

/// What can be gone through and is no list: a generator, which is always true and has no length, or a view of a dictionary.
pub(super) fn view_of(items: Vec<JinjaValue>, is_generator: bool) -> JinjaValue {
    JinjaValue::from_object(View {
        items,
        is_generator,
    })
}

/// Whether a value is a generator or a view of a dictionary; the former have no length.
pub(super) fn view(value: &JinjaValue) -> Option<&View> {
    value.downcast_object_ref()
}

#[derive(Debug)]
struct List {
    items: Vec<JinjaValue>,
    is_tuple: bool,
}

impl Object for List {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }

    fn get_value(self: &Arc<Self>, key: &JinjaValue) -> Option<JinjaValue> {
        self.items.get(key.as_usize()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.items.len())
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&match self.is_tuple {
            true => python::repr_of_tuple(self.items.iter()),
            false => python::repr_of_list(self.items.iter()),
        })
    }
}

#[derive(Debug)]
pub(super) struct View {
    items: Vec<JinjaValue>,
    pub(super) is_generator: bool,
}

impl Object for View {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Iterable
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.items.clone())
    }

    fn is_true(self: &Arc<Self>) -> bool {
        self.is_generator || !self.items.is_empty()
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.is_generator {
            true => f.write_str("<generator object>"),
            false => write!(f, "dict_view({})", python::repr_of_list(self.items.iter())),
        }
    }
}

/// `value['key']` where `key` may be the name of a method: the key comes first, then the method.
pub(super) fn item(value: &JinjaValue, key: &str) -> Result<JinjaValue, Error> {
    let found = value.get_item(&key.into())?;
    Ok(match value.downcast_object_ref::<Dict>() {
        Some(_) if found.is_undefined() => value.get_attr(key)?,
        _ => found,
    })
}

/// Whether a list or a view writes itself as Python does.
pub(super) fn writes_itself(value: &JinjaValue) -> bool {
    value.downcast_object_ref::<List>().is_some() || view(value).is_some()
}

/// Whether `key` is the name of a method of dictionaries.
pub(super) fn is_method(key: &str) -> bool {
    DICT_METHODS.contains(&key)
}

#[derive(Debug)]
struct Dict(IndexMap<String, JinjaValue>);

impl Object for Dict {
    fn get_value(self: &Arc<Self>, key: &JinjaValue) -> Option<JinjaValue> {
        self.0.get(key.as_str()?).cloned()
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<JinjaValue> {
        match DICT_METHODS.iter().find(|name| **name == key) {
            Some(name) => Some(JinjaValue::from_object(Method(name))),
            None => self.0.get(key).cloned(),
        }
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        let keys: Vec<JinjaValue> = self.0.keys().map(|key| key.as_str().into()).collect();
        Enumerator::Values(keys)
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.0.len())
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.0.iter();
        f.write_str(&python::repr_of_dict(entries.map(|(key, value)| {
            (JinjaValue::from(key.as_str()), value.clone())
        })))
    }
}

/// A method that is named and not called.
#[derive(Debug)]
struct Method(&'static str);

impl Object for Method {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, _: &State<'_, '_>, _: &[JinjaValue]) -> Result<JinjaValue, Error> {
        Err(python::error(format!(
            "`{}` is called apart from its dictionary",
            self.0
        )))
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<built-in method {} of dict object>", self.0)
    }
}
