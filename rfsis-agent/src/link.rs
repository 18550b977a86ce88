//! The edge of `protect: sync`: the UDP socket of the sync channel, the gate's maps, and between them the
//! two sans-IO halves, [`Guard`] on the active and [`Flows`] on the standby. Part of the shadow thread.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use rfsis_common::ack_gate::{
    Confirmation, Guarded, OpeningEvent, OpeningKind, RELEASE_MARK, Sent,
};
use rfsis_common::maps::FlowKey;

use crate::adopt::Numbers;
use crate::bpf::GuardMaps;
use crate::flows::{Effects, Flows};
use crate::guard::{Fact, Guard, GuardEffects};
use crate::heartbeat::Nanos;
use crate::metrics::{GuardCondition, JoinResult, Metrics, Protection, SyncReceived, SyncSent};
use crate::services::{Connections, Snapshots};
use crate::shared::Shared;
use crate::sync::{Channel, MAX_DATAGRAM, Record};
use crate::sys::RawIpSocket;

/// Datagrams that are taken before frames are looked at again.
const BATCH: usize = 64;

/// The same of openings: all that the ring holds.
const OPENINGS_BATCH: usize = 8192;

/// Opens the socket of the sync channel on this node's own address.
///
/// # Errors
/// Of bind(2): the port may be in use.
pub fn bind(node: Ipv4Addr, port: u16) -> std::io::Result<UdpSocket> {
    let socket = UdpSocket::bind(SocketAddrV4::new(node, port))?;
    socket.set_nonblocking(true)?;
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
}

impl KernelGuard {
    fn done(&self, result: Result<(), crate::bpf::BpfError>) -> bool {
        if let Err(error) = &result {
            tracing::warn!(%error, "the ACK gate does not hear the agent");
        }
        result.is_ok()
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

    fn confirm(&mut self, slot: u32, confirmation: Confirmation) -> bool {
        self.done(self.maps.confirm(slot, confirmation))
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

    fn take_snapshot(&mut self, flow: FlowKey, join: u32) {
        self.connections.ask(flow, join);
    }
}

/// This node's end of the sync channel.
pub struct Link {
    /// Makes and judges datagrams.
    pub channel: Channel,
    /// Carries them.
    pub socket: UdpSocket,
    /// Where the peer's end is.
    pub peer: SocketAddrV4,
    /// What the ACK gate guards while this node is active.
    pub guard: Guard,
    /// The ACK gate.
    pub gate: KernelGuard,
    /// Connections that open.
    pub openings: RingBuf<MapData>,
    /// Snapshots of connections that were asked for.
    pub snapshots: Snapshots,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// The peer's session, as last seen.
    pub peer_session: Option<u64>,
    /// What is to be said.
    pub records: Vec<Record>,
    /// When the active asked last for a sign of life, ns.
    pub asked_at: Nanos,
    /// Silence of either node after which the active does not wait for the standby, ns.
    pub timeout: Nanos,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link")
            .field("guard", &self.guard)
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
        self.guard.next_wakeup()
    }

    /// Whether the active, last heard by its heartbeat at `heard_at` (ns), was not heard here for so long
    /// that it may have opened its gate.
    pub fn was_deaf(&self, heard_at: Nanos) -> bool {
        heard_at.saturating_sub(self.asked_at) > self.timeout
    }

    /// The node is active now.
    pub fn go_active(&mut self, now: Nanos) {
        self.guard.go_active(now);
        self.metrics.protection.choose(Protection::Degraded);
    }

    /// The node is standby again.
    pub fn go_standby(&mut self) {
        self.guard.go_standby(&mut self.gate);
        self.records.clear();
        self.metrics.protection.choose(Protection::Standby);
    }

    /// The kernel is about to answer a SYN that the gate has not seen.
    pub fn note_syn(&mut self, packet: &[u8], now: Nanos) {
        self.guard
            .process_opening(packet, OpeningKind::Syn, now, &mut self.gate);
    }

    /// The kernel takes a flow that lived on a shadow.
    pub fn adopt(&mut self, numbers: &Numbers, now: Nanos) {
        self.guard.adopt(numbers, now, &mut self.gate);
    }

    /// Takes what came in, does what is due, and says what is to be said. After each batch of frames, so
    /// that one datagram confirms all of them. Returns whether there may be more to take.
    pub fn run(
        &mut self,
        flows: &mut Flows,
        effects: &mut impl Effects,
        shared: &Shared,
        now: Nanos,
    ) -> bool {
        let session = shared.peer_session();
        if session != self.peer_session {
            self.peer_session = session;
            self.channel.set_peer(session);
            self.guard.peer_changed(now, &mut self.gate);
        }
        let epoch = shared.epoch();
        let mut answer = false;
        let mut more = self.take_datagrams(flows, effects, shared, now, &mut answer);
        more |= self.take_openings();
        while let Some(taken) = self.snapshots.take() {
            self.guard.process_snapshot(
                taken.flow,
                taken.join,
                taken.snapshot,
                now,
                &mut self.gate,
            );
        }
        if now >= self.guard.next_wakeup() {
            self.guard.poll(now, &mut self.gate);
        }
        flows.take_confirmations(|record| self.records.push(record));
        let ping = self.guard.take_records(&mut self.records);
        if ping || answer || !self.records.is_empty() {
            self.say(epoch, ping);
        }
        for fact in self.guard.take_facts() {
            self.tell(fact);
        }
        for ended in self.guard.take_joins() {
            self.metrics.late_joins.inc(ended.result);
            if ended.result == JoinResult::Joined {
                let took = Duration::from_nanos(ended.took);
                self.metrics.late_join_duration.observe(took.as_secs_f64());
            }
        }
        more
    }

    fn take_datagrams(
        &mut self,
        flows: &mut Flows,
        effects: &mut impl Effects,
        shared: &Shared,
        now: Nanos,
        answer: &mut bool,
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
            let opened = match self.channel.open(&buffer[..len], *from.ip(), epoch) {
                Ok(opened) => opened,
                Err(error) => {
                    self.metrics.sync_received.inc(error.into());
                    continue;
                }
            };
            self.metrics.sync_received.inc(SyncReceived::Ok);
            shared.sync_heard(now);
            if opened.wants_answer {
                *answer = true;
                self.asked_at = now;
            }
            self.guard.heard(now, &mut self.gate);
            // It may speak of one that has just been reported.
            self.take_openings();
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
                        self.guard.process_record(&record, now, &mut self.gate);
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
                        self.guard.process_record(&record, now, &mut self.gate);
                        None
                    }
                };
                if let Some((flow, client_isn)) = unknown {
                    self.records.push(Record::Refuse { flow, client_isn });
                }
            }
            self.metrics.sync_records_skipped.inc_by(records.skipped());
        }
        true
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
            self.guard
                .process_opening(event.packet(), kind, event.at_ns, &mut self.gate);
        }
        true
    }

    fn say(&mut self, epoch: u64, wants_answer: bool) {
        let (socket, peer, metrics) = (&self.socket, self.peer, &self.metrics);
        self.channel
            .seal(epoch, wants_answer, self.records.drain(..), |datagram| {
                // Not sent is as good as lost: what matters is repeated.
                let sent = match socket.send_to(datagram, peer) {
                    Ok(_) => SyncSent::Ok,
                    Err(_) => SyncSent::SendFailed,
                };
                metrics.sync_sent.inc(sent);
            });
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
            Fact::StandbyForgot { flows } => {
                tracing::warn!(
                    flows,
                    "the standby's agent was started anew: the flows that run are unprotected until it has got them"
                );
            }
        }
    }

    /// Shows how many flows are guarded.
    pub fn count(&self) {
        let census = self.guard.census();
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
