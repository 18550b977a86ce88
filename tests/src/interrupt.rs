//! Ctrl-C leaves nothing behind: namespaces and children go by themselves, a directory does not.

use std::path::PathBuf;

use anyhow::Result;
use nix::sys::signal::{SigSet, Signal};

/// SIGINT, SIGTERM and SIGHUP, held back.
#[derive(Debug)]
pub struct Interrupts(SigSet);

impl Interrupts {
    /// Holds them back on this thread and on all that it starts from now on.
    ///
    /// # Errors
    /// What `pthread_sigmask` says.
    pub fn hold() -> Result<Self> {
        let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]
            .into_iter()
            .collect();
        signals.thread_block()?;
        Ok(Self(signals))
    }

    /// From now on such a signal removes the directory and ends the process.
    pub fn remove(&self, directory: PathBuf) {
        let signals = self.0;
        std::thread::spawn(move || {
            if let Ok(signal) = signals.wait() {
                std::fs::remove_dir_all(&directory).ok();
                // As a shell reports it.
                std::process::exit(128 + signal as i32);
            }
        });
    }
}
