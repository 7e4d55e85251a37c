//! `merge`: a full model directory.

use anyhow::Result;
use monteclora_converters::{DType, ModelFiles, merge_dir};

use super::{print, read_effective};
use crate::cli::{DtypeArg, MergeArgs};
use crate::hub;

pub(super) fn run(args: &MergeArgs) -> Result<()> {
    let adapter = read_effective(&args.adapter, args.force)?;
    let base = hub::locate(&args.model.model_id, &args.model.options.hub())?;
    let files = ModelFiles::open(&base.dir)?;
    let dtype = match args.model.options.dtype {
        DtypeArg::Auto => None,
        DtypeArg::F32 => Some(DType::F32),
        DtypeArg::Bf16 => Some(DType::BF16),
        DtypeArg::F16 => Some(DType::F16),
    };
    let report = merge_dir(&files, &adapter, &args.output, dtype)?;
    print(&format!(
        "wrote {} ({} tensors merged, {} copied)\n  rounding: largest error {:.3e}, {:.3e} of the update's norm; {:.2} % of the \
         updated entries are stored as if there had been no update",
        args.output.display(),
        report.n_merged,
        report.n_copied,
        report.max_abs_error,
        report.relative_error,
        100.0 * report.update_lost
    ))
}
