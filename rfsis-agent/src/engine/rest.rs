//! When the shadow thread reads frames that do not wake it.

use rfsis_common::verdict::{ACK_FRAME, BARE_FRAME, patience};

use crate::bpf::RestWriter;
use crate::heartbeat::Nanos;

/// Whether the thread rests, and the programs' knowledge of it.
#[derive(Debug)]
pub struct Rest {
    map: RestWriter,
    /// For how long it is to rest for what it has read, ns; 0 if nothing.
    due: Nanos,
    /// Connections open: of these there is more to come.
    opens: bool,
    told: bool,
}

impl Rest {
    /// Awake.
    pub fn new(map: RestWriter) -> Self {
        Self {
            map,
            due: 0,
            opens: false,
            told: false,
        }
    }

    /// A frame of `len` bytes was read: others that follow it, to be woken for each of which costs more than to read
    /// it, may wait as long as it might have.
    pub(super) fn note(&mut self, len: u32) {
        let patience = patience(len);
        self.opens |= len > ACK_FRAME && len <= BARE_FRAME;
        self.due = match self.due {
            0 => patience,
            due => due.min(patience),
        };
    }

    /// To be called before the thread waits; gives when it has to look at the ring by itself, ns. What
    /// arrived before the programs heard of it lies in the ring, and who waits for a ring with something
    /// in it does not wait.
    pub(super) fn begin(&mut self, may_rest: bool, now: Nanos) -> Nanos {
        // Bare acknowledgements alone are those of a download: too many together would take long.
        let most = if std::mem::take(&mut self.opens) {
            patience(BARE_FRAME)
        } else {
            patience(BARE_FRAME + 1)
        };
        let due = std::mem::take(&mut self.due).min(most);
        let rests = due > 0 && may_rest;
        let until = if rests { now + due } else { 0 };
        if rests || self.told {
            match self.map.write(until) {
                Ok(()) => self.told = rests,
                Err(error) => tracing::warn!(%error, "cannot rest"),
            }
        }
        if rests { until } else { Nanos::MAX }
    }
}
