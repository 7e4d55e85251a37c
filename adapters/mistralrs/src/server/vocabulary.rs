//! A model's tokens as bytes, and the grammars that constrain its answers.

use std::sync::{Arc, OnceLock};

use mistralrs_core::llguidance::api::TopLevelGrammar;
use mistralrs_core::llguidance::toktrie::{TokEnv, TokEnvWithTrie};
use mistralrs_core::llguidance::{Matcher, ParserFactory};
use mistralrs_core::{Constraint, Pipeline};
use parking_lot::Mutex;
use tokenizers::Tokenizer;

use crate::error::{Error, Result};

/// White space that JSON may have between its parts: a space, or a new line with its indentation. Without a bound, a
/// small model may generate only white space up to its limit.
const JSON_WHITE_SPACE: &str = r"[ ]|\r?\n[ \t]{0,16}";

/// The tokens of a loaded model.
pub(crate) struct ModelTokens {
    /// Tokens that end an answer.
    pub(crate) end_tokens: Vec<u32>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) vocabulary: Arc<Vocabulary>,
}

impl ModelTokens {
    pub(crate) fn of(model: &(dyn Pipeline + Send + Sync)) -> Result<Self> {
        let metadata = model.get_metadata();
        let missing = || Error::Engine("the model came without a tokenizer".to_owned());
        let theirs = metadata.tok_env().ok_or_else(missing)?;
        Ok(Self {
            tokenizer: model.tokenizer().ok_or_else(missing)?,
            vocabulary: Arc::new(Vocabulary::new(theirs, &metadata.eos_tok)),
            end_tokens: metadata.eos_tok.clone(),
        })
    }
}

/// The vocabulary of one model, with the model's own end tokens.
///
/// mistral.rs gives its grammars the end token that llguidance finds by its text, such as `<|endoftext|>`. The model
/// may have another (`<|im_end|>`); the answer would then continue after the last brace. The end tokens here are those
/// of the engine, from `generation_config.json`, `tokenizer_config.json` and `config.json`.
pub(crate) struct Vocabulary {
    env: TokEnv,
    /// Made for the first grammar, because a large vocabulary takes a considerable part of a second.
    factory: OnceLock<std::result::Result<ParserFactory, String>>,
}

impl Vocabulary {
    /// Takes the vocabulary of mistral.rs and replaces its end token by `end_tokens`.
    pub(crate) fn new(theirs: TokEnv, end_tokens: &[u32]) -> Self {
        let trie = theirs.tok_trie();
        let mut ends = end_tokens.to_vec();
        ends.retain(|token| usize::try_from(*token).is_ok_and(|token| token < trie.vocab_size()));
        let env = match &ends[..] {
            [] => theirs,
            ends => {
                let trie = trie.with_eos_tokens(ends);
                Arc::new(TokEnvWithTrie::new(theirs, trie))
            }
        };
        Self {
            env,
            factory: OnceLock::new(),
        }
    }

    fn factory(&self) -> std::result::Result<&ParserFactory, String> {
        let make = || {
            let mut factory = ParserFactory::new_simple(&self.env)?;
            factory.quiet();
            anyhow::Ok(factory)
        };
        let made = self
            .factory
            .get_or_init(|| make().map_err(|error| error.to_string()));
        made.as_ref().map_err(String::clone)
    }

    /// Compiles `constraint` to a matcher. This may take a while, so it must not run on a thread that serves requests.
    ///
    /// # Errors
    /// Returns what is wrong with the grammar.
    pub(crate) fn compile(&self, constraint: &Constraint) -> Result<Option<Matcher>, String> {
        let grammar = match constraint {
            Constraint::None => return Ok(None),
            Constraint::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Constraint::Lark(lark) => TopLevelGrammar::from_lark(lark.clone()),
            Constraint::JsonSchema(schema) => {
                TopLevelGrammar::from_json_schema(with_bounded_white_space(schema))
            }
            Constraint::Llguidance(grammar) => grammar.clone(),
        };
        let parser = self.factory()?.create_parser(grammar);
        let parser = parser.map_err(|error| error.to_string())?;
        let mut matcher = Matcher::new(Ok(parser));
        // Some faults, such as a rule that never ends, appear only at the first step.
        let mask = matcher.compute_mask().map_err(|error| error.to_string())?;
        if mask.is_zero() {
            return Err("no text of this model's vocabulary fits it".to_owned());
        }
        Ok(Some(matcher))
    }

    /// The bytes of `token`; for a special token, the bytes of its name.
    pub(crate) fn bytes(&self, token: u32) -> Vec<u8> {
        self.env.tok_trie().decode_ext(&[token], true)
    }

    /// The bytes that `token` adds to a text; none for a special token.
    pub(crate) fn text_bytes(&self, token: u32) -> Vec<u8> {
        self.env.tok_trie().decode_ext(&[token], false)
    }
}

fn with_bounded_white_space(schema: &serde_json::Value) -> serde_json::Value {
    let mut schema = schema.clone();
    if let Some(fields) = schema.as_object_mut() {
        let bounded = serde_json::json!({"whitespace_pattern": JSON_WHITE_SPACE});
        fields.entry("x-guidance").or_insert(bounded);
    }
    schema
}

/// The state of a grammar in one answer.
pub(crate) struct Held {
    matcher: Mutex<Matcher>,
    /// Number of tokens of the answer that the matcher has consumed.
    n_seen: Mutex<usize>,
}

impl Held {
    /// Starts the grammar at the beginning of an answer; each answer needs its own.
    pub(crate) fn new(matcher: &Matcher) -> Self {
        Self {
            matcher: Mutex::new(matcher.deep_clone()),
            n_seen: Mutex::new(0),
        }
    }

    /// Sets the logits of tokens that must not follow `answer` to minus infinity. Returns false if the answer is
    /// complete or can only end.
    ///
    /// # Errors
    /// Returns the fault that stopped the grammar.
    pub(crate) fn mask(&self, answer: &[u32], logits: &mut [f32]) -> Result<bool, String> {
        let mut matcher = self.matcher.lock();
        let mut n_seen = self.n_seen.lock();
        let new = answer.get(*n_seen..).unwrap_or_default();
        if matcher.is_stopped() {
            return Ok(false);
        }
        if !new.is_empty() {
            matcher
                .consume_tokens(new)
                .map_err(|error| error.to_string())?;
            *n_seen = answer.len();
        }
        if matcher.is_stopped() {
            return Ok(false);
        }
        let mask = matcher.compute_mask().map_err(|error| error.to_string())?;
        for (token, logit) in (0u32..).zip(logits.iter_mut()) {
            let within = usize::try_from(token).is_ok_and(|token| token < mask.len());
            if !(within && mask.is_allowed(token)) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use mistralrs_core::llguidance::toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie};
    use serde_json::json;

    use super::*;

    /// A vocabulary of printable characters, space and line feed, with two tokens that look like end tokens.
    /// `<|endoftext|>`, which llguidance takes as the end, has the id 0; `<|im_end|>` has the id 1.
    pub(crate) fn two_ends(end_tokens: &[u32]) -> Vocabulary {
        let special = |name: &str| [&[TokTrie::SPECIAL_TOKEN_MARKER], name.as_bytes()].concat();
        let ends = ["<|endoftext|>", "<|im_end|>"].map(special);
        let characters = (b'!'..=b'~').chain(*b" \n").map(|byte| vec![byte]);
        let words: Vec<Vec<u8>> = ends.into_iter().chain(characters).collect();
        let n_words = u32::try_from(words.len()).expect("a small vocabulary");
        let trie = TokTrie::from(&TokRxInfo::new(n_words, 0), &words);
        Vocabulary::new(Arc::new(ApproximateTokEnv::new(trie)), end_tokens)
    }

    pub(crate) fn ids(vocabulary: &Vocabulary, text: &str) -> Vec<u32> {
        vocabulary.env.tokenize(text)
    }

    /// The tokens that may follow `answer`; none if it is complete.
    fn after(held: &Held, answer: &[u32]) -> Option<Vec<u32>> {
        let mut logits = vec![0f32; 98];
        let goes_on = held.mask(answer, &mut logits).expect("sound");
        let kept = (0u32..).zip(logits).filter(|(_, logit)| *logit == 0.0);
        goes_on.then(|| kept.map(|(token, _)| token).collect())
    }

    #[test]
    fn a_grammar_ends_with_the_models_own_tokens() {
        for ends in [&[0u32][..], &[1], &[1, 0]] {
            let vocabulary = two_ends(ends);
            let compiled = vocabulary.compile(&Constraint::Regex("ab*".to_owned()));
            let held = Held::new(&compiled.expect("sound").expect("a grammar"));
            assert_eq!(after(&held, &[]), Some(ids(&vocabulary, "a")));
            let mut expected = [ids(&vocabulary, "b"), ends.to_vec()].concat();
            expected.sort_unstable();
            assert_eq!(after(&held, &ids(&vocabulary, "a")), Some(expected));
        }
        let vocabulary = two_ends(&[1]);
        let schema = Constraint::JsonSchema(json!({"const": 1}));
        let held = Held::new(
            &vocabulary
                .compile(&schema)
                .expect("sound")
                .expect("a grammar"),
        );
        // The only matching text is complete: the answer ends without an end token.
        assert_eq!(after(&held, &ids(&vocabulary, "1")), None);
    }

    #[test]
    fn answers_of_one_grammar_do_not_mix() {
        let vocabulary = two_ends(&[1]);
        let matcher = vocabulary.compile(&Constraint::Regex("ab|cd".to_owned()));
        let matcher = matcher.expect("sound").expect("a grammar");
        let (first, second) = (Held::new(&matcher), Held::new(&matcher));
        assert_eq!(
            after(&first, &ids(&vocabulary, "a")),
            Some(ids(&vocabulary, "b"))
        );
        assert_eq!(
            after(&second, &ids(&vocabulary, "c")),
            Some(ids(&vocabulary, "d"))
        );
    }

    #[test]
    fn white_space_between_parts_of_json_is_bounded() {
        let vocabulary = two_ends(&[1]);
        let schema = Constraint::JsonSchema(json!({"type": "array", "items": {"const": 1}}));
        let matcher = vocabulary
            .compile(&schema)
            .expect("sound")
            .expect("a grammar");
        let [line, space] = ["\n", " "].map(|text| ids(&vocabulary, text)[0]);
        let may_follow = |text: &str, token: u32| {
            let next = after(&Held::new(&matcher), &ids(&vocabulary, text));
            next.is_some_and(|next| next.contains(&token))
        };
        for (text, token, may) in [
            ("[", line, true),
            ("[", space, true),
            ("[\n", line, false),
            ("[ ", space, false),
            ("[\n    ", space, true),
            ("[\n                ", space, false),
        ] {
            assert_eq!(may_follow(text, token), may, "{text:?}");
        }
        let answer = ids(&vocabulary, "[\n  1,\n  1\n]");
        assert_eq!(
            after(&Held::new(&matcher), &answer),
            None,
            "an ordinary layout"
        );
    }

    #[test]
    fn what_is_wrong_with_a_grammar_is_said() {
        let vocabulary = two_ends(&[1]);
        for (idx, wrong) in [
            Constraint::Lark("start: start".to_owned()),
            Constraint::Lark("start: (".to_owned()),
            Constraint::Regex("(".to_owned()),
            Constraint::JsonSchema(json!({"type": "nothing"})),
            Constraint::JsonSchema(json!({"$ref": "#/nowhere"})),
        ]
        .into_iter()
        .enumerate()
        {
            let message = vocabulary.compile(&wrong).err();
            let message = message.unwrap_or_else(|| panic!("grammar {idx} is taken"));
            assert!(!message.is_empty(), "grammar {idx}");
        }
    }
}
