//! The file `MLmodel`: which of an artifact's files is the ONNX model.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::super::SourceError;
use super::super::names;
use crate::control::{lineage, yaml};

/// Name of the file.
pub(super) const FILE: &str = "MLmodel";
/// Largest one. It may hold a signature of thousands of columns.
pub(super) const SIZE_MAX: usize = 4 << 20;

/// What we need of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MlModel {
    /// Path of the ONNX file in the artifact's folder.
    pub(super) model: String,
    pub(super) run: Option<String>,
    pub(super) model_id: Option<String>,
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    flavors: BTreeMap<String, Flavor>,
    run_id: Option<String>,
    model_id: Option<String>,
}

/// Flavors of other libraries have a `data` of their own meaning: only that of ONNX is read.
#[derive(Deserialize)]
struct Flavor {
    #[serde(default)]
    data: Option<serde_json::Value>,
}

impl MlModel {
    pub(super) fn parse(text: &str) -> Result<Self, SourceError> {
        let wrong = |reason: String| SourceError::Answer { what: FILE.to_owned(), reason };
        let file: File = yaml::parse(text).map_err(wrong)?;
        let Some(onnx) = file.flavors.get("onnx") else {
            let flavors: Vec<String> =
                file.flavors.keys().take(8).map(|name| lineage::short(name)).collect();
            let flavors = match flavors.is_empty() {
                true => "none".to_owned(),
                false => flavors.join(", "),
            };
            let reason = format!("has no ONNX flavor, only: {flavors}");
            return Err(SourceError::Unsupported(reason));
        };
        let Some(model) = onnx.data.as_ref().and_then(serde_json::Value::as_str) else {
            return Err(wrong("flavors.onnx.data: expected the name of a file".to_owned()));
        };
        names::check(model)?;
        let text = |value: Option<String>| value.map(|value| lineage::short(&value));
        Ok(Self { model: model.to_owned(), run: text(file.run_id), model_id: text(file.model_id) })
    }

    /// The folder that is served, with a slash at its end: external data lies beside the model.
    pub(super) fn folder(&self) -> &str {
        let end = self.model.rfind('/').map_or(0, |slash| slash + 1);
        &self.model[..end]
    }

    pub(super) fn file_name(&self) -> &str {
        &self.model[self.folder().len()..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As MLflow 3.17.2 writes it.
    const WRITTEN: &str = r#"artifact_path: mlflow-artifacts:/1/models/m-0123456789abcdef0123456789abcdef/artifacts
flavors:
  onnx:
    code: null
    data: model.onnx
    onnx_session_options: null
    onnx_version: 1.22.0
    providers:
    - CUDAExecutionProvider
    - CPUExecutionProvider
  python_function:
    data: model.onnx
    env:
      conda: conda.yaml
      virtualenv: python_env.yaml
    loader_module: mlflow.onnx
    python_version: 3.11.7
is_signature_from_type_hint: false
mlflow_version: 3.17.2
model_id: m-0123456789abcdef0123456789abcdef
model_size_bytes: 1212
model_uuid: m-0123456789abcdef0123456789abcdef
prompts: null
run_id: 8a3c2f
signature:
  inputs: '[{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": [-1, 4]}}]'
  outputs: '[{"type": "tensor", "tensor-spec": {"dtype": "int64", "shape": [-1]}}]'
  params: null
type_hint_from_example: false
utc_time_created: '2026-01-31 09:30:00.000000'
"#;

    #[test]
    fn the_onnx_flavor_names_the_file() {
        let model = MlModel::parse(WRITTEN).unwrap();
        assert_eq!((model.folder(), model.file_name()), ("", "model.onnx"));
        assert_eq!(model.run.as_deref(), Some("8a3c2f"));
        let moved = WRITTEN.replace("data: model.onnx", "data: sub/net.onnx");
        let model = MlModel::parse(&moved).unwrap();
        assert_eq!((model.folder(), model.file_name()), ("sub/", "net.onnx"));
    }

    #[test]
    fn what_is_no_onnx_model_says_so() {
        let sklearn = WRITTEN.replace("  onnx:", "  sklearn:");
        let error = MlModel::parse(&sklearn).unwrap_err().to_string();
        assert!(error.contains("no ONNX flavor, only: python_function, sklearn"), "{error}");
        for bad in [
            "",
            "- a",
            "flavors: 3",
            "flavors: {onnx: {data: [a]}}",
            "flavors: {onnx: {}}",
            "flavors: {onnx: {data: ../../etc/passwd}}",
            "flavors: {onnx: {data: /etc/passwd}}",
            "flavors: {onnx: {data: \"a\\0b\"}}",
            "flavors: {onnx: {data: ''}}",
            "{",
        ] {
            assert!(MlModel::parse(bad).is_err(), "{bad}");
        }
    }
}
