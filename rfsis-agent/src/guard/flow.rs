//! A flow at the ACK gate, and how well it is protected.

use rfsis_common::ack_gate::{Confirmation, Guarded};
use rfsis_common::prompt::Delegated;

use super::GuardEffects;
use crate::heartbeat::Nanos;
use crate::segment::Options;
use crate::sync::Open;

#[derive(Debug)]
pub(super) struct Syn {
    pub(super) isn: u32,
    pub(super) window: u16,
    pub(super) options: Options,
}

#[derive(Debug)]
pub(super) enum Phase {
    Opening {
        open: Box<Open>,
        /// The SYN-ACK.
        answer: Vec<u8>,
        /// The gate has it, too, and lets it go when the kernels agree.
        kept: bool,
        since: Nanos,
        pause: Nanos,
        /// When the standby is to be told of it, or told again.
        repeat_at: Nanos,
    },
    Guarded,
    Exposed,
    /// The gate lets out no more than is confirmed; the client may have been told of more before.
    Closing {
        until: Nanos,
    },
}

#[derive(Debug)]
pub(super) struct Flow {
    pub(super) slot: u32,
    /// By which both nodes tell this connection from others of the same ports. Of a flow that has joined
    /// late it is a made-up one, see [`Snapshot::client_isn`](crate::sync::Snapshot::client_isn).
    pub(super) client_isn: u32,
    pub(super) active_isn: u32,
    pub(super) shift: u8,
    pub(super) sack_permitted: bool,
    /// The kernel may have spoken before the gate knew of the flow, so that the client may have been told of
    /// more than the gate has noted.
    pub(super) spoke_unseen: bool,
    pub(super) phase: Phase,
    /// Of a guarded flow what the gate knew when it was looked at last; else what the standby said since. Never older than
    /// that: numbers that lie 2 GiB apart cannot be compared.
    pub(super) confirmation: Confirmation,
    pub(super) recheck: Option<Nanos>,
    /// How often it was closed in vain.
    pub(super) closed_in_vain: u8,
    /// When the standby was heard of it, or asked for it.
    pub(super) known_at: Nanos,
    /// What was confirmed when it was found to wait for more, and when that was.
    pub(super) stalled: Option<(u32, Nanos)>,
    /// The kernel has said once that there is no such connection.
    pub(super) denied: bool,
}

impl Flow {
    pub(super) fn new(slot: u32, open: &Open, phase: Phase, now: Nanos) -> Self {
        let scaled = open.client.window_scale.is_some();
        Self {
            slot,
            client_isn: open.client_isn,
            active_isn: open.active_isn,
            // Counts only where both announced it (RFC 7323 section 2.2).
            shift: open.active.window_scale.filter(|_| scaled).unwrap_or(0),
            sack_permitted: open.client.sack_permitted && open.active.sack_permitted,
            spoke_unseen: false,
            phase,
            confirmation: Confirmation::default(),
            recheck: None,
            closed_in_vain: 0,
            known_at: now,
            stalled: None,
            denied: false,
        }
    }

    /// Every byte of which its client is told is confirmed: what more is, the gate takes by itself.
    pub(super) fn protect(&mut self, fx: &mut impl GuardEffects) {
        self.phase = Phase::Guarded;
        self.closed_in_vain = 0;
        fx.delegate(self.slot, Delegated::of(self.client_isn));
    }

    /// Learns what the gate has taken by itself.
    pub(super) fn catch_up(&mut self, fx: &mut impl GuardEffects) {
        if matches!(self.phase, Phase::Guarded) {
            self.confirmation = fx.confirmed(self.slot);
        }
    }

    /// The gate passes all of it.
    pub(super) fn expose(&mut self, fx: &mut impl GuardEffects) {
        fx.confirm(self.slot, Confirmation::OPEN);
        fx.delegate(self.slot, Delegated::default());
        self.confirmation = Confirmation::default();
        self.phase = Phase::Exposed;
    }

    pub(super) fn guarded(&self) -> Guarded {
        Guarded {
            slot: self.slot,
            client_isn: self.client_isn,
            shift: u32::from(self.shift),
        }
    }
}
