//! Special tokens around a text. mistral.rs 0.8.1 adds them to a rendered conversation, so a conversation whose
//! template already prints the begin token would have two. It does not add them to plain text.

use serde_json::Value;

/// Tokens that a tokenizer puts before and after plain text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct TextFrame {
    pub(crate) prefix: Vec<u32>,
    pub(crate) suffix: Vec<u32>,
}

/// Makes `tokenizer` add nothing to a text and not truncate it.
pub(crate) fn leave_out(tokenizer: &mut Value) {
    for key in ["post_processor", "padding", "truncation"] {
        tokenizer[key] = Value::Null;
    }
}

impl TextFrame {
    /// The tokens that the post-processor of `tokenizer` adds.
    pub(crate) fn of(tokenizer: &Value) -> Self {
        let mut frame = Self::default();
        frame.add(&tokenizer["post_processor"]);
        frame
    }

    fn add(&mut self, processor: &Value) {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match processor["type"].as_str() {
            Some("Sequence") => {
                for inner in processor["processors"].as_array().into_iter().flatten() {
                    self.add(inner);
                }
            }
            Some("TemplateProcessing") => {
                let mut before_text = true;
                for piece in processor["single"].as_array().into_iter().flatten() {
                    before_text &= piece.get("Sequence").is_none();
                    let name = piece["SpecialToken"]["id"].as_str().unwrap_or_default();
                    let ids = processor["special_tokens"][name]["ids"].as_array();
                    let side = match before_text {
                        true => &mut self.prefix,
                        false => &mut self.suffix,
                    };
                    side.extend(ids.into_iter().flatten().filter_map(id));
                }
            }
            Some("BertProcessing" | "RobertaProcessing") => {
                self.prefix.extend(id(&processor["cls"][1]));
                self.suffix.extend(id(&processor["sep"][1]));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_frame_of_plain_text_is_kept() {
        let processor = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "b"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "e"}}],
            "special_tokens": {"b": {"ids": [7]}, "e": {"ids": [8, 9]}}});
        let sequence =
            json!({"type": "Sequence", "processors": [{"type": "ByteLevel"}, processor]});
        let mut tokenizer = json!({"post_processor": sequence, "truncation": {"max_length": 3}});
        let expected = TextFrame {
            prefix: vec![7],
            suffix: vec![8, 9],
        };
        assert_eq!(TextFrame::of(&tokenizer), expected);
        leave_out(&mut tokenizer);
        assert_eq!(TextFrame::of(&tokenizer), TextFrame::default());
        assert!(tokenizer["truncation"].is_null());
    }
}
