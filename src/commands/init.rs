//! `init`: a commented run.toml for a model and a data file.

use anyhow::Result;
use monteclora_converters::files;

use super::train::{Prepared, prepare};
use super::{Usage, dry_run, print, weight_type};
use crate::cli::{DtypeArg, InitArgs};
use crate::config::RunConfig;
use crate::hub;
use crate::model::read_shape;
use crate::system::available_memory_bytes;

/// Share of the available memory that a suggested run may take by its estimate.
const SHARE: f64 = 0.7;
/// Tokens that an optimiser step should see at least, as far as the data have them.
const STEP_TOKENS: usize = 2048;
/// Sequences are suggested up to this length; longer ones are named.
const LONGEST: usize = 4096;

/// What the data and the machine suggest.
struct Suggestion {
    max_seq_length: usize,
    overlong: &'static str,
    packing: bool,
    batch_size: usize,
    accumulation: usize,
    checkpointing: bool,
    epochs: usize,
    notes: Vec<String>,
}

pub(super) fn run(args: &InitArgs) -> Result<()> {
    weight_type(args.model.options.dtype)?;
    if args.output.exists() && !args.force {
        return Err(Usage(format!(
            "`{}` exists; choose another with -o or pass --force",
            args.output.display()
        ))
        .into());
    }
    let base = hub::locate(&args.model.model_id, &args.model.options.hub())?;
    let model = read_shape(&base.dir)?;
    // Every row is read as a run reads it, with nothing left out but what the model itself cannot hold.
    let limit = model.max_position_embeddings;
    let probe = Suggestion {
        max_seq_length: limit,
        overlong: "drop",
        packing: false,
        batch_size: 1,
        accumulation: 1,
        checkpointing: false,
        epochs: 1,
        notes: Vec::new(),
    };
    let prepared = prepare(parse(&text(args, &probe, None))?, Some(base.clone()))?;
    let suggestion = suggest(&prepared, limit)?;
    let text = text(args, &suggestion, Some(&prepared));
    // What is written must be what `train` accepts.
    prepare(parse(&text)?, Some(base))?;
    files::write_text(&args.output, &text)?;
    let mut said = vec![format!("wrote {}", args.output.display())];
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

fn suggest(prepared: &Prepared, limit: usize) -> Result<Suggestion> {
    let stats = prepared.train.stats();
    let mut notes = Vec::new();
    if stats.n_dropped > 0 {
        notes.push(format!(
            "{} examples are longer than the model's {limit} tokens and will be dropped",
            stats.n_dropped
        ));
    }
    let capped = stats.tokens.max > LONGEST;
    if capped {
        notes.push(format!(
            "the longest example has {} tokens; max_seq_length is set to {LONGEST} and longer ones are dropped",
            stats.tokens.max
        ));
    }
    // The next multiple of 64, so that a few more rows of the kind still fit.
    let longest = stats
        .tokens
        .max
        .min(LONGEST)
        .next_multiple_of(64)
        .min(limit);
    let tokens = stats.tokens.total as usize;
    let mean = tokens.div_ceil(stats.n_examples.max(1));
    // Packing evens out the size of batches where examples are much shorter than the longest.
    let packing = 2 * mean < longest && stats.n_examples >= 16;
    let sites = dry_run::sites(prepared)?;
    let row_tokens = if packing { longest } else { mean };
    let wanted = STEP_TOKENS
        .div_ceil(row_tokens)
        .clamp(1, 16)
        .next_power_of_two();
    let budget = available_memory_bytes().map(|bytes| (bytes as f64 * SHARE) as u64);
    let fits = |batch_size: usize, checkpointing: bool| {
        let shape = dry_run::Shape {
            batch_size,
            pack_tokens: packing.then_some(longest),
            longest,
            gradient_checkpointing: checkpointing,
        };
        let needed = dry_run::estimate_shape(prepared, &sites, &shape).peak;
        budget.is_none_or(|budget| needed <= budget)
    };
    let mut batch_size = wanted;
    while batch_size > 1 && !fits(batch_size, false) {
        batch_size /= 2;
    }
    let checkpointing = !fits(batch_size, false);
    if !fits(batch_size, checkpointing) {
        notes.push("by the estimate this will not fit into the available memory; --dry-run tells what to change".to_owned());
    }
    let steps_an_epoch = if packing {
        tokens.div_ceil(longest * wanted)
    } else {
        stats.n_examples.div_ceil(wanted)
    };
    Ok(Suggestion {
        max_seq_length: longest,
        overlong: if capped || stats.n_dropped > 0 {
            "drop"
        } else {
            "error"
        },
        packing,
        batch_size,
        accumulation: wanted / batch_size,
        checkpointing,
        // Small data are read more often, up to about a hundred steps.
        epochs: 100usize.div_ceil(steps_an_epoch.max(1)).clamp(1, 3),
        notes,
    })
}

/// A TOML string.
fn quoted(text: impl std::fmt::Display) -> String {
    toml::Value::String(text.to_string()).to_string()
}

fn text(args: &InitArgs, suggestion: &Suggestion, prepared: Option<&Prepared>) -> String {
    let options = &args.model.options;
    let mut model = format!("model_id = {}", quoted(&args.model.model_id));
    if let Some(revision) = &options.revision {
        model.push_str(&format!("\nrevision = {}", quoted(revision)));
    }
    match options.dtype {
        DtypeArg::Auto => {}
        dtype => model.push_str(&format!(
            "\ndtype = {}",
            quoted(format!("{dtype:?}").to_lowercase())
        )),
    }
    if let Some(template) = &options.chat_template {
        model.push_str(&format!("\nchat_template = {}", quoted(template.display())));
    }
    let found = prepared.map_or(String::new(), |prepared| {
        let stats = prepared.train.stats();
        format!(
            "# {} examples, {} rows; {} to {} tokens an example (median {}, 95 % up to {})\n",
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
seed = 42

[model]
{model}

[data]
{found}train = {train}
{valid}format = "{format}"
max_seq_length = {max_seq_length}
overlong = "{overlong}"                 # error | drop | truncate: what happens to longer examples
packing = {packing}                    # short examples share a pack and never see each other
train_on = "assistant"             # assistant | last_assistant | completion | all: which turns are learnt

[lora]
method = "monteclora"              # monteclora | lora | lora-fa
r = 16
lora_alpha = 32
target_modules = "all-linear"      # or names, such as ["q_proj", "v_proj"]

[lora.monteclora]
preset = "recommended"             # recommended | paper | peft

[train]
output_dir = {output_dir}
num_train_epochs = {epochs}
per_device_train_batch_size = {batch_size}    # {rows} at a time
gradient_accumulation_steps = {accumulation}    # batches of that size a step; the result is that of one large batch
gradient_checkpointing = {checkpointing}     # true takes less memory and more time
learning_rate = 5e-4
lr_scheduler_type = "linear"       # linear | cosine | constant
warmup_ratio = 0.03
logging_steps = 10
eval_steps = 100
save_steps = 100
report_to = ["jsonl"]              # add "tensorboard" for event files in output_dir/tb
"#,
        file = args.output.display(),
        train = quoted(args.data.display()),
        max_seq_length = suggestion.max_seq_length,
        overlong = suggestion.overlong,
        packing = suggestion.packing,
        output_dir = quoted(args.output_dir.display()),
        epochs = suggestion.epochs,
        batch_size = suggestion.batch_size,
        accumulation = suggestion.accumulation,
        checkpointing = suggestion.checkpointing,
    )
}
