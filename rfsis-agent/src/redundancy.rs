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
use crate::flows::Census;
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

impl Record {
    /// Notes how it is `now`, at the time `wall` of the calendar. Gives for how long the pair was not redundant since it was
    /// looked at last.
    fn note(&mut self, redundant: bool, now: Instant, wall: SystemTime) -> Duration {
        let passed = now - std::mem::replace(&mut self.looked_at, now);
        self.since = redundant.then(|| self.since.unwrap_or(wall));
        if redundant { Duration::ZERO } else { passed }
    }
}

/// Flows that the death of the active would cost, as a node knows them that is in `state`. `unguarded`: connections of its
/// kernel that the ACK gate does not guard, and that it guards no more.
fn flows_at_risk(state: State, census: &Census, unguarded: u64) -> u32 {
    let flows = match state {
        // With `protect: async` the kernel's connections that were adopted are all that is known.
        State::Active => census.live as u64 + unguarded.max(census.unprotected as u64),
        _ => (census.unprotected + census.lagging + census.diverged) as u64,
    };
    u32::try_from(flows).unwrap_or(u32::MAX)
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
        let unguarded = self.unguarded.load(Ordering::Relaxed)
            + self.metrics.guarded_flows.get(GuardCondition::Exposed) as u64;
        let flows = flows_at_risk(node.state, &self.shared.census(), unguarded);
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
        let without = lock(&self.record).note(redundant, Instant::now(), wall::now());
        self.metrics
            .without_redundancy
            .inc_by(without.as_secs_f64());
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Each kind has a number of its own: a sum tells which were added.
    const CENSUS: Census = Census {
        handshake: 1,
        lockstep: 2,
        lagging: 4,
        diverged: 8,
        unprotected: 16,
        live: 32,
        lag_bytes: 64,
        bytes: 128,
    };

    #[test]
    fn a_standby_would_lose_what_it_lacks_bytes_of() {
        for state in [State::Standby, State::TakingOver, State::Fenced] {
            assert_eq!(flows_at_risk(state, &CENSUS, 1000), 4 + 8 + 16);
        }
    }

    #[test]
    fn an_active_would_lose_what_its_standby_never_heard_of() {
        assert_eq!(flows_at_risk(State::Active, &CENSUS, 1000), 32 + 1000);
        assert_eq!(flows_at_risk(State::Active, &CENSUS, 15), 32 + 16);
        assert_eq!(
            flows_at_risk(State::Active, &CENSUS, u64::MAX - 32),
            u32::MAX
        );
    }

    #[test]
    fn redundancy_is_as_old_as_its_last_return_and_only_the_time_without_it_counts() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let wall = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let mut record = Record {
            looked_at: begin,
            since: None,
        };
        let mut without = Duration::ZERO;
        let looks = [
            (1, false, None),
            (3, true, Some(3)),
            (7, true, Some(3)),
            (12, false, None),
            (20, true, Some(20)),
        ];
        for (second, redundant, since) in looks {
            without += record.note(redundant, at(second), wall(second));
            assert_eq!(record.since, since.map(wall), "at {second} s");
        }
        assert_eq!(without, Duration::from_secs(1 + 5));
    }
}
