//! A decoder's architecture, read from a Hugging Face `config.json` of any generation.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::model::{Error, Result};

/// Supported families; all are Llama-shaped and differ in biases, norms and windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`, SmolLM2 among them.
    Llama,
    /// `MistralForCausalLM`.
    Mistral,
    /// `Qwen2ForCausalLM`: biases on q, k and v.
    Qwen2,
    /// `Qwen3ForCausalLM`: norms on the heads of q and k.
    Qwen3,
}

/// A decoder's sizes and switches.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Architecture family.
    pub family: Family,
    /// Vocabulary entries.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Entries a head; need not be `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Longest sequence the model was made for.
    pub max_position_embeddings: usize,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Frequencies of the rotary embedding, `[head_dim / 2]`, radians a position.
    pub inverse_frequencies: Vec<f32>,
    /// Keys a query may look back on, a layer; all when none.
    pub windows: Vec<Option<usize>>,
}

impl ModelConfig {
    /// Reads `config.json` in `dir`.
    ///
    /// # Errors
    /// A missing file, an unknown architecture, and every feature this decoder does not compute, each by its key.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| Error::Io {
            path: path.clone(),
            source,
        })?;
        let json: Value = serde_json::from_str(&text).map_err(|source| Error::Json {
            path: path.clone(),
            source,
        })?;
        Reader { json: &json, path }.config()
    }
}

struct Reader<'a> {
    json: &'a Value,
    path: PathBuf,
}

impl Reader<'_> {
    fn refuse(&self, key: &str, problem: impl Into<String>) -> Error {
        Error::Config {
            path: self.path.clone(),
            key: key.to_owned(),
            problem: problem.into(),
        }
    }

    fn present(&self, key: &str) -> Option<&Value> {
        self.json.get(key).filter(|v| !v.is_null())
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.optional_size(key)?
            .ok_or_else(|| self.refuse(key, "missing; is this the config.json of a decoder?"))
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.present(key)
            .map(|v| {
                v.as_u64()
                    .filter(|n| *n > 0 && *n < 1 << 32)
                    .map(|n| n as usize)
                    .ok_or_else(|| {
                        self.refuse(key, format!("expected a positive whole number, found {v}"))
                    })
            })
            .transpose()
    }

    fn number(&self, from: &Value, key: &str) -> Result<Option<f64>> {
        from.get(key)
            .filter(|v| !v.is_null())
            .map(|v| {
                v.as_f64()
                    .filter(|x| x.is_finite() && *x > 0.0)
                    .ok_or_else(|| {
                        self.refuse(key, format!("expected a positive number, found {v}"))
                    })
            })
            .transpose()
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.present(key)
            .map(|v| {
                v.as_bool()
                    .ok_or_else(|| self.refuse(key, format!("expected true or false, found {v}")))
            })
            .transpose()
    }

    fn family(&self) -> Result<Family> {
        let name = self
            .present("model_type")
            .and_then(Value::as_str)
            .unwrap_or("absent");
        match name {
            "llama" => Ok(Family::Llama),
            "mistral" => Ok(Family::Mistral),
            "qwen2" => Ok(Family::Qwen2),
            "qwen3" => Ok(Family::Qwen3),
            other => Err(self.refuse(
                "model_type",
                format!("`{other}` is not supported; supported are llama, mistral, qwen2, qwen3"),
            )),
        }
    }

    fn config(&self) -> Result<ModelConfig> {
        let family = self.family()?;
        if let Some(quantization) = self.present("quantization_config") {
            let method = quantization
                .get("quant_method")
                .and_then(Value::as_str)
                .unwrap_or("unknown");
            return Err(self.refuse(
                "quantization_config",
                format!("the weights are quantised ({method}); use the full-precision checkpoint, or `import-gguf` for a GGUF file"),
            ));
        }
        for key in ["hidden_act", "hidden_activation"] {
            match self.present(key).map(|v| v.as_str().unwrap_or("")) {
                None | Some("silu" | "swish") => {}
                Some(other) => {
                    return Err(self.refuse(
                        key,
                        format!("activation `{other}` is not supported; only silu is"),
                    ));
                }
            }
        }
        let hidden_size = self.size("hidden_size")?;
        let num_attention_heads = self.size("num_attention_heads")?;
        let num_key_value_heads = self
            .optional_size("num_key_value_heads")?
            .unwrap_or(num_attention_heads);
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(self.refuse("num_key_value_heads", "does not divide num_attention_heads"));
        }
        let head_dim = match self.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if family == Family::Qwen3 => 128,
            None => hidden_size / num_attention_heads,
        };
        if !head_dim.is_multiple_of(2) {
            return Err(self.refuse(
                "head_dim",
                format!("{head_dim} is odd; rotary embedding needs pairs"),
            ));
        }
        let num_hidden_layers = self.size("num_hidden_layers")?;
        let max_position_embeddings = self
            .optional_size("max_position_embeddings")?
            .unwrap_or(2048);
        // All four families of transformers take a missing key as false.
        let tie_word_embeddings = self.flag("tie_word_embeddings")?.unwrap_or(false);
        Ok(ModelConfig {
            family,
            vocab_size: self.size("vocab_size")?,
            hidden_size,
            intermediate_size: self.size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: self.number(self.json, "rms_norm_eps")?.unwrap_or(1e-6),
            max_position_embeddings,
            tie_word_embeddings,
            inverse_frequencies: self.inverse_frequencies(head_dim)?,
            windows: self.windows(family, num_hidden_layers)?,
        })
    }

    fn windows(&self, family: Family, layers: usize) -> Result<Vec<Option<usize>>> {
        let window = self.optional_size("sliding_window")?;
        let none = vec![None; layers];
        match family {
            Family::Llama => Ok(none),
            Family::Mistral => Ok(vec![window; layers]),
            Family::Qwen2 | Family::Qwen3 => {
                if let Some(types) = self.present("layer_types").and_then(Value::as_array) {
                    if types.len() != layers {
                        return Err(self.refuse(
                            "layer_types",
                            format!("has {} entries for {layers} layers", types.len()),
                        ));
                    }
                    return types
                        .iter()
                        .map(|t| match t.as_str() {
                            Some("full_attention") => Ok(None),
                            Some("sliding_attention") if window.is_some() => Ok(window),
                            _ => Err(self.refuse("layer_types", format!("{t} is not supported"))),
                        })
                        .collect();
                }
                if !self.flag("use_sliding_window")?.unwrap_or(false) {
                    return Ok(none);
                }
                let first = self.optional_size("max_window_layers")?.unwrap_or(28);
                Ok((0..layers)
                    .map(|l| if l >= first { window } else { None })
                    .collect())
            }
        }
    }

    /// `theta^(-2i/d)`, rescaled as `rope_scaling` (transformers 4) or `rope_parameters` (5) asks.
    fn inverse_frequencies(&self, head_dim: usize) -> Result<Vec<f32>> {
        let empty = Value::Null;
        let (key, scaling) = ["rope_parameters", "rope_scaling"]
            .iter()
            .find_map(|key| self.present(key).map(|v| (*key, v)))
            .unwrap_or(("rope_scaling", &empty));
        let theta = match self.number(scaling, "rope_theta")? {
            Some(theta) => theta,
            None => self.number(self.json, "rope_theta")?.unwrap_or(10_000.0),
        };
        if let Some(partial) = self
            .number(self.json, "partial_rotary_factor")?
            .or(self.number(scaling, "partial_rotary_factor")?)
            && partial != 1.0
        {
            return Err(self.refuse(
                "partial_rotary_factor",
                format!("{partial} is not supported; only 1.0 is"),
            ));
        }
        // transformers raises the base to an f32 exponent and inverts in f32.
        let plain: Vec<f32> = (0..head_dim / 2)
            .map(|i| 1.0 / (theta as f32).powf((2 * i) as f32 / head_dim as f32))
            .collect();
        let kind = ["rope_type", "type"]
            .iter()
            .find_map(|k| scaling.get(k).and_then(Value::as_str))
            .unwrap_or("default");
        let needed = |name: &str| -> Result<f64> {
            self.number(scaling, name)?.ok_or_else(|| {
                self.refuse(
                    &format!("{key}.{name}"),
                    format!("missing; rope type `{kind}` needs it"),
                )
            })
        };
        match kind {
            "default" => Ok(plain),
            "linear" => {
                let factor = needed("factor")? as f32;
                Ok(plain.into_iter().map(|f| f / factor).collect())
            }
            "llama3" => {
                let factor = needed("factor")?;
                let low = needed("low_freq_factor")?;
                let high = needed("high_freq_factor")?;
                let old = needed("original_max_position_embeddings")?;
                Ok(plain
                    .into_iter()
                    .map(|f| llama3_frequency(f, factor, low, high, old))
                    .collect())
            }
            other => Err(self.refuse(
                &format!("{key}.rope_type"),
                format!("`{other}` is not supported; supported are default, linear, llama3"),
            )),
        }
    }
}

/// Llama 3's rescaling: long wavelengths are divided by `factor`, short ones kept, those between interpolated.
fn llama3_frequency(frequency: f32, factor: f64, low: f64, high: f64, old_context: f64) -> f32 {
    let wavelength = 2.0 * std::f64::consts::PI / f64::from(frequency);
    let f = f64::from(frequency);
    let scaled = if wavelength > old_context / low {
        f / factor
    } else if wavelength < old_context / high {
        f
    } else {
        let smooth = (old_context / wavelength - low) / (high - low);
        (1.0 - smooth) * f / factor + smooth * f
    };
    scaled as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(json: Value) -> Result<ModelConfig> {
        Reader {
            json: &json,
            path: "config.json".into(),
        }
        .config()
    }

    fn llama() -> Value {
        json!({"model_type": "llama", "vocab_size": 10, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
               "num_attention_heads": 2, "rms_norm_eps": 1e-5})
    }

    fn with(key: &str, value: Value) -> Value {
        let mut json = llama();
        json[key] = value;
        json
    }

    #[test]
    fn both_generations_of_rope_keys_are_read() -> Result<()> {
        let old = read(with("rope_theta", json!(500.0)))?;
        let new = read(with(
            "rope_parameters",
            json!({"rope_type": "default", "rope_theta": 500.0}),
        ))?;
        assert_eq!(old, new);
        assert_ne!(old.inverse_frequencies, read(llama())?.inverse_frequencies);
        Ok(())
    }

    #[test]
    fn llama3_scaling_keeps_short_and_divides_long_wavelengths() {
        assert_eq!(llama3_frequency(1.0, 8.0, 1.0, 4.0, 8192.0), 1.0);
        assert_eq!(llama3_frequency(1e-5, 8.0, 1.0, 4.0, 8192.0), 1.25e-6);
        let between = llama3_frequency(2e-3, 8.0, 1.0, 4.0, 8192.0);
        assert!(between < 2e-3 && between > 2.5e-4);
    }

    #[test]
    fn what_is_not_computed_is_refused_by_key() {
        for (key, value) in [
            ("model_type", json!("gpt2")),
            ("hidden_act", json!("gelu")),
            ("quantization_config", json!({"quant_method": "gptq"})),
            ("rope_scaling", json!({"rope_type": "yarn", "factor": 2.0})),
            ("rope_scaling", json!({"rope_type": "linear"})),
            ("num_hidden_layers", json!(-3)),
            ("head_dim", json!(3)),
            ("partial_rotary_factor", json!(0.5)),
            ("num_key_value_heads", json!(3)),
        ] {
            let error = read(with(key, value)).expect_err(key).to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }

    #[test]
    fn windows_follow_the_family() -> Result<()> {
        let mut mistral = with("sliding_window", json!(7));
        mistral["model_type"] = json!("mistral");
        assert_eq!(read(mistral.clone())?.windows, [Some(7), Some(7)]);
        mistral["model_type"] = json!("qwen2");
        assert_eq!(read(mistral.clone())?.windows, [None, None]);
        mistral["use_sliding_window"] = json!(true);
        mistral["max_window_layers"] = json!(1);
        assert_eq!(read(mistral)?.windows, [None, Some(7)]);
        Ok(())
    }
}
