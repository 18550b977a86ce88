//! A machine's kernel: TCP, and the programs with their maps. It outlives the agent.

use rfsis_common::ack_gate::{AckGateVerdict, OpeningKind, is_opening};
use rfsis_common::frame::{Classified, classify};
use rfsis_common::maps::{HeldEvent, MirrorPeer, NodeState, State as NodeKind};
use rfsis_common::mirror::{MirrorAction, MirrorEgress, mirror_decide};
use rfsis_common::verdict::{GateVerdict, XdpAction, gate_decide, is_syn_ack, xdp_decide};

use super::*;
use crate::fault::faulty;
use crate::shadow::reset_packet;

/// Frames that the ring holds.
const RING: usize = 512;

/// What leaves a machine.
#[derive(Debug)]
pub(crate) enum Out {
    /// A packet from the VIP, past the gate.
    Packet(Vec<u8>),
    /// A copy for the peer.
    Copy(Vec<u8>, Direction),
    /// A heartbeat.
    Heartbeat(crate::heartbeat::Heartbeat),
    /// A datagram of the sync channel.
    Datagram(Vec<u8>),
    /// Gratuitous ARP.
    Announce,
}

/// An entry of the frame ring.
#[derive(Clone, Debug)]
pub(crate) struct Mirrored {
    pub(crate) arrival: Nanos,
    pub(crate) direction: Direction,
    /// The node's state when it came.
    pub(crate) state: NodeKind,
    /// By the peer's hardware address.
    pub(crate) from_peer: bool,
    pub(crate) packet: Vec<u8>,
    /// The program has answered it.
    pub(crate) answered: bool,
}

/// How the two are connected, and what is protected: the same on both machines.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    /// `protect: sync`.
    pub(crate) sync: bool,
    /// `tap: mirror`.
    pub(crate) mirror: bool,
}

/// A connection of the kernel's, with its server.
pub(crate) struct Connection {
    pub(crate) host: Host,
    pub(crate) server: Server,
    /// What the kernel knows of it.
    pub(crate) track: Track,
    next: Nanos,
    /// It was a live shadow.
    pub(crate) adopted: bool,
}

/// The kernel of one machine.
pub(crate) struct Kernel {
    setup: Setup,
    seed: u64,
    pub(crate) state: NodeState,
    pub(crate) maps: Maps,
    /// Whom the mirror copies to.
    pub(crate) peer: MirrorPeer,
    pub(crate) connections: BTreeMap<FlowKey, Connection>,
    /// How connections are made, by the client's port.
    pub(crate) tweaks: BTreeMap<u16, Tweaks>,
    /// XDP is attached: it goes with the agent.
    pub(crate) has_agent: bool,
    pub(crate) ring: VecDeque<Mirrored>,
    /// Flows that found the ring full.
    pub(crate) lost: Vec<(FlowKey, Nanos)>,
    pub(crate) held: VecDeque<HeldEvent>,
    pub(crate) out: Vec<Out>,
    /// What the standby's program has confirmed by itself, times.
    pub(crate) pledges_kept: u64,
}

/// An Ethernet frame, as far as the programs look at it.
fn framed(packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 14 + packet.len()];
    frame[12..14].copy_from_slice(&[0x08, 0x00]);
    frame[14..].copy_from_slice(packet);
    frame
}

fn classified(packet: &[u8]) -> Classified {
    classify(&&framed(packet)[..], u32::from(VIP))
}

impl Kernel {
    pub(crate) fn new(setup: Setup, seed: u64, tweaks: BTreeMap<u16, Tweaks>) -> Self {
        Self {
            setup,
            seed,
            state: NodeState::default(),
            maps: Maps::default(),
            peer: MirrorPeer::NOBODY,
            connections: BTreeMap::new(),
            tweaks,
            has_agent: false,
            ring: VecDeque::new(),
            lost: vec![],
            held: VecDeque::new(),
            out: vec![],
            pledges_kept: 0,
        }
    }

    /// The programs are loaded anew, with empty maps.
    pub(crate) fn load(&mut self) {
        let tweaks = std::mem::take(&mut self.tweaks);
        *self = Self {
            has_agent: true,
            pledges_kept: self.pledges_kept,
            ..Self::new(self.setup, self.seed.wrapping_add(0x9e37), tweaks)
        };
    }

    /// Whether the VIP's output leaves.
    pub(crate) fn may_speak(&self, now: Nanos) -> bool {
        self.state
            .may_speak(if faulty!(IgnoreLease) { 0 } else { now })
    }

    /// When a stack has something to do by itself.
    pub(crate) fn next_wakeup(&self) -> Nanos {
        let times = self.connections.values().map(|c| c.next);
        times.min().unwrap_or(Nanos::MAX)
    }

    // ---- in ------------------------------------------------------------------------------------

    /// A packet of the VIP's comes in. `for_us`: addressed to this machine; `from_peer`: by the other one, and
    /// if it is a copy then for the standby alone.
    pub(crate) fn receive(
        &mut self,
        world: &mut World,
        packet: &[u8],
        direction: Direction,
        (for_us, from_peer): (bool, bool),
        now: Nanos,
    ) {
        let frame = classified(packet);
        let state = self.state.state();
        let action = xdp_decide(&frame, state, |tcp| world.live.contains(&tcp.flow));
        if self.has_agent && action == XdpAction::Mirror {
            return self.capture(packet, direction, state, from_peer, now);
        }
        if direction == Direction::FromVip || !for_us {
            return;
        }
        if let Some(tcp) = frame.tcp().filter(|tcp| is_opening(tcp)) {
            if self.setup.sync || self.setup.mirror {
                world.approved.remove(&tcp.flow);
            }
            if self.setup.sync && self.has_agent {
                let opening = Opening::Packet(OpeningKind::Syn, packet.to_vec());
                self.maps.openings.push_back(opening);
                if self.maps.guarding {
                    self.maps.agreement.note_syn(packet, false);
                }
            }
        }
        self.offer(&frame, packet, now);
        self.stack(packet, &mut world.approved, now);
    }

    fn capture(
        &mut self,
        packet: &[u8],
        direction: Direction,
        state: NodeKind,
        from_peer: bool,
        now: Nanos,
    ) {
        if self.ring.len() < RING {
            let answer = self.agree(packet, direction, state, now);
            if answer.is_none() || !faulty!(AnswerLost) {
                self.ring.push_back(Mirrored {
                    arrival: now,
                    direction,
                    state,
                    from_peer,
                    packet: packet.to_vec(),
                    answered: answer.is_some(),
                });
            }
            let said = answer.or_else(|| self.pledge(packet, direction, state, from_peer, now));
            self.out.extend(said.map(Out::Datagram));
        } else if let Ok((flow, _)) = parse(packet, direction) {
            self.lost.push((flow, now));
        }
    }

    /// What the standby's program confirms of a copy that is in the ring.
    fn pledge(
        &mut self,
        packet: &[u8],
        direction: Direction,
        state: NodeKind,
        from_peer: bool,
        now: Nanos,
    ) -> Option<Vec<u8>> {
        let copied = self.setup.mirror && from_peer && direction == Direction::ToVip;
        if state != NodeKind::Standby || !copied {
            return None;
        }
        let said = self.maps.confirm_pledged(classified(packet).tcp()?, now)?;
        self.pledges_kept += 1;
        if faulty!(PledgeLost) {
            self.ring.pop_back();
        }
        Some(said)
    }

    /// What the standby's program notes of a handshake that goes into the ring, and what it answers.
    fn agree(
        &mut self,
        packet: &[u8],
        direction: Direction,
        state: NodeKind,
        now: Nanos,
    ) -> Option<Vec<u8>> {
        if state != NodeKind::Standby {
            return None;
        }
        let frame = classified(packet);
        let tcp = frame.tcp()?;
        match direction {
            Direction::ToVip if is_opening(tcp) => self.maps.agreement.note_syn(packet, true),
            Direction::FromVip if is_syn_ack(tcp) => {
                return self.maps.agreement.answer(packet, now);
            }
            _ => {}
        }
        None
    }

    /// TCP gets a segment.
    pub(crate) fn stack(&mut self, packet: &[u8], approved: &mut HashSet<FlowKey>, now: Nanos) {
        let Ok((flow, segment)) = parse(packet, Direction::ToVip) else {
            return;
        };
        let opens = segment.syn && segment.ack.is_none() && !segment.rst;
        let is_new = self.connections.get_mut(&flow).is_none_or(|known| {
            let state = known.host.socket(known.server.handle).state();
            opens
                && known.track.client_isn != segment.seq
                && matches!(state, State::Closed | State::TimeWait)
        });
        if is_new && opens && self.has_agent {
            let fresh = self.accept(flow, &segment, now);
            self.connections.insert(flow, fresh);
        }
        match self.connections.get_mut(&flow) {
            Some(connection) => {
                connection.track.client_says(&segment);
                connection.host.receive(packet);
                connection.next = now;
            }
            None if segment.rst => {}
            None => {
                // RFC 9293 section 3.10.7.1.
                let reset = match segment.ack {
                    Some(ack) => reset_packet(flow, VIP, ack, None),
                    None => reset_packet(flow, VIP, 0, Some(segment.end())),
                };
                self.leave(reset, false, approved, now);
            }
        }
    }

    fn accept(&mut self, flow: FlowKey, syn: &Segment<'_>, now: Nanos) -> Connection {
        let tweaks = self
            .tweaks
            .get(&flow.client_port)
            .copied()
            .unwrap_or_default();
        self.seed = self.seed.wrapping_add(1);
        let mut host = Host::new(VIP, self.seed, now, false);
        host.plain.insert(flow.client_port, tweaks);
        if let Some(isn) = tweaks.active_isn {
            host.wanted.insert(flow.client_port, isn);
        }
        let ticks = tweaks.timestamps.then_some(active_ticks as fn() -> u32);
        let mut listener = socket(tweaks.active_buffer, ticks);
        listener
            .listen((VIP, flow.service_port))
            .expect("a port that is not 0");
        let handle = host.sockets.add(listener);
        let kind = config().services[&flow.service_port];
        Connection {
            host,
            server: Server {
                expects: Some((flow.client_port, 0)),
                ..Server::new(handle, kind.stream())
            },
            track: Track::of_syn(syn),
            next: now,
            adopted: false,
        }
    }

    /// The kernel goes on with what was a live shadow. `first`: the client's first byte.
    pub(crate) fn adopt(
        &mut self,
        numbers: &Numbers,
        mut unfinished: Unfinished,
        first: u32,
        now: Nanos,
    ) {
        if faulty!(AdoptNoInput) {
            unfinished.input.clear();
        }
        let taken = numbers.rcv_nxt.wrapping_sub(unfinished.input.len() as u32);
        let track = Track::adopted(numbers, taken);
        let Adopted {
            flow,
            host,
            mut server,
        } = Adopted::new(numbers, unfinished, now);
        server.expects = Some((flow.client_port, taken.wrapping_sub(first).into()));
        let connection = Connection {
            host,
            server,
            track,
            next: now,
            adopted: true,
        };
        self.connections.insert(flow, connection);
    }

    // ---- the stacks run ------------------------------------------------------------------------

    /// Runs what is due; `serves`: the services do.
    pub(crate) fn run(&mut self, serves: bool, approved: &mut HashSet<FlowKey>, now: Nanos) {
        let due: Vec<FlowKey> = self
            .connections
            .iter()
            .filter(|(_, connection)| connection.next <= now)
            .map(|(flow, _)| *flow)
            .collect();
        for flow in due {
            self.run_one(flow, serves, approved, now);
        }
    }

    /// The services have time again.
    pub(crate) fn hurry(&mut self, now: Nanos) {
        for connection in self.connections.values_mut() {
            connection.next = now;
        }
    }

    fn run_one(
        &mut self,
        flow: FlowKey,
        serves: bool,
        approved: &mut HashSet<FlowKey>,
        now: Nanos,
    ) {
        let Some(connection) = self.connections.get_mut(&flow) else {
            return;
        };
        let Connection { host, server, .. } = connection;
        let mut sent = host.poll(now);
        if serves && self.has_agent {
            let was_done = server.done;
            server.run(host);
            if server.done && !was_done {
                approved.insert(flow);
            }
            sent.extend(host.poll(now));
        }
        connection.next = host.poll_at(now);
        let handle = server.handle;
        let over = host.socket(handle).state() == State::Closed;
        for packet in sent {
            if let Some(connection) = self.connections.get_mut(&flow)
                && let Ok((_, segment)) = parse(&packet, Direction::FromVip)
            {
                connection.track.hear(&segment);
                connection.track.kernel_says(&segment);
            }
            self.leave(packet, false, approved, now);
        }
        if over {
            self.connections.remove(&flow);
        }
    }

    /// The agent was killed: the kernel closes its sockets.
    pub(crate) fn lose_agent(&mut self, now: Nanos) {
        self.has_agent = false;
        self.ring.clear();
        self.held.clear();
        self.maps.openings.clear();
        for connection in self.connections.values_mut() {
            let Connection { host, server, .. } = connection;
            let socket = host.socket(server.handle);
            // With bytes unread it resets (RFC 2525 section 2.17).
            if socket.recv_queue() > 0 {
                socket.abort();
            } else {
                socket.close();
            }
            connection.next = now;
        }
    }

    /// What a connection and its server are about.
    pub(crate) fn snapshot(&mut self, flow: &FlowKey) -> Option<crate::sync::Snapshot> {
        let Connection {
            host,
            server,
            track,
            ..
        } = self.connections.get_mut(flow)?;
        server.run(host);
        snapshot(track, host, server)
    }

    // ---- out -----------------------------------------------------------------------------------

    /// A packet on its way out, through the gate. `released`: marked by the agent as past the ACK gate.
    pub(crate) fn leave(
        &mut self,
        packet: Vec<u8>,
        released: bool,
        approved: &mut HashSet<FlowKey>,
        now: Nanos,
    ) {
        let frame = classified(&packet);
        let state = if self.may_speak(now) {
            // A lease that is not looked at is one that holds.
            NodeState {
                lease_ns: self.state.lease_ns.max(now),
                ..self.state
            }
        } else {
            self.state
        };
        let is_approved = |flow: &FlowKey| faulty!(ApproveAll) || approved.contains(flow);
        let verdict = gate_decide(
            &frame,
            &state,
            now,
            |_| true,
            |tcp| is_approved(&tcp.flow),
            || false,
        );
        let Some(tcp) = frame.tcp() else {
            return;
        };
        match verdict {
            GateVerdict::Passed => {}
            GateVerdict::Held => {
                if self.has_agent {
                    self.held.push_back(HeldEvent {
                        at_ns: now,
                        flow: tcp.flow,
                        seq: tcp.seq,
                        ack: tcp.ack,
                        flags: tcp.flags.into(),
                        reserved: 0,
                    });
                }
                return;
            }
            _ => return,
        }
        let opens = is_syn_ack(tcp);
        if opens {
            approved.remove(&tcp.flow);
        }
        if !self.setup.sync {
            self.offer(&frame, &packet, now);
            self.out.push(Out::Packet(packet));
            return;
        }
        if released {
            if !(opens && self.maps.guarding) {
                self.offer(&frame, &packet, now);
            }
            self.out.push(Out::Packet(packet));
            return;
        }
        self.maps.now = now;
        self.maps.copied = self.setup.mirror && !self.peer.is_nobody();
        let (verdict, left) = self.maps.judge(packet.clone());
        match (verdict, left) {
            (AckGateVerdict::Opening, left) => {
                if self.setup.mirror {
                    let copy = held(packet);
                    self.offer(&classified(&copy), &copy, now);
                }
                self.out.extend(left.map(Out::Packet));
            }
            (_, Some(left)) => {
                self.offer(&classified(&left), &left, now);
                self.out.push(Out::Packet(left));
            }
            (_, None) => {}
        }
    }

    /// Copies a frame to the standby if it is to have one.
    fn offer(&mut self, frame: &Classified, packet: &[u8], now: Nanos) {
        if !self.setup.mirror {
            return;
        }
        let sync = self.setup.sync;
        let known = frame
            .tcp()
            .and_then(|tcp| self.maps.sent_next(&tcp.flow))
            .filter(|_| sync);
        let egress = || {
            if sync && known.is_some() {
                MirrorEgress::Handshake
            } else {
                MirrorEgress::Full
            }
        };
        if mirror_decide(frame, &self.state, || now, self.peer, egress, |_| known)
            == MirrorAction::Clone
        {
            let copy = Out::Copy(packet.to_vec(), frame.direction);
            self.out.push(copy);
        }
    }
}
