//! How a model is to be served: `config.pbtxt` and `tidegate.toml`, merged.
