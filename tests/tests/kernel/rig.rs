//! Loaded programs of which a run shows all that it does: what becomes of the frame, every counter, every
//! ring, every copy.

use std::os::fd::OwnedFd;
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use rfsis_agent::bpf::{
    AckGateCounters, Approvals, Counters, GateCounters, GuardMaps, LiveFlows, LoadParams,
    LostFlows, MirrorCounters, MirrorParams, MirrorWriter, Program, Programs, SkbContext,
    StateWriter, XdpCounters, XdpMode,
};
use rfsis_common::ack_gate::{
    AckGateVerdict, Confirmation, Guarded, OpeningEvent, OpeningKind, Sent,
};
use rfsis_common::maps::{
    FlowKey, FrameHeader, HeartbeatEvent, HeldEvent, MirrorPeer, NodeState, State,
};
use rfsis_common::mirror::{MirrorEgress, MirrorVerdict};
use rfsis_common::verdict::{GateVerdict, XdpVerdict};

use crate::frames::{FLOW, OBSERVED, OWN_MAC, SERVICE, STANDBY, VIP};
use crate::host::{GUARD, index_of, mac_of, now_ns, packet_socket, receive, run, veth};

/// What is fixed when the programs are loaded.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Tap `mirror` with this egress; `None` is tap `lan`.
    pub mirror: Option<MirrorEgress>,
    /// `protect: sync`.
    pub ack_gate: bool,
}

/// What the agent tells the programs while they run. The flow that it speaks of is [`FLOW`].
#[derive(Clone, Copy, Debug)]
pub struct World {
    /// [`State`] as a number, or none of them.
    pub state: u64,
    /// The lease has not lapsed.
    pub leased: bool,
    /// The flow is on a shadow.
    pub live: bool,
    /// Its FIN and RST may leave.
    pub approved: bool,
    /// To whom copies go.
    pub standby: MirrorPeer,
    /// The standby answers: the ACK gate guards.
    pub guards: bool,
    /// What the ACK gate knows of the flow.
    pub guarded: Option<Known>,
}

impl World {
    /// A node in this state, its lease valid, a standby heard.
    pub const fn of(state: State) -> Self {
        Self {
            state: state as u64,
            leased: true,
            live: false,
            approved: false,
            standby: MirrorPeer::at(STANDBY),
            guards: false,
            guarded: None,
        }
    }

    pub const fn node(&self) -> NodeState {
        let lease_ns = if self.leased { u64::MAX } else { 1 };
        NodeState {
            state: self.state,
            lease_ns,
        }
    }
}

/// A flow that the standby knows.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    pub guarded: Guarded,
    pub confirmation: Confirmation,
    pub sent: Sent,
}

/// More than any frame of these tests has.
const MTU: u32 = 9000;

/// What a slot says of its time after a run that wrote it.
pub const NOW: u64 = 1;

/// All that a run did. Times are checked and left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// The frame as it goes on, if it does.
    pub output: Option<Vec<u8>>,
    /// What was counted, once for each count.
    pub xdp: Vec<XdpVerdict>,
    pub gate: Vec<GateVerdict>,
    pub mirror: Vec<MirrorVerdict>,
    pub ack_gate: Vec<AckGateVerdict>,
    /// Entries of the rings, their times 0.
    pub frames: Vec<(FrameHeader, Vec<u8>)>,
    pub heartbeats: Vec<(u32, Vec<u8>)>,
    pub held: Vec<HeldEvent>,
    pub openings: Vec<(OpeningKind, FlowKey, Vec<u8>)>,
    /// Flows that lost a copy.
    pub lost: Vec<FlowKey>,
    /// Frames that left for the standby.
    pub copies: Vec<Vec<u8>>,
    /// What the ACK gate knows of the flow now, if it still does; `at_ns` is [`NOW`] where it was written.
    pub sent: Option<Sent>,
}

impl Effects {
    /// Where this is not what was expected, for a message; numbers are hexadecimal.
    pub fn differences(&self, expected: &Self) -> Vec<String> {
        macro_rules! compare {
            ($($field:ident),+) => {
                [$((self.$field != expected.$field).then(|| {
                    let name = stringify!($field);
                    let (found, expected) = (&self.$field, &expected.$field);
                    format!("{name}: found {found:02x?}, expected {expected:02x?}")
                })),+]
            };
        }
        let all = compare!(
            output, xdp, gate, mirror, ack_gate, frames, heartbeats, held, openings, lost, copies,
            sent
        );
        all.into_iter().flatten().collect()
    }
}

/// All programs.
pub const PROGRAMS: [Program; 4] = [
    Program::Xdp,
    Program::Ingress,
    Program::Mirror,
    Program::Gate,
];

/// Whether every kernel takes the frame for a test run: not by TC, where the header of IP is not whole.
pub fn runs(program: Program, frame: &[u8]) -> bool {
    let header = match frame[12..14] {
        [0x08, 0x00] => 34,
        [0x86, 0xdd] => 54,
        _ => 14,
    };
    program == Program::Xdp || frame.len() >= header
}

/// All verdicts, counted since the programs were loaded.
pub struct Counts {
    xdp: XdpCounters,
    gate: GateCounters,
    mirror: MirrorCounters,
    ack_gate: AckGateCounters,
}

/// The programs, on a host with the interface `eth0`.
pub struct Rig {
    programs: Programs,
    state: StateWriter,
    standby: MirrorWriter,
    live: LiveFlows,
    approvals: Approvals,
    guard: GuardMaps,
    counters: Counters,
    lost: LostFlows,
    frames: RingBuf<MapData>,
    heartbeats: RingBuf<MapData>,
    held: RingBuf<MapData>,
    openings: RingBuf<MapData>,
    outgoing: OwnedFd,
    ifindex: u32,
    has_ack_gate: bool,
    known: Option<Known>,
}

impl Rig {
    /// On the thread's network namespace, which has no `eth0` yet.
    pub fn new(setup: Setup) -> Self {
        veth(MTU);
        let mac = OWN_MAC.map(|byte| format!("{byte:02x}")).join(":");
        run(&format!("ip link set eth0 address {mac}"));
        let mirror = setup.mirror.map(|egress| MirrorParams {
            ifindex: index_of("eth0"),
            mac: mac_of("eth0"),
            egress,
        });
        let params = LoadParams {
            vip: VIP,
            service_ports: &[SERVICE, OBSERVED],
            observed_ports: &[OBSERVED],
            datagram_ports: &[SERVICE],
            frame_ring_bytes: 1 << 20,
            max_live_flows: 16,
            mirror,
            guard: setup.ack_gate.then_some(GUARD),
        };
        let mut programs = Programs::load(params).unwrap_or_else(|error| panic!("{error}"));
        Self {
            state: programs.state_map().unwrap(),
            standby: programs.mirror().unwrap(),
            live: programs.live_flows().unwrap(),
            approvals: programs.approvals().unwrap(),
            guard: programs.guard_maps().unwrap(),
            counters: programs.counters().unwrap(),
            lost: programs.lost_flows().unwrap(),
            frames: programs.take_frames().unwrap(),
            heartbeats: programs.take_heartbeats().unwrap(),
            held: programs.take_held().unwrap(),
            openings: programs.take_openings().unwrap(),
            outgoing: packet_socket("eth0"),
            ifindex: index_of("eth0"),
            has_ack_gate: setup.ack_gate,
            known: None,
            programs,
        }
    }

    /// Tells the programs so.
    pub fn set(&mut self, world: &World) {
        self.state.write(world.node()).unwrap();
        self.standby.write(world.standby).unwrap();
        // One that is not there does not keep those behind it.
        let other = FlowKey {
            client_port: !FLOW.client_port,
            ..FLOW
        };
        self.live.remove(&[other, FLOW]).unwrap();
        if world.live {
            self.live.insert(FLOW).unwrap();
        }
        self.approvals.revoke(&FLOW).unwrap();
        if world.approved {
            self.approvals.approve(FLOW).unwrap();
        }
        self.guard.set_mode(world.guards).unwrap();
        self.guard.withdraw(&FLOW).unwrap();
        self.known = world.guarded.filter(|_| self.has_ack_gate);
        if let Some(known) = self.known {
            // A slot that is not there holds nothing.
            if known.guarded.slot < GUARD.slots {
                self.guard.reset(known.guarded.slot, known.sent).unwrap();
                let slot = known.guarded.slot;
                assert!(self.guard.confirm(slot, known.confirmation));
            }
            self.guard.publish(FLOW, known.guarded).unwrap();
        }
    }

    /// Interface that a program finds a frame on: test runs of XDP are on the loopback interface.
    pub fn ifindex(&self, program: Program) -> u32 {
        if program == Program::Xdp {
            1
        } else {
            self.ifindex
        }
    }

    /// Runs a program on a frame with this mark, which the kernel must take ([`runs`]).
    pub fn run(&mut self, program: Program, frame: &[u8], mark: u32) -> Effects {
        let context = SkbContext {
            mark,
            ifindex: self.ifindex,
        };
        let before = self.counts();
        let begin = now_ns();
        let result = self.programs.test_run(program, frame, context);
        let (code, output) = result.unwrap_or_else(|error| panic!("{error}: {frame:02x?}"));
        let in_time = |at_ns: u64| {
            assert!(
                (begin..=now_ns()).contains(&at_ns),
                "a time that is not now"
            );
        };
        // `enum xdp_action`: XDP_DROP, XDP_PASS; TC_ACT_STOLEN, TC_ACT_UNSPEC (include/uapi/linux).
        let goes_on = match (program, code) {
            (Program::Xdp, 1) | (_, 4) => false,
            (Program::Xdp, 2) | (_, -1) => true,
            (_, other) => panic!("{program:?} gives {other}"),
        };
        let after = self.counts();
        let frames = entries(&mut self.frames, |entry| {
            let (mut header, copy) = FrameHeader::split(entry).unwrap();
            in_time(std::mem::take(&mut header.arrival_ns));
            (header, copy.to_vec())
        });
        let heartbeats = entries(&mut self.heartbeats, |entry| {
            let event = HeartbeatEvent::parse(entry).unwrap();
            in_time(event.arrival_ns);
            (event.ifindex, event.frame().to_vec())
        });
        let held = entries(&mut self.held, |entry| {
            let mut event = HeldEvent::parse(entry).unwrap();
            in_time(std::mem::take(&mut event.at_ns));
            event
        });
        let openings = entries(&mut self.openings, |entry| {
            let event = OpeningEvent::parse(entry).unwrap();
            in_time(event.at_ns);
            let kind = OpeningKind::from_u32(event.kind).unwrap();
            (kind, event.flow, event.packet().to_vec())
        });
        let lost = self.lost.drain().unwrap().into_iter().map(|(flow, at_ns)| {
            in_time(at_ns);
            flow
        });
        Effects {
            output: goes_on.then_some(output),
            xdp: moved(XdpVerdict::ALL, |it| after.xdp.get(it) - before.xdp.get(it)),
            gate: moved(GateVerdict::ALL, |it| {
                after.gate.get(it) - before.gate.get(it)
            }),
            mirror: moved(MirrorVerdict::ALL, |it| {
                after.mirror.get(it) - before.mirror.get(it)
            }),
            ack_gate: moved(AckGateVerdict::ALL, |it| {
                after.ack_gate.get(it) - before.ack_gate.get(it)
            }),
            frames,
            heartbeats,
            held,
            openings,
            lost: lost.collect(),
            copies: self.copies(),
            sent: self.sent(in_time),
        }
    }

    /// Puts the gate and the program that catches frames on the interface.
    pub fn attach(&mut self) {
        self.programs.attach_gate("eth0").unwrap();
        self.programs.attach_ingress("eth0", XdpMode::Tc).unwrap();
    }

    pub fn counts(&self) -> Counts {
        Counts {
            xdp: self.counters.xdp().unwrap(),
            gate: self.counters.gate().unwrap(),
            mirror: self.counters.mirror().unwrap(),
            ack_gate: self.counters.ack_gate().unwrap(),
        }
    }

    /// What was caught, and what the gate did, since then.
    pub fn verdicts_since(&self, before: &Counts) -> (Vec<XdpVerdict>, Vec<GateVerdict>) {
        let now = self.counts();
        (
            moved(XdpVerdict::ALL, |it| now.xdp.get(it) - before.xdp.get(it)),
            moved(GateVerdict::ALL, |it| {
                now.gate.get(it) - before.gate.get(it)
            }),
        )
    }

    /// A copy is on its way, and seen by those who listen on the interface, before the program goes on.
    fn copies(&self) -> Vec<Vec<u8>> {
        let next = || {
            receive(&self.outgoing, Duration::ZERO, |it| {
                it.starts_with(&STANDBY)
            })
        };
        std::iter::from_fn(next).collect()
    }

    fn sent(&self, in_time: impl Fn(u64)) -> Option<Sent> {
        let known = self.known.filter(|_| self.guard.is_published(&FLOW))?;
        let mut sent = self.guard.sent(known.guarded.slot)?;
        if sent.at_ns != known.sent.at_ns {
            in_time(sent.at_ns);
            sent.at_ns = NOW;
        }
        Some(sent)
    }
}

fn entries<T>(ring: &mut RingBuf<MapData>, read: impl Fn(&[u8]) -> T) -> Vec<T> {
    std::iter::from_fn(|| ring.next().map(|entry| read(&entry))).collect()
}

/// Each verdict as often as it was counted.
fn moved<V: Copy, const N: usize>(all: [V; N], by: impl Fn(V) -> u64) -> Vec<V> {
    all.into_iter()
        .flat_map(|verdict| (0..by(verdict)).map(move |_| verdict))
        .collect()
}
