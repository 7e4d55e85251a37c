//! The thinking effort: maps OpenAI's efforts to the three that chat templates know.

use serde::{Deserialize, Deserializer};

use super::fields::checked;

/// The value of `reasoning_effort`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effort {
    /// No thinking at all.
    Off,
    /// One of the three efforts, by name.
    At(&'static str),
}

impl Effort {
    /// The effort that the chat template gets.
    pub(crate) fn told(self) -> Option<&'static str> {
        match self {
            Self::Off => None,
            Self::At(name) => Some(name),
        }
    }
}

impl<'de> Deserialize<'de> for Effort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let must = "is none, minimal, low, medium, high or xhigh";
        checked(deserializer, must, |value| match value.as_str()? {
            "none" => Some(Self::Off),
            "minimal" | "low" => Some(Self::At("low")),
            "medium" => Some(Self::At("medium")),
            "high" | "xhigh" => Some(Self::At("high")),
            _ => None,
        })
    }
}
