//! `merge`: merges an adapter into its base model and writes a full model directory.

use std::path::Path;

use anyhow::{Context, Result, bail};
use monteclora_converters::{
    Beside, ConversationSettings, DType, MergeReport, Problem, files, merge_dir,
    other_conversation, shell_word,
};
use serde_json::json;

use super::export::{beside_lines, count, require_apart};
use super::{print, print_json};
use crate::cli::MergeArgs;
use crate::hub;
use crate::model::open_base;
use crate::output::require_empty;
use crate::provenance::{read_effective_on, warn_of_settings};

/// Share of updated weights that keep their old value after rounding, above which a warning is logged.
const LOST: f64 = 0.5;

pub(super) fn run(args: &MergeArgs) -> Result<()> {
    let output = &args.output;
    if let Some(template) = &args.model.options.chat_template {
        bail!(Problem::usage(format!(
            "--chat-template {}: merge writes the adapter's chat template, or the base's; put the file into the adapter's directory as \
             chat_template.jinja",
            template.display()
        )));
    }
    let base = hub::locate(args.model.id()?, &args.model.options.hub())?;
    for source in [&base.dir, &args.adapter] {
        require_apart(source, output)?;
    }
    require_empty(output, args.force)?;
    let files = open_base(&base.dir)?;
    let adapter = read_effective_on(&args.adapter, &files, args.force)?;
    let dtype = match args.model.options.dtype.0 {
        "auto" => None,
        name => Some(DType::from_name(&name.to_uppercase()).ok_or_else(|| {
            Problem::usage(format!("--dtype {name}: a model's files have no such type"))
        })?),
    };
    let beside = Beside::of(&args.adapter)?.no_notes();
    let carried = &beside.carried;
    let settings = ConversationSettings {
        template: None,
        prompts_as_chats: None,
    };
    // The adapter's own template or tokenizer replaces the base model's, so a difference needs no warning.
    let is_merged = |warning: &Problem| match warning.code {
        "other-template" => carried.has_template(),
        "other-tokenizer" => carried.vocabulary_size().is_some(),
        _ => false,
    };
    let warnings = other_conversation(&args.adapter, &base.dir, settings)?.into_iter();
    let warnings = warnings.filter(|warning| !is_merged(warning));
    for warning in carried.unread_tokens().into_iter().chain(warnings) {
        tracing::warn!("{warning}");
    }
    warn_of_settings(&args.adapter);
    let is_occupied = std::fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_some());
    let report = if is_occupied {
        replace(output, |sibling| {
            Ok(merge_dir(&files, &adapter, sibling, dtype, carried)?)
        })?
    } else {
        merge_dir(&files, &adapter, output, dtype, carried)?
    };
    if report.update_lost > LOST {
        tracing::warn!(
            "{:.0} % of the update is lost: it is smaller than the steps of the stored type; use --dtype f32 to keep it, or serve the adapter beside its base",
            100.0 * report.update_lost
        );
    }
    if args.json {
        let mut object = serde_json::to_value(&report)?;
        object["output"] = json!(output);
        object["carried"] = json!(beside.carried);
        object["left_out"] = json!(beside.left_out);
        return print_json(&object);
    }
    let out = shell_word(&output.display().to_string());
    // llama.cpp's own converter knows every architecture that it runs.
    let next = format!(
        "\n  next      for llama.cpp: python convert_hf_to_gguf.py {out} --outfile {out}.gguf --outtype q8_0   (or f16; the script is llama.cpp's)"
    );
    print(&(text(output, &report) + &beside_lines(&beside, &replaced(&report)) + &next))
}

/// Text about the files that the adapter's tokenizer and templates replaced.
fn replaced(report: &MergeReport) -> String {
    match report.replaced.as_slice() {
        [] => "from the adapter".to_owned(),
        names => format!(
            "from the adapter in place of the base's {}",
            names.join(", ")
        ),
    }
}

fn text(output: &Path, report: &MergeReport) -> String {
    let rounding = if report.max_abs_error == 0.0 {
        "none beyond float32 arithmetic".to_owned()
    } else {
        format!(
            "largest error {:.1e}; error {:.2} % of the update's norm; {:.2} % of the updated weights are stored as if there \
             had been no update",
            report.max_abs_error,
            100.0 * report.relative_error,
            100.0 * report.update_lost
        )
    };
    let mut text = format!(
        "wrote {}: {} merged, {} copied\n  rounding  {rounding}",
        output.display(),
        count(report.n_merged, "weight"),
        report.n_copied
    );
    if report.untied {
        text.push_str(
            "\n  note      the head is adapted and was the embedding: it is a weight of its own now (lm_head.weight, tie_word_embeddings false)",
        );
    }
    if !report.not_copied.is_empty() {
        text.push_str(&format!(
            "\n  base      not copied: {}",
            report.not_copied.join(", ")
        ));
    }
    text
}

/// Merges into a sibling directory of `output`, then replaces the model files in `output`.
fn replace(output: &Path, merge: impl FnOnce(&Path) -> Result<MergeReport>) -> Result<MergeReport> {
    let context = || format!("cannot replace the model in `{}`", output.display());
    let sibling = files::dir_beside(&output.canonicalize().with_context(context)?)?;
    let made = sibling.path().join("model");
    let report = merge(&made)?;
    // Readers would load remaining weights of the old model together with the new ones.
    for entry in std::fs::read_dir(output).with_context(context)? {
        let path = entry.with_context(context)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json") {
            std::fs::remove_file(&path).with_context(context)?;
        }
    }
    for entry in std::fs::read_dir(&made).with_context(context)? {
        let path = entry.with_context(context)?.path();
        if let Some(name) = path.file_name() {
            std::fs::rename(&path, output.join(name)).with_context(context)?;
        }
    }
    Ok(report)
}
