//! Quantisation while loading: the ISQ of mistral.rs.

use candle_core::Device;
use mistralrs_core::{IsqType, parse_isq_value};

use crate::error::{Error, Result};

/// Parses the name of a quantisation type for `device`: `8`, `Q4K`, ... as mistral.rs spells them.
///
/// # Errors
/// Returns [`Error::Problem`] for an unknown name, and for a type that the device does not support.
pub fn parse_in_situ_quant(name: &str, device: &Device) -> Result<IsqType> {
    parse_isq_value(name, Some(device)).map_err(|message| Error::setting("in_situ_quant", message))
}
