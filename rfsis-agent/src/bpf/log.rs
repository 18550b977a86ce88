//! What the programs have to say (`aya-log`), as `tracing` events.

use std::fmt;

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::error::BpfError;

/// The log ring of the programs.
pub struct ProgramLog(EbpfLogger<ToTracing>);

impl fmt::Debug for ProgramLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProgramLog").finish_non_exhaustive()
    }
}

impl ProgramLog {
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, BpfError> {
        EbpfLogger::init_with_logger(ebpf, ToTracing)
            .map(Self)
            .map_err(|error| BpfError::new("opening the log of the programs", &error))
    }

    /// Passes on what comes, until it is dropped or the ring cannot be waited for.
    ///
    /// # Errors
    /// Where the ring cannot be registered with the reactor.
    pub async fn run(self) -> Result<(), BpfError> {
        let failed =
            |error: std::io::Error| BpfError::new("reading the log of the programs", &error);
        #[expect(
            deprecated,
            reason = "its successor is unsafe; the logger owns its descriptor and never changes it"
        )]
        let mut ring = AsyncFd::with_interest(self.0, Interest::READABLE).map_err(failed)?;
        loop {
            let mut ready = ring.readable_mut().await.map_err(failed)?;
            ready.get_inner_mut().flush();
            ready.clear_ready();
        }
    }
}

/// Turns records of the `log` crate into events. Rare ones only: the programs never log per frame.
struct ToTracing;

impl log::Log for ToTracing {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let program = record.target();
        let message = record.args();
        match record.level() {
            log::Level::Error => tracing::error!(program, "{message}"),
            log::Level::Warn => tracing::warn!(program, "{message}"),
            log::Level::Info => tracing::info!(program, "{message}"),
            log::Level::Debug | log::Level::Trace => tracing::debug!(program, "{message}"),
        }
    }

    fn flush(&self) {}
}
