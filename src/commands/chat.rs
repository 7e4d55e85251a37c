//! `chat`: a conversation at the terminal. Answers are streamed and shown with their confidence.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use monteclora_converters::Problem;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::opened::{Opened, Request, require_positive};
use super::predict::{agreement, how_sure};
use crate::cli::{ChatArgs, ScoringArgs};
use crate::data::{Message, Role};
use crate::eval::calibration::{Judged, Scaling};
use crate::eval::{Answerer, DEFAULT_SEED, LengthNormalisation};
use crate::model::{ActiveAdapter, Decoder, GenerationSettings};
use crate::output::name_of;
use crate::speech::{Speech, Spoken};

const HELP: &str = "\
/adapter DIR     answer with that adapter; /adapter none: with the base alone
/system TEXT     set the system message; /system alone removes it
/temperature T   draw tokens; 0 takes the most likely one
/undo            forget the last question and its answer
/clear           forget the whole conversation
/quit            end; so does Ctrl-D. Ctrl-C ends an answer";

pub(super) fn run(args: &ChatArgs) -> Result<()> {
    require_positive(&[("--max-tokens", args.max_tokens)])?;
    require_temperature(args.temperature)?;
    let mut chat = Chat::new(args)?;
    let asks = std::io::stdin().is_terminal();
    let mut lines = Lines::new(asks)?;
    if asks {
        chat.tell(&format!("{}; /help for commands", chat.voice.name));
    }
    while let Some(line) = lines.next(&chat.prompt())? {
        let line = line.trim();
        let done = match line.strip_prefix('/') {
            _ if line.is_empty() => Ok(()),
            Some("quit" | "exit" | "q") => break,
            Some(command) => chat.obey(command),
            None => chat.ask(line),
        };
        match done {
            Ok(()) => {}
            // At a terminal a wrong input must not end the conversation.
            Err(error) if asks => chat.tell(&format!("error: {error:#}")),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Returns an error if the temperature is not between 0 and 100.
pub(super) fn require_temperature(temperature: f64) -> Result<()> {
    match (0.0..=100.0).contains(&temperature) {
        true => Ok(()),
        false => bail!(Problem::usage(format!(
            "--temperature {temperature}: expected 0 to 100"
        ))),
    }
}

/// Input lines, from a person with history and editing, or from a pipe.
enum Lines {
    Person(Box<DefaultEditor>),
    Pipe(std::io::Lines<std::io::StdinLock<'static>>),
}

impl Lines {
    fn new(is_person: bool) -> Result<Self> {
        Ok(match is_person {
            true => Self::Person(Box::new(DefaultEditor::new()?)),
            false => Self::Pipe(std::io::stdin().lines()),
        })
    }

    fn next(&mut self, prompt: &str) -> Result<Option<String>> {
        match self {
            Self::Person(editor) => loop {
                match editor.readline(prompt) {
                    Ok(line) => {
                        editor.add_history_entry(line.as_str())?;
                        return Ok(Some(line));
                    }
                    Err(ReadlineError::Interrupted) => {}
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(error).context("cannot read the terminal"),
                }
            },
            Self::Pipe(lines) => lines
                .next()
                .transpose()
                .context("cannot read the standard input"),
        }
    }
}

/// The adapter that answers, or the base model alone.
struct Voice {
    name: String,
    opened: Opened,
    mean: ActiveAdapter,
    draws: Vec<ActiveAdapter>,
    calibration: Option<(Judged, Scaling)>,
}

struct Chat<'a> {
    args: &'a ChatArgs,
    decoder: Decoder,
    voice: Voice,
    system: Option<String>,
    turns: Vec<Message>,
    temperature: f64,
    /// Number of answers so far. Each answer has its own seed.
    n_answers: u64,
    stop: Arc<AtomicBool>,
}

impl<'a> Chat<'a> {
    fn new(args: &'a ChatArgs) -> Result<Self> {
        let opened = open(args, args.adapter.as_deref())?;
        let loaded = opened.load()?;
        let stop: Arc<AtomicBool> = Arc::default();
        let flag = stop.clone();
        ctrlc::set_handler(move || {
            if flag.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
        })
        .context("cannot install the signal handler")?;
        let adapters = (loaded.means, loaded.draws);
        Ok(Self {
            voice: Voice::new(args.adapter.as_deref(), opened, adapters)?,
            decoder: loaded.decoder,
            system: args.system.clone(),
            turns: Vec::new(),
            temperature: args.temperature,
            n_answers: 0,
            stop,
            args,
        })
    }

    fn prompt(&self) -> String {
        format!("{}> ", self.voice.name)
    }

    /// Writes a message to stderr, apart from the conversation.
    fn tell(&self, text: &str) {
        // Errors are ignored: the terminal may be closed.
        let _ = writeln!(std::io::stderr(), "{text}");
    }

    fn obey(&mut self, command: &str) -> Result<()> {
        let (name, rest) = command
            .split_once(char::is_whitespace)
            .unwrap_or((command, ""));
        let rest = rest.trim();
        match name {
            "help" | "?" => self.tell(HELP),
            "clear" => self.turns.clear(),
            "undo" => self.turns.truncate(self.turns.len().saturating_sub(2)),
            "system" => self.system = (!rest.is_empty()).then(|| rest.to_owned()),
            "temperature" => {
                let asked = rest
                    .parse()
                    .ok()
                    .filter(|t| require_temperature(*t).is_ok());
                let Some(temperature) = asked else {
                    bail!(Problem::usage("/temperature takes a number from 0 to 100"));
                };
                self.temperature = temperature;
            }
            "adapter" => {
                let path = match rest {
                    "" => bail!(Problem::usage("/adapter takes a directory, or `none`")),
                    "none" => None,
                    path => Some(Path::new(path)),
                };
                let opened = open(self.args, path)?;
                let adapters = opened.load_adapters(&self.decoder)?;
                self.voice = Voice::new(path, opened, adapters)?;
            }
            _ => bail!(Problem::usage(format!(
                "no command /{name}; /help lists them"
            ))),
        }
        Ok(())
    }

    fn ask(&mut self, question: &str) -> Result<()> {
        let system = self
            .system
            .iter()
            .map(|text| Message::new(Role::System, text));
        let mut messages: Vec<Message> = system.chain(self.turns.iter().cloned()).collect();
        messages.push(Message::new(Role::User, question));
        let encoder = &self.voice.opened.encoder;
        let prompt = match self.voice.opened.applies_chat_template {
            true => encoder.prompt_tokens(&messages, &[])?,
            false => encoder.plain_prompt_tokens(question)?,
        };
        let most = self.decoder.config().max_position_embeddings;
        let Some(room) = most.checked_sub(prompt.len()).filter(|room| *room > 0) else {
            bail!(Problem::usage(format!(
                "the conversation has {} tokens, and the model takes {most}; /clear begins another",
                prompt.len()
            )));
        };
        let speech = Speech {
            max_new_tokens: self.args.max_tokens.min(room),
            stop_tokens: encoder.stop_ids(),
            temperature: self.temperature,
            seed: self.args.seed.wrapping_add(self.n_answers),
        };
        self.stop.store(false, Ordering::SeqCst);
        let stop = self.stop.clone();
        let mut out = std::io::stdout();
        let spoken = speech.answer(
            (&self.decoder, &self.voice.mean),
            encoder.tokenizer(),
            &prompt,
            &|| !stop.load(Ordering::SeqCst),
            &mut |text| {
                // Errors are ignored: the reader of a closed pipe needs no text.
                let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
            },
        )?;
        let stopped = self.stop.swap(false, Ordering::SeqCst);
        super::print("")?;
        self.n_answers += 1;
        let text = encoder
            .tokenizer()
            .decode(&spoken.generation.tokens, true)?;
        if self.voice.opened.applies_chat_template {
            self.turns.push(Message::new(Role::User, question));
            self.turns.push(Message::new(Role::Assistant, text.trim()));
        }
        if stopped {
            self.tell("  (stopped)");
        } else if !self.args.no_confidence {
            self.tell(&format!("  {}", self.sureness(&prompt, &spoken)?));
        }
        Ok(())
    }

    /// The confidence of the answer, in words.
    fn sureness(&self, prompt: &[u32], spoken: &Spoken) -> Result<String> {
        let voice = &self.voice;
        let is_greedy = self.temperature == 0.0;
        if is_greedy && (voice.calibration.is_some() || !voice.draws.is_empty()) {
            let answerer = Answerer {
                decoder: &self.decoder,
                mean: &voice.mean,
                draws: &voice.draws,
                calibration: voice.calibration.as_ref(),
                threshold: None,
                tokenizer: voice.opened.encoder.tokenizer(),
                generation: GenerationSettings {
                    max_new_tokens: self.args.max_tokens,
                    stop_tokens: voice.opened.encoder.stop_ids(),
                    batch_size: 1,
                },
                normalisation: LengthNormalisation::None,
                cancelled: Some(&self.stop),
            };
            let answers = [spoken.generation.clone()];
            let said = answerer.about(&[prompt.to_vec()], &answers)?;
            if let Some(answer) = said.first() {
                let mut text = how_sure(answer);
                if let Some(found) = &answer.uncertainty {
                    text.push_str(&format!("; {}", agreement(found, "draws")));
                }
                return Ok(text);
            }
        }
        Ok(per_token(spoken, voice.opened.encoder.tokenizer()))
    }
}

/// The mean and the least probability of the tokens, in words. They replace the confidence where there is none, since
/// the uncalibrated probability of a whole answer says little.
fn per_token(spoken: &Spoken, tokenizer: &crate::data::Tokenizer) -> String {
    let n = spoken.log_probabilities.len().max(1) as f64;
    let mean = (spoken.log_probabilities.iter().sum::<f64>() / n).exp();
    let tokens = spoken.generation.tokens.iter().copied();
    let all = tokens
        .chain(spoken.generation.end)
        .zip(&spoken.log_probabilities);
    let least = all.min_by(|(_, a), (_, b)| a.total_cmp(b));
    let mut text = format!("{:.0} % per token", 100.0 * mean);
    if let Some((token, log_p)) = least {
        let shown = match Some(token) == spoken.generation.end {
            true => "the end".to_owned(),
            false => format!(
                "{:?}",
                tokenizer.decode(&[token], false).unwrap_or_default()
            ),
        };
        text.push_str(&format!("; least at {shown}: {:.0} %", 100.0 * log_p.exp()));
    }
    text
}

impl Voice {
    fn new(
        adapter: Option<&Path>,
        opened: Opened,
        (means, draws): (Vec<ActiveAdapter>, Vec<ActiveAdapter>),
    ) -> Result<Self> {
        let paths: Vec<PathBuf> = adapter.iter().map(|path| path.to_path_buf()).collect();
        let calibration = opened.calibration(&paths)?.of(Judged::Answers);
        let name = adapter.map_or("base".to_owned(), name_of);
        Ok(Self {
            name,
            calibration: calibration.asked(opened.draws()),
            mean: means.into_iter().next().unwrap_or_default(),
            draws,
            opened,
        })
    }
}

/// Opens and checks the base model, with or without an adapter.
fn open(args: &ChatArgs, adapter: Option<&Path>) -> Result<Opened> {
    let adapters: Vec<PathBuf> = adapter.iter().map(|path| path.to_path_buf()).collect();
    let scoring = ScoringArgs {
        seed: DEFAULT_SEED,
        max_seq_length: None,
        batch_size: None,
        no_chat_template: args.no_chat_template,
        length_normalised: false,
    };
    let request = Request {
        model: &args.model,
        posterior_samples: args.posterior_samples.filter(|_| adapter.is_some()),
        adapters: &adapters,
        scoring: &scoring,
    };
    Opened::new(&request, |config| config.max_position_embeddings)
}
