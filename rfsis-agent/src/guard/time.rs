//! What time brings: a silent standby, what is said again, and what is forgotten.

use rfsis_common::ack_gate::{Sent, sent_flags};
use rfsis_common::maps::FlowKey;

use super::{
    Fact, Flow, Guard, GuardEffects, MS, Phase, SECOND, SWEEP_AT_ONCE, SWEEP_PAUSE, SWEPT_PAUSE,
};
use crate::heartbeat::Nanos;
use crate::lockstep::before;
use crate::sync::{Record, Sack};

/// A flow is forgotten so long after the kernel sent an RST, or its FIN, ns. What the client still says
/// is between it and the kernel. One that is not guarded has nothing to be confirmed behind its FIN, and
/// would count as at risk.
const RESET_LINGER: Nanos = 2 * SECOND;
const FIN_LINGER: Nanos = 60 * SECOND;

/// Flows that are asked for at once.
const ASK_AT_ONCE: usize = 256;
const TELL_AT_ONCE: usize = 16;

/// A flow on which nothing was sent for so long is asked for, and again each time as much has passed: its
/// handshake may never have been completed, and the standby's word of that may be lost, ns.
const QUIET: Nanos = 200 * SECOND;

/// A flow of which something is held, and the standby confirms nothing new for so long, is asked for: perhaps the
/// standby has forgotten it.
const STALLED: Nanos = SECOND;

/// After this it is handed over anew: its copies do not come, though the standby is heard. A client that repeats itself
/// for so long has lost six segments one after the other (RFC 6298).
const STUCK: Nanos = 10 * SECOND;

impl Flow {
    /// How long the client has waited for a word that the standby does not give, ns; 0 if it does not.
    fn stalled_for(&mut self, sent: &Sent, now: Nanos, fx: &mut impl GuardEffects) -> Nanos {
        self.catch_up(fx);
        let confirmed = self.confirmation.ack();
        if !matches!(self.phase, Phase::Guarded) || !before(confirmed, sent.ack) {
            self.stalled = None;
            return 0;
        }
        match self.stalled {
            Some((at, since)) if at == confirmed => now.saturating_sub(since),
            _ => {
                self.stalled = Some((confirmed, now));
                0
            }
        }
    }
}

impl Guard {
    /// When [`Guard::poll`] is due, ns.
    pub fn next_wakeup(&self) -> Nanos {
        if !self.active {
            return Nanos::MAX;
        }
        let repeat = self.repeats.first().map_or(Nanos::MAX, |(at, _)| *at);
        let recheck = self.rechecks.first().map_or(Nanos::MAX, |(at, _)| *at);
        let late = self.late_wakeup();
        let regular = self.next_tick.min(self.next_sweep);
        regular.min(repeat).min(recheck).min(late)
    }

    /// Time has passed.
    pub fn poll(&mut self, now: Nanos, fx: &mut impl GuardEffects) {
        if !self.active {
            return;
        }
        if now >= self.next_tick {
            let answered = self.heard_at.is_some_and(|at| at >= self.pinged_at);
            if answered || self.pinged_at == 0 {
                self.pinged_at = now;
            }
            // A ping or its answer may be lost: until one comes back they follow each other closely, as long as
            // clients wait for a standby, or one has just come.
            let soon = !answered && now.saturating_sub(self.pinged_at) < self.config.timeout;
            let share = if soon { 16 } else { 4 };
            self.next_tick = now + (self.config.timeout / share).clamp(MS / 4, 100 * MS);
            self.ping = true;
            self.ask(fx);
        }
        let silent = self
            .heard_at
            .is_none_or(|at| now >= at.saturating_add(self.config.timeout));
        if silent && self.guarding {
            match fx.prompted_at() {
                at if now < at.saturating_add(self.config.timeout) => self.heard_at = Some(at),
                _ => self.degrade(now, fx),
            }
        }
        while let Some(&(at, key)) = self.rechecks.first()
            && at <= now
        {
            self.rechecks.remove(&(at, key));
            self.recheck(key, fx);
        }
        while let Some(&(at, key)) = self.repeats.first()
            && at <= now
        {
            self.repeats.remove(&(at, key));
            self.repeat(key, now, fx);
        }
        self.poll_late(now, fx);
        if now >= self.next_sweep {
            let more = self.sweep(now, fx) | self.sweep_handshakes(now, fx);
            if self.guarding {
                self.lend_slots(fx);
            }
            let soon = more || self.guarding;
            self.next_sweep = now + if soon { SWEEP_PAUSE } else { SWEPT_PAUSE };
        }
    }

    pub(super) fn recheck(&mut self, key: FlowKey, fx: &mut impl GuardEffects) {
        let Some(flow) = self.flows.get_mut(&key) else {
            return;
        };
        flow.recheck = None;
        if !matches!(flow.phase, Phase::Guarded) {
            return;
        }
        // In this order: the gate takes a confirmation before it tells the client of it, by itself and meanwhile.
        let sent = fx.sent(flow.slot);
        flow.catch_up(fx);
        if sent.is_some_and(|sent| before(flow.confirmation.ack(), sent.told)) {
            // It was told more while it was exposed, just before it was guarded again.
            flow.expose(fx);
            self.to_ask.push(key);
            return;
        }
        Self::release(self.config.vip, key, flow, &Sack::default(), fx);
    }

    /// Tells the standby what the clients of exposed flows were told, which asks it what it holds. While it
    /// is silent only now and then: perhaps it hears and is not heard.
    pub(super) fn ask(&mut self, fx: &mut impl GuardEffects) {
        if self.to_ask.is_empty() {
            let exposed = self.flows.iter();
            self.to_ask.extend(
                exposed
                    .filter(|(_, flow)| matches!(flow.phase, Phase::Exposed))
                    .map(|(key, _)| *key)
                    .filter(|key| !self.joins.concerns(key)),
            );
        }
        let most = if self.guarding {
            ASK_AT_ONCE
        } else {
            TELL_AT_ONCE
        };
        let rest = self.to_ask.len().saturating_sub(most);
        for key in self.to_ask.split_off(rest) {
            if let Some(flow) = self.flows.get(&key)
                && matches!(flow.phase, Phase::Exposed)
                && !self.joins.concerns(&key)
                && let Some(sent) = fx.sent(flow.slot)
            {
                self.records.push(Record::Told {
                    flow: key,
                    client_isn: flow.client_isn,
                    ack: sent.told,
                });
            }
        }
    }

    /// Looks at some flows, whether they have ended; returns whether there are more to look at.
    pub(super) fn sweep(&mut self, now: Nanos, fx: &mut impl GuardEffects) -> bool {
        if self.to_sweep.is_empty() {
            self.to_sweep.extend(self.flows.keys());
        }
        let rest = self.to_sweep.len().saturating_sub(SWEEP_AT_ONCE);
        let (mut ended, mut stuck) = (Vec::new(), Vec::new());
        for key in self.to_sweep.split_off(rest) {
            let Some(flow) = self.flows.get_mut(&key) else {
                continue;
            };
            if matches!(flow.phase, Phase::Opening { .. }) {
                continue;
            }
            let Some(sent) = fx.sent(flow.slot) else {
                continue;
            };
            let stalled = flow.stalled_for(&sent, now, fx);
            let quiet = now.saturating_sub(sent.at_ns);
            // Of one that is not guarded there is nothing that the standby could still confirm.
            let guarded = matches!(flow.phase, Phase::Guarded);
            let fin_linger = if guarded { FIN_LINGER } else { RESET_LINGER };
            if (sent.flags & sent_flags::RST_SENT != 0 && quiet > RESET_LINGER)
                || (sent.flags & sent_flags::FIN_SENT != 0 && quiet > fin_linger)
                || quiet > self.config.idle_timeout
            {
                ended.push((key, flow.client_isn));
            } else if !self.guarding || self.joins.concerns(&key) {
                continue;
            } else if stalled > STUCK {
                flow.stalled = None;
                stuck.push(key);
            } else if let unheard = now.saturating_sub(flow.known_at)
                && ((quiet > QUIET && unheard > QUIET) || (stalled > STALLED && unheard > STALLED))
            {
                flow.known_at = now;
                self.records.push(Record::Told {
                    flow: key,
                    client_isn: flow.client_isn,
                    ack: sent.told,
                });
            }
        }
        for (flow, client_isn) in ended {
            self.records.push(Record::Close { flow, client_isn });
            self.forget(flow, fx);
        }
        if !stuck.is_empty() {
            let flows = stuck.len();
            self.facts.push(Fact::Stuck { flows });
        }
        for flow in stuck {
            self.hand_over(flow, now, fx);
        }
        !self.to_sweep.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use rfsis_common::ack_gate::Confirmation;

    use super::*;
    use crate::guard::late::tests::{guard, numbers, records};
    use crate::guard::mock::Maps;
    use crate::sync::Confirm;

    /// A flow that is guarded, and a segment behind what the standby has confirmed.
    fn waiting() -> (Guard, Maps, FlowKey) {
        let (mut guard, mut maps) = (guard(4), Maps::default());
        let flow = numbers().flow;
        guard.adopt(&numbers(), MS, &mut maps);
        guard.heard(2 * MS, &mut maps);
        confirm(&mut guard, &mut maps, 3);
        assert!(guard.guards(flow));
        let slot = maps.guarded[&flow].slot;
        maps.sent.get_mut(&slot).unwrap().ack = 310;
        maps.talks = true;
        (guard, maps, flow)
    }

    fn confirm(guard: &mut Guard, maps: &mut Maps, ms: Nanos) {
        let confirm = Confirm {
            flow: numbers().flow,
            client_isn: 299,
            ack: 300,
            edge: 5_300,
            sack: Sack::default(),
        };
        guard.process_record(&Record::Confirm(confirm), ms * MS, maps);
    }

    /// As after 3 GiB, which the gate was told of by itself.
    fn go_far(maps: &mut Maps, slot: u32) -> u32 {
        let ack = 300_u32.wrapping_add(3 << 30);
        maps.confirm(slot, Confirmation::new(ack, ack + 5_000));
        let sent = maps.sent.get_mut(&slot).unwrap();
        (sent.ack, sent.edge) = (ack, ack + 5_000);
        (sent.told, sent.told_edge) = (ack, ack + 5_000);
        ack
    }

    fn confirm_at(guard: &mut Guard, maps: &mut Maps, ms: Nanos, ack: u32) {
        let confirm = Confirm {
            flow: numbers().flow,
            client_isn: 299,
            ack,
            edge: ack + 5_000,
            sack: Sack::default(),
        };
        guard.process_record(&Record::Confirm(confirm), ms * MS, maps);
    }

    #[test]
    fn what_the_standby_says_counts_after_more_bytes_than_numbers_tell_apart() {
        let (mut guard, mut maps, flow) = waiting();
        let slot = maps.guarded[&flow].slot;
        let ack = go_far(&mut maps, slot);
        maps.sent.get_mut(&slot).unwrap().ack = ack + 100;
        confirm_at(&mut guard, &mut maps, 10, ack + 50);
        assert_eq!(
            maps.confirmed(slot),
            Confirmation::new(ack + 50, ack + 5_050)
        );
        guard.poll(20 * MS, &mut maps);
        assert!(guard.guards(flow), "the client was told of no more");
        // Half of what is held waits still.
        let told = poll(&mut guard, &mut maps, 1_000..3_500);
        let asks =
            |record: &Record| matches!(record, Record::Told { ack: told, .. } if *told == ack);
        assert!(told.iter().any(asks), "{told:?}");
    }

    #[test]
    fn a_flow_is_guarded_again_after_more_bytes_than_numbers_tell_apart() {
        for far in [0, 3 << 30] {
            let (mut guard, mut maps, flow) = waiting();
            let slot = maps.guarded[&flow].slot;
            guard.poll(2_000 * MS, &mut maps);
            assert!(!guard.guards(flow), "the standby is silent");
            let ack = 300_u32.wrapping_add(far);
            let sent = maps.sent.get_mut(&slot).unwrap();
            (sent.ack, sent.edge) = (ack, ack + 5_000);
            (sent.told, sent.told_edge) = (ack, ack + 5_000);
            guard.heard(2_001 * MS, &mut maps);
            // Long ago.
            confirm_at(&mut guard, &mut maps, 2_001, ack.wrapping_sub(1 << 30));
            assert!(!guard.guards(flow), "{far}: the standby lacks a GiB");
            confirm_at(&mut guard, &mut maps, 2_002, ack);
            assert!(guard.guards(flow), "{far}");
            assert_eq!(maps.confirmed(slot), Confirmation::new(ack, ack + 5_000));
        }
    }

    /// Polls for so long (flows are looked at from the first second on), with a standby that is heard; gives what it is told.
    fn poll(guard: &mut Guard, maps: &mut Maps, ms: std::ops::Range<Nanos>) -> Vec<Record> {
        ms.step_by(20)
            .flat_map(|ms| {
                guard.heard(ms * MS, maps);
                guard.poll(ms * MS, maps);
                records(guard)
            })
            .collect()
    }

    /// How often a standby that is silent is asked whether it is there.
    fn pings(guard: &mut Guard, ms: std::ops::Range<Nanos>) -> usize {
        let mut maps = Maps::default();
        ms.filter(|ms| {
            guard.poll(ms * MS, &mut maps);
            guard.take_records(&mut Vec::new())
        })
        .count()
    }

    #[test]
    fn nobody_is_asked_for_closely_unless_one_may_have_come() {
        let mut guard = guard(4);
        assert_eq!(pings(&mut guard, 0..1_000), 16);
        assert_eq!(pings(&mut guard, 2_000..12_000), 100);
        guard.seek(12_050 * MS);
        assert_eq!(pings(&mut guard, 12_050..12_051), 1, "at once");
        assert_eq!(pings(&mut guard, 12_051..13_050), 15);
        assert_eq!(pings(&mut guard, 14_000..24_000), 100);
    }

    #[test]
    fn a_standby_that_clients_wait_for_is_asked_closely_when_it_does_not_answer() {
        let (mut guard, mut maps) = (guard(4), Maps::default());
        assert_eq!(pings(&mut guard, 0..3_000), 37);
        guard.heard(3_000 * MS, &mut maps);
        // Two each 100 ms, then unanswered ones each sixteenth of the timeout.
        assert_eq!(pings(&mut guard, 3_000..4_000), 15);
        assert_eq!(guard.take_facts(), [Fact::Guarding]);
    }

    #[test]
    fn a_standby_that_confirms_nothing_new_is_asked_and_in_the_end_gets_the_flow_anew() {
        let (mut guard, mut maps, flow) = waiting();
        assert_eq!(poll(&mut guard, &mut maps, 20..2_000), []);
        let asked = poll(&mut guard, &mut maps, 2_000..10_900);
        let told = |r: &&Record| matches!(r, Record::Told { flow: f, ack: 300, .. } if *f == flow);
        assert_eq!(asked.iter().filter(told).count(), asked.len());
        assert!((7..10).contains(&asked.len()), "each second: {asked:?}");
        assert!(guard.guards(flow) && guard.take_facts().iter().all(|f| *f == Fact::Guarding));
        let offered = poll(&mut guard, &mut maps, 10_900..11_400);
        assert!(
            offered
                .iter()
                .any(|r| matches!(r, Record::Offer(o) if o.flow == flow))
        );
        assert!(!guard.guards(flow));
        assert_eq!(guard.take_facts(), [Fact::Stuck { flows: 1 }]);
    }

    #[test]
    fn a_standby_that_has_forgotten_a_flow_gets_it_anew_when_it_is_asked() {
        let (mut guard, mut maps, flow) = waiting();
        let asked = poll(&mut guard, &mut maps, 20..2_200);
        let [Record::Told { client_isn, .. }] = asked[..] else {
            panic!("{asked:?}");
        };
        let refuse = Record::Refuse { flow, client_isn };
        guard.process_record(&refuse, 2_201 * MS, &mut maps);
        assert!(!guard.guards(flow));
        let offered = poll(&mut guard, &mut maps, 2_220..2_300);
        assert!(offered.iter().any(|r| matches!(r, Record::Offer(_))));
    }

    #[test]
    fn whoever_gets_on_however_slowly_is_not_handed_over() {
        let (mut guard, mut maps, flow) = waiting();
        let slot = maps.guarded[&flow].slot;
        for ms in (0..60_000).step_by(5_000) {
            poll(&mut guard, &mut maps, ms + 20..ms + 5_000);
            let sent = maps.sent.get_mut(&slot).unwrap();
            let confirm = Confirm {
                flow,
                client_isn: 299,
                ack: sent.ack - 5,
                edge: 5_300,
                sack: Sack::default(),
            };
            sent.ack += 10;
            guard.process_record(&Record::Confirm(confirm), (ms + 5_000) * MS, &mut maps);
        }
        assert!(guard.guards(flow));
    }
}
