//! Reads what we need of an ONNX file without any runtime.
