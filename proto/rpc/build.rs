//! Compiles the proto files in pure Rust: no protoc is needed to build.
use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

const FILES: [&str; 5] = [
    "swallow/inference/v1/common.proto",
    "swallow/inference/v1/generation.proto",
    "swallow/inference/v1/chat.proto",
    "swallow/inference/v1/model.proto",
    "swallow/worker/v1/worker.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=swallow");
    let descriptors = protox::compile(FILES, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".swallow.worker.v1.GetModelFileResponse")
        .compile_fds(descriptors)?;
    Ok(())
}
