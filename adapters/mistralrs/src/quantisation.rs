//! Quantisation while loading, mistral.rs's ISQ.

use candle_core::Device;
use mistralrs_core::{IsqType, parse_isq_value};

use crate::error::{Error, Result};

/// The type that `name` stands for on `device`: `8`, `Q4K`, ... as mistral.rs spells them.
///
/// # Errors
/// [`Error::Problem`] for an unknown name, and for a type that the device does not have.
pub fn parse_in_situ_quant(name: &str, device: &Device) -> Result<IsqType> {
    parse_isq_value(name, Some(device)).map_err(|message| Error::setting("in_situ_quant", message))
}
