//! Which features the tensors of a model have, what they are called, and their values row by row.
//!
//! The rule, for an input or output `x`, the rows of which have `k` elements (without the axis of the
//! batch, if there is one):
//!
//! | rows of `x` | features |
//! | --- | --- |
//! | one element | `x` |
//! | 2 to [`ELEMENTS_MAX`] elements, whatever their axes | `x[0]` … `x[k-1]`, row-major |
//! | more, or a number that varies; numbers only | `length(x)` if it varies, `mean(x)`, `std(x)`, `min(x)`, `max(x)`, `norm(x)`, `saturated(x)`, `projection(x)[0]` … `[15]`, `mmd(x)` |
//! | an output of one axis, floats, 2 or more | besides, `class(x)`, `confidence(x)`, `margin(x)`, `entropy(x)`, where the row is a distribution |
//!
//! Names are unique among inputs and among outputs; [`Feature::label`] is unique in a model.

use serde::{Deserialize, Serialize};

use super::scored;
use super::wide;
use crate::domain::{DataType, Dim, TensorSpec};

/// A row with more elements is summed up, not watched element by element.
pub const ELEMENTS_MAX: usize = 256;
/// Features of one model.
pub const FEATURES_MAX: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Input,
    Output,
}

/// What of a row a feature is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    Element(usize),
    /// Place of the largest score; a category.
    Class,
    /// The largest score.
    Confidence,
    /// The largest score less the second.
    Margin,
    /// `-Σ p ln p`
    Entropy,
    /// Number of elements.
    Length,
    Mean,
    Std,
    Min,
    Max,
    Norm,
    /// Share of the elements that are the row's smallest or largest.
    Saturated,
    /// One of the numbers of a random projection.
    Projection(usize),
    /// All of them, for the distance of means of random features.
    Mmd,
}

/// One number or category for each row.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Feature {
    pub name: String,
    pub role: Role,
    pub tensor: String,
    pub part: Part,
    #[serde(with = "by_name")]
    pub datatype: DataType,
}

mod by_name {
    use serde::{Deserialize as _, Deserializer, Serializer, de};

    use crate::domain::DataType;

    pub(super) fn serialize<S: Serializer>(
        datatype: &DataType,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(datatype.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<DataType, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl Feature {
    fn new(role: Role, tensor: &str, datatype: DataType, part: Part, single: bool) -> Self {
        let name = match part {
            Part::Element(_) if single => tensor.to_owned(),
            Part::Element(at) => format!("{tensor}[{at}]"),
            Part::Projection(at) => format!("projection({tensor})[{at}]"),
            Part::Class => format!("class({tensor})"),
            Part::Confidence => format!("confidence({tensor})"),
            Part::Margin => format!("margin({tensor})"),
            Part::Entropy => format!("entropy({tensor})"),
            Part::Length => format!("length({tensor})"),
            Part::Mean => format!("mean({tensor})"),
            Part::Std => format!("std({tensor})"),
            Part::Min => format!("min({tensor})"),
            Part::Max => format!("max({tensor})"),
            Part::Norm => format!("norm({tensor})"),
            Part::Saturated => format!("saturated({tensor})"),
            Part::Mmd => format!("mmd({tensor})"),
        };
        Self { name, role, tensor: tensor.to_owned(), part, datatype }
    }

    /// `in x[0]`, `out class(y)`: an input and an output of one name are two features.
    pub fn label(&self) -> String {
        let role = if self.role == Role::Input { "in" } else { "out" };
        format!("{role} {}", self.name)
    }

    /// One of a row's scores made by [`scored`], which only a row that is a distribution has.
    pub fn of_scores(&self) -> bool {
        matches!(self.part, Part::Class | Part::Confidence | Part::Margin | Part::Entropy)
    }
}

/// The features of one tensor of a signature. `batched`: its first axis is that of the rows.
pub fn of_spec(role: Role, spec: &TensorSpec, batched: bool) -> Vec<Feature> {
    let row = spec.shape.as_ref().map(|dims| &dims[usize::from(batched && !dims.is_empty())..]);
    let sizes: Option<Vec<usize>> = row.and_then(|dims| {
        let fixed = |dim: &Dim| if let Dim::Fixed(size) = dim { Some(*size) } else { None };
        dims.iter().map(fixed).collect()
    });
    of_rows(role, &spec.name, spec.datatype, sizes.as_deref())
}

/// The features of a tensor whose rows have this shape; `None` when it varies.
pub fn of_rows(
    role: Role,
    tensor: &str,
    datatype: DataType,
    shape: Option<&[usize]>,
) -> Vec<Feature> {
    let make = |part: Part, single: bool| Feature::new(role, tensor, datatype, part, single);
    let elements =
        shape.and_then(|sizes| sizes.iter().try_fold(1_usize, |all, size| all.checked_mul(*size)));
    let mut features: Vec<Feature> = match elements {
        Some(0) => Vec::new(),
        Some(elements @ 1..=ELEMENTS_MAX) => {
            (0..elements).map(|at| make(Part::Element(at), elements == 1)).collect()
        }
        // Texts have no mean.
        _ if datatype == DataType::Bytes => Vec::new(),
        _ => {
            let length = elements.is_none().then_some(Part::Length);
            let parts = length.into_iter().chain(wide::PARTS);
            let projection = (0..wide::DIMENSIONS).map(Part::Projection).chain([Part::Mmd]);
            parts.chain(projection).map(|part| make(part, false)).collect()
        }
    };
    let floats =
        matches!(datatype, DataType::Fp16 | DataType::Bf16 | DataType::Fp32 | DataType::Fp64);
    let scores = shape.is_some_and(|sizes| sizes.len() == 1 && sizes[0] >= 2);
    if role == Role::Output && floats && scores {
        features.extend(scored::PARTS.map(|part| make(part, false)));
    }
    features
}

/// What a feature has in one row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    Number(f64),
    Text(&'a [u8]),
    /// All numbers of a row's random projection.
    Vector(&'a [f64; wide::DIMENSIONS]),
    Missing,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(
        role: Role,
        datatype: DataType,
        shape: &[Option<usize>],
        batched: bool,
    ) -> Vec<String> {
        let dim = |size: &Option<usize>| size.map_or(Dim::Dynamic(None), Dim::Fixed);
        let shape = Some(shape.iter().map(dim).collect());
        let spec = TensorSpec { name: "x".into(), datatype, shape };
        of_spec(role, &spec, batched).into_iter().map(|feature| feature.name).collect()
    }

    #[test]
    fn names_follow_the_rule() {
        use DataType::{Bytes, Fp32, Int64};
        let scores = ["class(x)", "confidence(x)", "margin(x)", "entropy(x)"];
        assert_eq!(names(Role::Input, Fp32, &[None], true), ["x"]);
        assert_eq!(names(Role::Input, Fp32, &[None, Some(1)], true), ["x"]);
        assert_eq!(names(Role::Input, Fp32, &[None, Some(2)], true), ["x[0]", "x[1]"]);
        assert_eq!(names(Role::Input, Bytes, &[None, Some(2)], true), ["x[0]", "x[1]"]);
        assert_eq!(names(Role::Input, Fp32, &[Some(2), Some(2)], false).len(), 4);
        assert_eq!(names(Role::Output, Fp32, &[None, Some(2)], true)[2..], scores);
        assert_eq!(names(Role::Output, Int64, &[None], true), ["x"]);
        assert_eq!(names(Role::Output, Fp32, &[None, Some(2), Some(2)], true).len(), 4);
        let wide = names(Role::Input, Int64, &[None, None], true);
        assert_eq!((wide[0].as_str(), wide.len()), ("length(x)", 24));
        assert_eq!(
            names(Role::Input, Fp32, &[None, Some(3), Some(224), Some(224)], true).len(),
            23
        );
        assert_eq!(names(Role::Output, Fp32, &[None, Some(1000)], true)[23..], scores);
        assert!(names(Role::Input, Bytes, &[None, None], true).is_empty());
    }
}
