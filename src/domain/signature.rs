//! What a model takes and gives.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{DataType, Failure, NamedTensor, Tensor};

/// One dimension of a declared shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dim {
    Fixed(usize),
    /// Any size; two dimensions with one symbol are equal in a request.
    Dynamic(Option<String>),
}

/// Name, datatype and declared shape of one input or output; `shape` is `None` when the model
/// file does not say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    pub name: String,
    #[serde(with = "datatype_name")]
    pub datatype: DataType,
    pub shape: Option<Vec<Dim>>,
}

/// Inputs and outputs of a model version, in the order of its graph.
///
/// Shapes include the batch dimension. `batched` says that the first dimension of every tensor is
/// one row per example, so that requests may be joined along it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    pub inputs: Vec<TensorSpec>,
    pub outputs: Vec<TensorSpec>,
    pub batched: bool,
}

impl TensorSpec {
    /// Shape as the protocols show it: −1 for a dynamic dimension; `[-1]` when unknown.
    pub fn wire_shape(&self) -> Vec<i64> {
        match &self.shape {
            None => vec![-1],
            Some(dims) => dims.iter().map(Dim::wire).collect(),
        }
    }

    /// What is wrong with `shape` for this tensor, if anything.
    fn mismatch(&self, shape: &[usize]) -> bool {
        let Some(dims) = &self.shape else { return false };
        dims.len() != shape.len()
            || dims
                .iter()
                .zip(shape)
                .any(|(dim, got)| matches!(dim, Dim::Fixed(size) if size != got))
    }
}

impl Dim {
    pub fn wire(&self) -> i64 {
        match self {
            Self::Fixed(size) => i64::try_from(*size).unwrap_or(i64::MAX),
            Self::Dynamic(_) => -1,
        }
    }
}

/// Whether shape `is` does for who knows shape `was`: a free dimension takes what a fixed one took,
/// not the other way round; in outputs either may be free.
fn fits(was: &[i64], is: &[i64], takes: bool) -> bool {
    let dim = |(was, is): (&i64, &i64)| was == is || *is < 0 || (*was < 0 && !takes);
    was.len() == is.len() && was.iter().zip(is).all(dim)
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(size) => size.fmt(f),
            Self::Dynamic(Some(symbol)) => f.write_str(symbol),
            Self::Dynamic(None) => f.write_str("-1"),
        }
    }
}

impl Signature {
    /// What a caller of this signature would notice if `other` answered instead; `None`: nothing.
    pub fn difference(&self, other: &Self) -> Option<String> {
        for (role, ours, theirs) in
            [("input", &self.inputs, &other.inputs), ("output", &self.outputs, &other.outputs)]
        {
            if let Some(extra) =
                theirs.iter().find(|spec| !ours.iter().any(|s| s.name == spec.name))
            {
                return Some(format!("it has {role} '{}' besides", extra.name));
            }
            for spec in ours {
                let name = &spec.name;
                let Some(their) = theirs.iter().find(|their| their.name == *name) else {
                    return Some(format!("it has no {role} '{name}'"));
                };
                let (was, is) = (spec.datatype, their.datatype);
                if was != is {
                    return Some(format!("{role} '{name}' is {is}, not {was}"));
                }
                let (was, is) = (spec.wire_shape(), their.wire_shape());
                let takes = role == "input";
                if spec.shape.is_some() && their.shape.is_some() && !fits(&was, &is, takes) {
                    return Some(format!("{role} '{name}' has shape {is:?}, not {was:?}"));
                }
            }
        }
        None
    }

    pub fn output_at(&self, name: &str) -> Option<usize> {
        self.outputs.iter().position(|output| output.name == name)
    }

    /// Puts named tensors into the graph's order and checks each against its declaration.
    ///
    /// # Errors
    /// `InvalidInput` that names the input, what was expected and what came.
    pub fn bind(&self, named: Vec<NamedTensor>) -> Result<Vec<Tensor>, Failure> {
        if named.len() != self.inputs.len() {
            let expected = self.inputs.len();
            let got = named.len();
            let names = names(&self.inputs);
            return Err(Failure::invalid(format!(
                "expected {expected} inputs ({names}), got {got}"
            )));
        }
        let mut slots: Vec<Option<Tensor>> = vec![None; self.inputs.len()];
        for NamedTensor { name, tensor } in named {
            let Some(at) = self.inputs.iter().position(|input| input.name == name) else {
                let names = names(&self.inputs);
                return Err(Failure::invalid(format!(
                    "unexpected input '{name}', the model's inputs are {names}"
                )));
            };
            self.check(&self.inputs[at], &tensor)?;
            if slots[at].replace(tensor).is_some() {
                return Err(Failure::invalid(format!("input '{name}' is given twice")));
            }
        }
        // As many inputs as slots, none unknown, none twice: every slot is filled.
        let tensors: Vec<Tensor> = slots.into_iter().flatten().collect();
        self.check_rows(&tensors)?;
        Ok(tensors)
    }

    fn check(&self, spec: &TensorSpec, tensor: &Tensor) -> Result<(), Failure> {
        let name = &spec.name;
        if tensor.datatype() != spec.datatype {
            let (expected, got) = (spec.datatype, tensor.datatype());
            return Err(Failure::invalid(format!(
                "input '{name}' has datatype {got}, expected {expected}"
            )));
        }
        if spec.mismatch(tensor.shape()) {
            let expected = spec.wire_shape();
            let got = tensor.shape();
            return Err(Failure::invalid(format!(
                "input '{name}' has shape {got:?}, expected {expected:?}"
            )));
        }
        Ok(())
    }

    fn check_rows(&self, tensors: &[Tensor]) -> Result<(), Failure> {
        if !self.batched {
            return Ok(());
        }
        let rows = |tensor: &Tensor| tensor.shape().first().copied();
        let Some(first) = tensors.first() else { return Ok(()) };
        for (spec, tensor) in self.inputs.iter().zip(tensors) {
            if rows(tensor) != rows(first) {
                return Err(Failure::invalid(format!(
                    "input '{}' has batch size {:?}, input '{}' has {:?}",
                    spec.name,
                    rows(tensor).unwrap_or(0),
                    self.inputs[0].name,
                    rows(first).unwrap_or(0)
                )));
            }
        }
        match rows(first) {
            Some(0) => Err(Failure::invalid("batch size is 0, expected at least 1".to_owned())),
            _ => Ok(()),
        }
    }
}

fn names(specs: &[TensorSpec]) -> String {
    let names: Vec<String> = specs.iter().map(|spec| format!("'{}'", spec.name)).collect();
    names.join(", ")
}

mod datatype_name {
    use serde::{Deserialize, Deserializer, Serializer};

    use super::DataType;

    pub(super) fn serialize<S: Serializer>(
        datatype: &DataType,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(datatype.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<DataType, D::Error> {
        let name = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        name.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, datatype: DataType, dims: &[i64]) -> TensorSpec {
        let dim = |&dim: &i64| usize::try_from(dim).map_or(Dim::Dynamic(None), Dim::Fixed);
        TensorSpec { name: name.to_owned(), datatype, shape: Some(dims.iter().map(dim).collect()) }
    }

    #[test]
    fn what_callers_would_notice_is_a_difference() {
        let signature = |input: TensorSpec, output: TensorSpec| Signature {
            inputs: vec![input],
            outputs: vec![output],
            batched: true,
        };
        let fp32 = DataType::Fp32;
        let base = signature(spec("x", fp32, &[-1, 4]), spec("y", fp32, &[-1, 3]));
        let cases = [
            (spec("x", fp32, &[-1, 4]), spec("y", fp32, &[-1, 3]), None),
            (spec("x", fp32, &[-1, -1]), spec("y", fp32, &[-1, -1]), None),
            (spec("x", fp32, &[8, 4]), spec("y", fp32, &[-1, 3]), Some("[8, 4], not [-1, 4]")),
            (spec("x", fp32, &[-1, 5]), spec("y", fp32, &[-1, 3]), Some("[-1, 5]")),
            (spec("z", fp32, &[-1, 4]), spec("y", fp32, &[-1, 3]), Some("input 'z' besides")),
            (spec("x", DataType::Fp64, &[-1, 4]), spec("y", fp32, &[-1, 3]), Some("is FP64")),
            (spec("x", fp32, &[-1, 4]), spec("y", fp32, &[-1, 2]), Some("output 'y' has shape")),
            (spec("x", fp32, &[-1, 4]), spec("y", fp32, &[3]), Some("output 'y' has shape")),
        ];
        for (input, output, expected) in cases {
            let got = base.difference(&signature(input, output));
            match expected {
                None => assert_eq!(got, None),
                Some(part) => {
                    assert!(got.as_deref().is_some_and(|got| got.contains(part)), "{got:?}");
                }
            }
        }
    }
}
