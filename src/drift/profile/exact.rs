//! Numbers in JSON that are compared with others, read to the last bit: the JSON library's own reading of a number may be one step off.

use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer, de};
use serde_json::value::RawValue;

use crate::drift::grid::{EDGES_MAX, Grid};

pub(super) fn serialize<S: Serializer>(grid: &Grid, serializer: S) -> Result<S::Ok, S::Error> {
    grid.edges().serialize(serializer)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Grid, D::Error> {
    let raw = Box::<RawValue>::deserialize(deserializer)?;
    let inner = raw.get().trim().strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let inner = inner.ok_or_else(|| de::Error::custom("expected a list of edges"))?;
    let texts = inner.split(',').take(EDGES_MAX + 1);
    let edges: Result<Vec<f64>, _> = texts.map(|text| text.trim().parse()).collect();
    let edges = edges.map_err(|_| de::Error::custom("expected edges that are numbers"))?;
    Grid::try_from(edges).map_err(de::Error::custom)
}

/// The same for one number.
pub(super) mod number {
    use serde::{Deserialize as _, Deserializer, Serializer, de};
    use serde_json::value::RawValue;

    pub(in crate::drift::profile) fn serialize<S: Serializer>(
        number: &f64,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(*number)
    }

    pub(in crate::drift::profile) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<f64, D::Error> {
        let raw = Box::<RawValue>::deserialize(deserializer)?;
        let number = raw.get().trim().parse().ok().filter(|number: &f64| number.is_finite());
        number.ok_or_else(|| de::Error::custom("expected a number"))
    }
}
