//! Puts the eBPF object where `bpf::OBJECT` includes it from.
//!
//! The object is built by `cargo xtask setup`, for it needs a toolchain of its own. Without one an
//! empty object is included, so that a plain `cargo build` works; the agent then says what is missing.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    println!("cargo::rerun-if-env-changed=RFSIS_EBPF_OBJECT");
    let variable = |name| env::var_os(name).ok_or_else(|| io::Error::other(format!("no {name}")));
    let target = PathBuf::from(variable("OUT_DIR")?).join("rfsis-ebpf.o");
    let default = Path::new(&variable("CARGO_MANIFEST_DIR")?).join("../target/ebpf/rfsis-ebpf.o");

    let source = match env::var_os("RFSIS_EBPF_OBJECT") {
        Some(path) => PathBuf::from(path),
        None => default.clone(),
    };
    println!("cargo::rerun-if-changed={}", source.display());
    if source == default && !source.exists() {
        println!("cargo::warning=built without eBPF programs; run `cargo xtask setup`");
        return fs::write(target, []);
    }
    match fs::read(&source) {
        Ok(object) => fs::write(target, object),
        Err(error) => Err(io::Error::new(
            error.kind(),
            format!("eBPF object {}: {error}", source.display()),
        )),
    }
}
