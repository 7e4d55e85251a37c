//! Variables of chat templates that mistral.rs 0.8.1 sets or omits differently from transformers.

use serde_json::Value;

/// Makes every text of `template` see the variables of transformers.
///
/// mistral.rs defines `date_string` in its own format, whereas transformers leaves it to the template's default.
/// mistral.rs defines no `eos_token` for a model without one, where transformers prints nothing.
pub(crate) fn keep_to_transformers(template: &mut Value, has_eos: bool) {
    match template {
        Value::String(text) => {
            *text = text.replace("date_string", "model_date_string");
            if !has_eos {
                text.insert_str(0, "{% set eos_token = '' %}");
            }
        }
        Value::Array(named) => {
            for entry in named {
                keep_to_transformers(&mut entry["template"], has_eos);
            }
        }
        _ => {}
    }
}
