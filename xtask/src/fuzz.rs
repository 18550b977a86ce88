//! Fuzzing: the targets in `fuzz/`, each from its kept corpus on.

use anyhow::{Result, bail};

use crate::setup::fuzzing;
use crate::shell::{cargo, run, workspace};

/// In `fuzz/fuzz_targets`.
const TARGETS: [&str; 5] = ["config", "frame", "heartbeat", "lockstep", "sync"];

/// How long a target is run.
#[derive(Clone, Copy, Debug)]
pub enum Length {
    /// As many inputs, made of the same seed each time.
    Inputs(u32),
    /// So long, anew each time.
    Seconds(u32),
}

/// Runs one target or all. What a target finds is added to its corpus.
///
/// # Errors
/// When setup or the build fails, or a target has found an input that breaks it: the path of that input is
/// printed with the command that replays it.
pub fn fuzz(only: Option<&str>, length: Length) -> Result<()> {
    if let Some(name) = only.filter(|name| !TARGETS.contains(name)) {
        bail!("no fuzz target {name}: there are {}", TARGETS.join(", "));
    }
    fuzzing()?;
    for target in TARGETS {
        if only.is_some_and(|only| only != target) {
            continue;
        }
        // Nothing here is unsafe, so the sanitizers would find nothing; and they need a nightly.
        let mut command = cargo();
        command.args(["fuzz", "run", "--sanitizer", "none", target]);
        // What a short run finds new stays out of the tree.
        let (scratch, limit) = match length {
            Length::Inputs(count) => (true, format!("-runs={count}")),
            Length::Seconds(seconds) => (false, format!("-max_total_time={seconds}")),
        };
        if scratch {
            let scratch = workspace().join("fuzz/target/found").join(target);
            let _ = std::fs::remove_dir_all(&scratch);
            std::fs::create_dir_all(&scratch)?;
            command.arg(scratch).arg(format!("fuzz/corpus/{target}"));
        }
        command.args(["--", &limit]);
        if scratch {
            command.arg("-seed=1");
        }
        run(command.args(["-print_final_stats=1", "-verbosity=0"]))?;
    }
    Ok(())
}
