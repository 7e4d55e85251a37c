//! `data`: shows the problems of data files, their trained text and the lengths of their rows.

mod check;
mod preview;
mod stats;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail};
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

/// Settings for the rows, from the command line and an optional run.toml.
struct Request {
    /// The sources with their splits.
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
        let token_source = args.token_source.clone();
        let requested =
            |id: &str, revision: &Option<String>, template: Option<&PathBuf>| RequestedModel {
                id: id.to_owned(),
                options: HubOptions {
                    revision: revision.clone(),
                    token_source,
                },
                chat_template: args.chat_template.as_ref().or(template).cloned(),
            };
        let model = match (&args.model_id, &config) {
            (Some(id), _) => Some(requested(id, &args.revision, None)),
            (None, Some(RunConfig { model, .. })) => Some(requested(
                &model.model_id,
                &model.revision,
                model.chat_template.as_ref(),
            )),
            (None, None) => None,
        };
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
            bail!(Problem::usage("--max-seq-length: expected at least 2"));
        }
        Ok(Self {
            sources: sources(args, &data)?,
            schema: data.row_schema(),
            data,
            model,
        })
    }

    /// The model's encoder, if there is a model.
    fn encoder(&self) -> Result<Option<Arc<Encoder>>> {
        let encoder = |model| Ok(self.encoder_of(model, false)?.0);
        self.model.as_ref().map(encoder).transpose()
    }

    /// An encoder without a length limit, and the configured length limit in tokens.
    fn measuring_encoder(&self) -> Result<(Arc<Encoder>, usize)> {
        match &self.model {
            Some(model) => self.encoder_of(model, true),
            None => Err(Problem::usage(
                "tokens are those of a model: give one with -m, or a run.toml with -c",
            )
            .into()),
        }
    }

    fn encoder_of(&self, model: &RequestedModel, whole: bool) -> Result<(Arc<Encoder>, usize)> {
        let base = hub::locate(&model.id, &model.options)?;
        let config = read_shape(&base.dir)?;
        let limit = self.data.max_seq_length_for(config.max_position_embeddings);
        let mut options = self.data.encode_options(limit);
        if whole {
            (options.max_seq_length, options.overlong) = (usize::MAX, Overlong::Error);
        }
        let variables = self.data.template_variables.clone();
        let template = model.chat_template.as_deref();
        let encoder = Encoder::with_variables(&base.dir, template, variables, options)?;
        encoder.tokenizer().check_vocab(config.vocab_size)?;
        Ok((encoder, limit))
    }
}

fn sources(args: &DataSourceArgs, data: &DataConfig) -> Result<Vec<(PathBuf, Split)>> {
    let wanted = |split: Split| args.split.is_none_or(|asked| asked == split);
    if args.files.is_empty() {
        if data.train.as_os_str().is_empty() {
            bail!(Problem::usage("give data files, or a run.toml with -c"));
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
                bail!(Problem::usage(format!(
                    "--field {entry}: expected FIELD=NAME, such as prompt=question"
                )));
            }
        }
    }
    Ok(FieldNames::try_from(names)
        .map_err(|problem| Problem::usage(format!("--field: {problem}")))?)
}

/// The title of a source: its path, and for a directory its split.
fn title(path: &Path, split: Split) -> String {
    if path.is_file() {
        path.display().to_string()
    } else {
        format!("{} ({})", path.display(), split.name())
    }
}
