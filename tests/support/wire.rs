//! Models made by hand: as much of the protobuf wire format as a few nodes take.

pub const FLOAT: u64 = 1;
pub const INT64: u64 = 7;

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(u8::try_from(value & 0x7f).unwrap() | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).unwrap());
}

pub fn number(field: u64, value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    varint(field << 3, &mut out);
    varint(value, &mut out);
    out
}

pub fn bytes(field: u64, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    varint(field << 3 | 2, &mut out);
    varint(value.len() as u64, &mut out);
    out.extend_from_slice(value);
    out
}

/// A tensor's name, type and shape; `None` is a dimension of any size.
pub fn info(name: &str, kind: u64, dims: &[Option<u64>]) -> Vec<u8> {
    let dim = |(at, dim): (usize, &Option<u64>)| match dim {
        Some(size) => bytes(1, &number(1, *size)),
        None => bytes(1, &bytes(2, format!("{name}{at}").as_bytes())),
    };
    let shape: Vec<u8> = dims.iter().enumerate().flat_map(dim).collect();
    let tensor = [number(1, kind), bytes(2, &shape)].concat();
    [bytes(1, name.as_bytes()), bytes(2, &bytes(1, &tensor))].concat()
}

pub fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> Vec<u8> {
    let inputs = inputs.iter().flat_map(|name| bytes(1, name.as_bytes()));
    let outputs = outputs.iter().flat_map(|name| bytes(2, name.as_bytes()));
    bytes(1, &inputs.chain(outputs).chain(bytes(4, op.as_bytes())).collect::<Vec<_>>())
}

pub fn model(graph: &[Vec<u8>]) -> Vec<u8> {
    let graph = [bytes(2, b"g"), graph.concat()].concat();
    let opset = [bytes(1, b""), number(2, 13)].concat();
    [number(1, 8), bytes(7, &graph), bytes(8, &opset)].concat()
}
