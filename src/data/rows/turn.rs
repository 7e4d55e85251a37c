//! One turn of a conversation: a message of `role` and `content`, or ShareGPT's `from` and `value`.

use serde_json::{Map, Value};

use super::{
    read::Reader,
    row::{Message, Role},
    value::{flag, is_empty, kind, missing_or_wrong, nearest, without_indices},
};

/// Keys that say whether a turn is trained, besides `weight`: axolotl's `train` and `training`, ms-swift's `loss`.
const TRAINED: [&str; 3] = ["train", "training", "loss"];

/// Keys that control which part of a turn is trained, or how much, and that are not supported.
const NOT_FOLLOWED: [&str; 13] = [
    "train_detail",
    "training_detail",
    "loss_mask",
    "loss_scale",
    "loss_weight",
    "mask",
    "masked",
    "trainable",
    "trained",
    "ignore",
    "label",
    "reward",
    "advantage",
];

/// Keys whose values are not text, which a text model cannot read.
pub(super) const MEDIA: [&str; 6] = ["image", "images", "video", "videos", "audio", "audios"];

/// Keys that chat templates know under these names.
const FOR_TEMPLATE: [&str; 5] = [
    "name",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
];

/// Whether chat templates usually know a key of a message.
pub(in crate::data) fn is_for_templates(key: &str) -> bool {
    FOR_TEMPLATE.contains(&key)
}

const NAME_CONVERSATION: &str = "the turns are messages: `fields = { messages = \"conversations\" }` under [data] of run.toml, or `--field messages=conversations` for the data commands; or rename the column to `messages`";

const NAME_TURNS: &str = "the turns are ShareGPT's: `fields = { conversations = \"messages\" }` under [data] of run.toml, or `--field conversations=messages` for the data commands; or rename the column to `conversations`";

/// Roles of other programs, with their names here.
const ROLES_ELSEWHERE: [(&str, &str); 7] = [
    ("developer", "system"),
    ("function", "tool"),
    ("ipython", "tool"),
    ("human", "user"),
    ("model", "assistant"),
    ("bot", "assistant"),
    ("gpt", "assistant"),
];

/// Whether a key says that a turn is trained in the usual way.
fn is_usual(key: &str, value: &Value) -> bool {
    match key {
        "mask" | "masked" | "ignore" => flag(value) == Some(false),
        "trainable" | "trained" | "label" => flag(value) == Some(true),
        _ => false,
    }
}

/// Whether an object lacks the key `name` and has a key that is probably a misspelling of it.
fn misspelt(object: &Map<String, Value>, name: &str) -> bool {
    !object.contains_key(name) && object.keys().any(|key| nearest(key, [name]).is_some())
}

impl Reader<'_> {
    /// Reads the messages of a list. `read` gets the place and the value of each.
    pub(super) fn messages(
        &mut self,
        key: &str,
        read: fn(&mut Self, &str, &Value) -> Option<Message>,
    ) -> Option<Vec<Message>> {
        const FIX: &str = "expected a list of messages";
        let list = match self.object.get(key) {
            Some(Value::Array(list)) if list.is_empty() => {
                return self.refuse(key, "is empty", "expected at least one message");
            }
            Some(Value::Array(list)) => list,
            Some(Value::String(text)) if text.trim_start().starts_with('[') => {
                let fix =
                    "expected a list of messages, not its JSON text: write `json.loads` of it";
                return self.refuse(key, "found a string", fix);
            }
            other => return self.refuse(key, missing_or_wrong(other), FIX),
        };
        let has = |turn: &Value, key: &str| turn.get(key).is_some();
        let is_message = |turn: &Value| has(turn, "role") && !has(turn, "from");
        if key == "conversations" && list.iter().all(is_message) {
            let problem = "its turns have role and content, not from and value";
            return self.refuse(key, problem, NAME_CONVERSATION);
        }
        let is_sharegpt = |turn: &Value| has(turn, "from") && !has(turn, "role");
        if key == "messages" && list.iter().all(is_sharegpt) {
            let problem = "its turns have from and value, not role and content";
            return self.refuse(key, problem, NAME_TURNS);
        }
        let places = list.iter().enumerate();
        // Read all of them first, so that every problem is reported.
        let messages: Vec<_> = places
            .map(|(idx, value)| read(self, &format!("{key}[{idx}]"), value))
            .collect();
        messages.into_iter().collect()
    }

    /// Reads a message of role and content.
    pub(super) fn message(&mut self, at: &str, value: &Value) -> Option<Message> {
        let field = |name: &str| format!("{at}.{name}");
        let Value::Object(object) = value else {
            let found = format!("found {}", kind(value));
            return self.refuse(at, found, "expected an object with role and content");
        };
        let role = match misspelt(object, "role") {
            true => None,
            false => self.role(
                field("role"),
                object.get("role"),
                Role::from_name,
                "expected system, user, assistant or tool",
            ),
        };
        let mut fields = object.clone();
        let trained = self.trained(at, &mut fields);
        self.calls(at, &mut fields);
        let calls_tools = fields
            .get("tool_calls")
            .and_then(Value::as_array)
            .is_some_and(|calls| !calls.is_empty());
        let text = match fields.get("content") {
            Some(Value::Array(parts)) => self.parts(&field("content"), parts),
            None | Some(Value::Null) if calls_tools => Some(String::new()),
            None if misspelt(object, "content") => None,
            other => {
                let fix = "expected a string, or tool_calls in its place";
                self.string(field("content"), other, fix)
            }
        };
        let read = ["role", "content", "tool_calls"];
        self.turn_keys(at, &fields, &read);
        let (trained, must_train) = trained;
        Some(Message {
            role: role?,
            fields,
            text: text?,
            trained,
            must_train,
        })
    }

    /// Reads a ShareGPT turn as a message.
    pub(super) fn turn(&mut self, at: &str, value: &Value) -> Option<Message> {
        let field = |name: &str| format!("{at}.{name}");
        let Value::Object(object) = value else {
            let found = format!("found {}", kind(value));
            return self.refuse(at, found, "expected an object with from and value");
        };
        let mut rest = object.clone();
        let (trained, must_train) = self.trained(at, &mut rest);
        self.turn_keys(at, &rest, &["from", "value"]);
        let (from, said) = (rest.shift_remove("from"), rest.shift_remove("value"));
        let mut message = if from.as_ref().is_some_and(|from| from == "function_call") {
            let calls = self.called(&field("value"), said.as_ref())?;
            let mut message = Message::new(Role::Assistant, "");
            message.fields.insert("tool_calls".to_owned(), calls.into());
            message
        } else {
            let role = match misspelt(object, "from") {
                true => None,
                false => self.role(
                    field("from"),
                    from.as_ref(),
                    Role::from_sharegpt,
                    "expected system, human, gpt or tool (also user, assistant, function_call, observation)",
                ),
            };
            let text = match misspelt(object, "value") {
                true => None,
                false => self.string(field("value"), said.as_ref(), "expected a string"),
            };
            Message::new(role?, text?)
        };
        let known = |(key, value): &(String, Value)| {
            FOR_TEMPLATE.contains(&key.as_str()) && !value.is_null()
        };
        message.fields.extend(rest.into_iter().filter(known));
        (message.trained, message.must_train) = (trained, must_train);
        Some(message)
    }

    /// Whether a turn is trained, and whether the row requires it. Removes the keys that say so from `fields`.
    fn trained(&mut self, at: &str, fields: &mut Map<String, Value>) -> (bool, bool) {
        let mut said: Vec<(&str, bool)> = Vec::new();
        let keys = TRAINED.iter().map(|key| (*key, "expected true or false"));
        for (key, fix) in keys.chain([("weight", "expected 0 or 1")]) {
            match fields.shift_remove(key).filter(|value| !value.is_null()) {
                None => {}
                Some(value) => match flag(&value) {
                    Some(flag) => said.push((key, flag)),
                    None => {
                        let found = format!("found {value}");
                        self.refuse::<()>(format!("{at}.{key}"), found, fix);
                    }
                },
            }
        }
        let trained = said.iter().all(|(_, flag)| *flag);
        if let (Some((yes, _)), false) = (said.iter().find(|(_, flag)| *flag), trained) {
            let no = said
                .iter()
                .find(|(_, flag)| !flag)
                .map_or("", |(key, _)| key);
            let problem = format!("says that the turn is trained, and `{no}` that it is not");
            self.refuse::<()>(format!("{at}.{yes}"), problem, "keep one of them");
        }
        let must_train = said.iter().any(|(key, flag)| *flag && *key != "weight");
        (trained, must_train)
    }

    /// Checks the keys of a turn that nothing has read: each is refused, left to the template, or noted.
    fn turn_keys(&mut self, at: &str, fields: &Map<String, Value>, read: &[&str]) {
        let turn = without_indices(at);
        let is_message = read.contains(&"role");
        for (key, value) in fields {
            let key = key.as_str();
            if read.contains(&key) || is_empty(value) {
                continue;
            }
            if MEDIA.contains(&key) {
                let fix = "only text can be trained; remove it, or leave the row out";
                self.refuse::<()>(format!("{at}.{key}"), "is not text", fix);
            } else if is_usual(key, value) {
                // The key asks for what happens anyway.
            } else if NOT_FOLLOWED.contains(&key) && self.is_training() {
                let fix = "a turn is trained or not: write `\"train\": false` or `\"weight\": 0` beside it, or remove the key";
                let problem = "says what is trained, and is not supported";
                self.refuse::<()>(format!("{at}.{key}"), problem, fix);
            } else if FOR_TEMPLATE.contains(&key) {
                self.note_for_template(format!("{turn}.{key}"));
            } else if let Some(meant) = self.misspelt_turn_key(key, fields, is_message) {
                self.refuse_misspelt(format!("{at}.{key}"), meant);
            } else if is_message {
                self.note_for_template(format!("{turn}.{key}"));
            } else {
                self.note_unread(format!("{turn}.{key}"));
            }
        }
    }

    /// The key that a misspelt one probably means, if the turn lacks it.
    fn misspelt_turn_key(
        &self,
        key: &str,
        fields: &Map<String, Value>,
        is_message: bool,
    ) -> Option<&'static str> {
        let own: &[&str] = match is_message {
            true => &["role", "content", "tool_calls", "function_call"],
            false => &["from", "value"],
        };
        let names = own.iter().chain(&FOR_TEMPLATE).chain(&TRAINED);
        let absent = names.chain(&["weight"]).copied();
        nearest(key, absent.filter(|name| !fields.contains_key(*name)))
    }

    /// Joins OpenAI's content parts to one text. A part that is not text is refused.
    pub(super) fn parts(&mut self, field: &str, parts: &[Value]) -> Option<String> {
        let mut text = String::new();
        for (idx, part) in parts.iter().enumerate() {
            let named = |key: &str| part.get(key).and_then(Value::as_str);
            match (named("type"), named("text")) {
                (Some("text"), Some(part)) => text.push_str(part),
                (part_type, _) => {
                    return self.refuse(
                        format!("{field}[{idx}]"),
                        format!("part of type `{}`", part_type.unwrap_or("unknown")),
                        "only {\"type\": \"text\", \"text\": ...} can be trained",
                    );
                }
            }
            let keys = part.as_object().into_iter().flatten();
            for (key, value) in keys.filter(|(key, _)| !["type", "text"].contains(&key.as_str())) {
                if !is_empty(value) {
                    self.note_unread(format!("{}[].{key}", without_indices(field)));
                }
            }
        }
        Some(text)
    }

    fn role(
        &mut self,
        field: String,
        value: Option<&Value>,
        named: fn(&str) -> Option<Role>,
        fix: &str,
    ) -> Option<Role> {
        let name = self.string(field.clone(), value, fix)?;
        named(&name).or_else(|| {
            let elsewhere = ROLES_ELSEWHERE
                .iter()
                .find(|(known, here)| *known == name && named(here).is_some());
            let fix = match elsewhere {
                Some((_, here)) => format!("{fix}; write \"{here}\" in its place"),
                None => fix.to_owned(),
            };
            self.refuse(field, format!("unknown role \"{name}\""), &fix)
        })
    }
}
