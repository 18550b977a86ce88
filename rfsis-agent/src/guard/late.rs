//! Flows that are older than the standby, or of which it lost something: from exposed to guarded.
//!
//! 1. While its client is told more all the time, a flow would never be confirmed in full. So it is *closed*:
//!    from now on the client is told only what is confirmed, and what it was told before is so in a moment.
//! 2. If it is not, the standby lacks bytes that the client will not send again: a snapshot has them. So it does
//!    if it says that it does not know the flow (REFUSE), or cannot know it because it lived on a shadow until
//!    the kernel took it; and where the gate cannot know what the client was told, since the kernel has said
//!    nothing since the gate has known the flow. The flow is offered, and when the standby keeps its frames the
//!    snapshot is taken and sent ([`Joins`](crate::join::Joins)); the shadow that is made of it confirms.
//! 3. Before the snapshot is taken the flow is closed as well. Nobody is told of what comes after it until that
//!    is confirmed, though its copies get lost; and the client's window bounds what the standby has to keep.

use rfsis_common::ack_gate::{Confirmation, Sent, sent_flags};
use rfsis_common::maps::FlowKey;
use rfsis_common::prompt::Delegated;

use super::{Ended, Flow, Guard, GuardEffects, MS, Phase};
use crate::adopt::Numbers;
use crate::fault::faulty;
use crate::heartbeat::Nanos;
use crate::lockstep::{before, later};
use crate::sync::{Offer, Record, Snapshot};

/// A flow that is closing is looked at so often, and open again after this, ns; after more, where a snapshot
/// is under way meanwhile, or has just been.
const CLOSING_LOOK: Nanos = 10 * MS;
const CLOSING_PATIENCE: Nanos = 40 * MS;
const SNAPSHOT_PATIENCE: Nanos = 240 * MS;

/// So often in a row it is closed in vain: its client would feel it.
const CLOSED_IN_VAIN: u8 = 4;

impl Flow {
    /// Whether everything that the client was told is confirmed.
    pub(super) fn is_all_confirmed(&mut self, fx: &mut impl GuardEffects) -> bool {
        let Some(sent) = fx.sent(self.slot) else {
            return false;
        };
        // Each segment acknowledges again all that was acknowledged before it.
        if sent.version != 0 && sent.told == sent.ack {
            self.spoke_unseen = false;
        }
        // All zeros is no number: it would be ahead of half of all numbers.
        let is_confirmed = self.confirmation != Confirmation::default();
        is_confirmed && !self.spoke_unseen && !before(self.confirmation.ack(), sent.told)
    }
}

impl Guard {
    /// The standby does not know a flow that is not opening.
    pub(super) fn hand_over(&mut self, key: FlowKey, now: Nanos, fx: &mut impl GuardEffects) {
        self.expose(key, fx);
        let Some(flow) = self.flows.get_mut(&key) else {
            return;
        };
        let ended = fx
            .sent(flow.slot)
            .is_some_and(|sent| sent.flags & (sent_flags::FIN_SENT | sent_flags::RST_SENT) != 0);
        if ended {
            // What is left is between the client and the kernel.
            self.forget(key, fx);
        } else if !self.is_half_open(key, fx) {
            self.joins.want(key, now);
        }
    }

    /// The kernel takes a flow that lived on a shadow, and has said nothing yet: no standby knows it.
    pub fn adopt(&mut self, numbers: &Numbers, now: Nanos, fx: &mut impl GuardEffects) {
        let &Numbers {
            flow,
            snd_nxt,
            rcv_nxt,
            rcv_wnd,
            timestamp,
            ..
        } = numbers;
        if !self.active {
            return;
        }
        let edge = rcv_nxt.wrapping_add(rcv_wnd);
        let sent = Sent::established(snd_nxt, rcv_nxt, edge, timestamp).at(now);
        if self.note_exposed(&numbers.open(), sent, now, fx) && self.guarding {
            self.joins.want(flow, now);
        }
    }

    /// The standby has got so much of a snapshot, and keeps the flow's frames.
    pub(super) fn process_got(
        &mut self,
        key: FlowKey,
        join: u32,
        next: u32,
        now: Nanos,
        fx: &mut impl GuardEffects,
    ) {
        if !self.joins.process_got(key, join, next, now) {
            return;
        }
        if let Some(flow) = self.flows.get_mut(&key)
            && let Some(sent) = fx.sent(flow.slot)
        {
            // All that the client was told until now the snapshot will have.
            fx.confirm(flow.slot, Confirmation::new(sent.told, sent.told_edge));
            fx.delegate(flow.slot, Delegated::default());
            flow.phase = Phase::Closing {
                until: now + SNAPSHOT_PATIENCE,
            };
            self.closings.push_back((now + CLOSING_LOOK, key));
        }
        fx.take_snapshot(key, join);
    }

    /// What [`GuardEffects::take_snapshot`] has asked for; `None` if no such connection runs.
    pub fn process_snapshot(
        &mut self,
        key: FlowKey,
        join: u32,
        snapshot: Option<Snapshot>,
        now: Nanos,
        fx: &mut impl GuardEffects,
    ) {
        if !self.joins.awaits(&key, join) {
            return;
        }
        let Some(flow) = self.flows.get_mut(&key) else {
            return;
        };
        let complete = snapshot
            .zip(fx.sent(flow.slot))
            .map(|(mut snapshot, sent)| {
                // The gate has seen what the socket does not tell; but what was sent and acknowledged before it
                // knew the flow it has not seen.
                snapshot.sent = later(sent.next, snapshot.unacknowledged);
                snapshot.client.timestamp = snapshot.client.timestamp.map(|_| (sent.tsecr, 0));
                flow.client_isn = snapshot.client_isn();
                flow.active_isn = snapshot.active_isn();
                // By this number none is confirmed but a shadow that has all that the snapshot has.
                flow.spoke_unseen = false;
                flow.confirmation = Confirmation::default();
                snapshot.to_bytes()
            });
        let taken = complete.is_some();
        self.joins.process_snapshot(key, join, complete, now);
        if !taken {
            self.stop_closing(key, fx);
        }
    }

    /// The standby has no use for the flow.
    pub(super) fn process_decline(
        &mut self,
        key: FlowKey,
        join: u32,
        now: Nanos,
        fx: &mut impl GuardEffects,
    ) {
        if self.joins.process_decline(key, join, now) {
            self.stop_closing(key, fx);
        }
    }

    /// The standby could not keep the flow's frames: it is offered anew.
    pub(super) fn process_lost(
        &mut self,
        key: FlowKey,
        join: u32,
        now: Nanos,
        fx: &mut impl GuardEffects,
    ) {
        if self.joins.process_lost(key, join, now) {
            self.stop_closing(key, fx);
        }
    }

    /// No snapshot comes: the client must not wait for it.
    fn stop_closing(&mut self, key: FlowKey, fx: &mut impl GuardEffects) {
        let phase = self.flows.get(&key).map(|flow| &flow.phase);
        if matches!(phase, Some(Phase::Closing { .. })) {
            self.expose(key, fx);
        }
    }

    /// The standby has confirmed something of an exposed flow: guards it, or begins to.
    pub(super) fn protect_again(&mut self, key: FlowKey, now: Nanos, fx: &mut impl GuardEffects) {
        if self.joins.is_under_way(&key) {
            // It speaks of a shadow that the offer ends.
            return;
        }
        let may_close = !self.joins.concerns(&key);
        let Some(flow) = self.flows.get_mut(&key) else {
            return;
        };
        // One that could not join is closed only where that ends it.
        if faulty!(ForgetExposed) {
            fx.confirm(flow.slot, flow.confirmation);
            flow.phase = Phase::Guarded;
            return;
        }
        if !flow.is_all_confirmed(fx) && !may_close {
            return;
        }
        fx.confirm(flow.slot, flow.confirmation);
        // The gate may have told more at the same moment, so it is looked at now.
        if flow.is_all_confirmed(fx) {
            flow.protect(fx);
            // It was perhaps to be offered, which would end the shadow that has confirmed it.
            self.joins.forget(&key);
        } else if may_close {
            let patience = match flow.closed_in_vain {
                0 => CLOSING_PATIENCE,
                _ => SNAPSHOT_PATIENCE,
            };
            flow.phase = Phase::Closing {
                until: now + patience,
            };
            self.closings.push_back((now + CLOSING_LOOK, key));
        } else {
            self.expose(key, fx);
        }
    }

    pub(super) fn late_wakeup(&self) -> Nanos {
        let closing = self.closings.front().map_or(Nanos::MAX, |(at, _)| *at);
        let join = if self.guarding {
            self.joins.next_wakeup()
        } else {
            Nanos::MAX
        };
        closing.min(join)
    }

    pub(super) fn poll_late(&mut self, now: Nanos, fx: &mut impl GuardEffects) {
        while let Some((_, key)) = self.closings.pop_front_if(|(at, _)| *at <= now) {
            self.look_at_closing(key, now, fx);
        }
        if self.guarding {
            let (flows, records) = (&self.flows, &mut self.records);
            let offer = |key, join| {
                let flow: &Flow = flows.get(&key)?;
                fx.sent(flow.slot).map(|sent| {
                    Record::Offer(Offer {
                        flow: key,
                        join,
                        client_isn: flow.client_isn,
                        next: sent.next,
                    })
                })
            };
            self.joins.poll(now, offer, records);
        }
    }

    fn look_at_closing(&mut self, key: FlowKey, now: Nanos, fx: &mut impl GuardEffects) {
        let Some(flow) = self.flows.get_mut(&key) else {
            return;
        };
        let Phase::Closing { until } = flow.phase else {
            return;
        };
        let joins = self.joins.concerns(&key);
        if now < until {
            // The standby's word may be lost.
            if let Some(sent) = fx.sent(flow.slot)
                && !joins
            {
                self.records.push(Record::Told {
                    flow: key,
                    client_isn: flow.client_isn,
                    ack: sent.told,
                });
            }
            self.closings.push_back((now + CLOSING_LOOK, key));
            return;
        }
        flow.closed_in_vain += 1;
        if flow.closed_in_vain < CLOSED_IN_VAIN {
            // Nothing new, if it is under way.
            self.joins.want(key, now);
        } else {
            self.joins.give_up(key, now);
        }
        self.expose(key, fx);
    }

    /// Late joins that have ended since the last call.
    pub fn take_joins(&mut self) -> Vec<Ended> {
        self.joins.take_ended()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::Ipv4Addr;

    use rfsis_common::ack_gate::Guarded;
    use rfsis_common::maps::HeldEvent;

    use super::*;
    use crate::guard::mock::Maps;
    use crate::guard::{GuardConfig, RECHECK, RECHECK_SOON};
    use crate::segment::{Options, flow_key};
    use crate::sync::{Confirm, Sack};

    const VIP: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 100);

    pub(in crate::guard) fn numbers() -> Numbers {
        Numbers {
            flow: flow_key(Ipv4Addr::LOCALHOST, 40_000, 7),
            vip: VIP,
            snd_nxt: 700,
            rcv_nxt: 300,
            snd_wnd: 60_000,
            rcv_wnd: 5_000,
            mss: 1460,
            shifts: Some((3, 9)),
            sack: true,
            timestamp: Some((11, 22)),
        }
    }

    pub(in crate::guard) fn guard(max_flows: usize) -> Guard {
        let mut guard = Guard::new(GuardConfig {
            vip: VIP,
            timeout: 1_000 * MS,
            max_flows,
            idle_timeout: 1_000_000 * MS,
            copied: true,
        });
        guard.go_active(0);
        guard
    }

    pub(in crate::guard) fn records(guard: &mut Guard) -> Vec<Record> {
        let mut records = Vec::new();
        guard.take_records(&mut records);
        records
    }

    #[test]
    fn that_there_is_no_connection_which_is_known_is_believed_the_second_time() {
        const RST: u32 = 4;
        const ACK: u32 = 16;
        let (mut guard, mut maps) = (guard(4), Maps::default());
        let held = |flow, flags| HeldEvent {
            flow,
            flags,
            ..HeldEvent::default()
        };
        let flow = numbers().flow;
        assert!(!guard.doubts(&held(flow, RST)), "of nothing that is known");
        guard.adopt(&numbers(), MS, &mut maps);
        // A connection that a service has, and ends.
        assert!(!guard.doubts(&held(flow, RST | ACK)));
        assert!(!guard.doubts(&held(flow, 1 | ACK)));
        assert!(guard.doubts(&held(flow, RST)));
        assert!(!guard.doubts(&held(flow, RST)));
    }

    #[test]
    fn an_adopted_flow_is_noted_exactly_and_passes_the_gate_until_the_standby_has_got_it() {
        let (mut guard, mut maps) = (guard(4), Maps::default());
        let numbers = numbers();
        let flow = numbers.flow;
        guard.heard(MS, &mut maps);
        guard.adopt(&numbers, MS, &mut maps);
        let Guarded { slot, shift, .. } = maps.guarded[&flow];
        assert_eq!(shift, 9);
        assert!(maps.confirmed[&slot].is_open());
        let sent = maps.sent[&slot];
        assert_eq!((sent.next, sent.ack, sent.told), (700, 300, 300));
        assert_eq!((sent.edge, sent.told_edge), (5_300, 5_300));
        assert_eq!((sent.tsval, sent.tsecr, sent.at_ns), (11, 22, MS));
        assert_eq!(guard.census().exposed, 1);
        // It is offered unasked.
        guard.poll(2 * MS, &mut maps);
        let offers = records(&mut guard);
        let join = offers.iter().find_map(|record| match record {
            Record::Offer(offer) if offer.flow == flow && offer.next == 700 => Some(offer.join),
            _ => None,
        });
        let join = join.unwrap_or_else(|| panic!("{offers:?}"));
        let got = Record::Got {
            flow,
            join,
            next: 0,
        };
        guard.process_record(&got, 3 * MS, &mut maps);
        assert_eq!(maps.wanted, [(flow, join)]);
        let options = Options {
            mss: Some(1460),
            timestamp: Some((0, 0)),
            ..Options::default()
        };
        let snapshot = Snapshot {
            next: 300,
            ack: 300,
            edge: 5_300,
            unacknowledged: 700,
            client: options,
            active: options,
            ..Snapshot::default()
        };
        guard.process_snapshot(flow, join, Some(snapshot), 4 * MS, &mut maps);
        guard.poll(5 * MS, &mut maps);
        let whole = records(&mut guard)
            .iter()
            .find_map(|record| match record {
                Record::Part(part) => Some(part.total),
                _ => None,
            })
            .unwrap();
        let got = Record::Got {
            flow,
            join,
            next: whole,
        };
        guard.process_record(&got, 6 * MS, &mut maps);
        let confirm = Record::Confirm(Confirm {
            flow,
            client_isn: 299,
            ack: 300,
            edge: 5_300,
            sack: Sack::default(),
        });
        guard.process_record(&confirm, 7 * MS, &mut maps);
        assert!(guard.guards(flow));
        assert_eq!(maps.confirmed[&slot], Confirmation::new(300, 5_300));
    }

    #[test]
    fn a_flow_of_which_the_gate_takes_confirmations_while_it_is_looked_at_stays_guarded() {
        let (mut guard, mut maps) = (guard(4), Maps::default());
        let numbers = numbers();
        let flow = numbers.flow;
        guard.adopt(&numbers, MS, &mut maps);
        guard.heard(2 * MS, &mut maps);
        let mut confirm = Confirm {
            flow,
            client_isn: guard.flows[&flow].client_isn,
            ack: 300,
            edge: 5_300,
            sack: Sack::default(),
        };
        guard.process_record(&Record::Confirm(confirm), 3 * MS, &mut maps);
        assert!(guard.guards(flow));
        maps.is_busy = true;
        for ms in 4..100 {
            confirm.ack += 10;
            guard.process_record(&Record::Confirm(confirm), ms * MS, &mut maps);
            guard.poll(ms * MS + RECHECK_SOON, &mut maps);
            guard.heard(ms * MS + RECHECK_SOON, &mut maps);
            guard.poll(ms * MS + RECHECK, &mut maps);
            assert!(guard.guards(flow), "after {ms} ms");
        }
    }

    #[test]
    fn without_a_standby_an_adopted_flow_waits_for_one_and_without_room_it_passes_unnoted() {
        let (mut guard, mut maps) = (guard(1), Maps::default());
        let first = numbers();
        guard.adopt(&first, MS, &mut maps);
        guard.poll(2 * MS, &mut maps);
        assert_eq!(records(&mut guard).len(), 1, "told, in case it is heard");
        let second = Numbers {
            flow: flow_key(Ipv4Addr::LOCALHOST, 40_001, 7),
            ..first
        };
        guard.adopt(&second, 3 * MS, &mut maps);
        assert_eq!(guard.census().refused, 1);
        assert!(!maps.guarded.contains_key(&second.flow));
        // The standby that comes is asked, and does not know it.
        guard.heard(4 * MS, &mut maps);
        guard.poll(4 * MS, &mut maps);
        let told = records(&mut guard);
        let Some(&Record::Told {
            flow, client_isn, ..
        }) = told.first()
        else {
            panic!("{told:?}");
        };
        assert_eq!(flow, first.flow);
        let refuse = Record::Refuse { flow, client_isn };
        guard.process_record(&refuse, 5 * MS, &mut maps);
        guard.poll(6 * MS, &mut maps);
        assert!(matches!(records(&mut guard)[..], [Record::Offer(_)]));
        // A node that has yielded adopts nothing.
        guard.go_standby(&mut maps);
        guard.adopt(&first, 7 * MS, &mut maps);
        assert!(maps.guarded.is_empty());
    }
}
