//! Tool calls in the messages of an application. mistral.rs 0.8.1 puts them under a key that no template reads
//! (`RequestBuilder::add_message_with_tool_call`), and keeps their arguments as text, although templates expect an
//! object.

use either::Either;
use indexmap::IndexMap;
use mistralrs_core::MessageContent;
use serde_json::Value;

/// Converts the calls in `messages` to the key and form that templates read.
pub(crate) fn name_as_templates_do(messages: &mut [IndexMap<String, MessageContent>]) {
    for message in messages {
        let Some(Either::Right(mut calls)) = message.shift_remove("function") else {
            continue;
        };
        for call in &mut calls {
            let arguments = call
                .get_mut("function")
                .and_then(|function| function.get_mut("arguments"));
            if let Some(arguments) = arguments
                && let Some(text) = arguments.as_str()
                && let Ok(object @ Value::Object(_)) = serde_json::from_str(text)
            {
                *arguments = object;
            }
        }
        message.insert("tool_calls".to_owned(), Either::Right(calls));
    }
}

#[cfg(test)]
mod tests {
    use mistralrs::{
        CalledFunction, RequestBuilder, RequestLike, RequestMessage, TextMessageRole,
        ToolCallResponse, ToolCallType,
    };

    use super::*;

    #[test]
    fn a_call_is_where_templates_look_for_it() {
        let call = ToolCallResponse {
            index: 0,
            id: "call-1".to_owned(),
            tp: ToolCallType::Function,
            function: CalledFunction {
                name: "count".to_owned(),
                arguments: r#"{"digit":1}"#.to_owned(),
            },
        };
        let mut request = RequestBuilder::new()
            .add_message(TextMessageRole::User, "?")
            .add_message_with_tool_call(TextMessageRole::Assistant, "", vec![call]);
        let RequestMessage::Chat { mut messages, .. } = request.take_messages() else {
            panic!("no conversation");
        };
        name_as_templates_do(&mut messages);
        assert_eq!(messages[0].len(), 2);
        let Some(Either::Right(calls)) = messages[1].get("tool_calls") else {
            panic!("no calls in {messages:?}");
        };
        assert_eq!(calls[0]["function"]["arguments"]["digit"], 1);
        assert_eq!(calls[0]["function"]["name"], "count");
    }
}
