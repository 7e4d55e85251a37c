//! Shapes that are not those of config.json, and the key that explains them.

use std::collections::BTreeMap;

use super::{Comparison, HEAD, in_more_layers, pattern};
use crate::architecture::{ModelShape, Role, entry, with_entry};
use crate::problem::Problem;

/// Tensors whose shapes disagree, by pattern, shape expected and shape found.
type Groups<'a> = BTreeMap<(&'a str, &'a [usize], &'a [usize]), Vec<&'a str>>;

impl Comparison<'_> {
    /// Shapes that disagree, those with one cause together.
    pub(super) fn shapes(&self) -> Vec<Problem> {
        let mut groups = Groups::new();
        for (name, expected) in &self.expected {
            if let Some((_, found)) = self.files.info(name)
                && found != expected
            {
                let key = (pattern(name), expected.as_slice(), found);
                groups.entry(key).or_default().push(name);
            }
        }
        if let Some(problem) = self.one_size(&groups) {
            return vec![problem];
        }
        let mut problems = Vec::new();
        for ((_, expected, found), names) in &groups {
            let message = format!(
                "{found:?} in `{}`{}, where config.json gives {expected:?}",
                self.files.file_of(names[0]),
                in_more_layers(names.len())
            );
            let fix = match names[0] == HEAD || names[0] == self.files.embedding() {
                true => "resize it to vocab_size, or correct vocab_size in config.json",
                false => "use the config.json that the weights were saved with",
            };
            problems.push(Problem::new("shape", names[0], message, fix));
        }
        problems
    }

    /// One problem for all shapes that disagree, if one key of config.json with another value makes them right.
    fn one_size(&self, groups: &Groups<'_>) -> Option<Problem> {
        let (first, n_more) = (
            groups.values().flatten().next()?,
            groups.values().flatten().count() - 1,
        );
        let shape = self.shape;
        let size = |name: &str, dim: usize| self.files.info(name)?.1.get(dim).copied();
        let rows = |role: Role| {
            let mut projections = shape.family.projections.iter();
            let projection = projections.find(|projection| projection.parts == [role])?;
            size(&format!("{}.{}.weight", shape.block(0), projection.name), 0)
        };
        let heads = |role| Some(rows(role)? / shape.head_dim);
        let embedding = self.files.embedding();
        let keys = [
            ("vocab_size", shape.vocab_size, size(&embedding, 0)),
            ("hidden_size", shape.hidden_size, size(&embedding, 1)),
            (
                "intermediate_size",
                shape.intermediate_size,
                rows(Role::Gate),
            ),
            (
                "num_key_value_heads",
                shape.num_key_value_heads,
                heads(Role::Key),
            ),
            (
                "num_attention_heads",
                shape.num_attention_heads,
                heads(Role::Query),
            ),
            (
                "head_dim",
                shape.head_dim,
                rows(Role::Query).map(|rows| rows / shape.num_attention_heads),
            ),
        ];
        let makes_right = |key: &str, value: usize| {
            let config = with_entry(self.files.config(), key, value.into());
            ModelShape::layout(&config).is_ok_and(|shape| {
                let mut tensors = shape.tensors().into_iter();
                tensors.all(|tensor| {
                    let info = self.files.info(&tensor.name);
                    info.is_none_or(|(_, found)| found == tensor.shape)
                })
            })
        };
        let (key, now, found) = keys
            .into_iter()
            .filter_map(|(key, now, found)| Some((key, now, found?)))
            .find(|(key, now, found)| now != found && makes_right(key, *found))?;
        let (at, value) = entry(self.files.config(), key);
        let says = match value {
            Some(value) if !value.is_null() => format!("is {value}"),
            _ => format!("is not given, which means {now}"),
        };
        let more = match n_more {
            0 => format!("`{first}` is of"),
            n => format!("`{first}` and {n} more tensors are of"),
        };
        let message = format!("{says}, but {more} {found}");
        let fix = format!(
            "set \"{key}\": {found} in config.json, or use the weights that it was made for"
        );
        Some(Problem::new("shape", at, message, fix))
    }
}
