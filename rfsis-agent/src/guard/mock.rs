//! What the guard's tests act on.

use std::collections::{HashMap, HashSet};

use rfsis_common::ack_gate::{Confirmation, Guarded, Sent};
use rfsis_common::agree::Pending;
use rfsis_common::maps::FlowKey;
use rfsis_common::prompt::Delegated;

use super::GuardEffects;
use crate::heartbeat::Nanos;

/// The gate's maps, and what else the guard reaches.
#[derive(Default)]
pub(super) struct Maps {
    pub(super) guarded: HashMap<FlowKey, Guarded>,
    pub(super) sent: HashMap<u32, Sent>,
    pub(super) confirmed: HashMap<u32, Confirmation>,
    delegated: HashMap<u32, Delegated>,
    /// Connections that a service has; `None`: all.
    pub(super) running: Option<HashSet<FlowKey>>,
    /// Snapshots that were asked for.
    pub(super) wanted: Vec<(FlowKey, u32)>,
    /// The gate takes a confirmation, and tells the client of it, behind each look at what it has.
    pub(super) is_busy: bool,
    /// Clients are told something.
    pub(super) talks: bool,
}

impl Maps {
    fn goes_on(&mut self, slot: u32) {
        if self.is_busy
            && self.delegated.contains_key(&slot)
            && let (Some(confirmed), Some(sent)) =
                (self.confirmed.get_mut(&slot), self.sent.get_mut(&slot))
        {
            let (ack, edge) = (confirmed.ack(), confirmed.edge());
            *confirmed = Confirmation::new(ack + 10, edge + 10);
            (sent.ack, sent.told, sent.told_edge) = (ack + 10, ack + 10, edge + 10);
        }
    }
}

impl GuardEffects for Maps {
    fn set_guarding(&mut self, _on: bool) {}

    fn start(&mut self, slot: u32, sent: Sent) -> bool {
        self.sent.insert(slot, sent);
        true
    }

    fn publish(&mut self, flow: FlowKey, guarded: Guarded) -> bool {
        self.guarded.insert(flow, guarded);
        true
    }

    fn withdraw(&mut self, flow: FlowKey) {
        self.guarded.remove(&flow);
    }

    fn lend(&mut self, _slot: u32) -> bool {
        true
    }

    fn kept(&mut self, _flow: FlowKey) -> Option<Pending> {
        None
    }

    fn claim(&mut self, _flow: FlowKey) -> bool {
        false
    }

    fn confirm(&mut self, slot: u32, confirmation: Confirmation) -> bool {
        self.confirmed.insert(slot, confirmation);
        true
    }

    fn confirm_more(&mut self, slot: u32, confirmation: Confirmation) -> Confirmation {
        let known = self.confirmed.entry(slot).or_default();
        *known = known.with(confirmation);
        *known
    }

    fn confirmed(&mut self, slot: u32) -> Confirmation {
        let confirmed = self.confirmed.get(&slot).copied().unwrap_or_default();
        self.goes_on(slot);
        confirmed
    }

    fn delegate(&mut self, slot: u32, delegated: Delegated) -> bool {
        self.delegated.insert(slot, delegated);
        true
    }

    fn prompted_at(&mut self) -> Nanos {
        0
    }

    fn sent(&mut self, slot: u32) -> Option<Sent> {
        let sent = self.sent.get(&slot).copied();
        self.goes_on(slot);
        sent
    }

    fn send(&mut self, packet: &[u8]) {
        assert!(self.talks, "there is nothing to be said: {packet:?}");
    }

    fn runs(&mut self, flow: FlowKey) -> bool {
        let running = self.running.as_ref();
        running.is_none_or(|running| running.contains(&flow))
    }

    fn take_snapshot(&mut self, flow: FlowKey, join: u32) {
        self.wanted.push((flow, join));
    }
}
