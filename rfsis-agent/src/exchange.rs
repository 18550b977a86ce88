//! What the two nodes tell each other about flows: the datagrams of the sync channel on the one side, on the
//! other [`Guard`] of the active and [`Flows`] of the standby.
//!
//! Sans-IO: [`crate::link`] is the edge, with socket and maps; the simulation runs this same code.

use std::net::Ipv4Addr;

use rfsis_common::prompt::{PromptPeer, PromptSeen};

use crate::flows::{Effects, Flows};
use crate::guard::{Guard, GuardEffects};
use crate::heartbeat::Nanos;
use crate::sync::{Channel, Confirm, Opened, Prompts, Record, SyncError, Term};

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
    /// The peer's session, as last seen.
    peer_session: Option<u64>,
    /// What is to be said.
    records: Vec<Record>,
    /// What the active's kernel is to be told.
    confirms: Vec<Confirm>,
    /// A sign of life is owed.
    answer: bool,
    /// The peer gets copies of what comes in.
    copied: bool,
    /// When the active asked last for a sign of life, ns.
    asked_at: Nanos,
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
            peer_session: None,
            records: Vec::new(),
            confirms: Vec::new(),
            answer: false,
            copied: false,
            asked_at: 0,
            timeout,
            interval,
        }
    }

    /// Whether the active, by its heartbeats alive until `lived_until` (ns), was not heard here for so long
    /// that it may have opened its gate: it has lived until then, and perhaps until its next heartbeat.
    pub fn was_deaf(&self, lived_until: Nanos) -> bool {
        let dead_at = lived_until.saturating_add(self.interval);
        dead_at.saturating_sub(self.asked_at) > self.timeout
    }

    /// The node is active now.
    pub fn go_active(&mut self, now: Nanos) {
        self.guard.go_active(now);
    }

    /// The node is standby again.
    pub fn go_standby(&mut self, gate: &mut impl GuardEffects) {
        self.guard.go_standby(gate);
        self.records.clear();
    }

    /// The peer's session, as last seen.
    pub fn peer_session(&self) -> Option<u64> {
        self.peer_session
    }

    /// The peer's session that the heartbeats have established, and the epoch of this node. With either the
    /// standby may be one that has forgotten what it held: its agent was started anew, or it had taken over. Gives
    /// from whom the kernel is to take confirmations from now on, if that has changed.
    pub fn set_term(
        &mut self,
        session: Option<u64>,
        epoch: u64,
        now: Nanos,
        gate: &mut impl GuardEffects,
    ) -> Option<PromptPeer> {
        if session != self.peer_session {
            self.peer_session = session;
            self.channel.set_peer(session);
        }
        let peer = self.prompts.set_term(session.map(|peer_session| Term {
            own_session: self.own_session,
            peer_session,
            epoch,
        }))?;
        self.guard.peer_changed(now, gate);
        Some(peer)
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
        self.guard.next_wakeup()
    }

    /// Does what is due, and hands what is to be said to `send`, as datagrams. After each batch of frames, so
    /// that one datagram confirms all of them.
    pub fn dispatch(
        &mut self,
        epoch: u64,
        now: Nanos,
        flows: &mut Flows,
        gate: &mut impl GuardEffects,
        mut send: impl FnMut(&[u8]),
    ) {
        if now >= self.guard.next_wakeup() {
            self.guard.poll(now, gate);
        }
        let (records, confirms) = (&mut self.records, &mut self.confirms);
        flows.take_confirmations(|record| match record {
            Record::Confirm(confirm) if confirm.sack.blocks().is_empty() => confirms.push(confirm),
            record => records.push(record),
        });
        if !self.confirms.is_empty() {
            self.prompts.seal(&self.confirms, &mut send);
            self.confirms.clear();
        }
        let ping = self.guard.take_records(&mut self.records);
        let answer = std::mem::take(&mut self.answer);
        if ping || answer || !self.records.is_empty() {
            self.channel.seal(epoch, ping, self.records.drain(..), send);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::GuardConfig;

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

    #[test]
    fn an_active_that_may_have_opened_its_gate_behind_its_last_heartbeat_has_left_the_standby_deaf()
    {
        let mut exchange = exchange(300 * MS, 50 * MS);
        exchange.asked_at = 1000 * MS;
        assert!(!exchange.was_deaf(900 * MS));
        assert!(!exchange.was_deaf(1250 * MS));
        assert!(exchange.was_deaf(1250 * MS + 1));
    }
}
