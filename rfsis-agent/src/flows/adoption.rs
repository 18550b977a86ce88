//! Live shadows on their way into the kernel, a few at a time.
//!
//! ```text
//!  live ──(settled)──► ask the client what it has got ──► all acknowledged? ──► kernel socket
//!                                ▲      │ no                     │ no
//!                                └──────┘ ever more rarely       ▼
//!                                                      the handler rests until it is
//! ```
//!
//! A shadow that cannot be moved goes on as it is, and is looked at again, ever more rarely.

use std::collections::BTreeSet;

use rfsis_common::maps::FlowKey;

use super::{Effects, Flow, Flows};
use crate::adopt::Numbers;
use crate::collections::HashMap;
use crate::heartbeat::Nanos;
use crate::shadow::{Readiness, Shadow, Shell};

const MS: Nanos = 1_000_000;

/// Flows that are looked at in one turn, and the time from one turn to the next, ns: the frames of the others
/// wait meanwhile, and the services have as much to do.
const AT_ONCE: usize = 32;
const TURN: Nanos = MS;

/// Shadows that are done with and given back to the system in one turn: to unmap their buffers takes as long
/// as to make a socket, so it waits until nothing else is due.
const FREED_AT_ONCE: usize = 4;

/// A flow that is not ready is looked at again after the first, then ever more rarely up to the second, ns.
const PAUSE: Nanos = 20 * MS;
const PAUSE_MOST: Nanos = 2_000 * MS;

/// A handler does not rest for a client that acknowledges nothing for so long, ns.
const REST: Nanos = 100 * MS;

#[derive(Debug)]
struct Move {
    at: Nanos,
    pause: Nanos,
    /// The handler rests; how far the client had acknowledged when it was last looked at.
    rests_from: Option<u32>,
}

/// The live flows that are to be adopted, and when they are looked at.
#[derive(Debug, Default)]
pub(super) struct Moves {
    /// Those that are to be looked at next are due at 0.
    due: BTreeSet<(Nanos, FlowKey)>,
    moves: HashMap<FlowKey, Move>,
    next_turn: Nanos,
    /// Of flows that were adopted.
    shells: Vec<Shell>,
}

impl Moves {
    /// Looks at a flow at `at`, for the first time.
    pub(super) fn add(&mut self, flow: FlowKey, at: Nanos) {
        let known = self.moves.insert(
            flow,
            Move {
                at,
                pause: PAUSE,
                rests_from: None,
            },
        );
        if let Some(known) = known {
            self.due.remove(&(known.at, flow));
        }
        self.due.insert((at, flow));
    }

    /// Forgets a flow.
    pub(super) fn remove(&mut self, flow: FlowKey) {
        if let Some(known) = self.moves.remove(&flow) {
            self.due.remove(&(known.at, flow));
        }
    }

    /// Forgets all flows.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Looks at a flow before all others: its handler rests.
    pub(super) fn hurry(&mut self, flow: FlowKey) {
        self.reschedule(flow, 0);
    }

    /// Looks at a flow at `at` instead of when it was due.
    fn reschedule(&mut self, flow: FlowKey, at: Nanos) {
        if let Some(known) = self.moves.get_mut(&flow) {
            self.due.remove(&(known.at, flow));
            known.at = at;
            self.due.insert((at, flow));
        }
    }

    /// Looks at a flow again after a pause, which is twice as long the next time.
    fn postpone(&mut self, flow: FlowKey, now: Nanos) {
        if let Some(known) = self.moves.get_mut(&flow) {
            let at = now + known.pause;
            known.pause = (known.pause * 2).min(PAUSE_MOST);
            known.rests_from = None;
            self.reschedule(flow, at);
        }
    }

    /// When the next is due, ns.
    pub(super) fn next_wakeup(&self) -> Nanos {
        match self.due.first() {
            Some(&(0, _)) => 0,
            Some(&(at, _)) => at.max(self.next_turn),
            None if self.shells.is_empty() => Nanos::MAX,
            None => self.next_turn,
        }
    }

    fn pop_due(&mut self, now: Nanos) -> Option<FlowKey> {
        let (_, flow) = self.due.first().copied().filter(|(at, _)| *at <= now)?;
        self.due.pop_first();
        Some(flow)
    }
}

impl Flows {
    /// Looks at some of the flows that are due. `note` is told of each that the kernel takes, before the kernel
    /// hears of its client or says anything.
    pub fn adopt_some(
        &mut self,
        now: Nanos,
        fx: &mut impl Effects,
        mut note: impl FnMut(&Numbers),
    ) {
        let now = self.advance(now);
        while let Some(flow) = self.moves.pop_due(0) {
            self.try_to_adopt(flow, now, fx, &mut note);
        }
        if now < self.moves.next_turn {
            return;
        }
        if !fx.may_adopt() {
            self.moves.next_turn = now + TURN;
            return;
        }
        let mut looked_at = 0;
        while looked_at < AT_ONCE
            && let Some(flow) = self.moves.pop_due(now)
        {
            self.try_to_adopt(flow, now, fx, &mut note);
            looked_at += 1;
        }
        let shells = &mut self.moves.shells;
        if looked_at == 0 && !shells.is_empty() {
            shells.truncate(shells.len().saturating_sub(FREED_AT_ONCE));
            self.moves.next_turn = now + TURN;
        }
        if looked_at > 0 {
            self.moves.next_turn = now + TURN;
        }
    }

    fn try_to_adopt(
        &mut self,
        flow: FlowKey,
        now: Nanos,
        fx: &mut impl Effects,
        note: &mut impl FnMut(&Numbers),
    ) {
        let Some(Flow::Shadow(shadow)) = self.flows.get(&flow) else {
            self.moves.remove(flow);
            return;
        };
        match shadow.readiness(now) {
            Readiness::Ready => {
                if !self.adopt(flow, now, fx, note) {
                    self.wake(flow, now, fx);
                    self.moves.postpone(flow, now);
                }
            }
            Readiness::Unsettled(until) => self.moves.reschedule(flow, until),
            Readiness::Unheard => {
                self.with_shadow(flow, now, fx, Shadow::ask);
                self.moves.postpone(flow, now);
            }
            Readiness::Unacknowledged => self.rest(flow, now, fx),
            Readiness::Incomplete => {
                self.wake(flow, now, fx);
                self.moves.postpone(flow, now);
            }
            Readiness::Ending => {
                self.wake(flow, now, fx);
                self.moves.remove(flow);
            }
        }
    }

    /// Lets the handler rest as long as the client goes on acknowledging.
    fn rest(&mut self, flow: FlowKey, now: Nanos, fx: &mut impl Effects) {
        let (Some(Flow::Shadow(shadow)), Some(known)) =
            (self.flows.get_mut(&flow), self.moves.moves.get_mut(&flow))
        else {
            return;
        };
        let acknowledged = shadow.acknowledged();
        if known.rests_from == Some(acknowledged) {
            self.wake(flow, now, fx);
            self.moves.postpone(flow, now);
        } else {
            shadow.rest();
            known.rests_from = Some(acknowledged);
            self.moves.reschedule(flow, now + REST);
        }
    }

    fn wake(&mut self, flow: FlowKey, now: Nanos, fx: &mut impl Effects) {
        if let Some(Flow::Shadow(shadow)) = self.flows.get(&flow)
            && shadow.is_resting()
        {
            self.with_shadow(flow, now, fx, Shadow::wake);
        }
    }

    /// Moves a flow into the kernel; returns whether the kernel took it.
    fn adopt(
        &mut self,
        flow: FlowKey,
        now: Nanos,
        fx: &mut impl Effects,
        note: &mut impl FnMut(&Numbers),
    ) -> bool {
        let Some(Flow::Shadow(shadow)) = self.flows.get(&flow) else {
            return false;
        };
        // While `LIVE_FLOWS` still names the flow: who comes next finds either the shadow or the socket.
        let numbers = shadow.numbers(now);
        let Some(socket) = fx.restore(&numbers) else {
            return false;
        };
        note(&numbers);
        self.drop_bytes_of(flow);
        let shadow = self.flows.remove(&flow);
        self.remove(flow, fx);
        if let Some(Flow::Shadow(shadow)) = shadow
            && let Some((unfinished, shell)) = shadow.unfinished()
        {
            fx.adopt(flow, socket, unfinished);
            self.moves.shells.push(shell);
        }
        true
    }
}
