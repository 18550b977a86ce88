//! What the threads show each other. The real-time thread never waits here.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rfsis_common::maps::State;

use crate::cli::Role;
use crate::flows::Census;
use crate::heartbeat::{MacAddr, Nanos};

/// The node, as `status` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeView {
    /// What it is now.
    pub state: State,
    /// Its epoch.
    pub epoch: u64,
    /// The peer, once heard.
    pub peer: Option<PeerGlimpse>,
}

/// What was last heard of the peer, as far as others than the heartbeat thread care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerGlimpse {
    /// What it is.
    pub state: State,
    /// Its epoch.
    pub epoch: u64,
    /// What the operator prefers it to be.
    pub role: Role,
    /// Flows that a takeover by the standby would lose, as far as the peer knows.
    pub at_risk: u32,
}

/// Written by the heartbeat thread and the shadow thread, read by the rest.
#[derive(Debug)]
pub struct Shared {
    node: Mutex<NodeView>,
    census: Mutex<Census>,
    peer_heard_at: AtomicU64,
    peer_lived_until: AtomicU64,
    /// The hardware address of the peer's tap in the low 48 bits, 0 if it was never heard.
    peer_tap: AtomicU64,
    /// The peer's session, 0 before it is proven.
    peer_session: AtomicU64,
    epoch: AtomicU64,
    sync_heard_at: AtomicU64,
    /// The epoch in which that was said.
    sync_epoch: AtomicU64,
    copying: AtomicBool,
    /// Flows that a takeover by the standby would lose, as far as is known here.
    at_risk: AtomicU32,
    /// When neither node knew of any, 0 if never.
    safe_at: AtomicU64,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            node: Mutex::new(NodeView {
                state: State::Standby,
                epoch: 0,
                peer: None,
            }),
            census: Mutex::default(),
            peer_heard_at: AtomicU64::new(0),
            peer_lived_until: AtomicU64::new(0),
            peer_tap: AtomicU64::new(0),
            peer_session: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            sync_heard_at: AtomicU64::new(0),
            sync_epoch: AtomicU64::new(0),
            copying: AtomicBool::new(false),
            at_risk: AtomicU32::new(0),
            safe_at: AtomicU64::new(0),
        }
    }
}

impl Shared {
    /// The node's state.
    pub fn node(&self) -> NodeView {
        *lock(&self.node)
    }

    /// Shows the node's state, unless somebody is reading just now. Returns whether it is shown.
    pub fn try_set_node(&self, view: NodeView) -> bool {
        let Ok(mut node) = self.node.try_lock() else {
            return false;
        };
        *node = view;
        true
    }

    /// The flows, as counted last.
    pub fn census(&self) -> Census {
        *lock(&self.census)
    }

    /// Shows a new count of the flows.
    pub fn set_census(&self, census: Census) {
        *lock(&self.census) = census;
    }

    /// The peer was heard at `at` (ns); its tap has hardware address `tap`.
    pub fn peer_heard(&self, at: Nanos, tap: MacAddr) {
        self.peer_heard_at.store(at, Ordering::Relaxed);
        let [a, b, c, d, e, f] = tap;
        let number = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
        self.peer_tap.store(number, Ordering::Relaxed);
    }

    /// The peer may have been active until `at` (ns).
    pub fn set_peer_lived_until(&self, at: Nanos) {
        self.peer_lived_until.store(at, Ordering::Relaxed);
    }

    /// Until when the peer may have been active, ns; `None` if it was never heard.
    pub fn peer_lived_until(&self) -> Option<Nanos> {
        Some(self.peer_lived_until.load(Ordering::Relaxed)).filter(|at| *at > 0)
    }

    /// The node's epoch, and the peer's session once it is proven.
    pub fn set_session(&self, epoch: u64, peer: Option<u64>) {
        self.epoch.store(epoch, Ordering::Relaxed);
        self.peer_session
            .store(peer.unwrap_or(0), Ordering::Relaxed);
    }

    /// The peer's session, `None` before it is proven.
    pub fn peer_session(&self) -> Option<u64> {
        Some(self.peer_session.load(Ordering::Relaxed)).filter(|session| *session > 0)
    }

    /// The node's epoch.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// When the peer was heard last, ns; `None` if never.
    pub fn peer_heard_at(&self) -> Option<Nanos> {
        Some(self.peer_heard_at.load(Ordering::Relaxed)).filter(|at| *at > 0)
    }

    /// The peer was heard on the sync channel at `at` (ns), in this epoch.
    pub fn sync_heard(&self, at: Nanos, epoch: u64) {
        self.sync_epoch.store(epoch, Ordering::Relaxed);
        self.sync_heard_at.store(at, Ordering::Relaxed);
    }

    /// When the peer was heard on the sync channel last, ns; `None` if never.
    pub fn sync_heard_at(&self) -> Option<Nanos> {
        Some(self.sync_heard_at.load(Ordering::Relaxed)).filter(|at| *at > 0)
    }

    /// The same, if it was in this epoch.
    pub fn sync_heard_in(&self, epoch: u64) -> Option<Nanos> {
        let same = self.sync_epoch.load(Ordering::Relaxed) == epoch;
        self.sync_heard_at().filter(|_| same)
    }

    /// Whether the standby gets the VIP's frames, as far as it depends on this node.
    pub fn is_copying(&self) -> bool {
        self.copying.load(Ordering::Relaxed)
    }

    /// Shows whether it does.
    pub fn set_copying(&self, copying: bool) {
        self.copying.store(copying, Ordering::Relaxed);
    }

    /// Flows that a takeover by the standby would lose, as far as is known here.
    pub fn at_risk(&self) -> u32 {
        self.at_risk.load(Ordering::Relaxed)
    }

    /// Shows a new count of them; returns the old one.
    pub fn set_at_risk(&self, flows: u32) -> u32 {
        self.at_risk.swap(flows, Ordering::Relaxed)
    }

    /// When neither node knew of any flow at risk last, ns; `None` if never.
    pub fn safe_at(&self) -> Option<Nanos> {
        Some(self.safe_at.load(Ordering::Relaxed)).filter(|at| *at > 0)
    }

    /// At `at` (ns) neither node knows of any.
    pub fn set_safe(&self, at: Nanos) {
        self.safe_at.store(at, Ordering::Relaxed);
    }

    /// The hardware address of the peer's tap, as its authenticated heartbeats say.
    pub fn peer_tap(&self) -> Option<MacAddr> {
        let [_, _, mac @ ..] = self.peer_tap.load(Ordering::Relaxed).to_be_bytes();
        (mac != [0; 6]).then_some(mac)
    }
}

/// The values are plain data: a thread that panicked while it held them left them whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
