//! Whether a base's weights are quantised: what config.json declares, or what the tensors show.

use serde_json::{Map, Value};

use super::ModelFiles;
use super::mlx::Mlx;
use crate::tensors::dtype::DType;

/// Ends of names that only quantised weights have beside them, and what writes them.
const MARKS: [(&str, &str); 14] = [
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight_shape", "compressed-tensors"),
    (".absmax", "bitsandbytes, 4 bits"),
    (".quant_map", "bitsandbytes, 4 bits"),
    (".SCB", "bitsandbytes, 8 bits"),
    (".weight_scale_inv", "FP8 in blocks"),
    (".weight_scale", "FP8 or INT8"),
    (".input_scale", "FP8 or INT8"),
    ("_proj.scales", "MLX"),
    ("embed_tokens.scales", "MLX"),
    ("_proj_blocks", "MXFP4"),
    ("_proj_scales", "MXFP4"),
];

/// What to do with weights in blocks that are not read.
pub(crate) const FIX: &str = "use the full-precision model that it was made from; a GGUF file (F16, Q8_0, Q4_0 to Q6_K) and a directory of \
mlx-lm's affine 4 or 8 bits are read as they are";

/// The key of config.json that says that the weights are quantised, and the method.
pub(crate) fn declared(config: &Map<String, Value>) -> Option<(&'static str, String)> {
    let keys = ["quantization_config", "compression_config", "quantization"];
    let found = keys.into_iter().find_map(|key| {
        let value = config.get(key).filter(|value| !value.is_null())?;
        Some((key, value))
    });
    let (key, value) = found?;
    let bits = value.get("bits").and_then(Value::as_u64);
    let method = match (value.get("quant_method").and_then(Value::as_str), bits) {
        (Some(method), _) => method.to_owned(),
        // mlx-lm names no method.
        (None, Some(bits)) if value.get("group_size").is_some() => {
            let unread = Mlx::of(config).and_then(|mlx| mlx.unread());
            let unread = unread.map_or(String::new(), |unread| format!(": {unread}"));
            format!("MLX, {bits} bits{unread}")
        }
        _ => "unknown method".to_owned(),
    };
    Some((key, method))
}

impl ModelFiles {
    /// How the weights are quantised, if they are: their blocks, the method named in `config.json`, or what the tensors show.
    pub fn quantization(&self) -> Option<String> {
        if let Some(blocks) = self.blocks() {
            return Some(blocks);
        }
        if let Some((_, method)) = declared(self.config()) {
            return Some(method);
        }
        let marked = self.names().find_map(|name| {
            let (_, method) = MARKS.iter().find(|(mark, _)| name.ends_with(mark))?;
            Some(format!(
                "{method}: `{}` holds tensor `{name}`",
                self.file_of(name)
            ))
        });
        marked.or_else(|| self.no_floats())
    }

    /// The weights that are no real numbers, if there are any.
    fn no_floats(&self) -> Option<String> {
        let of = |name: &str| {
            let (dtype, _) = self.info(name)?;
            (name.ends_with(".weight") && !dtype.is_float()).then_some(dtype)
        };
        let first = self.names().find(|name| of(name).is_some())?;
        let dtype = of(first)?;
        let n_more = self.names().filter(|name| of(name) == Some(dtype)).count() - 1;
        let more = match n_more {
            0 => String::new(),
            n => format!(" and {n} more are"),
        };
        Some(format!(
            "{}: tensor `{first}` in `{}`{more} {dtype}",
            described(dtype),
            self.file_of(first)
        ))
    }

    /// The name of the file that holds the tensor called `name`.
    pub(crate) fn file_of(&self, name: &str) -> String {
        let file = self.weights.path_of(name).and_then(|path| path.file_name());
        file.map_or_else(String::new, |file| file.to_string_lossy().into_owned())
    }
}

/// What weights of a type that is none of real numbers most likely are.
fn described(dtype: DType) -> &'static str {
    match dtype {
        DType::F8E4M3 | DType::F8E5M2 => "8-bit floating point",
        DType::I8 => "8-bit integers",
        DType::U8 => "packed 4-bit or 8-bit values",
        DType::U32 | DType::I32 => "values packed into 32-bit integers",
        _ => "integers",
    }
}
