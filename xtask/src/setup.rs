//! What building and testing need, detected or installed. Each step says itself in one line.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::ebpf::{LINKED_TOOLCHAIN, Toolchain};
use crate::shell::{ask, command, find, has, root_prefix, run_quietly};

/// Programs that the tests and the demo run, and the Debian packages they come from.
pub const PROGRAMS: [(&str, &str); 11] = [
    ("ip", "iproute2"),
    ("bridge", "iproute2"),
    ("tc", "iproute2"),
    ("ss", "iproute2"),
    ("nc.openbsd", "netcat-openbsd"),
    ("ethtool", "ethtool"),
    ("nft", "nftables"),
    ("setpriv", "util-linux"),
    ("prlimit", "util-linux"),
    ("faketime", "faketime"),
    ("cc", "build-essential"),
];

/// The release of bpf-linker that goes with the pinned aya.
const LINKER_VERSION: &str = "0.13.0";
/// The release of cargo-fuzz that was tried: it builds the targets and runs libFuzzer.
const CARGO_FUZZ_VERSION: &str = "0.13.2";
/// LLVM of Debian's `rustc-web`.
const DEBIAN_LLVM: u32 = 22;
/// How long rustup may try to fetch something before Debian's packages are used, seconds.
const FETCH_LIMIT: &str = "180";

/// Makes sure of everything and returns the toolchain that built the eBPF object.
///
/// # Errors
/// Names what is missing and how to get it.
pub fn setup() -> Result<Toolchain> {
    install_missing(&PROGRAMS, "programs for tests and demo")?;
    let toolchain = ebpf_toolchain()?;
    step(&format!("eBPF object: built by {}", toolchain.describe()));
    Ok(toolchain)
}

/// Makes sure of clippy for the eBPF toolchain.
///
/// # Errors
/// Names what is missing and how to get it.
pub fn ebpf_clippy(toolchain: Toolchain) -> Result<()> {
    if ask(toolchain.program("cargo").args(["clippy", "--version"])).is_some() {
        return Ok(());
    }
    match toolchain {
        Toolchain::Rustup(name) if name != LINKED_TOOLCHAIN => {
            step(&format!("rustup component add clippy --toolchain {name}"));
            run_quietly(command("rustup").args(["component", "add", "clippy", "--toolchain", name]))
        }
        _ => apt_install(&["rust-web-clippy"]),
    }
}

/// Makes sure of cargo-fuzz, and of the compiler for libFuzzer.
///
/// # Errors
/// Names what is missing and how to get it.
pub fn fuzzing() -> Result<()> {
    install_missing(&[("g++", "g++")], "C++ compiler for libFuzzer")?;
    if has("cargo-fuzz") {
        return Ok(());
    }
    step(&format!(
        "cargo install cargo-fuzz {CARGO_FUZZ_VERSION} (about a minute)"
    ));
    let install = ["install", "cargo-fuzz", "--locked", "--version"];
    run_quietly(command("cargo").args(install).arg(CARGO_FUZZ_VERSION))
}

fn step(what: &str) {
    println!("setup: {what}");
}

/// Installs the packages of those programs that are not there.
///
/// # Errors
/// Names what is missing and how to get it.
pub fn install_missing(programs: &[(&str, &str)], what: &str) -> Result<()> {
    let mut missing: Vec<&str> = programs
        .iter()
        .filter(|(program, _)| !has(program))
        .map(|&(_, package)| package)
        .collect();
    missing.dedup();
    if missing.is_empty() {
        step(&format!("{what}: found"));
        return Ok(());
    }
    apt_install(&missing)
}

fn apt_install(packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    if find("apt-get").is_none() {
        bail!("missing: {list} (Debian's names), and there is no apt-get: install them by hand");
    }
    let sudo = root_prefix(&format!("installing {list}"))?;
    let apt = |arguments: &[&str]| {
        let words = sudo.iter().map(String::as_str);
        let words: Vec<&str> = words
            .chain(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"])
            .chain(arguments.iter().copied())
            .collect();
        run_quietly(command(words[0]).args(&words[1..]))
    };
    let mut install = vec!["install", "-y", "--no-install-recommends"];
    install.extend(packages);
    step(&format!("apt-get install {list}"));
    if apt(&install).is_ok() {
        return Ok(());
    }
    step("apt-get update");
    apt(&["update"]).context("apt-get update")?;
    apt(&install).with_context(|| format!("cannot install {list}: install them by hand"))
}

/// A toolchain is good when it has built the object: versions on paper prove little here, for
/// rustc and bpf-linker must agree on the LLVM inside.
fn ebpf_toolchain() -> Result<Toolchain> {
    let mut failure = None;
    if has("bpf-linker") {
        for toolchain in Toolchain::ALL {
            if !toolchain.has_sources() {
                continue;
            }
            step(&format!(
                "eBPF toolchain: {}, bpf-linker: found",
                toolchain.describe()
            ));
            match toolchain.build() {
                Ok(()) => return Ok(toolchain),
                Err(error) => {
                    step("… which cannot build the object");
                    failure.get_or_insert(error);
                }
            }
        }
    }
    // A compiler and linker that agree and still fail: the source is at fault, not the machine.
    if let Some(error) = failure
        && Toolchain::ALL.into_iter().any(is_matched)
    {
        return Err(error);
    }
    install_ebpf_toolchain()
}

fn is_matched(toolchain: Toolchain) -> bool {
    toolchain.has_sources() && toolchain.llvm_major() == linker_llvm_major()
}

/// LLVM major version that bpf-linker is linked with, where it is linked dynamically.
fn linker_llvm_major() -> Option<u32> {
    let libraries = ask(Command::new("ldd").arg(find("bpf-linker")?))?;
    let (_, rest) = libraries.split_once("libLLVM")?;
    let digits: String = rest
        .chars()
        .skip_while(|c| !c.is_ascii_digit())
        .take_while(char::is_ascii_digit)
        .collect();
    digits.parse().ok()
}

fn install_ebpf_toolchain() -> Result<Toolchain> {
    let toolchain = match fetch_nightly() {
        Some(nightly) => nightly,
        None => debian_toolchain()?,
    };
    let major = toolchain.llvm_major().unwrap_or(DEBIAN_LLVM);
    match install_linker(major).and_then(|()| toolchain.build()) {
        Err(error) if toolchain == Toolchain::Rustup("nightly") => {
            step(&format!(
                "nightly does not build the object ({error:#}): trying Debian's"
            ));
            let debian = debian_toolchain()?;
            install_linker(debian.llvm_major().unwrap_or(DEBIAN_LLVM))?;
            debian.build()?;
            Ok(debian)
        }
        outcome => outcome.map(|()| toolchain),
    }
}

/// A nightly with sources, if rustup can fetch one: it may be offline or behind a mirror without.
fn fetch_nightly() -> Option<Toolchain> {
    let nightly = Toolchain::Rustup("nightly");
    if nightly.has_sources() {
        return Some(nightly);
    }
    if !has("rustup") {
        step("rustup: not found, using Debian's Rust for eBPF");
        return None;
    }
    let installed = ask(command("rustup").args(["toolchain", "list"]))
        .is_some_and(|list| list.lines().any(|line| line.starts_with("nightly-")));
    // An installed nightly is somebody's: add to it, do not replace it.
    let line: &[&str] = if installed {
        &["component", "add", "rust-src", "--toolchain", "nightly"]
    } else {
        &[
            "toolchain",
            "install",
            "nightly",
            "--profile",
            "minimal",
            "--component",
            "rust-src",
        ]
    };
    step(&format!("rustup {}", line.join(" ")));
    let fetched = run_quietly(command("timeout").args([FETCH_LIMIT, "rustup"]).args(line));
    if fetched.is_err() {
        step("… cannot be fetched here, using Debian's Rust for eBPF");
        return None;
    }
    Some(nightly)
}

fn debian_toolchain() -> Result<Toolchain> {
    if !Toolchain::Debian.has_sources() {
        apt_install(&["rustc-web", "cargo-web", "rust-web-src"])?;
    }
    if !has("rustup") {
        return Ok(Toolchain::Debian);
    }
    step(&format!("rustup toolchain link {LINKED_TOOLCHAIN} /usr"));
    run_quietly(command("rustup").args(["toolchain", "link", LINKED_TOOLCHAIN, "/usr"]))?;
    Ok(Toolchain::Rustup(LINKED_TOOLCHAIN))
}

fn install_linker(llvm: u32) -> Result<()> {
    if has("bpf-linker") && linker_llvm_major() == Some(llvm) {
        return Ok(());
    }
    let prefix = format!("/usr/lib/llvm-{llvm}");
    if !std::path::Path::new(&prefix)
        .join("bin/llvm-config")
        .exists()
    {
        apt_install(&[&format!("llvm-{llvm}-dev")])?;
    }
    step(&format!(
        "cargo install bpf-linker {LINKER_VERSION} with LLVM {llvm} (about a minute)"
    ));
    run_quietly(
        command("cargo")
            .args([
                "install",
                "bpf-linker",
                "--version",
                LINKER_VERSION,
                "--force",
            ])
            .args([
                "--no-default-features",
                "--features",
                &format!("llvm-{llvm}"),
            ])
            .env("LLVM_PREFIX", prefix),
    )
    .context("cannot install bpf-linker: see https://github.com/aya-rs/bpf-linker")
}
