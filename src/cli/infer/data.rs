//! Arrays to send: from a `.npz` file, or made up from a model's metadata.

use std::io::{Read, Seek};

use anyhow::{Context, bail, ensure};
use npyz::{DType, Endianness, NpyFile, Order, TypeChar};
use serde_json::{Value, json};

use crate::domain::DataType;

/// Largest array that is read from a file or made up, in bytes.
const ARRAY_SIZE_MAX: u64 = 1 << 30;

/// One input in the form of the binary tensor extension.
#[derive(Debug, PartialEq)]
pub(super) struct Array {
    pub(super) name: String,
    pub(super) datatype: DataType,
    pub(super) shape: Vec<u64>,
    pub(super) data: Vec<u8>,
}

/// Request body of the binary tensor extension, and the length of its JSON part.
pub(super) fn request_body(arrays: &[Array]) -> (Vec<u8>, usize) {
    let inputs: Vec<Value> = arrays
        .iter()
        .map(|array| {
            json!({
                "name": array.name,
                "datatype": array.datatype.name(),
                "shape": array.shape,
                "parameters": {"binary_data_size": array.data.len()},
            })
        })
        .collect();
    let mut body = json!({ "inputs": inputs }).to_string().into_bytes();
    let json_len = body.len();
    for array in arrays {
        body.extend_from_slice(&array.data);
    }
    (body, json_len)
}

/// Every array of a `.npz` file.
pub(super) fn read_npz(file: impl Read + Seek) -> anyhow::Result<Vec<Array>> {
    let mut archive = zip::ZipArchive::new(file).context("is not a .npz file")?;
    let mut arrays = Vec::with_capacity(archive.len());
    for at in 0..archive.len() {
        let entry = archive.by_index(at)?;
        let Some(name) = npyz::npz::array_name_from_file_name(entry.name()).map(str::to_owned)
        else {
            continue;
        };
        arrays.push(read_npy(&name, entry).with_context(|| format!("array '{name}'"))?);
    }
    ensure!(!arrays.is_empty(), "holds no array");
    Ok(arrays)
}

fn read_npy(name: &str, reader: impl Read) -> anyhow::Result<Array> {
    let file = NpyFile::new(reader)?;
    let shape = file.shape().to_vec();
    let contiguous = file.order() == Order::C || shape.len() < 2;
    ensure!(contiguous, "is in Fortran order; save numpy.ascontiguousarray(x)");
    let DType::Plain(kind) = file.dtype() else { bail!("has records as elements") };
    let swapped = kind.endianness() == Endianness::Big && kind.num_bytes() != Some(1);
    ensure!(!swapped, "is big-endian; save x.astype(x.dtype.newbyteorder('<'))");
    let width = kind.num_bytes().context("has an unknown element size")?;
    let count = file.len();
    let bytes = count.checked_mul(u64::try_from(width)?).filter(|bytes| *bytes <= ARRAY_SIZE_MAX);
    let bytes = bytes.with_context(|| format!("is over the limit of {ARRAY_SIZE_MAX} bytes"))?;
    let mut raw = Vec::new();
    file.into_inner().take(bytes).read_to_end(&mut raw)?;
    ensure!(u64::try_from(raw.len())? == bytes, "is cut short");
    let datatype = match (kind.type_char(), width) {
        (TypeChar::Bool, 1) => DataType::Bool,
        (TypeChar::Int, 1) => DataType::Int8,
        (TypeChar::Int, 2) => DataType::Int16,
        (TypeChar::Int, 4) => DataType::Int32,
        (TypeChar::Int, 8) => DataType::Int64,
        (TypeChar::Uint, 1) => DataType::Uint8,
        (TypeChar::Uint, 2) => DataType::Uint16,
        (TypeChar::Uint, 4) => DataType::Uint32,
        (TypeChar::Uint, 8) => DataType::Uint64,
        (TypeChar::Float, 2) => DataType::Fp16,
        (TypeChar::Float, 4) => DataType::Fp32,
        (TypeChar::Float, 8) => DataType::Fp64,
        (TypeChar::UnicodeStr | TypeChar::ByteStr, _) => DataType::Bytes,
        _ => bail!("has elements of type {kind}, which have no datatype in the protocol"),
    };
    let data = match kind.type_char() {
        TypeChar::UnicodeStr => texts(&raw, width, count, utf32)?,
        TypeChar::ByteStr => texts(&raw, width, count, |element| Ok(element.to_vec()))?,
        _ => raw,
    };
    Ok(Array { name: name.to_owned(), datatype, shape, data })
}

/// Fixed-width texts, padded with zeros, as `BYTES` elements.
fn texts(
    raw: &[u8],
    width: usize,
    count: u64,
    decode: impl Fn(&[u8]) -> anyhow::Result<Vec<u8>>,
) -> anyhow::Result<Vec<u8>> {
    let mut data = Vec::new();
    for at in 0..usize::try_from(count)? {
        let element = raw.get(at * width..(at + 1) * width).unwrap_or_default();
        let mut text = decode(element)?;
        while text.last() == Some(&0) {
            text.pop();
        }
        push_bytes(&mut data, &text)?;
    }
    Ok(data)
}

fn utf32(element: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut text = String::new();
    for code in element.chunks_exact(4) {
        let code = u32::from_le_bytes([code[0], code[1], code[2], code[3]]);
        text.push(char::from_u32(code).context("has a text that is not Unicode")?);
    }
    Ok(text.into_bytes())
}

fn push_bytes(data: &mut Vec<u8>, element: &[u8]) -> anyhow::Result<()> {
    data.extend_from_slice(&u32::try_from(element.len())?.to_le_bytes());
    data.extend_from_slice(element);
    Ok(())
}

/// Shapes given by hand: `name=1,4`.
pub(super) fn parse_shape(text: &str) -> Result<(String, Vec<u64>), String> {
    let expected = || format!("expected NAME=SIZE,SIZE… like x=1,4, got '{text}'");
    let (name, sizes) = text.split_once('=').ok_or_else(expected)?;
    let sizes: Result<Vec<u64>, _> = sizes.split(',').map(|size| size.trim().parse()).collect();
    Ok((name.to_owned(), sizes.map_err(|_| expected())?))
}

/// Makes up an array for every input of the metadata; sizes that vary are 1.
pub(super) fn made_up(
    metadata: &Value,
    shapes: &[(String, Vec<u64>)],
) -> anyhow::Result<Vec<Array>> {
    let inputs = metadata["inputs"].as_array().context("metadata has no inputs")?;
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    let names: Vec<&str> = inputs.iter().filter_map(|input| input["name"].as_str()).collect();
    if let Some((name, _)) = shapes.iter().find(|(name, _)| !names.contains(&name.as_str())) {
        bail!("the model has no input '{name}', its inputs are {}", names.join(", "));
    }
    inputs
        .iter()
        .map(|input| {
            let name = input["name"].as_str().context("an input has no name")?.to_owned();
            let datatype: DataType = input["datatype"].as_str().unwrap_or_default().parse()?;
            let sizes = input["shape"].as_array().map(Vec::as_slice).unwrap_or_default();
            let declared = sizes.iter().map(|size| size.as_u64().unwrap_or(1)).collect();
            let given = shapes.iter().find(|(given, _)| *given == name);
            let shape: Vec<u64> = given.map_or(declared, |(_, shape)| shape.clone());
            let data = noise.array(datatype, &shape)?;
            Ok(Array { name, datatype, shape, data })
        })
        .collect()
}

/// Xorshift: the same numbers every time, so that a run can be repeated.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Between −1 and 1.
    fn unit(&mut self) -> f32 {
        let sixteen = u16::try_from(self.next() >> 48).unwrap_or(0);
        f32::from(sixteen) / f32::from(u16::MAX) * 2.0 - 1.0
    }

    fn array(&mut self, datatype: DataType, shape: &[u64]) -> anyhow::Result<Vec<u8>> {
        let count = shape.iter().try_fold(1_u64, |count, size| count.checked_mul(*size));
        let count = count.filter(|count| *count <= ARRAY_SIZE_MAX / 8);
        let count = count.with_context(|| format!("shape {shape:?} is too large"))?;
        let mut data = Vec::new();
        for _ in 0..count {
            self.element(datatype, &mut data)?;
        }
        Ok(data)
    }

    /// Whole numbers stay below 10: they are often indices into something.
    fn element(&mut self, datatype: DataType, data: &mut Vec<u8>) -> anyhow::Result<()> {
        match datatype {
            DataType::Fp16 => data.extend(half::f16::from_f32(self.unit()).to_le_bytes()),
            DataType::Bf16 => data.extend(half::bf16::from_f32(self.unit()).to_le_bytes()),
            DataType::Fp32 => data.extend(self.unit().to_le_bytes()),
            DataType::Fp64 => data.extend(f64::from(self.unit()).to_le_bytes()),
            DataType::Bool => data.push(u8::from(self.next() & 1 == 1)),
            DataType::Bytes => {
                push_bytes(data, format!("text-{}", self.next() % 10).as_bytes())?;
            }
            whole => {
                let width = whole.size().unwrap_or(1);
                data.extend_from_slice(&(self.next() % 10).to_le_bytes()[..width]);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write as _};

    use npyz::WriterBuilder as _;

    use super::*;

    fn npz(arrays: &[(&str, Vec<u8>)]) -> Cursor<Vec<u8>> {
        let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
        for (name, content) in arrays {
            archive.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
            archive.write_all(content).unwrap();
        }
        archive.finish().unwrap()
    }

    fn npy<T: npyz::AutoSerialize + Copy>(values: &[T], shape: &[u64], order: Order) -> Vec<u8> {
        let mut out = Vec::new();
        let options = npyz::WriteOptions::new().default_dtype().shape(shape).order(order);
        let mut writer = options.writer(&mut out).begin_nd().unwrap();
        writer.extend(values.iter().copied()).unwrap();
        writer.finish().unwrap();
        out
    }

    /// A file as numpy writes it, with this `descr`.
    fn raw_npy(descr: &str, len: usize, data: &[u8]) -> Vec<u8> {
        let mut header =
            format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({len},), }}");
        while (10 + header.len() + 1) % 64 != 0 {
            header.push(' ');
        }
        header.push('\n');
        let mut file = b"\x93NUMPY\x01\x00".to_vec();
        file.extend(u16::try_from(header.len()).unwrap().to_le_bytes());
        file.extend(header.as_bytes());
        file.extend(data);
        file
    }

    #[test]
    fn arrays_of_a_file_are_sent_as_they_are() {
        let x = npy(&[1.0_f32, 2.0, 3.0, 4.0], &[2, 2], Order::C);
        let utf32: Vec<u8> = "hi\0ß\0\0".chars().flat_map(|c| u32::from(c).to_le_bytes()).collect();
        let file = npz(&[("x.npy", x), ("t.npy", raw_npy("<U3", 2, &utf32)), ("readme", vec![1])]);
        let arrays = read_npz(file).unwrap();
        assert_eq!(arrays.len(), 2);
        assert_eq!((arrays[0].datatype, &arrays[0].shape[..]), (DataType::Fp32, &[2, 2][..]));
        assert_eq!(&arrays[0].data[4..8], 2.0_f32.to_le_bytes());
        assert_eq!(arrays[1].datatype, DataType::Bytes);
        assert_eq!(arrays[1].data, b"\x02\0\0\0hi\x02\0\0\0\xc3\x9f");
        let (body, json_len) = request_body(&arrays);
        let json: Value = serde_json::from_slice(&body[..json_len]).unwrap();
        assert_eq!(json["inputs"][0]["parameters"]["binary_data_size"], 16);
        assert_eq!(body.len(), json_len + 16 + arrays[1].data.len());
    }

    #[test]
    fn what_cannot_be_sent_is_refused() {
        let fortran = npy(&[1.0_f32, 2.0, 3.0, 4.0], &[2, 2], Order::Fortran);
        assert!(read_npz(npz(&[("x.npy", fortran)])).is_err());
        assert!(read_npz(npz(&[("x.npy", raw_npy(">f4", 1, &[0; 4]))])).is_err());
        assert!(read_npz(npz(&[("x.npy", raw_npy("<f4", 2, &[0; 4]))])).is_err());
        assert!(read_npz(npz(&[("x.npy", raw_npy("|O", 1, &[0; 8]))])).is_err());
        assert!(read_npz(Cursor::new(b"no zip".to_vec())).is_err());
        assert!(read_npz(npz(&[])).is_err());
    }

    #[test]
    fn made_up_arrays_fit_the_metadata() {
        let metadata = json!({"inputs": [
            {"name": "x", "datatype": "FP16", "shape": [-1, 3]},
            {"name": "n", "datatype": "INT64", "shape": [-1, -1]},
            {"name": "t", "datatype": "BYTES", "shape": [2]},
        ]});
        let arrays = made_up(&metadata, &[("n".to_owned(), vec![1, 5])]).unwrap();
        assert_eq!((arrays[0].shape.as_slice(), arrays[0].data.len()), (&[1, 3][..], 6));
        assert_eq!((arrays[1].shape.as_slice(), arrays[1].data.len()), (&[1, 5][..], 40));
        assert_eq!(arrays[2].data.len(), 2 * (4 + "text-0".len()));
        assert!(made_up(&metadata, &[("y".to_owned(), vec![1])]).is_err());
        assert!(made_up(&metadata, &[("x".to_owned(), vec![u64::MAX, 2])]).is_err());
    }

    #[test]
    fn shapes_are_read_or_refused() {
        assert_eq!(
            parse_shape("a=b"),
            Err("expected NAME=SIZE,SIZE… like x=1,4, got 'a=b'".to_owned())
        );
        assert_eq!(parse_shape("x=1, 4"), Ok(("x".to_owned(), vec![1, 4])));
        assert!(parse_shape("x").is_err());
    }
}
