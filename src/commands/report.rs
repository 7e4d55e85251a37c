//! `report`: one self-contained HTML page about a run.

use std::io::Write;

use anyhow::{Context, Result};

use super::{Usage, print};
use crate::cli::ReportArgs;
use crate::report::RunFiles;

pub(super) fn run(args: &ReportArgs) -> Result<()> {
    let dir = &args.output_dir;
    if !dir.is_dir() {
        return Err(Usage(format!(
            "`{}`: no such directory; give the output_dir of a training run",
            dir.display()
        ))
        .into());
    }
    let page = RunFiles::read(dir)?.html()?;
    let target = args
        .output
        .clone()
        .unwrap_or_else(|| dir.join("report.html"));
    let context = || format!("cannot write `{}`", target.display());
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => std::path::Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(parent).with_context(context)?;
    file.write_all(page.as_bytes()).with_context(context)?;
    #[cfg(unix)]
    {
        // A page is for a browser, perhaps another user's; temporary files are private.
        use std::os::unix::fs::PermissionsExt;
        let permissions = std::fs::Permissions::from_mode(0o644);
        file.as_file()
            .set_permissions(permissions)
            .with_context(context)?;
    }
    file.persist(&target).with_context(context)?;
    print(&format!("wrote {}; open it in a browser", target.display()))
}
