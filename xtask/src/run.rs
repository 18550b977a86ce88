//! The tasks themselves.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::ebpf::object;
use crate::fuzz::{Length, fuzz};
use crate::kernel;
use crate::setup::{ebpf_clippy, setup};
use crate::shell::{cargo, root_prefix, run, workspace};

/// The agent that is tested, shown and measured.
pub fn agent() -> PathBuf {
    workspace().join("target/release/rfsis-agent")
}

/// Builds the object and the agent.
///
/// # Errors
/// When setup or a build fails.
pub fn build() -> Result<()> {
    setup()?;
    run(cargo().args(["build", "--release", "--package", "rfsis-agent"]))
}

/// Everything that can be tested.
///
/// # Errors
/// When setup, a build or a test fails.
pub fn test(filter: Option<&str>) -> Result<()> {
    build()?;
    let everything_else = [
        "--workspace",
        "--exclude",
        "rfsis-ebpf",
        "--exclude",
        "tests",
    ];
    run(cargo().arg("test").args(everything_else).args(filter))?;
    if filter.is_none() {
        sim(["--seeds", SIM_SEEDS])?;
        sim(["--faults", SIM_SEEDS])?;
    }
    // One lab at a time: each has deadlines of milliseconds, and few machines have cores for two.
    run(as_root("the end-to-end part", cargo().arg("test"))?
        .args(["--release", "--package", "tests", "--no-fail-fast"])
        .args(filter)
        .args(["--", "--test-threads=1"]))
}

/// The stress tests, those of minutes included, with what they observe.
///
/// # Errors
/// When setup, a build or a test fails.
pub fn stress(filter: Option<&str>) -> Result<()> {
    build()?;
    run(as_root("the stress tests", cargo().arg("test"))?
        .args(["--release", "--package", "tests", "--test", "stress"])
        .args(["--", "--include-ignored", "--test-threads=1", "--nocapture"])
        .args(filter))
}

/// Seeds of the simulation in `test`; also those by which each deliberate fault must be caught.
const SIM_SEEDS: &str = "20000";

/// The simulation, with its own arguments.
///
/// # Errors
/// When the build fails, or a seed.
pub fn sim(arguments: impl IntoIterator<Item: AsRef<OsStr>>) -> Result<()> {
    run(cargo()
        .args(["run", "--quiet", "--release", "--package", "rfsis-agent"])
        .args(["--features", "simulation", "--bin", "rfsis-sim", "--"])
        .args(arguments))
}

/// Formatting and clippy.
///
/// # Errors
/// When something is found.
pub fn lint() -> Result<()> {
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["fmt", "--manifest-path", "fuzz/Cargo.toml", "--check"]))?;
    run(cargo()
        .args(["clippy", "--workspace", "--exclude", "rfsis-ebpf"])
        .args(["--all-targets", "--", "-D", "warnings"]))?;
    run(cargo()
        .args([
            "clippy",
            "--package",
            "rfsis-agent",
            "--features",
            "simulation",
        ])
        .args(["--bins", "--", "-D", "warnings"]))?;
    let toolchain = setup()?;
    ebpf_clippy(toolchain)?;
    toolchain.clippy()
}

/// Inputs of each fuzz target in CI, after its corpus.
const CI_INPUTS: u32 = 5_000;
/// The kernel on which CI runs tests besides the host's: of Debian's the oldest that is new enough.
const CI_KERNEL: &str = "6.1";

/// What CI runs.
///
/// # Errors
/// At the first step that fails.
pub fn ci() -> Result<()> {
    plain_build()?;
    lint()?;
    test(None)?;
    kernel::test(CI_KERNEL, None)?;
    fuzz(None, Length::Inputs(CI_INPUTS))
}

/// That a reader without eBPF toolchain and privileges gets a build.
fn plain_build() -> Result<()> {
    println!("xtask: a plain `cargo build`, without the eBPF object");
    let (object, aside) = (object(), object().with_extension("aside"));
    let moved = object.exists();
    if moved {
        std::fs::rename(&object, &aside)?;
    }
    let built = run(cargo().arg("build"));
    if moved {
        std::fs::rename(&aside, &object)?;
    }
    built
}

/// A session that survives its server, before your eyes.
///
/// # Errors
/// When setup or a build fails, or the session did not survive.
pub fn demo() -> Result<()> {
    build()?;
    run(as_root("the demo", cargo().arg("run"))?.args([
        "--quiet",
        "--release",
        "--package",
        "tests",
        "--bin",
        "demo",
    ]))
}

/// Benchmarks, as Markdown; all figures with their targets in one table at the end. `only` names one subject.
///
/// # Errors
/// When setup, a build or a benchmark fails. A missed target is no error: it is printed.
pub fn bench(runs: u32, only: Option<&str>) -> Result<()> {
    build()?;
    let mut wanted = vec!["--runs".to_owned(), runs.to_string()];
    wanted.extend(
        only.iter()
            .flat_map(|name| ["--only".to_owned(), (*name).to_owned()]),
    );
    println!(
        "\n## Measured by `cargo xtask bench {}`\n",
        wanted.join(" ")
    );
    let mut figures = measure(
        as_root("measuring", cargo().args(["run", "--quiet"]))?
            .args(["--release", "--package", "tests", "--bin", "bench", "--"])
            .args(&wanted),
    )?;
    if only.is_none() {
        let memory = ["bench", "--quiet", "--package", "rfsis-agent"];
        figures.extend(measure(cargo().args(memory).args(["--bench", "shadow"]))?);
    }
    println!("### Summary\n\n| what | measured | target | met? |\n|---|---|---|---|");
    for figure in figures {
        println!("| {figure} |");
    }
    Ok(())
}

/// Runs a benchmark, its tables on our output, and returns its figures: the lines that begin with
/// `=> `, without that.
fn measure(command: &mut Command) -> Result<Vec<String>> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start a benchmark")?;
    let output = child.stdout.take().context("a benchmark without output")?;
    let mut figures = Vec::new();
    for line in BufReader::new(output).lines() {
        let line = line?;
        match line.strip_prefix("=> ") {
            Some(figure) => figures.push(figure.to_owned()),
            None => println!("{line}"),
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "a benchmark failed: {status}");
    Ok(figures)
}

/// Lets cargo build as the user that it is, and run what it built as root.
fn as_root<'a>(purpose: &str, cargo: &'a mut Command) -> Result<&'a mut Command> {
    cargo.env("RFSIS_AGENT", agent());
    let sudo = root_prefix(purpose)?;
    if !sudo.is_empty() {
        let runner = format!(
            "CARGO_TARGET_{}_UNKNOWN_LINUX_{}_RUNNER",
            std::env::consts::ARCH.to_uppercase(),
            if cfg!(target_env = "musl") {
                "MUSL"
            } else {
                "GNU"
            }
        );
        cargo.env(runner, "sudo --preserve-env=RFSIS_AGENT,RUST_BACKTRACE");
    }
    Ok(cargo)
}
