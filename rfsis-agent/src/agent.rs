//! Start, stop, and who talks to whom.

use crate::cli::{Fatal, Role};
use crate::config::Config;

/// Runs the agent in the foreground until it is told to stop.
///
/// # Errors
/// See [`Fatal`].
pub fn run(config: Config, role: Role) -> Result<(), Fatal> {
    let _ = (config, role);
    Err(Fatal::Failed(anyhow::anyhow!("the agent is not built yet")))
}

/// Leaves the host as it was found, after a crash.
///
/// # Errors
/// See [`Fatal`].
pub fn cleanup(config: &Config) -> Result<(), Fatal> {
    let _ = config;
    Err(Fatal::Failed(anyhow::anyhow!("the agent is not built yet")))
}
