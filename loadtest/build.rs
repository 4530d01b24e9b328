//! Compiles the gateway's `proto/` without needing protoc, and the echo service of the gRPC floor.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=../proto");
    let descriptors = protox::compile(["../proto/grpc_service.proto"], ["../proto"])?;
    tonic_prost_build::configure()
        .bytes(".")
        .build_client(false)
        .build_server(false)
        .compile_fds(descriptors)?;
    tonic_build::manual::Builder::new().build_client(false).compile(&[echo()]);
    Ok(())
}

/// `ModelInfer` that answers with the message it was sent.
fn echo() -> tonic_build::manual::Service {
    let message = "crate::proto::ModelInferRequest";
    let method = tonic_build::manual::Method::builder()
        .name("model_infer")
        .route_name("ModelInfer")
        .input_type(message)
        .output_type(message)
        .codec_path("tonic_prost::ProstCodec")
        .build();
    tonic_build::manual::Service::builder()
        .name("GRPCInferenceService")
        .package("inference")
        .method(method)
        .build()
}
