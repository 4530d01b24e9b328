//! Models made by hand: enough of the protobuf wire format for a few nodes.

const FLOAT: u64 = 1;
const INT64: u64 = 7;

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(u8::try_from(value & 0x7f).unwrap() | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).unwrap());
}

fn number(field: u64, value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    varint(field << 3, &mut out);
    varint(value, &mut out);
    out
}

fn bytes(field: u64, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    varint(field << 3 | 2, &mut out);
    varint(value.len() as u64, &mut out);
    out.extend_from_slice(value);
    out
}

fn info(name: &str, kind: u64, dims: &[Option<u64>]) -> Vec<u8> {
    let dim = |(at, dim): (usize, &Option<u64>)| match dim {
        Some(size) => bytes(1, &number(1, *size)),
        None => bytes(1, &bytes(2, format!("{name}{at}").as_bytes())),
    };
    let shape: Vec<u8> = dims.iter().enumerate().flat_map(dim).collect();
    let tensor = [number(1, kind), bytes(2, &shape)].concat();
    [bytes(1, name.as_bytes()), bytes(2, &bytes(1, &tensor))].concat()
}

fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> Vec<u8> {
    let inputs = inputs.iter().flat_map(|name| bytes(1, name.as_bytes()));
    let outputs = outputs.iter().flat_map(|name| bytes(2, name.as_bytes()));
    bytes(1, &inputs.chain(outputs).chain(bytes(4, op.as_bytes())).collect::<Vec<_>>())
}

fn scalar(name: &str, value: i64) -> Vec<u8> {
    let tensor = [number(2, INT64), bytes(8, name.as_bytes()), bytes(9, &value.to_le_bytes())];
    bytes(5, &tensor.concat())
}

fn model(graph: &[Vec<u8>]) -> Vec<u8> {
    let graph = [bytes(2, b"g"), graph.concat()].concat();
    let opset = [bytes(1, b""), number(2, 13)].concat();
    [number(1, 8), bytes(7, &graph), bytes(8, &opset)].concat()
}

/// `y = relu(x)` over rows of two.
pub(crate) fn relu() -> Vec<u8> {
    let info = |name: &str| info(name, FLOAT, &[None, Some(2)]);
    model(&[node("Relu", &["x"], &["y"]), bytes(11, &info("x")), bytes(12, &info("y"))])
}

/// Largest of the products of all pairs: a tensor that is as large as the input's square.
pub(crate) fn square() -> Vec<u8> {
    model(&[
        node("Transpose", &["x"], &["t"]),
        node("Mul", &["x", "t"], &["pairs"]),
        node("ReduceMax", &["pairs"], &["y"]),
        bytes(11, &info("x", FLOAT, &[None, Some(1)])),
        bytes(12, &info("y", FLOAT, &[Some(1), Some(1)])),
    ])
}

/// Models whose output or inner tensor is as large as the value of input `n` says.
pub(crate) fn bombs() -> Vec<(&'static str, Vec<u8>)> {
    let n = || bytes(11, &info("n", INT64, &[Some(1)]));
    let y = |kind, dims: &[Option<u64>]| bytes(12, &info("y", kind, dims));
    let x = || bytes(11, &info("x", FLOAT, &[Some(1)]));
    let range = || [scalar("zero", 0), scalar("one", 1)].concat();
    let scalar_n = || node("Squeeze", &["n"], &["limit"]);
    vec![
        ("expand", model(&[node("Expand", &["x", "n"], &["y"]), x(), n(), y(FLOAT, &[None])])),
        ("tile", model(&[node("Tile", &["x", "n"], &["y"]), x(), n(), y(FLOAT, &[None])])),
        ("fill", model(&[node("ConstantOfShape", &["n"], &["y"]), n(), y(FLOAT, &[None])])),
        (
            "range",
            model(&[
                scalar_n(),
                node("Range", &["zero", "limit", "one"], &["y"]),
                range(),
                n(),
                y(INT64, &[None]),
            ]),
        ),
        (
            "inner",
            model(&[
                node("Expand", &["x", "n"], &["wide"]),
                node("Sin", &["wide"], &["waves"]),
                node("ReduceMax", &["waves"], &["y"]),
                x(),
                n(),
                y(FLOAT, &[Some(1)]),
            ]),
        ),
    ]
}
