//! What the two nodes tell each other about flows: the datagrams of the sync channel on the one side, on the
//! other [`Guard`] of the active and [`Flows`] of the standby.
//!
//! Sans-IO: [`crate::link`] is the edge, with socket and maps; the simulation runs this same code.

use std::net::Ipv4Addr;

use rfsis_common::agree::{AgreePeer, Answer};
use rfsis_common::prompt::{PromptPeer, PromptSeen};

use crate::flows::{Effects, Flows};
use crate::guard::{Guard, GuardEffects};
use crate::heartbeat::Nanos;
use crate::pledge::{PledgeEffects, Pledges};
use crate::sync::{Channel, Confirm, Opened, Prompts, Record, SyncError, Term};

/// The active need not hear at once that a flow has ended: it would be woken for each, ns.
const CLOSE_PATIENCE: Nanos = 10_000_000;

/// A node's half of the exchange.
#[derive(Debug)]
pub struct Exchange {
    /// Makes and judges datagrams.
    channel: Channel,
    /// Makes datagrams for the active's kernel.
    prompts: Prompts,
    /// This node's session.
    own_session: u64,
    /// What the ACK gate guards while this node is active.
    pub guard: Guard,
    /// What the programs confirm by themselves while it is standby.
    pub pledges: Pledges,
    /// The peer's session, as last seen.
    peer_session: Option<u64>,
    /// What is to be said.
    records: Vec<Record>,
    /// What the active's kernel is to be told.
    confirms: Vec<Confirm>,
    /// Ends of which the active is told when there is something else to say, or at `close_at` (ns).
    closes: Vec<Record>,
    close_at: Nanos,
    /// A sign of life is owed.
    answer: bool,
    /// The peer gets copies of what comes in.
    copied: bool,
    /// When the active asked last for a sign of life, ns.
    asked_at: Nanos,
    /// When it was asked again after so long that the active may have opened its gate, ns.
    deaf_until: Nanos,
    /// Silence of either node after which the active does not wait for the standby, ns.
    timeout: Nanos,
    /// Between two heartbeats of the active, ns.
    interval: Nanos,
}

impl Exchange {
    /// Nothing was said yet. `own_session`: that of `channel`; `timeout`: that of the guard; `interval`: between
    /// heartbeats, ns.
    pub fn new(
        channel: Channel,
        prompts: Prompts,
        own_session: u64,
        guard: Guard,
        timeout: Nanos,
        interval: Nanos,
    ) -> Self {
        Self {
            channel,
            prompts,
            own_session,
            guard,
            pledges: Pledges::none(),
            peer_session: None,
            records: Vec::new(),
            confirms: Vec::new(),
            closes: Vec::new(),
            close_at: Nanos::MAX,
            answer: false,
            copied: false,
            asked_at: 0,
            deaf_until: 0,
            timeout,
            interval,
        }
    }

    /// Whether the active, by its heartbeats alive until `lived_until` (ns), was not heard here for so long
    /// that it may have opened its gate: it has lived until then, and perhaps until its next heartbeat. What waited
    /// while this agent did not run is heard late, and the answer to it perhaps not at all.
    pub fn was_deaf(&self, lived_until: Nanos) -> bool {
        let dead_at = lived_until.saturating_add(self.interval);
        dead_at.saturating_sub(self.asked_at) > self.timeout || self.deaf_until > lived_until
    }

    /// The node is active now.
    pub fn go_active(&mut self, now: Nanos) {
        self.guard.go_active(now);
    }

    /// The node is standby again.
    pub fn go_standby(&mut self, gate: &mut impl GuardEffects) {
        self.guard.go_standby(gate);
        self.records.clear();
        self.closes.clear();
        self.close_at = Nanos::MAX;
    }

    /// The peer's session, as last seen.
    pub fn peer_session(&self) -> Option<u64> {
        self.peer_session
    }

    /// The peer's session that the heartbeats have established, and the epoch of this node. With either the
    /// standby may be one that has forgotten what it held: its agent was started anew, or it had taken over. Gives
    /// from whom the kernel is to take confirmations from now on, and with whom to agree on openings, if that has changed.
    pub fn set_term(
        &mut self,
        session: Option<u64>,
        epoch: u64,
        now: Nanos,
        gate: &mut impl GuardEffects,
    ) -> Option<(PromptPeer, AgreePeer)> {
        if session != self.peer_session {
            self.peer_session = session;
            self.channel.set_peer(session);
        }
        let peers = self.prompts.set_term(session.map(|peer_session| Term {
            own_session: self.own_session,
            peer_session,
            epoch,
        }))?;
        self.guard.peer_changed(now, gate);
        Some(peers)
    }

    /// Whether the peer gets copies of what comes in: from then on it can answer.
    pub fn set_copied(&mut self, copied: bool, now: Nanos) {
        if copied && !self.copied {
            self.guard.seek(now);
        }
        self.copied = copied;
    }

    /// The epoch of [`Exchange::set_term`], if there is a peer.
    pub fn epoch(&self) -> Option<u64> {
        self.prompts.epoch()
    }

    /// As [`Prompts::sealed_by_programs`].
    pub fn prompted_by_programs(&self) -> u64 {
        self.prompts.sealed_by_programs()
    }

    /// As [`Prompts::open`].
    ///
    /// # Errors
    /// Likewise.
    pub fn open_prompt(
        &self,
        datagram: &[u8],
        from: Ipv4Addr,
        seen: PromptSeen,
    ) -> Result<(Vec<Confirm>, PromptSeen), SyncError> {
        self.prompts.open(datagram, from, seen)
    }

    /// As [`Prompts::open_answer`].
    ///
    /// # Errors
    /// Likewise.
    pub fn open_answer(&self, datagram: &[u8], from: Ipv4Addr) -> Result<Answer, SyncError> {
        self.prompts.open_answer(datagram, from)
    }

    /// Takes an answer that the active's kernel has left to the agent; `false` if nothing waits for it.
    pub fn process_answer(
        &mut self,
        answer: &Answer,
        now: Nanos,
        gate: &mut impl GuardEffects,
    ) -> bool {
        let key = self.prompts.agreeing().taking;
        self.guard.process_answer(answer, key, now, gate)
    }

    /// Takes confirmations that the active's kernel has left to the agent.
    pub fn process_prompt(
        &mut self,
        confirms: Vec<Confirm>,
        now: Nanos,
        gate: &mut impl GuardEffects,
    ) {
        self.guard.heard(now, gate);
        for confirm in confirms {
            self.guard
                .process_record(&Record::Confirm(confirm), now, gate);
        }
    }

    /// Judges a datagram that came from the address `from`. One that counts is to be given to
    /// [`Exchange::process`], and is a sign of life if the peer is copied to: one that gets no copies would
    /// never confirm what it is sent, and clients would wait for it.
    ///
    /// # Errors
    /// Why it does not count.
    pub fn open<'a>(
        &mut self,
        datagram: &'a [u8],
        from: Ipv4Addr,
        epoch: u64,
        now: Nanos,
        gate: &mut impl GuardEffects,
    ) -> Result<Opened<'a>, SyncError> {
        let opened = self.channel.open(datagram, from, epoch)?;
        if opened.wants_answer {
            self.answer = true;
            if now.saturating_sub(self.asked_at) > self.timeout {
                self.deaf_until = now;
            }
            self.asked_at = now;
        }
        if self.copied {
            self.guard.heard(now, gate);
        }
        Ok(opened)
    }

    /// Takes what the peer says. Returns how many of its records this version does not know.
    pub fn process(
        &mut self,
        opened: Opened<'_>,
        now: Nanos,
        flows: &mut Flows,
        effects: &mut impl Effects,
        gate: &mut impl GuardEffects,
    ) -> u64 {
        let mut records = opened.records;
        for record in &mut records {
            let unknown = match record {
                Record::Open(open) => (!flows.process_open(&open, now, effects))
                    .then_some((open.flow, open.client_isn)),
                Record::Told {
                    flow,
                    client_isn,
                    ack,
                } => (!flows.process_told(flow, client_isn, ack)).then_some((flow, client_isn)),
                Record::Close { flow, client_isn } => {
                    flows.process_close(flow, client_isn, effects);
                    self.guard.process_record(&record, now, gate);
                    None
                }
                Record::Offer(ref offer) => {
                    flows.process_offer(offer, now, effects);
                    None
                }
                Record::Part(ref part) => {
                    flows.process_part(part, now, effects);
                    None
                }
                Record::Known(_)
                | Record::Confirm(_)
                | Record::Refuse { .. }
                | Record::Got { .. }
                | Record::Decline { .. }
                | Record::Lost { .. } => {
                    self.guard.process_record(&record, now, gate);
                    None
                }
            };
            if let Some((flow, client_isn)) = unknown {
                self.records.push(Record::Refuse { flow, client_isn });
            }
        }
        records.skipped()
    }

    /// When [`Exchange::dispatch`] is due though nothing came in, ns.
    pub fn next_wakeup(&self) -> Nanos {
        self.guard.next_wakeup().min(self.close_at)
    }

    /// Does what is due, and hands what is to be said to `send`, as datagrams. After each batch of frames, so
    /// that one datagram confirms all of them.
    pub fn dispatch(
        &mut self,
        epoch: u64,
        now: Nanos,
        flows: &mut Flows,
        gate: &mut (impl GuardEffects + PledgeEffects),
        mut send: impl FnMut(&[u8]),
    ) {
        if now >= self.guard.next_wakeup() {
            self.guard.poll(now, gate);
        }
        let (records, confirms) = (&mut self.records, &mut self.confirms);
        let closes = &mut self.closes;
        flows.take_confirmations(|record| match record {
            Record::Confirm(confirm) if confirm.sack.blocks().is_empty() => confirms.push(confirm),
            Record::Close { .. } => closes.push(record),
            record => records.push(record),
        });
        if !self.closes.is_empty() && self.close_at == Nanos::MAX {
            self.close_at = now + CLOSE_PATIENCE;
        }
        let pledges = &mut self.pledges;
        self.confirms
            .retain(|confirm| !pledges.is_said(confirm, flows, gate));
        if !self.confirms.is_empty() {
            self.prompts.seal(&self.confirms, &mut send);
            self.confirms.clear();
        }
        let ping = self.guard.take_records(&mut self.records);
        let answer = std::mem::take(&mut self.answer);
        if ping || answer || !self.records.is_empty() || now >= self.close_at {
            self.records.append(&mut self.closes);
            self.close_at = Nanos::MAX;
            self.channel.seal(epoch, ping, self.records.drain(..), send);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::FlowsConfig;
    use crate::guard::GuardConfig;
    use crate::segment::{Options, flow_key};
    use crate::simulation::{ECHO, Maps, World, config};
    use crate::sync::Open;

    const MS: Nanos = 1_000_000;
    const KEY: &[u8] = b"0123456789abcdef";

    fn exchange(timeout: Nanos, interval: Nanos) -> Exchange {
        let (node, peer) = (Ipv4Addr::new(192, 168, 1, 2), Ipv4Addr::new(192, 168, 1, 1));
        let guard = Guard::new(GuardConfig {
            vip: Ipv4Addr::new(192, 168, 1, 100),
            timeout,
            max_flows: 1,
            idle_timeout: 0,
            copied: true,
        });
        let channel = Channel::new(KEY, "demo", node, peer, 1);
        let prompts = Prompts::new(KEY, "demo", node, peer, 9501);
        Exchange::new(channel, prompts, 1, guard, timeout, interval)
    }

    #[test]
    fn a_standby_that_begins_to_get_copies_is_asked_at_once_and_only_then() {
        let mut exchange = exchange(300 * MS, 50 * MS);
        exchange.go_active(1000 * MS);
        exchange.set_copied(true, 1500 * MS);
        assert_eq!(exchange.next_wakeup(), 1500 * MS);
        exchange.set_copied(true, 1600 * MS);
        assert_eq!(exchange.next_wakeup(), 1500 * MS, "it gets them still");
        exchange.set_copied(false, 1700 * MS);
        assert_eq!(exchange.next_wakeup(), 1500 * MS);
        exchange.set_copied(true, 1800 * MS);
        assert_eq!(exchange.next_wakeup(), 1800 * MS);
    }

    /// A standby's flows that have something to say by and by: the flow is known, then its client gives up.
    fn ended(world: &mut World) -> Flows {
        let config = FlowsConfig {
            guarded: true,
            copied: true,
            ..config()
        };
        let mut flows = Flows::new(config).unwrap();
        let client = Ipv4Addr::new(192, 168, 1, 50);
        let open = Open {
            flow: flow_key(client, 40_000, ECHO),
            client_isn: 1000,
            active_isn: 5000,
            client_window: 60_000,
            client: Options::default(),
            active: Options::default(),
        };
        assert!(flows.process_open(&open, MS, world));
        flows.take_confirmations(|_| {});
        flows.process_close(open.flow, open.client_isn, world);
        flows
    }

    #[test]
    fn that_flows_have_ended_is_said_with_something_else_or_a_little_later() {
        let (mut world, mut maps) = (World::default(), Maps::default());
        let said = |exchange: &mut Exchange, flows: &mut Flows, now, maps: &mut Maps| {
            let mut said = 0;
            exchange.dispatch(1, now, flows, maps, |_| said += 1);
            said
        };
        let mut exchange = exchange(300 * MS, 50 * MS);
        exchange.channel.set_peer(Some(7));
        let mut flows = ended(&mut world);
        assert_eq!(said(&mut exchange, &mut flows, 10 * MS, &mut maps), 0);
        assert_eq!(exchange.next_wakeup(), 10 * MS + CLOSE_PATIENCE);
        // Another does not put it off.
        let mut flows = ended(&mut world);
        assert_eq!(said(&mut exchange, &mut flows, 15 * MS, &mut maps), 0);
        assert_eq!(exchange.next_wakeup(), 10 * MS + CLOSE_PATIENCE);
        assert_eq!(said(&mut exchange, &mut flows, 20 * MS, &mut maps), 1);
        assert_eq!(exchange.next_wakeup(), Nanos::MAX);
        assert_eq!(said(&mut exchange, &mut flows, 40 * MS, &mut maps), 0);

        let mut flows = ended(&mut world);
        assert_eq!(said(&mut exchange, &mut flows, 50 * MS, &mut maps), 0);
        exchange.answer = true;
        assert_eq!(said(&mut exchange, &mut flows, 51 * MS, &mut maps), 1);
        assert_eq!(said(&mut exchange, &mut flows, 70 * MS, &mut maps), 0);
    }

    #[test]
    fn an_active_that_may_have_opened_its_gate_behind_its_last_heartbeat_has_left_the_standby_deaf()
    {
        let mut exchange = exchange(300 * MS, 50 * MS);
        exchange.asked_at = 1000 * MS;
        assert!(!exchange.was_deaf(900 * MS));
        assert!(!exchange.was_deaf(1250 * MS));
        assert!(exchange.was_deaf(1250 * MS + 1));
    }

    #[test]
    fn an_active_whose_questions_waited_and_that_died_meanwhile_has_left_the_standby_deaf() {
        let mut exchange = exchange(300 * MS, 50 * MS);
        let (node, peer) = (Ipv4Addr::new(192, 168, 1, 2), Ipv4Addr::new(192, 168, 1, 1));
        exchange.channel.set_peer(Some(7));
        let mut active = Channel::new(KEY, "demo", peer, node, 7);
        active.set_peer(Some(1));
        let mut maps = Maps::default();
        let mut ask = |exchange: &mut Exchange, at| {
            let mut datagrams = Vec::new();
            active.seal(1, true, std::iter::empty(), |datagram| {
                datagrams.push(datagram.to_vec());
            });
            for datagram in datagrams {
                exchange.open(&datagram, peer, 1, at, &mut maps).unwrap();
            }
        };
        ask(&mut exchange, 1000 * MS);
        ask(&mut exchange, 1100 * MS);
        assert!(!exchange.was_deaf(1120 * MS));
        // All that came while the agent was stopped.
        ask(&mut exchange, 1700 * MS);
        ask(&mut exchange, 1701 * MS);
        assert!(exchange.was_deaf(1650 * MS));
        assert!(!exchange.was_deaf(1750 * MS), "it had the answer");
    }
}
