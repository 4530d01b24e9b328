use proptest::prelude::*;

use super::*;
use crate::batch::Form;
use crate::domain::PaddedOutput;

fn spec(name: &str, datatype: DataType, dims: &[i64]) -> TensorSpec {
    let dim = |(at, dim): (usize, &i64)| match usize::try_from(*dim) {
        Ok(size) => Dim::Fixed(size),
        Err(_) if *dim == -2 => Dim::Dynamic(Some("length".to_owned())),
        Err(_) => Dim::Dynamic((at == 0).then(|| "batch".to_owned())),
    };
    let shape = Some(dims.iter().enumerate().map(dim).collect());
    TensorSpec { name: name.to_owned(), datatype, shape }
}

fn signature(inputs: Vec<TensorSpec>, outputs: Vec<TensorSpec>) -> Signature {
    Signature { inputs, outputs, batched: true }
}

fn input(name: &str, axis: usize, value: PadValue) -> PaddedInput {
    PaddedInput { name: name.to_owned(), axis, value }
}

fn output(name: &str, axis: usize) -> PaddedOutput {
    PaddedOutput { name: name.to_owned(), axis }
}

/// `ids` and `mask` of one length, `hidden` as long, `pooled` without length.
fn text_model() -> Signature {
    signature(
        vec![spec("ids", DataType::Int64, &[-1, -2]), spec("mask", DataType::Uint8, &[-1, 1, -2])],
        vec![
            spec("hidden", DataType::Fp32, &[-1, -2, 4]),
            spec("pooled", DataType::Fp32, &[-1, 4]),
        ],
    )
}

fn text_settings() -> PaddingSettings {
    PaddingSettings {
        buckets: vec![4, 8],
        inputs: vec![input("ids", 1, PadValue::Int(7)), input("mask", 2, PadValue::Zero)],
        outputs: vec![output("hidden", 1)],
        mask: Some("mask".to_owned()),
    }
}

fn bytes(shape: &[usize]) -> Tensor {
    let size: usize = shape.iter().product();
    let data: Vec<u8> = (1..=255).cycle().take(size).collect();
    Tensor::new(DataType::Uint8, Shape::from_slice(shape), data.into()).unwrap()
}

#[test]
fn settings_are_held_against_the_signature() {
    assert!(Padding::new(&text_settings(), &text_model()).is_ok());
    type Change = fn(&mut PaddingSettings, &mut Signature);
    let cases: &[(Change, &str)] = &[
        (|_, model| model.batched = false, "the model is not batched"),
        (
            |pad, _| pad.inputs[0].name = "idz".into(),
            "input 'idz': the model has the inputs ids, mask",
        ),
        (
            |pad, _| pad.inputs[0].axis = 2,
            "input 'ids': axis 2 is out of range, the input has 2 dimensions",
        ),
        (
            |pad, _| pad.inputs[1].axis = 1,
            "input 'mask': expected an axis of any size, axis 1 always has 1",
        ),
        (
            |pad, _| pad.outputs[0].axis = 2,
            "output 'hidden': expected an axis of any size, axis 2 always has 4",
        ),
        (|pad, _| pad.outputs.clear(), "axis 1 of output 'hidden' is the padded 'length' too"),
        (|pad, _| drop(pad.inputs.remove(1)), "axis 2 of input 'mask' is the padded 'length' too"),
        (
            |pad, _| pad.inputs[0].value = PadValue::Float(0.5_f64.to_bits()),
            "value 0.5 does not fit INT64",
        ),
        (|pad, _| drop(pad.inputs.remove(0)), "mask 'mask': expected another padded input"),
        (
            |_, model| model.inputs[1].datatype = DataType::Bytes,
            "mask 'mask': value 1 does not fit BYTES",
        ),
        (
            |_, model| model.inputs[1].shape = Some(vec![Dim::Dynamic(None); 3]),
            "mask 'mask': its shape is [-1, -1, -1], expected axes 0 and 2 alone to vary",
        ),
        (|_, model| model.inputs[1].shape = None, "mask 'mask': the model does not say its shape"),
    ];
    for (change, message) in cases {
        let (mut settings, mut model) = (text_settings(), text_model());
        change(&mut settings, &mut model);
        let problems = Padding::new(&settings, &model).unwrap_err();
        assert!(problems.iter().any(|line| line.contains(message)), "{message}: {problems:?}");
    }
}

#[test]
fn a_value_fits_its_datatype_or_is_refused() {
    let float = |value: f64| PadValue::Float(value.to_bits());
    type Case = (PadValue, DataType, Option<Vec<u8>>);
    let cases: &[Case] = &[
        (PadValue::Int(-1), DataType::Int64, Some(vec![255; 8])),
        (PadValue::Int(-1), DataType::Uint64, None),
        (PadValue::Int(300), DataType::Uint8, None),
        (PadValue::Int(1), DataType::Fp32, Some(1_f32.to_le_bytes().to_vec())),
        (float(f64::NEG_INFINITY), DataType::Fp32, Some(f32::NEG_INFINITY.to_le_bytes().to_vec())),
        (float(1e300), DataType::Fp32, None),
        (float(1e5), DataType::Fp16, None),
        (float(-2.0), DataType::Bf16, Some(half::bf16::from_f32(-2.0).to_le_bytes().to_vec())),
        (PadValue::Bool(true), DataType::Bool, Some(vec![1])),
        (PadValue::Int(2), DataType::Bool, None),
        (PadValue::Bool(true), DataType::Uint8, None),
        (PadValue::Text("[PAD]".to_owned()), DataType::Bytes, Some(b"\x05\0\0\0[PAD]".to_vec())),
        (PadValue::Text(String::new()), DataType::Fp32, None),
        (PadValue::Int(0), DataType::Bytes, None),
    ];
    for (value, datatype, want) in cases {
        assert_eq!(element(value, *datatype).ok(), *want, "{value:?} as {datatype}");
    }
    for datatype in DataType::ALL {
        let zero = element(&PadValue::Zero, datatype).unwrap();
        assert!(zero.iter().all(|byte| *byte == 0), "{datatype}: {zero:?}");
    }
}

#[test]
fn lengths_go_to_the_next_bucket() {
    let mut settings = text_settings();
    let listed = Padding::new(&settings, &text_model()).unwrap();
    let lengths = [0, 1, 4, 5, 8, 9, 1000];
    assert_eq!(lengths.map(|length| listed.bucket(length)), [0, 4, 4, 8, 8, 9, 1000]);
    assert_eq!(listed.target(&[5, 6]), Some(8));
    assert_eq!(listed.target(&[6, 6]), None, "one length is not padded");
    settings.buckets.clear();
    let powers = Padding::new(&settings, &text_model()).unwrap();
    assert_eq!(lengths.map(|length| powers.bucket(length)), [0, 1, 4, 8, 8, 16, 1024]);
    assert_eq!(powers.target(&[5, 6]), Some(6), "nobody's length is not made up");
    assert_eq!(powers.bucket(usize::MAX), usize::MAX);
}

#[test]
fn lengths_must_agree_within_a_request() {
    let padding = Padding::new(&text_settings(), &text_model()).unwrap();
    let ids = |length: usize| {
        let shape = Shape::from_slice(&[1, length]);
        Tensor::new(DataType::Int64, shape, vec![1; 8 * length].into()).unwrap()
    };
    assert_eq!(padding.length(&[ids(3), bytes(&[1, 1, 3])]).unwrap(), 3);
    let error = padding.length(&[ids(3), bytes(&[1, 1, 4])]).unwrap_err();
    assert_eq!(error.to_string(), "input 'mask' has length 4, expected 3 as input 'ids' has");
    let error = padding.length(&[ids(3), bytes(&[1, 4])]).unwrap_err();
    assert_eq!(error.to_string(), "input 'mask' has 2 dimensions, expected a length along axis 2");
}

#[test]
fn a_mask_is_made_where_it_is_left_out() {
    let padding = Padding::new(&text_settings(), &text_model()).unwrap();
    let named = |name: &str, tensor| NamedTensor { name: name.to_owned(), tensor };
    let ids = |shape: &[usize]| {
        let size: usize = shape.iter().product();
        let shape = Shape::from_slice(shape);
        named("ids", Tensor::new(DataType::Int64, shape, vec![1; 8 * size].into()).unwrap())
    };
    let mut inputs = vec![ids(&[2, 3])];
    padding.fill_mask(&mut inputs);
    assert_eq!(inputs[1].name, "mask");
    assert_eq!(inputs[1].tensor.shape(), [2, 1, 3]);
    assert_eq!(inputs[1].tensor.data()[..], [1; 6]);

    let mut sent = vec![named("mask", bytes(&[2, 1, 3])), ids(&[2, 3])];
    padding.fill_mask(&mut sent);
    assert_eq!(sent.len(), 2, "a mask that was sent stays");
    let mut neither = vec![named("other", bytes(&[2]))];
    padding.fill_mask(&mut neither);
    assert_eq!(neither.len(), 1);
    let huge = Shape::from_slice(&[1 << 30, 1 << 30, 0]);
    let empty = Tensor::new(DataType::Int64, huge, Vec::new().into()).unwrap();
    let mut lies = vec![named("ids", empty)];
    padding.fill_mask(&mut lies);
    assert_eq!(lies.len(), 1, "no mask for a shape without data");
}

#[test]
fn padding_stands_behind_each_row_and_is_cut_off_again() {
    let padding = Padding::new(&text_settings(), &text_model()).unwrap();
    let form = Form { batched: true, padding: Some(padding) };
    let ids = |values: &[i64]| {
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let shape = Shape::from_slice(&[1, values.len()]);
        Tensor::new(DataType::Int64, shape, data.into()).unwrap()
    };
    let a = vec![ids(&[1, 2, 3]), bytes(&[1, 1, 3])];
    let b = vec![ids(&[4]), bytes(&[1, 1, 1])];
    assert!(form.joins(&a, &b));
    let joined = form.join(&[&a, &b]).unwrap();
    let values: Vec<u8> = joined.inputs[0].data().as_chunks::<8>().0.iter().map(|b| b[0]).collect();
    assert_eq!(values, [1, 2, 3, 7, 4, 7, 7, 7]);
    assert_eq!(joined.inputs[1].data()[..], [1, 2, 3, 0, 1, 0, 0, 0]);
    assert_eq!(joined.inputs[1].shape(), [2, 1, 4]);
    let elements = form.counted(&[&a, &b], &joined.inputs).unwrap();
    assert_eq!((elements.real, elements.padding), (8, 8));

    let (hidden, pooled) = (bytes(&[2, 4, 4]), bytes(&[2, 4]));
    let cut = form.cut(&joined, &[hidden, pooled.clone()]).unwrap();
    assert_eq!(cut[0][0], bytes(&[1, 3, 4]));
    assert_eq!(cut[1][0].data()[..], [17, 18, 19, 20]);
    assert_eq!(cut[1][1], pooled.rows(1, 2).unwrap());

    let error = form.cut(&joined, &[bytes(&[2, 2, 4]), pooled]).unwrap_err();
    let said = "output 'hidden' has shape [1, 2, 4], expected 4 along axis 1";
    assert_eq!(error.to_string(), said);

    let long = vec![ids(&[0; 5]), bytes(&[1, 1, 5])];
    assert!(!form.joins(&a, &long), "another bucket");
    assert_eq!(form.elements(&long), 2 * 8, "counted as long as it may become");
}

/// A tensor of any datatype from a seed.
fn tensor(datatype: DataType, shape: &[usize], seed: u8) -> Tensor {
    let elements: usize = shape.iter().product();
    let each = (0..elements).zip((0..=255_u8).cycle()).map(|(_, at)| at.wrapping_mul(seed));
    let shape = Shape::from_slice(shape);
    match datatype.size() {
        None => {
            let texts: Vec<Vec<u8>> = each.map(|at| vec![at; usize::from(at % 5)]).collect();
            Tensor::from_elements(shape, &texts).unwrap()
        }
        Some(size) => {
            let bit = |byte: u8| if datatype == DataType::Bool { byte % 2 } else { byte };
            let data: Vec<u8> = each.flat_map(|at| vec![bit(at); size]).collect();
            Tensor::new(datatype, shape, data.into()).unwrap()
        }
    }
}

proptest! {
    #[test]
    fn unpadding_undoes_padding(
        datatype in prop::sample::select(&DataType::ALL[..]),
        dims in prop::collection::vec(0_usize..4, 2..5),
        axis in 1_usize..4,
        members in prop::collection::vec((1_usize..4, 1_usize..20), 1..6),
        buckets in prop::collection::btree_set(1_usize..24, 0..4),
        seed: u8,
    ) {
        let axis = axis.min(dims.len() - 1);
        let mut wire: Vec<i64> = vec![-1; dims.len()];
        wire[axis] = -2;
        let model = signature(vec![spec("x", datatype, &wire)], vec![spec("y", datatype, &wire)]);
        let settings = PaddingSettings {
            buckets: buckets.into_iter().collect(),
            inputs: vec![input("x", axis, PadValue::Zero)],
            outputs: vec![output("y", axis)],
            mask: None,
        };
        let padding = Padding::new(&settings, &model).unwrap();
        let form = Form { batched: true, padding: Some(padding) };
        let requests: Vec<Vec<Tensor>> = members
            .iter()
            .map(|(rows, length)| {
                let mut shape = dims.clone();
                (shape[0], shape[axis]) = (*rows, *length);
                vec![tensor(datatype, &shape, seed)]
            })
            .collect();
        let padding = form.padding.as_ref().unwrap();
        for (a, (_, length_a)) in requests.iter().zip(&members) {
            for (b, (_, length_b)) in requests.iter().zip(&members) {
                let same = padding.bucket(*length_a) == padding.bucket(*length_b);
                prop_assert_eq!(form.joins(a, b), same, "{} and {}", length_a, length_b);
            }
        }
        let company: Vec<&[Tensor]> = requests
            .iter()
            .filter(|request| form.joins(&requests[0], request))
            .map(Vec::as_slice)
            .collect();
        let joined = form.join(&company).unwrap();
        // An identity model: what comes out is what went in.
        let cut = form.cut(&joined, &joined.inputs).unwrap();
        prop_assert_eq!(cut.len(), company.len());
        for (got, want) in cut.iter().zip(&company) {
            prop_assert_eq!(got.as_slice(), *want);
        }
        let bound: usize = company.iter().map(|inputs| form.elements(inputs)).sum();
        prop_assert!(joined.inputs[0].elements() <= bound, "the budget counts all that runs");
    }
}
