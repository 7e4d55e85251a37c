//! `import-gguf`: converts a GGUF base model to a Hugging Face directory.

use anyhow::Result;
use monteclora_converters::DType;

use super::{print, print_json};
use crate::cli::{ImportDtypeArg, ImportGgufArgs};
use crate::gguf_import::{ImportOptions, import_gguf};
use crate::progress;

pub(super) fn run(args: &ImportGgufArgs) -> Result<()> {
    let options = ImportOptions {
        dtype: match args.dtype {
            ImportDtypeArg::F32 => DType::F32,
            ImportDtypeArg::Bf16 => DType::BF16,
        },
        force: args.force,
        ..ImportOptions::default()
    };
    let bar = progress::bytes("writing weights");
    let report = import_gguf(&args.file, &args.output, &options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    if args.json {
        return print_json(&report);
    }
    let mut text = format!(
        "wrote {}: {} with {} parameters in {} tensors",
        args.output.display(),
        report.model_type,
        report.n_parameters,
        report.n_tensors
    );
    for note in &report.notes {
        text.push_str(&format!("\n  {note}"));
    }
    print(&text)
}
