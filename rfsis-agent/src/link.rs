//! The edge of `protect: sync`: the UDP socket of the sync channel and the gate's maps, for the sans-IO
//! [`Exchange`]. Part of the shadow thread.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use rfsis_common::ack_gate::{
    Confirmation, Guarded, OpeningEvent, OpeningKind, RELEASE_MARK, Sent,
};
use rfsis_common::agree::{self, Answer, Pending};
use rfsis_common::maps::{FlowKey, HeldEvent, MirrorPeer, Promise};
use rfsis_common::pledge::Pledged;
use rfsis_common::prompt::{self, Delegated};

use crate::adopt::Numbers;
use crate::bpf::GuardMaps;
use crate::exchange::Exchange;
use crate::flows::{Effects, Flows};
use crate::guard::{Fact, GuardEffects};
use crate::heartbeat::{MacAddr, Nanos};
use crate::metrics::{GuardCondition, JoinResult, Metrics, Protection, SyncReceived, SyncSent};
use crate::pledge::PledgeEffects;
use crate::services::{Connections, Snapshots};
use crate::shared::Shared;
use crate::sync::{MAX_DATAGRAM, SyncError};
use crate::sys::RawIpSocket;

/// Datagrams that are taken before frames are looked at again.
const BATCH: usize = 64;

/// The same of openings: all that the ring holds.
const OPENINGS_BATCH: usize = 8192;

/// For so long after this thread was last at work its program may answer for it, ns.
const PROMISE: Nanos = 200_000_000;

/// Opens the socket of the sync channel on this node's own address.
///
/// # Errors
/// Of bind(2): the port may be in use.
pub fn bind(node: Ipv4Addr, port: u16) -> std::io::Result<UdpSocket> {
    let socket = UdpSocket::bind(SocketAddrV4::new(node, port))?;
    socket.set_nonblocking(true)?;
    crate::sys::omit_checksums(&socket)?;
    Ok(socket)
}

/// Opens the raw socket whose packets the ACK gate lets pass.
///
/// # Errors
/// As [`RawIpSocket::open`]; EPERM without CAP_NET_ADMIN.
pub fn release_socket(interface: &str) -> std::io::Result<RawIpSocket> {
    let socket = RawIpSocket::open(interface)?;
    socket.mark(RELEASE_MARK)?;
    Ok(socket)
}

/// What the guard does to the kernel.
#[derive(Debug)]
pub struct KernelGuard {
    /// The gate's maps.
    pub maps: GuardMaps,
    /// Sends past the ACK gate.
    pub socket: RawIpSocket,
    /// Of which snapshots are asked.
    pub connections: Arc<Connections>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Element of the gate's map in which it notes the peer's prompt datagrams.
    pub prompts: u32,
    /// How many of these are counted.
    pub prompts_counted: u64,
}

impl KernelGuard {
    fn done(&self, result: Result<(), crate::bpf::BpfError>) -> bool {
        if let Err(error) = &result {
            tracing::warn!(%error, "the ACK gate does not hear the agent");
        }
        result.is_ok()
    }
}

impl PledgeEffects for KernelGuard {
    fn pledge(&mut self, flow: FlowKey, pledged: Pledged) -> bool {
        self.done(self.maps.pledge(flow, pledged))
    }

    fn retract(&mut self, flow: FlowKey) {
        self.done(self.maps.retract(&flow));
    }
}

impl KernelGuard {
    /// Counts what the gate has taken without this thread.
    fn count_prompts(&mut self) {
        let taken = self.maps.prompts_seen(self.prompts).taken;
        let new = taken.saturating_sub(self.prompts_counted);
        self.metrics.sync_received.add(SyncReceived::Ok, new);
        self.prompts_counted = taken;
    }
}

impl GuardEffects for KernelGuard {
    fn set_guarding(&mut self, on: bool) {
        self.done(self.maps.set_mode(on));
    }

    fn start(&mut self, slot: u32, sent: Sent) -> bool {
        self.done(self.maps.reset(slot, sent))
    }

    fn publish(&mut self, flow: FlowKey, guarded: Guarded) -> bool {
        self.done(self.maps.publish(flow, guarded))
    }

    fn withdraw(&mut self, flow: FlowKey) {
        self.done(self.maps.withdraw(&flow));
    }

    fn lend(&mut self, slot: u32) -> bool {
        self.done(self.maps.lend(slot))
    }

    fn kept(&mut self, flow: FlowKey) -> Option<Pending> {
        self.maps.kept(&flow)
    }

    fn claim(&mut self, flow: FlowKey) -> bool {
        self.maps.claim(&flow)
    }

    fn confirm(&mut self, slot: u32, confirmation: Confirmation) -> bool {
        self.maps.confirm(slot, confirmation)
    }

    fn confirm_more(&mut self, slot: u32, confirmation: Confirmation) -> Confirmation {
        self.maps.confirm_more(slot, confirmation)
    }

    fn confirmed(&mut self, slot: u32) -> Confirmation {
        self.maps.confirmed(slot)
    }

    fn delegate(&mut self, slot: u32, delegated: Delegated) -> bool {
        self.done(self.maps.delegate(slot, delegated))
    }

    fn prompted_at(&mut self) -> Nanos {
        self.maps.prompts_seen(self.prompts).at_ns
    }

    fn sent(&mut self, slot: u32) -> Option<Sent> {
        self.maps.sent(slot)
    }

    fn send(&mut self, packet: &[u8]) {
        // Not sent is as good as lost: the client repeats what it was not told of.
        if self.socket.send(packet).is_err() {
            self.metrics.shadow_send_failures.inc();
        }
    }

    fn runs(&mut self, flow: FlowKey) -> bool {
        self.connections.runs(&flow)
    }

    fn take_snapshot(&mut self, flow: FlowKey, join: u32) {
        self.connections.ask(flow, join);
    }
}

/// This node's end of the sync channel.
pub struct Link {
    /// What is said, and why.
    pub exchange: Exchange,
    /// Carries it.
    pub socket: UdpSocket,
    /// Where the peer's end is.
    pub peer: SocketAddrV4,
    /// The ACK gate.
    pub gate: KernelGuard,
    /// Connections that open.
    pub openings: RingBuf<MapData>,
    /// Snapshots of connections that were asked for.
    pub snapshots: Snapshots,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// How many confirmations of the programs' are counted.
    pub prompted: u64,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("exchange", &self.exchange)
            .finish_non_exhaustive()
    }
}

impl Link {
    /// What wakes the thread.
    pub fn fds(&self) -> [BorrowedFd<'_>; 3] {
        [
            self.socket.as_fd(),
            self.openings.as_fd(),
            self.snapshots.fd(),
        ]
    }

    /// When [`Link::run`] is due without a datagram or an opening, ns.
    pub fn next_wakeup(&self) -> Nanos {
        self.exchange.next_wakeup()
    }

    /// The node is active now.
    pub fn go_active(&mut self, shared: &Shared, now: Nanos) {
        self.set_term(shared, now);
        self.exchange.go_active(now);
        self.metrics.protection.choose(Protection::Degraded);
    }

    /// Lets the program answer and confirm for this thread while it has room, until it should have said so again. `copies`: the
    /// hardware address from which they come, and the interface on which. `caught_up`: since the last call there was a moment
    /// at which nothing was in the ring.
    pub fn promise(
        &mut self,
        flows: &mut Flows,
        effects: &mut impl Effects,
        copies: Option<(MacAddr, u32)>,
        caught_up: bool,
        now: Nanos,
    ) {
        let promise = Promise {
            until_ns: if flows.has_room() { now + PROMISE } else { 0 },
            from: copies.map_or(MirrorPeer::NOBODY, |(mac, _)| MirrorPeer::at(mac)),
            ifindex: copies.map_or(0, |(_, ifindex)| ifindex.into()),
        };
        self.gate.done(self.gate.maps.promise(promise));
        if caught_up {
            let pledges = &mut self.exchange.pledges;
            pledges.check(flows, effects, &mut self.gate);
        }
    }

    /// The node is standby again.
    pub fn go_standby(&mut self) {
        self.exchange.go_standby(&mut self.gate);
        // What the gate has reported until now is of connections that are no more: nobody is to hear of it when
        // the node is active again.
        while self.take_openings() {}
        self.metrics.protection.choose(Protection::Standby);
    }

    /// The kernel is about to answer a SYN that the gate has not seen.
    pub fn note_syn(&mut self, packet: &[u8], now: Nanos) {
        self.exchange
            .guard
            .process_opening(packet, OpeningKind::Syn, now, &mut self.gate);
    }

    /// As [`Guard::doubts`](crate::guard::Guard::doubts).
    pub fn doubts(&mut self, held: &HeldEvent) -> bool {
        // It may be of a connection that has just been reported.
        self.take_openings();
        self.exchange.guard.doubts(held)
    }

    /// The kernel takes a flow that lived on a shadow.
    pub fn adopt(&mut self, numbers: &Numbers, now: Nanos) {
        self.exchange.guard.adopt(numbers, now, &mut self.gate);
    }

    /// Takes what came in, does what is due, and says what is to be said. Returns whether there may be more
    /// to take.
    pub fn run(
        &mut self,
        flows: &mut Flows,
        effects: &mut impl Effects,
        shared: &Shared,
        now: Nanos,
    ) -> bool {
        self.set_term(shared, now);
        self.exchange.set_copied(shared.is_copying(), now);
        let epoch = shared.epoch();
        let mut more = self.take_datagrams(flows, effects, shared, now);
        more |= self.take_openings();
        while let Some(taken) = self.snapshots.take() {
            self.exchange.guard.process_snapshot(
                taken.flow,
                taken.join,
                taken.snapshot,
                now,
                &mut self.gate,
            );
        }
        let (socket, peer, metrics) = (&self.socket, self.peer, &self.metrics);
        self.exchange
            .dispatch(epoch, now, flows, &mut self.gate, |datagram| {
                // Not sent is as good as lost: what matters is repeated.
                let sent = match socket.send_to(datagram, peer) {
                    Ok(_) => SyncSent::Ok,
                    Err(_) => SyncSent::SendFailed,
                };
                metrics.sync_sent.inc(sent);
            });
        let facts = self.exchange.guard.take_facts();
        if !facts.is_empty() {
            // Whoever hears of it may look at once, and must not find what was true before it.
            self.count();
        }
        for fact in facts {
            self.tell(fact);
        }
        for ended in self.exchange.guard.take_joins() {
            self.metrics.late_joins.inc(ended.result);
            if ended.result == JoinResult::Joined {
                let took = Duration::from_nanos(ended.took);
                self.metrics.late_join_duration.observe(took.as_secs_f64());
            }
        }
        more
    }

    fn set_term(&mut self, shared: &Shared, now: Nanos) {
        let (session, epoch) = (shared.peer_session(), shared.epoch());
        if let Some((prompt, agree)) = self.exchange.set_term(session, epoch, now, &mut self.gate) {
            self.gate.count_prompts();
            self.gate.done(self.gate.maps.agree_with(agree));
            self.gate.done(self.gate.maps.take_prompts(prompt));
            (self.gate.prompts, self.gate.prompts_counted) = (prompt.seen, 0);
            // What the kernels agreed on until now was with another.
            while self.take_openings() {}
        }
    }

    fn take_datagrams(
        &mut self,
        flows: &mut Flows,
        effects: &mut impl Effects,
        shared: &Shared,
        now: Nanos,
    ) -> bool {
        let epoch = shared.epoch();
        // One byte more than any is long, so that a longer one is told from a cut one.
        let mut buffer = [0; MAX_DATAGRAM + 1];
        for _ in 0..BATCH {
            let (len, from) = match self.socket.recv_from(&mut buffer) {
                Ok((len, SocketAddr::V4(from))) => (len, from),
                Ok(_) => continue,
                // Also an ICMP error of a peer whose agent is not up: it is read once and gone.
                Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
            };
            if buffer.starts_with(&agree::MAGIC) {
                let answer = self.exchange.open_answer(&buffer[..len], *from.ip());
                let result = answer.and_then(|answer| self.take_answer(&answer, now));
                let result = result.map_or_else(SyncReceived::from, |()| SyncReceived::Ok);
                self.metrics.sync_received.inc(result);
                continue;
            }
            if buffer.starts_with(&prompt::MAGIC) {
                self.take_prompt(&buffer[..len], *from.ip(), shared, now);
                continue;
            }
            let datagram = &buffer[..len];
            let opened = match self
                .exchange
                .open(datagram, *from.ip(), epoch, now, &mut self.gate)
            {
                Ok(opened) => opened,
                Err(error) => {
                    self.metrics.sync_received.inc(error.into());
                    continue;
                }
            };
            self.metrics.sync_received.inc(SyncReceived::Ok);
            shared.sync_heard(now, epoch);
            // It may speak of one that has just been reported.
            self.take_openings();
            let skipped = self
                .exchange
                .process(opened, now, flows, effects, &mut self.gate);
            self.metrics.sync_records_skipped.inc_by(skipped);
        }
        true
    }

    /// Takes what the programs have left to the agent, or do not wait for any more.
    fn take_answer(&mut self, answer: &Answer, now: Nanos) -> Result<(), SyncError> {
        self.take_openings();
        if self.exchange.process_answer(answer, now, &mut self.gate) {
            Ok(())
        } else {
            Err(SyncError::Stale)
        }
    }

    /// Takes what the gate has left to the agent.
    fn take_prompt(&mut self, datagram: &[u8], from: Ipv4Addr, shared: &Shared, now: Nanos) {
        let seen = self.gate.maps.prompts_seen(self.gate.prompts);
        let (confirms, seen) = match self.exchange.open_prompt(datagram, from, seen) {
            Ok(opened) => opened,
            Err(error) => return self.metrics.sync_received.inc(error.into()),
        };
        let noted = self.gate.maps.note_prompt(self.gate.prompts, seen);
        self.gate.done(noted);
        self.metrics.sync_received.inc(SyncReceived::Ok);
        shared.sync_heard(now, shared.epoch());
        self.exchange.process_prompt(confirms, now, &mut self.gate);
    }

    fn take_openings(&mut self) -> bool {
        for _ in 0..OPENINGS_BATCH {
            let Some(entry) = self.openings.next() else {
                return false;
            };
            let Some(event) = OpeningEvent::parse(&entry) else {
                continue;
            };
            drop(entry);
            let Some(kind) = OpeningKind::from_u32(event.kind) else {
                continue;
            };
            let (guard, at) = (&mut self.exchange.guard, event.at_ns);
            match (kind, event.agreed()) {
                (OpeningKind::Agreed, Some(agreed)) => {
                    guard.process_agreed(event.flow, agreed, at, &mut self.gate);
                }
                (kind, _) => guard.process_opening(event.packet(), kind, at, &mut self.gate),
            }
        }
        true
    }

    fn tell(&self, fact: Fact) {
        match fact {
            Fact::Guarding => {
                self.metrics.protection.choose(Protection::Sync);
                tracing::info!("protection: sync, the standby confirms what clients are told");
            }
            Fact::Degraded { exposed } => {
                self.metrics.protection.choose(Protection::Degraded);
                tracing::warn!(
                    exposed,
                    "protection: degraded, the standby is silent and clients do not wait for it"
                );
            }
            Fact::Stuck { flows } => {
                self.metrics.guard_stuck.inc_by(flows as u64);
                tracing::warn!(
                    flows,
                    "the standby is heard, and confirmed nothing of flows whose clients wait: do the copies reach it?"
                );
            }
            Fact::StandbyForgot { flows } => {
                tracing::warn!(
                    flows,
                    "the standby's agent was started anew: the flows that run are unprotected until it has got them"
                );
            }
        }
    }

    /// Shows how many flows are guarded.
    pub fn count(&mut self) {
        self.gate.count_prompts();
        let prompted = self.exchange.prompted_by_programs();
        let new = prompted.saturating_sub(self.prompted);
        self.metrics.sync_sent.add(SyncSent::ByKernel, new);
        self.prompted = prompted;
        let (broken, counted) = (self.exchange.pledges.broken(), &self.metrics.pledges_broken);
        counted.inc_by(broken.saturating_sub(counted.get()));
        let census = self.exchange.guard.census();
        for (condition, count) in [
            (GuardCondition::Opening, census.opening),
            (GuardCondition::Guarded, census.guarded),
            (GuardCondition::Exposed, census.exposed),
        ] {
            self.metrics.guarded_flows.set(condition, count as f64);
        }
        self.metrics.late_joins_waiting.set(census.joining as i64);
        let refused = &self.metrics.guard_refused;
        refused.inc_by(census.refused.saturating_sub(refused.get()));
    }
}
