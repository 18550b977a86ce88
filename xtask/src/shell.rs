//! Running other programs, as root where that is needed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Root of the workspace.
pub fn workspace() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

/// A command in the workspace that is not bound to the toolchain which runs xtask.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.current_dir(workspace());
    for variable in ["CARGO", "RUSTC", "RUSTDOC", "RUSTUP_TOOLCHAIN"] {
        command.env_remove(variable);
    }
    command
}

/// `cargo` of the toolchain that runs xtask.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}

/// Runs a command, its output on ours.
///
/// # Errors
/// When it cannot be started or fails.
pub fn run(command: &mut Command) -> Result<()> {
    let line = describe(command);
    let status = command
        .status()
        .with_context(|| format!("cannot start `{line}`"))?;
    if !status.success() {
        bail!("`{line}`: {status}");
    }
    Ok(())
}

/// Runs a command and returns what it printed; `None` when it cannot be started or fails.
pub fn ask(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success().then_some(text)
}

/// Runs a command quietly; what it printed is shown only in the error.
///
/// # Errors
/// When it cannot be started or fails.
pub fn run_quietly(command: &mut Command) -> Result<()> {
    let line = describe(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start `{line}`"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> = said.lines().collect();
        let last = lines[lines.len().saturating_sub(20)..].join("\n");
        bail!("`{line}`: {}:\n{last}", output.status);
    }
    Ok(())
}

/// Whether a program of this name is in `PATH`.
pub fn has(program: &str) -> bool {
    find(program).is_some()
}

/// Where a program of this name is: in `PATH`, or where Debian keeps root's.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// Whether xtask itself runs as root.
pub fn is_root() -> bool {
    ask(Command::new("id").arg("-u")).is_some_and(|uid| uid.trim() == "0")
}

/// What to put in front of a command that needs root: nothing, or `sudo`.
///
/// # Errors
/// When there is neither root nor sudo.
pub fn root_prefix(purpose: &str) -> Result<Vec<String>> {
    if is_root() {
        return Ok(Vec::new());
    }
    if has("sudo") {
        println!("xtask: {purpose} needs root: using sudo");
        return Ok(vec!["sudo".into()]);
    }
    bail!("{purpose} needs root: run this as root, or install sudo")
}

/// A command as one would type it.
pub fn describe(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}
