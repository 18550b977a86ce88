//! Whether the death of either node would be survived: which flows a takeover would lose, since when none,
//! and for how long in all there were some.
//!
//! Each node counts what it knows of and tells the other by its heartbeats. The standby knows which shadows
//! lack bytes. The active knows which connections the standby has never heard of: what its kernel has and the
//! ACK gate does not guard, and what lives on shadows of its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rfsis_common::maps::State;

use crate::bpf::GuardMaps;
use crate::heartbeat::Nanos;
use crate::metrics::{GuardCondition, Metrics};
use crate::node::Event;
use crate::pulse::PulseHandle;
use crate::shared::Shared;
use crate::sockets::VipSockets;
use crate::sys;
use crate::wall;

/// Between two looks.
pub const LOOK: Duration = Duration::from_millis(100);

/// Between two lists of the kernel's sockets, and in multiples of what one takes.
const LIST_INTERVAL: Duration = Duration::from_secs(1);
const LIST_SHARE: u32 = 100;

/// Counts flows at risk.
pub struct Redundancy {
    shared: Arc<Shared>,
    metrics: Arc<Metrics>,
    pulse: PulseHandle,
    sockets: VipSockets,
    /// Which flows the standby knows, with `protect: sync`.
    guarded: Option<GuardMaps>,
    /// Connections of the kernel that it does not, as counted last.
    unguarded: AtomicU64,
    next_list: Mutex<Option<Instant>>,
    record: Mutex<Record>,
}

impl std::fmt::Debug for Redundancy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Redundancy")
            .field("unguarded", &self.unguarded)
            .finish_non_exhaustive()
    }
}

/// What was so far.
#[derive(Clone, Copy, Debug)]
struct Record {
    looked_at: Instant,
    since: Option<SystemTime>,
}

impl Redundancy {
    /// Nothing is known yet.
    pub fn new(
        shared: Arc<Shared>,
        metrics: Arc<Metrics>,
        pulse: PulseHandle,
        sockets: VipSockets,
        guarded: Option<GuardMaps>,
    ) -> Self {
        Self {
            shared,
            metrics,
            pulse,
            sockets,
            guarded,
            unguarded: AtomicU64::new(0),
            next_list: Mutex::new(None),
            record: Mutex::new(Record {
                looked_at: Instant::now(),
                since: None,
            }),
        }
    }

    /// Counts anew, and tells the peer. `afresh`: the kernel's sockets as well, however recently they were
    /// listed.
    pub async fn look(&self, afresh: bool) {
        let node = self.shared.node();
        if node.state == State::Active {
            self.list(afresh).await;
        }
        let census = self.shared.census();
        let flows = match node.state {
            State::Active => {
                let unguarded = self.unguarded.load(Ordering::Relaxed)
                    + self.metrics.guarded_flows.get(GuardCondition::Exposed) as u64;
                // With `protect: async` the kernel's connections that were adopted are all that is known.
                census.live as u64 + unguarded.max(census.unprotected as u64)
            }
            _ => (census.unprotected + census.lagging + census.diverged) as u64,
        };
        let flows = u32::try_from(flows).unwrap_or(u32::MAX);
        if self.shared.set_at_risk(flows) != flows {
            self.pulse.order(Event::AtRisk(flows));
        }
        if flows == 0 && node.peer.is_some_and(|peer| peer.at_risk == 0) {
            self.shared.set_safe(sys::monotonic());
        }
    }

    /// Counts connections of the kernel that the standby does not know.
    async fn list(&self, afresh: bool) {
        let Some(guarded) = &self.guarded else {
            return;
        };
        let due = *lock(&self.next_list);
        if !afresh && due.is_some_and(|at| Instant::now() < at) {
            return;
        }
        let began = Instant::now();
        // Where the kernel cannot list them (no CONFIG_INET_DIAG) the peer's count has to do.
        if let Ok(open) = self.sockets.open().await {
            let unknown = open
                .iter()
                .filter(|socket| !guarded.is_published(&socket.flow));
            self.unguarded
                .store(unknown.count() as u64, Ordering::Relaxed);
        }
        let pause = LIST_INTERVAL.max(began.elapsed() * LIST_SHARE);
        *lock(&self.next_list) = Some(Instant::now() + pause);
    }

    /// Notes whether the pair is redundant now: since when, and for how long it was not.
    pub fn note(&self, redundant: bool) {
        let mut record = lock(&self.record);
        let now = Instant::now();
        let passed = now - record.looked_at;
        record.looked_at = now;
        record.since = redundant.then(|| record.since.unwrap_or_else(wall::now));
        if !redundant {
            self.metrics.without_redundancy.inc_by(passed.as_secs_f64());
        }
        self.metrics.redundant.set(i64::from(redundant));
    }

    /// Since when the pair has been redundant, `None` while it is not.
    pub fn since(&self) -> Option<SystemTime> {
        lock(&self.record).since
    }
}

/// How long ago, by the clock of [`sys::monotonic`].
pub fn age(at: Nanos) -> Duration {
    Duration::from_nanos(sys::monotonic().saturating_sub(at))
}

/// The values are plain data: a thread that panicked while it held them left them whole.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
