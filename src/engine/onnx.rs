//! Reads what we need of an ONNX file without any runtime.
//!
//! Invariants:
//! - Malformed bytes are [`EngineError::Broken`], never a panic.
//! - Tensor payloads are skipped, so the description of a large model stays small.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use prost::Message;

use super::EngineError;
use crate::domain::{DataType, Dim, Signature, TensorSpec};
use crate::proto::onnx as pb;

/// Largest model file; the format itself ends at 2 GiB.
pub const MODEL_BYTES_MAX: u64 = 2 << 30;

/// Most inputs, and most outputs, that a model may have.
pub const TENSORS_MAX: usize = 1024;

/// Name that errors about the file itself, whatever the engine, go by.
const READER: &str = "tidegate";

/// `data_location` of a tensor whose payload lies in another file.
const LOCATION_EXTERNAL: i32 = 1;

/// What an ONNX file says about itself.
#[derive(Clone, Debug)]
pub struct OnnxModel {
    pub signature: Signature,
    pub ir_version: i64,
    pub producer: String,
    /// Version of each operator set, by domain; the standard's own is `ai.onnx`.
    pub opsets: BTreeMap<String, i64>,
    /// How often each operator occurs, in the graph, its subgraphs and functions; operators of
    /// another domain than the standard's are `domain::Operator`.
    pub operators: BTreeMap<String, usize>,
    pub nodes: usize,
    /// Files that hold tensor payloads, relative to the model file, as the model writes them.
    pub external_data: BTreeSet<String>,
    /// Bytes of the main graph's weights, wherever they lie.
    pub weight_bytes: u64,
}

/// Reads a model file.
pub fn read(path: &Path) -> Result<OnnxModel, EngineError> {
    let meta = std::fs::metadata(path)
        .map_err(|error| EngineError::Io(format!("could not read the model file: {error}")))?;
    if !meta.is_file() {
        return Err(EngineError::Broken(
            "expected a model file, got a folder or device".to_owned(),
        ));
    }
    if meta.len() > MODEL_BYTES_MAX {
        let got = meta.len();
        return Err(EngineError::Broken(format!(
            "model file has {got} bytes, the limit is {MODEL_BYTES_MAX}"
        )));
    }
    let bytes = std::fs::read(path)
        .map_err(|error| EngineError::Io(format!("could not read the model file: {error}")))?;
    parse(&bytes)
}

/// Reads a model from the bytes of its file.
pub fn parse(bytes: &[u8]) -> Result<OnnxModel, EngineError> {
    let model = pb::ModelProto::decode(bytes)
        .map_err(|error| EngineError::Broken(format!("no ONNX file: {error}")))?;
    let Some(graph) = &model.graph else {
        return Err(EngineError::Broken("no ONNX file: it has no graph".to_owned()));
    };
    let signature = signature(graph)?;
    let mut census = Census::default();
    census.graph(graph);
    for function in &model.functions {
        census.nodes(&function.node);
    }
    let weight_bytes = graph.initializer.iter().map(tensor_bytes).fold(0, u64::saturating_add);
    Ok(OnnxModel {
        signature,
        ir_version: model.ir_version,
        producer: format!("{} {}", model.producer_name, model.producer_version).trim().to_owned(),
        opsets: model
            .opset_import
            .iter()
            .map(|set| (domain(&set.domain).to_owned(), set.version))
            .collect(),
        operators: census.operators,
        nodes: census.count,
        external_data: census.external_data,
        weight_bytes,
    })
}

impl OnnxModel {
    /// Whether some operator runs a subgraph again and again.
    pub fn loops(&self) -> bool {
        self.operators.contains_key("Loop") || self.operators.contains_key("Scan")
    }

    /// Checks that every file of weights lies inside `folder`, links followed.
    pub fn confine_external_data(&self, folder: &Path) -> Result<(), EngineError> {
        self.external_data.iter().try_for_each(|location| confined(folder, location))
    }
}

/// Checks that a file which a model names lies inside the model's `folder`, links followed.
pub(super) fn confined(folder: &Path, location: &str) -> Result<(), EngineError> {
    let relative = Path::new(location);
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    if location.is_empty() || !relative.components().all(plain) {
        return Err(EngineError::Broken(format!(
            "external data '{location}' lies outside the model's folder"
        )));
    }
    let root = folder
        .canonicalize()
        .map_err(|error| EngineError::Io(format!("could not open the model's folder: {error}")))?;
    let file = root.join(relative).canonicalize().map_err(|error| {
        EngineError::Broken(format!("external data '{location}' cannot be opened: {error}"))
    })?;
    if !file.starts_with(&root) || !file.is_file() {
        return Err(EngineError::Broken(format!(
            "external data '{location}' is no file inside the model's folder"
        )));
    }
    Ok(())
}

/// Counts operators and collects files, over nested graphs.
#[derive(Default)]
struct Census {
    operators: BTreeMap<String, usize>,
    count: usize,
    external_data: BTreeSet<String>,
}

impl Census {
    /// As deep as the decoder went, which has a limit of its own.
    fn graph(&mut self, graph: &pb::GraphProto) {
        for tensor in &graph.initializer {
            self.tensor(tensor);
        }
        for sparse in &graph.sparse_initializer {
            for tensor in sparse.values.iter().chain(&sparse.indices) {
                self.tensor(tensor);
            }
        }
        self.nodes(&graph.node);
    }

    fn nodes(&mut self, nodes: &[pb::NodeProto]) {
        for node in nodes {
            self.count += 1;
            let name = match domain(&node.domain) {
                "ai.onnx" => node.op_type.clone(),
                other => format!("{other}::{}", node.op_type),
            };
            *self.operators.entry(name).or_default() += 1;
            for attribute in &node.attribute {
                for tensor in attribute.t.iter().chain(&attribute.tensors) {
                    self.tensor(tensor);
                }
                for graph in attribute.g.iter().chain(&attribute.graphs) {
                    self.graph(graph);
                }
            }
        }
    }

    fn tensor(&mut self, tensor: &pb::TensorProto) {
        if tensor.data_location != LOCATION_EXTERNAL && tensor.external_data.is_empty() {
            return;
        }
        let location = tensor.external_data.iter().find(|entry| entry.key == "location");
        self.external_data.insert(location.map(|entry| entry.value.clone()).unwrap_or_default());
    }
}

fn domain(domain: &str) -> &str {
    if domain.is_empty() { "ai.onnx" } else { domain }
}

fn signature(graph: &pb::GraphProto) -> Result<Signature, EngineError> {
    let weights: BTreeSet<&str> = graph
        .initializer
        .iter()
        .chain(graph.sparse_initializer.iter().filter_map(|sparse| sparse.values.as_ref()))
        .map(|tensor| tensor.name.as_str())
        .collect();
    let inputs: Vec<TensorSpec> = graph
        .input
        .iter()
        .filter(|input| !weights.contains(input.name.as_str()))
        .map(|input| spec("input", input))
        .collect::<Result<_, _>>()?;
    let outputs: Vec<TensorSpec> =
        graph.output.iter().map(|output| spec("output", output)).collect::<Result<_, _>>()?;
    for (role, specs) in [("inputs", &inputs), ("outputs", &outputs)] {
        if specs.len() > TENSORS_MAX {
            let got = specs.len();
            return Err(EngineError::Broken(format!(
                "model has {got} {role}, the limit is {TENSORS_MAX}"
            )));
        }
        let names: BTreeSet<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
        if names.len() != specs.len() {
            return Err(EngineError::Broken(format!("two of the model's {role} have one name")));
        }
    }
    if outputs.is_empty() {
        return Err(EngineError::Broken("model has no outputs".to_owned()));
    }
    let batched = is_batched(&inputs, &outputs);
    Ok(Signature { inputs, outputs, batched })
}

fn spec(role: &str, info: &pb::ValueInfoProto) -> Result<TensorSpec, EngineError> {
    use pb::type_proto::Value;
    let name = &info.name;
    if name.is_empty() || name.contains('\0') {
        return Err(EngineError::Broken(format!("an {role} of the model has no usable name")));
    }
    let tensor = match info.r#type.as_ref().and_then(|kind| kind.value.as_ref()) {
        Some(Value::TensorType(tensor)) => tensor,
        Some(Value::SequenceType(_) | Value::MapType(_)) => {
            return Err(unsupported(format!(
                "{role} '{name}' is a sequence or map, not a tensor; convert the model again with zipmap=False"
            )));
        }
        Some(Value::SparseTensorType(_)) => {
            return Err(unsupported(format!(
                "{role} '{name}' is a sparse tensor, expected a dense one"
            )));
        }
        Some(Value::OptionalType(_)) => {
            return Err(unsupported(format!("{role} '{name}' is optional, expected a tensor")));
        }
        None => return Err(EngineError::Broken(format!("{role} '{name}' has no type"))),
    };
    let datatype = datatype(tensor.elem_type).ok_or_else(|| {
        let number = tensor.elem_type;
        unsupported(format!(
            "{role} '{name}' has ONNX element type {number}, which the protocol lacks"
        ))
    })?;
    let shape = tensor.shape.as_ref().map(|shape| shape.dim.iter().map(dim).collect());
    Ok(TensorSpec { name: name.clone(), datatype, shape })
}

fn unsupported(missing: String) -> EngineError {
    EngineError::Unsupported { engine: READER, missing }
}

fn dim(dim: &pb::tensor_shape_proto::Dimension) -> Dim {
    use pb::tensor_shape_proto::dimension::Value;
    match &dim.value {
        // Exporters write −1, some 0, for a size that they don't know.
        Some(Value::DimValue(size)) => match usize::try_from(*size) {
            Ok(size) if size > 0 => Dim::Fixed(size),
            _ => Dim::Dynamic(None),
        },
        Some(Value::DimParam(symbol)) if !symbol.is_empty() => Dim::Dynamic(Some(symbol.clone())),
        Some(Value::DimParam(_)) | None => Dim::Dynamic(None),
    }
}

/// Rows are independent as far as the file tells: every first dimension may vary, and those with
/// a name have the same one. An output without a shape doesn't speak against it.
fn is_batched(inputs: &[TensorSpec], outputs: &[TensorSpec]) -> bool {
    let mut symbol: Option<&str> = None;
    let known = |spec: &TensorSpec| spec.shape.is_some();
    if inputs.is_empty() || !inputs.iter().all(known) {
        return false;
    }
    for spec in inputs.iter().chain(outputs) {
        let Some(shape) = &spec.shape else { continue };
        match shape.first() {
            None | Some(Dim::Fixed(_)) => return false,
            Some(Dim::Dynamic(None)) => {}
            Some(Dim::Dynamic(Some(name))) => match symbol {
                Some(other) if other != name => return false,
                _ => symbol = Some(name),
            },
        }
    }
    true
}

/// The protocol's datatype for an element type's number in the format.
pub(super) fn datatype(number: i32) -> Option<DataType> {
    Some(match number {
        1 => DataType::Fp32,
        2 => DataType::Uint8,
        3 => DataType::Int8,
        4 => DataType::Uint16,
        5 => DataType::Int16,
        6 => DataType::Int32,
        7 => DataType::Int64,
        8 => DataType::Bytes,
        9 => DataType::Bool,
        10 => DataType::Fp16,
        11 => DataType::Fp64,
        12 => DataType::Uint32,
        13 => DataType::Uint64,
        16 => DataType::Bf16,
        _ => return None,
    })
}

fn tensor_bytes(tensor: &pb::TensorProto) -> u64 {
    let size = datatype(tensor.data_type).and_then(DataType::size).unwrap_or(1) as u64;
    let dims = tensor.dims.iter().map(|&dim| u64::try_from(dim).unwrap_or(0));
    dims.fold(size, u64::saturating_mul)
}

#[cfg(test)]
mod tests {
    use pb::tensor_shape_proto::dimension::Value as DimValue;
    use proptest::prelude::*;

    use super::*;

    fn info(name: &str, elem_type: i32, dims: Option<&[&str]>) -> pb::ValueInfoProto {
        let dim = |text: &&str| pb::tensor_shape_proto::Dimension {
            value: match text.parse() {
                Ok(size) => Some(DimValue::DimValue(size)),
                Err(_) if *text == "?" => None,
                Err(_) => Some(DimValue::DimParam((*text).to_owned())),
            },
        };
        let shape = dims.map(|dims| pb::TensorShapeProto { dim: dims.iter().map(dim).collect() });
        let tensor = pb::type_proto::Tensor { elem_type, shape };
        pb::ValueInfoProto {
            name: name.to_owned(),
            r#type: Some(pb::TypeProto { value: Some(pb::type_proto::Value::TensorType(tensor)) }),
        }
    }

    fn model(inputs: Vec<pb::ValueInfoProto>, outputs: Vec<pb::ValueInfoProto>) -> pb::ModelProto {
        let external = |key: &str, value: &str| pb::StringStringEntryProto {
            key: key.to_owned(),
            value: value.to_owned(),
        };
        let weight = pb::TensorProto {
            dims: vec![3, 4],
            data_type: 1,
            name: "w".to_owned(),
            external_data: vec![external("location", "w.bin"), external("offset", "0")],
            data_location: 1,
        };
        let inner = pb::GraphProto {
            node: vec![pb::NodeProto { op_type: "Relu".to_owned(), ..Default::default() }],
            ..Default::default()
        };
        let branch = pb::AttributeProto { g: Some(inner), ..Default::default() };
        let node = pb::NodeProto {
            op_type: "If".to_owned(),
            domain: "mine".to_owned(),
            attribute: vec![branch],
            ..Default::default()
        };
        pb::ModelProto {
            ir_version: 8,
            graph: Some(pb::GraphProto {
                node: vec![node],
                initializer: vec![weight],
                input: inputs,
                output: outputs,
                ..Default::default()
            }),
            opset_import: vec![pb::OperatorSetIdProto { domain: String::new(), version: 17 }],
            ..Default::default()
        }
    }

    #[test]
    fn a_model_tells_its_signature_and_operators() {
        let inputs = vec![info("x", 1, Some(&["n", "4"])), info("w", 1, Some(&["3", "4"]))];
        let outputs = vec![info("y", 16, Some(&["?", "2"])), info("z", 8, None)];
        let read = parse(&model(inputs, outputs).encode_to_vec()).unwrap();
        assert_eq!(read.signature.inputs.len(), 1, "a weight is no input");
        assert_eq!(read.signature.inputs[0].wire_shape(), [-1, 4]);
        assert_eq!(read.signature.outputs[0].datatype, DataType::Bf16);
        assert_eq!(read.signature.outputs[1].datatype, DataType::Bytes);
        assert!(read.signature.batched);
        assert_eq!(read.opsets["ai.onnx"], 17);
        assert_eq!((read.operators["Relu"], read.operators["mine::If"], read.nodes), (1, 1, 2));
        assert_eq!(read.external_data, BTreeSet::from(["w.bin".to_owned()]));
        assert_eq!(read.weight_bytes, 48);
    }

    #[test]
    fn batched_means_one_dynamic_first_dimension_for_all() {
        /// What it is about, the input's dimensions, the output's, and what follows.
        type Case = (&'static str, &'static [&'static str], Option<&'static [&'static str]>, bool);
        let cases: &[Case] = &[
            ("named alike", &["n", "4"], Some(&["n", "2"]), true),
            ("output unnamed", &["n", "4"], Some(&["?", "2"]), true),
            ("both unnamed", &["?"], Some(&["?"]), true),
            ("minus one", &["-1", "4"], Some(&["-1"]), true),
            ("output shape unknown", &["n", "4"], None, true),
            ("named differently", &["n", "4"], Some(&["m", "2"]), false),
            ("fixed input", &["1", "4"], Some(&["n", "2"]), false),
            ("fixed output", &["n", "4"], Some(&["1", "2"]), false),
            ("scalar output", &["n", "4"], Some(&[]), false),
        ];
        for (name, input, output, batched) in cases {
            let bytes =
                model(vec![info("x", 1, Some(input))], vec![info("y", 1, *output)]).encode_to_vec();
            assert_eq!(parse(&bytes).unwrap().signature.batched, *batched, "{name}");
        }
    }

    #[test]
    fn what_the_protocol_lacks_is_unsupported_with_advice() {
        let mut map = info("y", 1, None);
        map.r#type = Some(pb::TypeProto {
            value: Some(pb::type_proto::Value::SequenceType(Box::default())),
        });
        let error = parse(&model(vec![], vec![map]).encode_to_vec()).unwrap_err();
        assert!(matches!(error, EngineError::Unsupported { .. }));
        assert!(error.to_string().contains("zipmap=False"), "{error}");
        let complex = model(vec![info("x", 14, None)], vec![info("y", 1, None)]);
        assert!(matches!(parse(&complex.encode_to_vec()), Err(EngineError::Unsupported { .. })));
    }

    #[test]
    fn external_data_stays_in_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("model");
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(folder.path().join("secret"), "x").unwrap();
        std::fs::write(inside.join("w.bin"), "x").unwrap();
        std::os::unix::fs::symlink("../secret", inside.join("link")).unwrap();
        let bytes = model(vec![], vec![info("y", 1, None)]).encode_to_vec();
        let mut read = parse(&bytes).unwrap();
        let cases = [
            ("w.bin", true),
            ("./w.bin", true),
            ("../secret", false),
            ("/etc/passwd", false),
            ("link", false),
            ("missing", false),
            ("", false),
        ];
        for (location, ok) in cases {
            read.external_data = BTreeSet::from([location.to_owned()]);
            assert_eq!(read.confine_external_data(&inside).is_ok(), ok, "{location}");
        }
    }

    proptest! {
        #[test]
        fn broken_bytes_are_an_error(
            cut in any::<prop::sample::Index>(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        ) {
            let inputs = vec![info("x", 1, Some(&["n", "4"]))];
            let mut bytes = model(inputs, vec![info("y", 7, Some(&["n"]))]).encode_to_vec();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(cut.index(bytes.len()) + 1);
            let _read = parse(&bytes);
        }

        #[test]
        fn any_bytes_are_an_error_or_a_model(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            let _read = parse(&bytes);
        }
    }

    #[test]
    fn nothing_is_no_model() {
        for bytes in [&b""[..], b"\x08\x08", b"not a model", &[0xff; 64]] {
            assert!(matches!(parse(bytes), Err(EngineError::Broken(_))), "{bytes:?}");
        }
    }
}
