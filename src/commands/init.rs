//! `init`: writes a commented run.toml for a model and a data file.

use anyhow::{Result, bail};
use monteclora_adapters::methods::METHODS;
use monteclora_adapters::methods::monteclora::Preset;
use monteclora_converters::{Problem, files, jinja};

use super::{print, weight_type};
use crate::cli::InitArgs;
use crate::config::{DataConfig, LoraConfig, RunConfig, TrainConfig};
use crate::data::Overlong;
use crate::hub;
use crate::model::read_shape;
use crate::output::is_read;
use crate::train::{Decided, Prepared, Suggestion, toml_text};

pub(super) fn run(args: &InitArgs) -> Result<()> {
    weight_type(args.model.options.dtype)?;
    if args.output.exists() && !args.force {
        bail!(Problem::usage(format!(
            "`{}` exists; choose another with -o or pass --force",
            args.output.display()
        )));
    }
    let rows = std::iter::once(args.data.as_path()).chain(args.valid.as_deref());
    let rows = rows.filter(|rows| rows.is_file());
    if is_read(&args.output, &rows.collect::<Vec<_>>()) {
        bail!(Problem::usage(format!(
            "-o `{}` is a file of rows; choose another name",
            args.output.display()
        )));
    }
    let base = hub::locate(args.model.id()?, &args.model.options.hub())?;
    let model = read_shape(&base.dir)?;
    // Rows are read as in a run. Only rows that are longer than the model's positions are dropped.
    let limit = model.max_position_embeddings;
    let template = args.model.options.chat_template.as_deref();
    let has_template = jinja::find(&base.dir, template)?.is_some();
    let probe = Suggestion {
        max_seq_length: limit,
        overlong: Overlong::Drop,
        packing: false,
        batch_size: 1,
        accumulation: 1,
        checkpointing: false,
        epochs: 1,
        notes: Vec::new(),
    };
    let prepared = Prepared::new(
        parse(&text(args, &probe, None, has_template))?,
        Some(base.clone()),
    )?;
    let suggestion = Suggestion::new(&prepared, limit, Decided::default())?;
    let text = text(args, &suggestion, Some(&prepared), has_template);
    // Check that `train` accepts the file.
    Prepared::new(parse(&text)?, Some(base))?;
    prepared.warn();
    files::write_text(&args.output, &text)?;
    let mut said = vec![format!("wrote {}", args.output.display())];
    if !has_template {
        said.push("note: the model has no chat template: prompts and completions are taken as they are (data.apply_chat_template = false)".to_owned());
    }
    said.extend(suggestion.notes.iter().map(|note| format!("note: {note}")));
    said.push(format!(
        "next: monteclora train -c {} --dry-run",
        args.output.display()
    ));
    print(&said.join("\n"))
}

fn parse(text: &str) -> Result<RunConfig> {
    Ok(RunConfig::from_toml(text, "run.toml", &[])?)
}

/// A TOML string.
fn quoted(text: impl std::fmt::Display) -> String {
    toml::Value::String(text.to_string()).to_string()
}

fn text(
    args: &InitArgs,
    suggestion: &Suggestion,
    prepared: Option<&Prepared>,
    has_template: bool,
) -> String {
    let options = &args.model.options;
    let mut model = format!("model_id = {}", quoted(args.model.named()));
    if let Some(revision) = &options.revision {
        model.push_str(&format!("\nrevision = {}", quoted(revision)));
    }
    if options.dtype.0 != "auto" {
        model.push_str(&format!("\ndtype = {}", quoted(options.dtype.0)));
    }
    if let Some(template) = &options.chat_template {
        model.push_str(&format!("\nchat_template = {}", quoted(template.display())));
    }
    let found = prepared.map_or(String::new(), |prepared| {
        let stats = prepared.train.stats();
        format!(
            "# {} examples, {} rows; {} to {} tokens per example (median {}, 95 % up to {})\n",
            stats.n_examples,
            prepared.train.format().name(),
            stats.tokens.min,
            stats.tokens.max,
            stats.tokens.median,
            stats.tokens.p95
        )
    });
    let format = prepared.map_or("auto", |prepared| prepared.train.format().name());
    let valid = match &args.valid {
        Some(path) => format!(
            "valid = {}\n",
            quoted(path.display())
        ),
        None => "# valid = \"valid.jsonl\"            # turns on evaluation, best model and early stopping\n".to_owned(),
    };
    let as_they_are = match has_template {
        true => "",
        false => "apply_chat_template = false     # the model has none\n",
    };
    let (lora, train) = (LoraConfig::default(), TrainConfig::default());
    let methods: Vec<&str> = METHODS.iter().map(|kind| kind.name).collect();
    let rows = if suggestion.packing {
        "packs of max_seq_length tokens"
    } else {
        "examples"
    };
    format!(
        r#"# A MonteCLoRA run. Check it:  monteclora train -c {file} --dry-run
#                   Start it:  monteclora train -c {file}
#                   Go on after an interruption:  monteclora train -c {file} --resume auto
# Paths are relative to the current directory. Every key has a default; docs/configuration.md lists them all.
seed = {seed}

[model]
{model}

[data]
{found}train = {rows_file}
{valid}format = "{format}"
{as_they_are}max_seq_length = {max_seq_length}
overlong = {overlong}                 # error | drop | truncate: what happens to longer examples
packing = {packing}                    # short examples share a pack and never see each other
train_on = {train_on}             # assistant | last_assistant | completion | all: which turns are learnt

[lora]
method = {method}              # {methods}
r = {r}
lora_alpha = {lora_alpha}
target_modules = {target_modules}      # or names, such as ["q_proj", "v_proj"]

[lora.monteclora]
preset = {preset}             # recommended | paper | peft

[train]
output_dir = {output_dir}
num_train_epochs = {epochs}
per_device_train_batch_size = {batch_size}    # {rows} at a time
gradient_accumulation_steps = {accumulation}    # batches of that size per step; the result is that of one large batch
gradient_checkpointing = {checkpointing}     # true takes less memory and more time
learning_rate = {learning_rate:e}
lr_scheduler_type = {schedule}       # linear | cosine | constant
warmup_ratio = {warmup_ratio}
logging_steps = {logging_steps}
eval_steps = {eval_steps}
save_steps = {save_steps}
report_to = ["jsonl"]              # add "tensorboard" for event files in output_dir/tb
"#,
        file = args.output.display(),
        rows_file = quoted(args.data.display()),
        max_seq_length = suggestion.max_seq_length,
        overlong = toml_text(suggestion.overlong),
        train_on = toml_text(DataConfig::default().train_on),
        seed = RunConfig::default().seed,
        method = toml_text(lora.method),
        methods = methods.join(" | "),
        r = lora.r,
        lora_alpha = lora.lora_alpha,
        target_modules = toml_text(&lora.target_modules),
        preset = toml_text(Preset::default()),
        learning_rate = train.learning_rate,
        schedule = toml_text(train.lr_scheduler_type),
        warmup_ratio = train.warmup_ratio,
        logging_steps = train.logging_steps,
        eval_steps = train.eval_steps,
        save_steps = train.save_steps,
        packing = suggestion.packing,
        output_dir = quoted(args.output_dir.display()),
        epochs = suggestion.epochs,
        batch_size = suggestion.batch_size,
        accumulation = suggestion.accumulation,
        checkpointing = suggestion.checkpointing,
    )
}
