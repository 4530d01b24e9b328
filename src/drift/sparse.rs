//! Lists of which most may be nothing, in a file: what is there and where, in forms that are for programs;
//! in JSON, which people read, the list as it is. For `#[serde(with)]`.

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// No list of counters is longer; a length that comes from a file is not believed beyond it.
const LEN_MAX: usize = 4096;

#[derive(Serialize)]
enum Written<'a, T> {
    All(&'a [T]),
    /// How long the list is, and what there is at which places.
    Some(usize, Vec<(usize, &'a T)>),
}

#[derive(Deserialize)]
enum Read<T> {
    All(Vec<T>),
    Some(usize, Vec<(usize, T)>),
}

pub(super) fn serialize<T, S>(values: &[T], serializer: S) -> Result<S::Ok, S::Error>
where
    T: Serialize + Default + PartialEq,
    S: Serializer,
{
    if serializer.is_human_readable() {
        return values.serialize(serializer);
    }
    let some = values.iter().enumerate().filter(|(_, value)| **value != T::default());
    let some: Vec<(usize, &T)> = some.collect();
    let written = match 2 * some.len() > values.len() {
        true => Written::All(values),
        false => Written::Some(values.len(), some),
    };
    written.serialize(serializer)
}

pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: DeserializeOwned + Default + Clone,
    D: Deserializer<'de>,
{
    if deserializer.is_human_readable() {
        return Vec::deserialize(deserializer);
    }
    let (len, some) = match Read::deserialize(deserializer)? {
        Read::All(values) => return Ok(values),
        Read::Some(len, some) => (len, some),
    };
    if len > LEN_MAX {
        return Err(D::Error::custom(format_args!("a list has {LEN_MAX} at most, got {len}")));
    }
    let mut values = vec![T::default(); len];
    for (at, value) in some {
        let place =
            values.get_mut(at).ok_or_else(|| D::Error::custom("a place beyond a list's end"))?;
        *place = value;
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Lists {
        #[serde(with = "super")]
        counts: Vec<u64>,
        #[serde(with = "super")]
        sums: Vec<f64>,
    }

    #[test]
    fn lists_are_read_as_they_were_and_empty_ones_are_short() {
        let mut lists = Lists { counts: vec![0; 256], sums: vec![0.0; 256] };
        let empty = postcard::to_stdvec(&lists).unwrap();
        assert_eq!(empty.len(), 8);
        (lists.counts[3], lists.sums[255]) = (7, -0.5);
        let bytes = postcard::to_stdvec(&lists).unwrap();
        assert_eq!(postcard::from_bytes::<Lists>(&bytes).unwrap(), lists);
        let full = Lists { counts: vec![3; 256], sums: vec![0.5; 256] };
        let bytes = postcard::to_stdvec(&full).unwrap();
        assert_eq!((bytes.len(), postcard::from_bytes(&bytes)), (6 + 256 * 9, Ok(full)));
        let json = serde_json::to_string(&lists).unwrap();
        assert!(json.starts_with(r#"{"counts":[0,0,0,7,0"#), "{json}");
        assert_eq!(serde_json::from_str::<Lists>(&json).unwrap(), lists);
    }

    #[test]
    fn lengths_and_places_from_a_file_are_not_believed() {
        // 1: the list is what there is at some places; the other one is empty.
        let made = |counts: (u64, Vec<(u64, u64)>)| {
            postcard::to_stdvec(&((1_u8, counts), (1_u8, 0_u64, Vec::<(u64, f64)>::new()))).unwrap()
        };
        let read = |bytes: &[u8]| postcard::from_bytes::<Lists>(bytes).is_ok();
        assert!(read(&made((2, vec![(1, 5)]))));
        assert!(!read(&made((2, vec![(2, 5)]))), "a place beyond the end");
        assert!(!read(&made((1 << 40, Vec::new()))), "a length beyond the limit");
        assert!(!read(&[0, 0xff, 0xff, 0xff, 0xff, 0x0f, 1]), "more than there is");
        assert!(!read(&[1, 2, 0xff, 0xff, 0xff, 0xff, 0x0f, 1]), "more places than there are");
    }
}
