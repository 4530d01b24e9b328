//! Models made by hand: what callers could do harm with.

use crate::wire::{FLOAT, INT64, bytes, info, model, node, number};

fn scalar(name: &str, value: i64) -> Vec<u8> {
    let tensor = [number(2, INT64), bytes(8, name.as_bytes()), bytes(9, &value.to_le_bytes())];
    bytes(5, &tensor.concat())
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
