//! `serve`: mistral.rs's OpenAI-compatible server with adapters loaded.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail};
use mistralrs_monteclora::{
    AdapterSection, ConfigSource, Error as ServeError, ModelSection, Scoring, ServeConfig,
    ServeFile, Wanted, serve,
};
use monteclora_converters::{DType, Problem};

use super::named_base::named_by;
use crate::allocator;
use crate::cli::ServeArgs;
use crate::hub::{self, HubOptions, OfGguf};
use crate::scoring::DecoderScoring;

pub(super) fn run(args: &ServeArgs) -> Result<()> {
    let config = configuration(args)?;
    let source: Option<Arc<ConfigSource>> = args.config.is_some().then(|| {
        let args = args.clone();
        let source: Arc<ConfigSource> = Arc::new(move || {
            configuration(&args).map_err(|error| match error.downcast::<ServeError>() {
                Ok(error) => error,
                Err(error) => ServeError::setting("configuration", format!("{error:#}")),
            })
        });
        source
    });
    let scheme = if config.tls.is_some() {
        "https"
    } else {
        "http"
    };
    let ui = config.ui;
    serve(&config, source, |address| {
        let page = match ui {
            true => format!("; its page is {scheme}://{address}/"),
            false => String::new(),
        };
        tracing::info!("serving on {scheme}://{address}; stop with ctrl-c{page}");
    })?;
    Ok(())
}

/// The configuration from the arguments and the file that they name.
fn configuration(args: &ServeArgs) -> Result<ServeConfig> {
    let first = args.adapters.first().and_then(|text| text.split_once('='));
    let model_id = match (&args.model_id, first) {
        (None, Some((_, path))) => Some(named_by(Path::new(path))?),
        (model_id, _) => model_id.clone(),
    };
    let mut file = match (&args.config, model_id) {
        (Some(path), _) => ServeFile::read(path)?,
        (None, Some(model_id)) => ServeFile {
            models: vec![model_section(&model_id, args)?],
            ..ServeFile::from_environment()?
        },
        (None, None) => {
            bail!(Problem::usage(
                "serve needs -c serve.toml, -m BASE, or --adapter ALIAS=PATH"
            ));
        }
    };
    if let Some(host) = &args.host {
        file.server.host.clone_from(host);
    }
    if let Some(port) = args.port {
        file.server.port = port;
    }
    let mut config = resolved(&file, &args.options.token_source)?;
    config.force = args.force;
    Ok(config)
}

/// Resolves `file` into a configuration that scores answers with our decoder.
pub(super) fn resolved(file: &ServeFile, token_source: &str) -> Result<ServeConfig> {
    let token_source = token_source.to_owned();
    let scoring: Arc<dyn Scoring> = Arc::new(DecoderScoring {
        token_source: token_source.clone(),
    });
    let locate = move |wanted: &Wanted<'_>| -> Result<PathBuf, ServeError> {
        let options = HubOptions {
            revision: wanted.revision.map(str::to_owned),
            token_source: token_source.clone(),
        };
        let dtype = match wanted.weights {
            Some(held) if held.in_bf16 => DType::BF16,
            _ => DType::F32,
        };
        let found = hub::locate_as(wanted.id, &options, OfGguf::Import(dtype));
        let found = found
            .map_err(|error| ServeError::not_found(Path::new(wanted.id), format!("{error:#}")))?;
        if wanted.is_gguf() && wanted.weights.is_some_and(|held| !held.quantised) {
            tracing::warn!(
                "{}: mistral.rs holds its weights as {dtype}, decoded to `{}`; in serve.toml, in_situ_quant = \"8\" below \
                 [models.quantization] halves that or better (\"4\" can round an adapter's update away)",
                wanted.id,
                found.dir.display()
            );
        }
        Ok(found.dir)
    };
    let mut config = file.resolve(&locate)?;
    config.reclaim = Some(allocator::return_freed_memory);
    Ok(config.with_scoring(&scoring))
}

fn model_section(model_id: &str, args: &ServeArgs) -> Result<ModelSection> {
    let adapters = args
        .adapters
        .iter()
        .map(|text| match text.split_once('=') {
            Some((alias, source)) if !alias.is_empty() && !source.is_empty() => {
                Ok(AdapterSection {
                    kind: None,
                    alias: alias.to_owned(),
                    source: source.to_owned(),
                    revision: None,
                    draws: 0,
                })
            }
            _ => Err(Problem::usage(format!(
                "--adapter {text}: expected ALIAS=PATH"
            ))),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let dtype = args.options.dtype.0;
    let mut section = ModelSection {
        model_id: model_id.to_owned(),
        revision: args.options.revision.clone(),
        dtype: (dtype != "auto").then(|| dtype.to_owned()),
        chat_template: args.options.chat_template.clone(),
        adapters,
        ..ModelSection::default()
    };
    section.device.cpu = args.options.cpu;
    section.uncertainty.enabled = args.uncertainty;
    Ok(section)
}
