//! `report`: one self-contained HTML page about a run.

use anyhow::{Result, bail};
use monteclora_converters::{Problem, files};

use super::print;
use crate::cli::ReportArgs;
use crate::report::RunFiles;

pub(super) fn run(args: &ReportArgs) -> Result<()> {
    let dir = &args.output_dir;
    if !dir.is_dir() {
        bail!(Problem::usage(format!(
            "`{}`: no such directory; give the output_dir of a training run",
            dir.display()
        )));
    }
    let page = RunFiles::read(dir)?.html()?;
    let target = args
        .output
        .clone()
        .unwrap_or_else(|| dir.join("report.html"));
    files::write_text(&target, &page)?;
    print(&format!("wrote {}; open it in a browser", target.display()))
}
