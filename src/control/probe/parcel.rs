//! A named tensor on its way to the child process, or back.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::domain::{NamedTensor, Tensor};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in super::super) struct Parcel {
    name: String,
    datatype: String,
    shape: Vec<usize>,
    /// As base64.
    data: String,
}

impl Parcel {
    pub(in super::super) fn new(name: &str, tensor: &Tensor) -> Self {
        Self {
            name: name.to_owned(),
            datatype: tensor.datatype().name().to_owned(),
            shape: tensor.shape().to_vec(),
            data: STANDARD.encode(tensor.data()),
        }
    }

    /// # Errors
    /// When it is none that [`Parcel::new`] makes.
    pub(in super::super) fn open(&self) -> Result<NamedTensor, String> {
        let wrong = |what: &dyn std::fmt::Display| format!("tensor '{}': {what}", self.name);
        let datatype = self.datatype.parse().map_err(|error| wrong(&error))?;
        let data = STANDARD.decode(&self.data).map_err(|error| wrong(&error))?;
        let shape = self.shape.iter().copied().collect();
        let tensor = Tensor::new(datatype, shape, data.into()).map_err(|error| wrong(&error))?;
        Ok(NamedTensor { name: self.name.clone(), tensor })
    }
}

/// Of one request.
pub(in super::super) fn pack(inputs: &[NamedTensor]) -> Vec<Parcel> {
    inputs.iter().map(|input| Parcel::new(&input.name, &input.tensor)).collect()
}

/// # Errors
/// As [`Parcel::open`].
pub(in super::super) fn unpack(parcels: &[Parcel]) -> Result<Vec<NamedTensor>, String> {
    parcels.iter().map(Parcel::open).collect()
}
