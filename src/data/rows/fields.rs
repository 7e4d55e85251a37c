//! The names that a data file gives to the fields of a row.

use indexmap::IndexMap;
use monteclora_converters::Problem;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::value::is_empty;

/// The fields of a row that a file may name differently.
const FIELDS: [&str; 14] = [
    "messages",
    "tools",
    "conversations",
    "system",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "history",
    "text",
    "choices",
    "answer",
    "chat_template_kwargs",
];

/// Maps fields of a row to their names in the file, such as `prompt = "question"`. A field that is not listed keeps its
/// own name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "IndexMap<String, String>")]
pub struct FieldNames(IndexMap<String, String>);

/// The result of renaming the columns of a row.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Renamed {
    /// The fields that the row has under another name.
    pub(super) fields: Vec<String>,
    /// Columns that hold something and were removed because they had the name of such a field.
    pub(super) displaced: Vec<String>,
}

impl TryFrom<IndexMap<String, String>> for FieldNames {
    type Error = String;

    /// Checks a mapping.
    ///
    /// # Errors
    /// Returns a message if a field is unknown, or if two fields have one name.
    fn try_from(names: IndexMap<String, String>) -> Result<Self, String> {
        for (idx, (field, name)) in names.iter().enumerate() {
            if !FIELDS.contains(&field.as_str()) {
                let nearness = |known: &str| strsim::jaro_winkler(known, field);
                let nearest = FIELDS
                    .iter()
                    .max_by(|a, b| nearness(a).total_cmp(&nearness(b)))
                    .filter(|nearest| nearness(nearest) > 0.8)
                    .map_or(String::new(), |nearest| {
                        format!(" (did you mean `{nearest}`?)")
                    });
                return Err(format!(
                    "unknown field `{field}`{nearest}; expected one of {}",
                    FIELDS.join(", ")
                ));
            }
            if let Some((other, _)) = names.iter().take(idx).find(|(_, taken)| *taken == name) {
                return Err(format!(
                    "`{name}` is given for both `{other}` and `{field}`; give each field its own"
                ));
            }
        }
        Ok(Self(names))
    }
}

impl FieldNames {
    /// Whether no field is renamed.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each renamed field with its name in the file.
    pub fn names(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(field, name)| (field.as_str(), name.as_str()))
    }

    /// Renames columns to the fields that they hold. A column that already has the name of such a field is removed.
    pub(super) fn apply(&self, object: &mut Map<String, Value>) -> Renamed {
        let names = self.0.iter();
        let found: Vec<_> = names
            .map(|(field, name)| (field, object.shift_remove(name)))
            .collect();
        let mut renamed = Renamed::default();
        for (field, value) in found {
            let before = match value {
                Some(value) => {
                    renamed.fields.push(field.clone());
                    object.insert(field.clone(), value)
                }
                None => object.shift_remove(field),
            };
            if before.is_some_and(|before| !is_empty(&before)) {
                renamed.displaced.push(field.clone());
            }
        }
        renamed
    }

    /// Restates a problem with the file's names.
    pub(crate) fn in_file_words(&self, mut problem: Problem) -> Problem {
        self.put_in_file_words(&mut problem.at);
        problem
    }

    /// Replaces the field of a place such as `messages[2].role` by the file's name.
    pub(super) fn put_in_file_words(&self, at: &mut String) {
        let end = at.find(['[', '.']).unwrap_or(at.len());
        if let Some(name) = self.0.get(&at[..end]) {
            at.replace_range(..end, name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(pairs: &[(&str, &str)]) -> Result<FieldNames, String> {
        let owned = |(field, name): &(&str, &str)| ((*field).to_owned(), (*name).to_owned());
        FieldNames::try_from(pairs.iter().map(owned).collect::<IndexMap<_, _>>())
    }

    #[test]
    fn fields_take_their_own_names() {
        let names = names(&[("prompt", "question"), ("completion", "prompt")]).expect("good");
        let mut object = serde_json::json!({"prompt": "p", "question": "q", "completion": "c"});
        let object = object.as_object_mut().expect("object");
        let renamed = names.apply(object);
        assert_eq!(renamed.fields, ["prompt", "completion"]);
        // The column that had this name before.
        assert_eq!(renamed.displaced, ["completion"]);
        assert_eq!(
            serde_json::to_value(&*object).expect("JSON"),
            serde_json::json!({"prompt": "q", "completion": "p"})
        );
        let problem = names.in_file_words(Problem::new("row", "completion", "p", "f"));
        assert_eq!(problem.at, "prompt");
    }

    #[test]
    fn bad_mappings_are_refused() {
        assert_eq!(
            names(&[("promt", "q")]).expect_err("unknown"),
            "unknown field `promt` (did you mean `prompt`?); expected one of messages, tools, conversations, system, prompt, completion, instruction, input, output, history, text, choices, answer, chat_template_kwargs"
        );
        assert!(
            names(&[("prompt", "q"), ("completion", "q")])
                .expect_err("twice")
                .contains("both `prompt` and `completion`")
        );
    }
}
