//! Values in base64, as 32-bit floats where those have each of them.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

/// Little-endian floats.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packed {
    F32(String),
    F64(String),
}

impl Packed {
    pub fn new(values: &[f64]) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "kept only where nothing is lost")]
        let narrow = |value: f64| value as f32;
        if values.iter().all(|value| f64::from(narrow(*value)) == *value) {
            let bytes: Vec<u8> =
                values.iter().flat_map(|value| narrow(*value).to_le_bytes()).collect();
            return Self::F32(STANDARD.encode(bytes));
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::F64(STANDARD.encode(bytes))
    }

    /// `None` when it is not base64, or not a whole number of floats.
    pub fn values(&self) -> Option<Vec<f64>> {
        let (Self::F32(text) | Self::F64(text)) = self;
        let bytes = STANDARD.decode(text).ok()?;
        match self {
            Self::F32(_) => {
                let (floats, rest) = bytes.as_chunks::<4>();
                let values = floats.iter().map(|float| f64::from(f32::from_le_bytes(*float)));
                rest.is_empty().then(|| values.collect())
            }
            Self::F64(_) => {
                let (floats, rest) = bytes.as_chunks::<8>();
                let values = floats.iter().map(|float| f64::from_le_bytes(*float));
                rest.is_empty().then(|| values.collect())
            }
        }
    }
}
