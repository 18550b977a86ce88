//! The eBPF object: which toolchain can build it, and how.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::shell::{ask, command, has, run, run_quietly, workspace};

/// Name under which Debian's Rust is known to rustup.
pub const LINKED_TOOLCHAIN: &str = "rfsis-ebpf";
/// The target of the object: eBPF, little-endian.
const TARGET: &str = "bpfel-unknown-none";

/// A Rust that may be able to build the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Toolchain {
    /// A toolchain of rustup's, by name.
    Rustup(&'static str),
    /// `/usr/bin/cargo`, from Debian's packages.
    Debian,
}

impl Toolchain {
    /// In the order in which they are tried.
    pub const ALL: [Toolchain; 3] = [
        Toolchain::Rustup("nightly"),
        Toolchain::Rustup(LINKED_TOOLCHAIN),
        Toolchain::Debian,
    ];

    /// For messages.
    pub fn describe(self) -> String {
        match self {
            Toolchain::Rustup(name) => format!("rustup toolchain {name}"),
            Toolchain::Debian => "/usr/bin/cargo".into(),
        }
    }

    /// `program` (`cargo`, `rustc`) of this toolchain.
    pub fn program(self, program: &str) -> Command {
        match self {
            Toolchain::Rustup(name) => {
                let mut command = command("rustup");
                command.args(["run", name, program]);
                command
            }
            Toolchain::Debian => command(&format!("/usr/bin/{program}")),
        }
    }

    /// Whether it is there with the sources of `core`, which `-Z build-std` compiles.
    pub fn has_sources(self) -> bool {
        if matches!(self, Toolchain::Rustup(_)) && !has("rustup") {
            return false;
        }
        ask(self.program("rustc").args(["--print", "sysroot"])).is_some_and(|sysroot| {
            PathBuf::from(sysroot.trim())
                .join("lib/rustlib/src/rust/library/core")
                .is_dir()
        })
    }

    /// Major version of its LLVM; bpf-linker must have the same.
    pub fn llvm_major(self) -> Option<u32> {
        let version = ask(self.program("rustc").arg("-vV"))?;
        let line = version
            .lines()
            .find_map(|line| line.strip_prefix("LLVM version: "))?;
        line.split('.').next()?.parse().ok()
    }

    /// `cargo SUBCOMMAND` on `rfsis-ebpf`, with everything the target needs.
    fn cargo(self, subcommand: &str) -> Command {
        let mut cargo = self.program("cargo");
        cargo
            .args([subcommand, "--release", "--package", "rfsis-ebpf"])
            .args(["-Z", "build-std=core", "--target", TARGET])
            .arg("--target-dir")
            .arg(directory())
            // `-Z` on a stable compiler.
            .env("RUSTC_BOOTSTRAP", "1")
            .env_remove("RUSTFLAGS")
            .env(
                "CARGO_ENCODED_RUSTFLAGS",
                "-Cdebuginfo=2\u{1f}-Clink-arg=--btf",
            );
        cargo
    }

    /// Builds the object.
    ///
    /// # Errors
    /// With what cargo printed last.
    pub fn build(self) -> Result<()> {
        run_quietly(&mut self.cargo("build"))?;
        let built = directory().join(TARGET).join("release/rfsis-ebpf");
        // Only a changed object makes the agent build anew.
        let bytes = std::fs::read(&built).with_context(|| built.display().to_string())?;
        if std::fs::read(object()).ok().as_ref() != Some(&bytes) {
            std::fs::write(object(), bytes).with_context(|| object().display().to_string())?;
        }
        Ok(())
    }

    /// Runs clippy on the programs.
    ///
    /// # Errors
    /// When it finds anything or is not installed.
    pub fn clippy(self) -> Result<()> {
        run(self.cargo("clippy").args(["--", "-D", "warnings"]))
    }
}

/// Where eBPF is built.
fn directory() -> PathBuf {
    workspace().join("target/ebpf")
}

/// The finished object, where the agent's build script looks for it.
pub fn object() -> PathBuf {
    directory().join("rfsis-ebpf.o")
}
