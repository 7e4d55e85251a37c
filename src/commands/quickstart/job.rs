//! The files that `quickstart` writes: rows, run.toml and serve.toml. With them every step can be repeated by hand.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use monteclora_converters::Problem;
use serde_json::{Value, json};

use crate::data::{Message, Role};
use crate::eval::Opening;
use crate::sample_models::Recipe;

use super::MAX_NEW_TOKENS;

const SPLITS: [(&str, &str); 3] = [
    (
        "train",
        include_str!("../../../examples/tickets/train.jsonl"),
    ),
    (
        "valid",
        include_str!("../../../examples/tickets/valid.jsonl"),
    ),
    ("test", include_str!("../../../examples/tickets/test.jsonl")),
];

/// An invented ticket about a product that is not in the training data. It shows the confidence on an unknown topic.
pub(super) const TICKET: &str = "my tablet will not turn on and i need it today";

/// Name of the run's configuration file in the output directory.
pub(super) const RUN: &str = "run.toml";

/// The instruction for all tickets.
const INSTRUCTION: &str =
    "Sort the support ticket. Answer with one line of JSON: category, priority, product.";

/// The form of the questions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Conversations, which the model's chat template renders.
    Conversations,
    /// Plain prompts, for a model without a chat template.
    Prompts,
}

/// The model to train and its settings.
pub(super) struct Job<'a> {
    /// The base model's directory.
    pub base: &'a Path,
    /// The base model's name in serve.toml.
    pub name: &'a str,
    pub form: Form,
    pub recipe: Recipe,
}

/// The paths of all files.
pub(super) struct Paths {
    pub data: PathBuf,
    pub adapter: PathBuf,
    pub collapsed: PathBuf,
    pub gguf: PathBuf,
    /// The adapter with the fitted posterior.
    pub posterior: PathBuf,
    pub run: PathBuf,
    pub serve: PathBuf,
}

impl Form {
    /// Converts the rows of a split from conversations to this form.
    fn rows(self, conversations: &str) -> Result<String> {
        if self == Self::Conversations {
            return Ok(conversations.to_owned());
        }
        let mut rows = String::new();
        for line in conversations.lines() {
            let row: Value = serde_json::from_str(line).context("a bundled ticket is no JSON")?;
            let text = |turn: usize| {
                let content = row["messages"][turn]["content"].as_str();
                content.context("a bundled ticket has not three turns")
            };
            let row = json!({
                "prompt": prompt(text(0)?, text(1)?),
                "completion": format!(" {}", text(2)?),
            });
            rows.push_str(&format!("{row}\n"));
        }
        Ok(rows)
    }

    /// [`TICKET`] as a question in this form.
    pub(super) fn question(self) -> Opening {
        match self {
            Self::Conversations => self.asked(TICKET),
            Self::Prompts => self.asked(&prompt(INSTRUCTION, TICKET)),
        }
    }

    /// The question with `text` as the user's turn of a conversation, or as the whole prompt.
    pub(super) fn asked(self, text: &str) -> Opening {
        match self {
            Self::Conversations => {
                let turns = [(Role::System, INSTRUCTION), (Role::User, text)];
                Opening::Turns(turns.map(|(role, text)| Message::new(role, text)).into())
            }
            Self::Prompts => Opening::Text(text.to_owned()),
        }
    }

    /// The first test ticket: the user's turn, or the whole prompt.
    fn known(self) -> Result<String> {
        let (_, rows) = SPLITS[2];
        let rows = self.rows(rows)?;
        let row = rows.lines().next().context("no bundled ticket")?;
        let row: Value = serde_json::from_str(row).context("a bundled ticket is no JSON")?;
        let asked = match self {
            Self::Conversations => &row["messages"][1]["content"],
            Self::Prompts => &row["prompt"],
        };
        Ok(asked
            .as_str()
            .context("a bundled ticket asks nothing")?
            .to_owned())
    }

    /// The example questions of the server's page, as tables of serve.toml.
    fn examples(self) -> Result<String> {
        let system = match self {
            Self::Conversations => format!("system = {}\n", toml::Value::from(INSTRUCTION)),
            Self::Prompts => String::new(),
        };
        let titles = [
            ("A ticket like those it learned", self.known()?),
            (
                "A ticket about something it has never seen",
                self.question().text().to_owned(),
            ),
        ];
        Ok(titles
            .map(|(title, question)| {
                format!(
                    "[[server.examples]]\ntitle = {}\n{system}question = {}\nmax_tokens = {MAX_NEW_TOKENS}\n\n",
                    toml::Value::from(title),
                    toml::Value::from(question)
                )
            })
            .concat())
    }

    /// The path of the endpoint for this form, and the body of a request.
    pub(super) fn request(self, model: &str, max_tokens: usize) -> (&'static str, Value) {
        match self.question() {
            Opening::Turns(turns) => {
                let messages: Vec<_> = turns.iter().map(|turn| turn.fields().clone()).collect();
                let body = json!({"model": model, "temperature": 0, "messages": messages});
                ("/v1/chat/completions", body)
            }
            Opening::Text(prompt) => {
                let body = json!({"model": model, "temperature": 0, "max_tokens": max_tokens, "prompt": prompt});
                ("/v1/completions", body)
            }
        }
    }
}

/// A ticket as a plain prompt. The answer follows after a space.
fn prompt(instruction: &str, ticket: &str) -> String {
    format!("{instruction}\nTicket: {ticket}\nAnswer:")
}

impl Paths {
    /// The paths in the output directory `out`.
    pub(super) fn below(out: &Path) -> Self {
        Self {
            data: out.join("data"),
            adapter: out.join("adapter"),
            collapsed: out.join("lora"),
            gguf: out.join("lora.gguf"),
            posterior: out.join("posterior"),
            run: out.join(RUN),
            serve: out.join("serve.toml"),
        }
    }
}

impl Job<'_> {
    /// Returns an error if `out` contains another job.
    pub(super) fn require_same(&self, out: &Path) -> Result<()> {
        let paths = Paths::below(out);
        let found = std::fs::read_to_string(&paths.run)
            .with_context(|| format!("cannot read `{}`", paths.run.display()))?;
        if found == self.run_toml(&paths) {
            return Ok(());
        }
        let message = format!(
            "`{}` is not what this quickstart would run: it was written for another model, by another version, or in a directory of another name, or it was edited. Give another --output-dir, or --force to replace what is there; `train -c` runs it as it is",
            paths.run.display()
        );
        Err(Problem::usage(message).into())
    }

    /// Writes data, run.toml and serve.toml into the output directory `out`.
    pub(super) fn lay_out(&self, out: &Path) -> Result<Paths> {
        let paths = Paths::below(out);
        std::fs::create_dir_all(&paths.data)
            .with_context(|| format!("cannot create `{}`", paths.data.display()))?;
        let write = |path: &Path, text: &str| {
            std::fs::write(path, text).with_context(|| format!("cannot write `{}`", path.display()))
        };
        for (name, conversations) in SPLITS {
            let path = paths.data.join(format!("{name}.jsonl"));
            write(&path, &self.form.rows(conversations)?)?;
        }
        write(&paths.run, &self.run_toml(&paths))?;
        write(&paths.serve, &self.serve_toml("adapter")?)?;
        Ok(paths)
    }

    /// Rewrites serve.toml so that it serves the posterior, which has the same mean, and its scores.
    pub(super) fn serve_posterior(&self, paths: &Paths) -> Result<()> {
        std::fs::write(&paths.serve, self.serve_toml("posterior")?)
            .with_context(|| format!("cannot write `{}`", paths.serve.display()))
    }

    fn run_toml(&self, paths: &Paths) -> String {
        let bare = match self.form {
            Form::Conversations => "",
            Form::Prompts => "apply_chat_template = false\n",
        };
        format!(
            "# What `monteclora quickstart` ran; repeat it with: monteclora train -c {}\n\
             seed = 42\n\n[model]\nmodel_id = {}\n\n\
             [data]\ntrain = {}\nvalid = {}\n{bare}max_seq_length = 256\npacking = false\n\n\
             [lora]\nmethod = \"monteclora\"\nr = 16\nlora_alpha = 32\ntarget_modules = \"all-linear\"\n\n\
             [train]\noutput_dir = {}\nnum_train_epochs = {}\nper_device_train_batch_size = 8\nlearning_rate = {:e}\n\
             logging_steps = 5\neval_steps = 40\nsave_steps = 50\n",
            paths.run.display(),
            quoted(self.base),
            quoted(&paths.data.join("train.jsonl")),
            quoted(&paths.data.join("valid.jsonl")),
            quoted(&paths.adapter),
            self.recipe.num_train_epochs,
            self.recipe.learning_rate,
        )
    }

    fn serve_toml(&self, source: &str) -> Result<String> {
        let uncertainty = match source {
            "posterior" => {
                "[models.uncertainty]   # POST /v1/monteclora/score: how sure an answer is\nenabled = true\ndtype = \"f32\"\n\n"
            }
            _ => "",
        };
        Ok(format!(
            "[server]\nhost = \"127.0.0.1\"\nport = 1234\nui = true   # a page at /\n\n{}[[models]]\nmodel_id = {}\nname = {}\n\n\
             [models.device]\ncpu = true\n\n{uncertainty}[[models.adapters]]\ntype = \"monteclora\"\nalias = \"triage\"\nsource = \"{source}\"\n",
            self.form.examples()?,
            quoted(self.base),
            toml::Value::from(self.name),
        ))
    }
}

fn quoted(path: &Path) -> toml::Value {
    path.display().to_string().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RunConfig;
    use crate::data::{RowContent, RowFormat, parse_row};
    use crate::sample_models::{GEMMA3_270M, SAMPLE_MODELS};

    #[test]
    fn a_prompt_holds_the_turns_and_its_completion_the_answer() {
        for (name, conversations) in SPLITS {
            assert_eq!(
                Form::Conversations.rows(conversations).expect("rows"),
                conversations
            );
            let prompts = Form::Prompts.rows(conversations).expect("rows");
            assert_eq!(prompts.lines().count(), conversations.lines().count());
            for (bare, turns) in prompts.lines().zip(conversations.lines()) {
                let row = |line: &str| parse_row(line.as_bytes(), None).expect("a row");
                let (format, bare) = row(bare);
                assert_eq!(format, RowFormat::PromptCompletion, "{name}");
                let RowContent::Prompt {
                    prompt,
                    completion,
                    system,
                    ..
                } = bare.content
                else {
                    panic!("{bare:?}");
                };
                let RowContent::Conversation { messages, .. } = row(turns).1.content else {
                    panic!("{turns}");
                };
                assert_eq!(system, None);
                let [instruction, ticket, answer] = &messages[..] else {
                    panic!("{turns}");
                };
                assert_eq!(instruction.content(), INSTRUCTION);
                assert!(prompt.starts_with(INSTRUCTION) && prompt.ends_with("\nAnswer:"));
                assert!(prompt.contains(ticket.content()));
                assert_eq!(completion.strip_prefix(' '), Some(answer.content()));
            }
        }
    }

    #[test]
    fn what_is_written_says_how_tickets_are_asked() {
        let dir = tempfile::tempdir().expect("a directory");
        for form in [Form::Conversations, Form::Prompts] {
            for model in SAMPLE_MODELS {
                let job = Job {
                    base: Path::new("/models/it's \"one\""),
                    name: model.name,
                    form,
                    recipe: model.recipe,
                };
                let paths = job.lay_out(dir.path()).expect("written");
                let text = std::fs::read_to_string(&paths.run).expect("readable");
                let run = RunConfig::from_toml(&text, "run.toml", &[]).expect("valid");
                assert_eq!(run.data.apply_chat_template, form == Form::Conversations);
                assert_eq!(run.model.model_id, job.base.to_str().expect("UTF-8"));
                assert_eq!(run.train.learning_rate, model.recipe.learning_rate);
                assert_eq!(
                    run.train.num_train_epochs,
                    Some(model.recipe.num_train_epochs)
                );
                for posterior in [false, true] {
                    if posterior {
                        job.serve_posterior(&paths).expect("written");
                    }
                    let text = std::fs::read_to_string(&paths.serve).expect("readable");
                    let serve: toml::Table = text.parse().expect("TOML");
                    let served = serve["models"][0].as_table().expect("a table");
                    assert_eq!(served["name"].as_str(), Some(model.name));
                    assert_eq!(served["model_id"].as_str(), job.base.to_str());
                    let source = served["adapters"][0]["source"].as_str();
                    assert_eq!(
                        source,
                        Some(if posterior { "posterior" } else { "adapter" })
                    );
                    assert_eq!(served.contains_key("uncertainty"), posterior);
                }
            }
        }
    }

    #[test]
    fn a_server_is_asked_as_the_model_was_trained() {
        let (path, body) = Form::Prompts.request(GEMMA3_270M.name, 40);
        assert_eq!(path, "/v1/completions");
        let asked = body["prompt"].as_str().expect("a text");
        assert!(asked.starts_with(INSTRUCTION) && asked.ends_with("\nAnswer:"));
        let (path, body) = Form::Conversations.request("triage", 40);
        assert_eq!(path, "/v1/chat/completions");
        assert_eq!(
            body["messages"][0],
            json!({"role": "system", "content": INSTRUCTION})
        );
        // In the shell command the body is between single quotes.
        assert!(!body.to_string().contains('\''));
    }
}
