//! Ctrl-C leaves nothing behind: namespaces and children go by themselves, a directory does not.

use std::path::PathBuf;

use anyhow::Result;

/// From now on SIGINT, SIGTERM and SIGHUP remove the directory and end the process. A handler, not
/// a blocked signal: children would inherit that.
///
/// # Errors
/// When it is called twice.
pub fn remove_on_interrupt(directory: PathBuf) -> Result<()> {
    ctrlc::set_handler(move || {
        std::fs::remove_dir_all(&directory).ok();
        // As a shell reports SIGINT.
        std::process::exit(130);
    })?;
    Ok(())
}
