//! `data`: what is wrong with data files, what is trained in them, how long their rows are.

mod check;
mod preview;
mod stats;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use indexmap::IndexMap;
use monteclora_converters::Problem;

use crate::cli::{DataCommand, DataSourceArgs};
use crate::config::{DataConfig, RunConfig};
use crate::data::{Encoder, FieldNames, Overlong, RowSchema, Split, splits};
use crate::hub::{self, HubOptions};
use crate::model::read_shape;

pub(super) fn run(command: &DataCommand) -> Result<()> {
    match command {
        DataCommand::Check(args) => check::run(args),
        DataCommand::Preview(args) => preview::run(args),
        DataCommand::Stats(args) => stats::run(args),
    }
}

/// What the command line, and the run.toml where one is given, say about the rows.
struct Request {
    /// Each source with the split that is meant.
    sources: Vec<(PathBuf, Split)>,
    schema: RowSchema,
    data: DataConfig,
    model: Option<RequestedModel>,
}

struct RequestedModel {
    id: String,
    options: HubOptions,
    chat_template: Option<PathBuf>,
}

impl Request {
    fn new(args: &DataSourceArgs) -> Result<Self> {
        let config = args
            .config
            .as_ref()
            .map(|path| RunConfig::load(path, &args.overrides))
            .transpose()?;
        let mut model = config.as_ref().map(|config| RequestedModel {
            id: config.model.model_id.clone(),
            options: HubOptions {
                revision: config.model.revision.clone(),
                token_source: args.token_source.clone(),
            },
            chat_template: config.model.chat_template.clone(),
        });
        if let Some(id) = &args.model_id {
            model = Some(RequestedModel {
                id: id.clone(),
                options: HubOptions {
                    revision: args.revision.clone(),
                    token_source: args.token_source.clone(),
                },
                chat_template: None,
            });
        }
        if let (Some(model), Some(template)) = (&mut model, &args.chat_template) {
            model.chat_template = Some(template.clone());
        }
        let mut data = config.map(|config| config.data).unwrap_or_default();
        data.format = args.format.unwrap_or(data.format);
        data.train_on = args.train_on.unwrap_or(data.train_on);
        data.max_seq_length = args.max_seq_length.or(data.max_seq_length);
        data.overlong = args.overlong.unwrap_or(data.overlong);
        data.apply_chat_template &= !args.no_chat_template;
        if !args.fields.is_empty() {
            data.fields = field_names(&args.fields)?;
        }
        if data.max_seq_length.is_some_and(|length| length < 2) {
            return Err(Problem::usage("--max-seq-length: expected at least 2").into());
        }
        Ok(Self {
            sources: sources(args, &data)?,
            schema: data.row_schema(),
            data,
            model,
        })
    }

    /// The model's encoder and the length limit in tokens.
    fn encoder(&self) -> Result<Option<(Arc<Encoder>, usize)>> {
        let Some(model) = &self.model else {
            return Ok(None);
        };
        let base = hub::locate(&model.id, &model.options)?;
        let config = read_shape(&base.dir)?;
        let limit = self.data.max_seq_length_for(config.max_position_embeddings);
        let encoder = Encoder::from_dir(
            &base.dir,
            model.chat_template.as_deref(),
            self.data.encode_options(limit),
        )?;
        encoder.tokenizer().check_vocab(config.vocab_size)?;
        Ok(Some((encoder, limit)))
    }

    /// As [`Self::encoder`], for verbs that cannot do without; rows of any length are encoded whole.
    fn measuring_encoder(&mut self) -> Result<(Arc<Encoder>, usize)> {
        let asked = self.data.max_seq_length;
        let Some((encoder, limit)) = self.encoder()? else {
            return Err(Problem::usage(
                "tokens are those of a model: give one with -m, or a run.toml with -c",
            )
            .into());
        };
        drop(encoder);
        self.data.max_seq_length = Some(usize::MAX);
        self.data.overlong = Overlong::Error;
        let encoder = self.encoder()?.map(|(encoder, _)| encoder);
        self.data.max_seq_length = asked;
        encoder
            .map(|encoder| (encoder, limit))
            .ok_or_else(|| Problem::usage("give a model with -m").into())
    }
}

fn sources(args: &DataSourceArgs, data: &DataConfig) -> Result<Vec<(PathBuf, Split)>> {
    let wanted = |split: Split| args.split.is_none_or(|asked| asked == split);
    if args.files.is_empty() {
        if data.train.as_os_str().is_empty() {
            return Err(Problem::usage("give data files, or a run.toml with -c").into());
        }
        let configured = [
            (Some(&data.train), Split::Train),
            (data.valid.as_ref(), Split::Valid),
        ];
        return Ok(configured
            .into_iter()
            .filter(|(_, split)| wanted(*split))
            .filter_map(|(path, split)| Some((path?.clone(), split)))
            .collect());
    }
    let mut found = Vec::new();
    for file in &args.files {
        match args.split {
            Some(split) => found.push((file.clone(), split)),
            None => found.extend(splits(file)?.into_iter().map(|split| (file.clone(), split))),
        }
    }
    Ok(found)
}

fn field_names(entries: &[String]) -> Result<FieldNames> {
    let mut names = IndexMap::new();
    for entry in entries {
        match entry.split_once('=') {
            Some((field, name)) if !field.is_empty() && !name.is_empty() => {
                names.insert(field.to_owned(), name.to_owned());
            }
            _ => {
                return Err(Problem::usage(format!(
                    "--field {entry}: expected FIELD=NAME, such as prompt=question"
                ))
                .into());
            }
        }
    }
    Ok(FieldNames::try_from(names)
        .map_err(|problem| Problem::usage(format!("--field: {problem}")))?)
}

/// A source in words: the path, and the split where the path has several.
fn title(path: &Path, split: Split) -> String {
    if path.is_file() {
        path.display().to_string()
    } else {
        format!("{} ({})", path.display(), split.name())
    }
}
