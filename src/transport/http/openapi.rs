//! An OpenAPI document of one model, with its own tensor names, datatypes and shapes.

use serde_json::{Map, Value, json};

use crate::domain::{DataType, ModelName, TensorSpec};
use crate::feedback::Outcome;
use crate::route::Served;

/// Most elements that an example spells out for one tensor.
const EXAMPLE_ELEMENTS_MAX: usize = 64;

/// The document for inference on `served`, whose model has these `versions`.
pub(super) fn document(served: &Served, versions: &[String]) -> Value {
    let model = &served.model;
    let inputs = &served.signature.inputs;
    let outputs = &served.signature.outputs;
    let mut paths = Map::new();
    paths.insert(format!("/v2/models/{model}/infer"), json!({"post": operation(model, "", &[])}));
    paths.insert(
        format!("/v2/models/{model}/versions/{{version}}/infer"),
        json!({"post": operation(model, "OfVersion", versions)}),
    );
    paths.insert(format!("/v2/models/{model}/feedback"), json!({"post": feedback(model)}));
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": format!("Model {model}"),
            "version": served.version.to_string(),
            "description": format!(
                "Open Inference Protocol v2. Version {} of the model, {}.",
                served.version, served.digest
            ),
        },
        "paths": paths,
        "components": {"schemas": {
            "InferRequest": request(inputs, outputs),
            "InferResponse": response(outputs),
            "FeedbackItem": feedback_item(),
            "FeedbackResults": feedback_results(),
            "Parameters": {
                "type": "object",
                "additionalProperties": {"type": ["string", "number", "boolean"]},
            },
            "Error": {
                "type": "object",
                "required": ["error", "code"],
                "properties": {"error": {"type": "string"}, "code": {"type": "string"}},
            },
        }},
    })
}

fn feedback(model: &ModelName) -> Value {
    let item = json!({"$ref": "#/components/schemas/FeedbackItem"});
    let body = json!({"oneOf": [item, {"type": "array", "items": item, "minItems": 1}]});
    let json_body = |schema: Value| json!({"application/json": {"schema": schema}});
    let results = json!({"$ref": "#/components/schemas/FeedbackResults"});
    let error = json!({"$ref": "#/components/schemas/Error"});
    json!({
        "operationId": "feedback",
        "summary": format!("Say what became of predictions of {model}"),
        "requestBody": {"required": true, "content": json_body(body)},
        "responses": {
            "202": {"description": "It is recorded.", "content": json_body(results)},
            "default": {"description": "Nothing was taken.", "content": json_body(error)},
        },
    })
}

fn feedback_item() -> Value {
    let label = json!({"type": ["boolean", "number", "string"]});
    let row = json!({"type": ["boolean", "number", "string", "null"]});
    json!({
        "type": "object",
        "required": ["prediction_id"],
        "additionalProperties": false,
        "properties": {
            "prediction_id": {"type": "string", "format": "uuid"},
            "label": {"oneOf": [label, {"type": "array", "items": row, "minItems": 1}]},
            "metric": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
            "value": {"type": "number"},
            "at": {"type": "string", "format": "date-time"},
        },
        "anyOf": [{"required": ["label"]}, {"required": ["metric", "value"]}],
    })
}

fn feedback_results() -> Value {
    let statuses = Outcome::ALL.map(Outcome::as_str);
    json!({
        "type": "object",
        "required": ["results"],
        "properties": {"results": {"type": "array", "items": {
            "type": "object",
            "required": ["prediction_id", "status"],
            "properties": {
                "prediction_id": {"type": "string", "format": "uuid"},
                "status": {"enum": statuses},
            },
        }}},
    })
}

fn operation(model: &ModelName, suffix: &str, versions: &[String]) -> Value {
    let schema = |name: &str| json!({"$ref": format!("#/components/schemas/{name}")});
    let json_body = |name: &str| json!({"application/json": {"schema": schema(name)}});
    let mut parameters = vec![json!({
        "name": "tidegate-timeout-ms",
        "in": "header",
        "description": "How long the caller waits at most.",
        "schema": {"type": "integer", "minimum": 0},
    })];
    if !versions.is_empty() {
        parameters.push(json!({
            "name": "version",
            "in": "path",
            "required": true,
            "description": "Number of a version, or a label.",
            "schema": {"type": "string", "examples": versions},
        }));
    }
    json!({
        "operationId": format!("infer{suffix}"),
        "summary": format!("Predict with {model}"),
        "parameters": parameters,
        "requestBody": {"required": true, "content": json_body("InferRequest")},
        "responses": {
            "200": {"description": "The prediction.", "content": json_body("InferResponse")},
            "default": {"description": "It failed.", "content": json_body("Error")},
        },
    })
}

fn request(inputs: &[TensorSpec], outputs: &[TensorSpec]) -> Value {
    let output_names: Vec<&str> = outputs.iter().map(|output| output.name.as_str()).collect();
    let examples: Vec<Value> = inputs.iter().map(example).collect();
    json!({
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {"$ref": "#/components/schemas/Parameters"},
            "inputs": tensors(inputs),
            "outputs": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["name"],
                    "properties": {
                        "name": {"enum": output_names},
                        "parameters": {"$ref": "#/components/schemas/Parameters"},
                    },
                },
            },
        },
        "examples": [{"inputs": examples}],
    })
}

fn response(outputs: &[TensorSpec]) -> Value {
    json!({
        "type": "object",
        "required": ["model_name", "model_version", "outputs"],
        "properties": {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "outputs": tensors(outputs),
        },
    })
}

/// A list of these tensors; each may come at any place.
fn tensors(specs: &[TensorSpec]) -> Value {
    let items: Vec<Value> = specs.iter().map(tensor).collect();
    json!({"type": "array", "items": {"oneOf": items}})
}

fn tensor(spec: &TensorSpec) -> Value {
    let shape = spec.wire_shape();
    let dims: Vec<Value> = shape
        .iter()
        .map(|dim| {
            if *dim < 0 { json!({"type": "integer", "minimum": 0}) } else { json!({"const": dim}) }
        })
        .collect();
    let mut shape_schema = json!({"type": "array"});
    if spec.shape.is_some() {
        shape_schema =
            json!({"type": "array", "prefixItems": dims, "minItems": dims.len(), "items": false});
    }
    json!({
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"const": spec.name},
            "datatype": {"const": spec.datatype.name()},
            "shape": shape_schema,
            "parameters": {"$ref": "#/components/schemas/Parameters"},
            "data": {
                "type": "array",
                "description": "Row-major elements, flat or nested as the shape.",
                "items": {"anyOf": [element(spec.datatype), {"type": "array"}]},
            },
        },
    })
}

fn element(datatype: DataType) -> Value {
    let range = |least: i128, most: i128| {
        // As text where a JSON reader's integers end.
        match (i64::try_from(least), i64::try_from(most)) {
            (Ok(least), Ok(most)) => {
                json!({"type": "integer", "minimum": least, "maximum": most})
            }
            _ => json!({"type": "integer", "minimum": 0, "maximum": u64::MAX}),
        }
    };
    match datatype {
        DataType::Bool => json!({"type": "boolean"}),
        DataType::Bytes => json!({"type": "string"}),
        DataType::Uint8 => range(0, u8::MAX.into()),
        DataType::Uint16 => range(0, u16::MAX.into()),
        DataType::Uint32 => range(0, u32::MAX.into()),
        DataType::Uint64 => range(0, u64::MAX.into()),
        DataType::Int8 => range(i8::MIN.into(), i8::MAX.into()),
        DataType::Int16 => range(i16::MIN.into(), i16::MAX.into()),
        DataType::Int32 => range(i32::MIN.into(), i32::MAX.into()),
        DataType::Int64 => range(i64::MIN.into(), i64::MAX.into()),
        DataType::Fp16 | DataType::Bf16 | DataType::Fp32 | DataType::Fp64 => {
            json!({"type": "number"})
        }
    }
}

/// One example of an input, variable dimensions as 1; without data where that has no JSON form
/// or would be long.
fn example(spec: &TensorSpec) -> Value {
    let shape: Vec<usize> =
        spec.wire_shape().iter().map(|dim| usize::try_from(*dim).unwrap_or(1)).collect();
    let elements = shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim));
    let mut input = json!({"name": spec.name, "datatype": spec.datatype.name(), "shape": shape});
    let zero = match spec.datatype {
        DataType::Fp16 | DataType::Bf16 => return input,
        DataType::Bool => json!(false),
        DataType::Bytes => json!("text"),
        DataType::Fp32 | DataType::Fp64 => json!(0.0),
        _ => json!(0),
    };
    if let Some(count) = elements.filter(|count| *count <= EXAMPLE_ELEMENTS_MAX) {
        input["data"] = Value::Array(vec![zero; count]);
    }
    input
}
