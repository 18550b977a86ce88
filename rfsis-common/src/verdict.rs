//! What is done with a frame: pure functions that the eBPF programs and the simulation both call.

use crate::frame::{Classified, FrameClass, TcpPart, tcp_flags};
use crate::maps::{Direction, MirrorPeer, NodeState, State};

/// What the XDP program did with a frame; index into `XDP_COUNTERS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum XdpVerdict {
    /// Not the VIP's: passed.
    Other = 0,
    /// The VIP's, on the active: passed to the kernel.
    PassVip = 1,
    /// Copied to the frame ring, dropped.
    Mirrored = 2,
    /// To be copied, but the ring was full: dropped, the flow noted in `LOST_FLOWS`.
    MirrorLost = 3,
    /// Heartbeat: copied to its ring, dropped.
    Heartbeat = 4,
    /// Heartbeat that found its ring full: dropped.
    HeartbeatLost = 5,
    /// Tagged for a VLAN: passed.
    Tagged = 6,
    /// Not parseable: passed, never mirrored.
    Malformed = 7,
}

impl XdpVerdict {
    /// All, in the order of their numbers.
    pub const ALL: [XdpVerdict; 8] = [
        XdpVerdict::Other,
        XdpVerdict::PassVip,
        XdpVerdict::Mirrored,
        XdpVerdict::MirrorLost,
        XdpVerdict::Heartbeat,
        XdpVerdict::HeartbeatLost,
        XdpVerdict::Tagged,
        XdpVerdict::Malformed,
    ];

    /// Value of the metrics label `verdict`.
    pub const fn as_str(self) -> &'static str {
        match self {
            XdpVerdict::Other => "other",
            XdpVerdict::PassVip => "pass_vip",
            XdpVerdict::Mirrored => "mirrored",
            XdpVerdict::MirrorLost => "mirror_lost",
            XdpVerdict::Heartbeat => "heartbeat",
            XdpVerdict::HeartbeatLost => "heartbeat_lost",
            XdpVerdict::Tagged => "tagged",
            XdpVerdict::Malformed => "malformed",
        }
    }
}

/// What the XDP program is to do with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpAction {
    /// Leave it to the kernel, and count it so.
    Pass(XdpVerdict),
    /// Copy to the frame ring, drop.
    Mirror,
    /// Copy to the heartbeat ring, drop.
    Heartbeat,
}

impl NodeState {
    /// The state, `Standby` for anything unknown: when in doubt, silent.
    #[inline(always)]
    pub const fn state(&self) -> State {
        match self.state {
            1 => State::Active,
            2 => State::TakingOver,
            3 => State::Fenced,
            4 => State::HandingOver,
            _ => State::Standby,
        }
    }

    /// Whether output of the VIP may leave at `now` (ns, CLOCK_MONOTONIC).
    #[inline(always)]
    pub const fn may_speak(&self, now_ns: u64) -> bool {
        matches!(self.state(), State::Active) && now_ns <= self.lease_ns
    }

    /// Whether what came in for the VIP may be copied to the standby at `now` (ns). A frame may be between
    /// the programs on ingress when the gate is closed for a handover: it is the standby's to answer.
    #[inline(always)]
    pub const fn may_copy_input(&self, now_ns: u64) -> bool {
        matches!(self.state(), State::Active | State::HandingOver) && now_ns <= self.lease_ns
    }
}

/// Decides for an ingress frame. `is_live` says whether a flow is in `LIVE_FLOWS`; it is asked only
/// on the active and only for TCP.
#[inline(always)]
pub fn xdp_decide(
    frame: &Classified,
    state: State,
    is_live: impl FnOnce(&TcpPart) -> bool,
) -> XdpAction {
    match frame.class {
        FrameClass::Heartbeat => XdpAction::Heartbeat,
        FrameClass::Tagged => XdpAction::Pass(XdpVerdict::Tagged),
        FrameClass::Malformed => XdpAction::Pass(XdpVerdict::Malformed),
        // Somebody else's claim to the VIP must reach the kernel's neighbour table like any ARP.
        FrameClass::Other | FrameClass::ArpFromVip => XdpAction::Pass(XdpVerdict::Other),
        FrameClass::ArpRequestForVip => match state {
            State::Active => XdpAction::Pass(XdpVerdict::PassVip),
            _ => XdpAction::Mirror,
        },
        FrameClass::Vip => match (state, frame.tcp()) {
            (State::Active, Some(tcp)) if is_live(tcp) => XdpAction::Mirror,
            (State::Active, _) => XdpAction::Pass(XdpVerdict::PassVip),
            _ => XdpAction::Mirror,
        },
    }
}

/// Whether a copy in the frame ring wakes its reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// If it has read all before this one, as a ring buffer does by itself: a reader that sleeps has.
    WhenCaughtUp,
    /// At once, though it rests and may not have read what came meanwhile.
    Now,
    /// No: it looks by itself when its rest is over.
    Later,
}

/// Frames longer than this are long, bytes: a client that sends much waits for its window.
pub const LONG_FRAME: u32 = 512;
/// Frames longer than this have data; those of a handshake, with the options that Linux sends, have not.
pub const BARE_FRAME: u32 = 74;

/// Frames no longer than this are no SYNs of Linux: acknowledgements, which come in streams, and ends.
pub const ACK_FRAME: u32 = 66;

/// How long a frame of so many bytes may wait for a reader that rests, ns. For a confirmation of data a client may
/// wait, for that of a bare frame nobody does.
#[inline(always)]
pub const fn patience(len: u32) -> u64 {
    if len > LONG_FRAME {
        60_000
    } else if len > BARE_FRAME {
        200_000
    } else {
        1_000_000
    }
}

/// A reader that rests wakes by itself, if not quite when it asked for: to wake it just before costs the sender's CPU an
/// interrupt, ns.
const OVERSLEEP_NS: u64 = 200_000;

/// Decides for a copy of `len` bytes, of a SYN-ACK that is `held` or of something else; `rest_until` as the
/// reader wrote it last. All times in ns.
///
/// To wake a thread costs more than to read a frame. So one that has just read rests for a moment, and of
/// frames that follow each other closely many are read, and confirmed, at once.
#[inline(always)]
pub const fn wake_decide(len: u32, held: bool, now_ns: u64, rest_until: u64) -> Wake {
    if now_ns >= rest_until.saturating_add(OVERSLEEP_NS) {
        return Wake::WhenCaughtUp;
    }
    let is_late = len > BARE_FRAME && rest_until.saturating_sub(now_ns) > patience(len);
    if held || is_late {
        Wake::Now
    } else {
        Wake::Later
    }
}

/// What the gate did with a packet; index into `GATE_COUNTERS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum GateVerdict {
    /// Not from the VIP: passed.
    Other = 0,
    /// From the VIP: passed.
    Passed = 1,
    /// From the VIP while not active, or after the lease: dropped.
    Closed = 2,
    /// FIN or RST that nobody approved: dropped and reported; ICMP port unreachable for a service's
    /// UDP port: dropped.
    Held = 3,
    /// From the VIP and addressed to the standby's tap, as copies are: passed, and not copied again.
    Copy = 4,
}

impl GateVerdict {
    /// All, in the order of their numbers.
    pub const ALL: [GateVerdict; 5] = [
        GateVerdict::Other,
        GateVerdict::Passed,
        GateVerdict::Closed,
        GateVerdict::Held,
        GateVerdict::Copy,
    ];

    /// Value of the metrics label `verdict`.
    pub const fn as_str(self) -> &'static str {
        match self {
            GateVerdict::Other => "other",
            GateVerdict::Passed => "passed",
            GateVerdict::Closed => "closed",
            GateVerdict::Held => "held",
            GateVerdict::Copy => "copy",
        }
    }
}

/// Decides for an egress frame: silence first, then the hold.
///
/// `is_service` says whether a TCP port is a service's; `is_approved` whether the flow's FIN or RST
/// may leave; `refuses_service` whether the packet says that a service's UDP port is closed: while the
/// agent lives it is open. All are asked only when they matter.
#[inline(always)]
pub fn gate_decide(
    frame: &Classified,
    node: &NodeState,
    now_ns: u64,
    is_service: impl FnOnce(u16) -> bool,
    is_approved: impl FnOnce(&TcpPart) -> bool,
    refuses_service: impl FnOnce() -> bool,
) -> GateVerdict {
    let tcp = match (frame.class, frame.direction) {
        (FrameClass::Vip, Direction::FromVip) => frame.tcp(),
        // Fails closed: what cannot be read may be the VIP's.
        (FrameClass::ArpFromVip | FrameClass::Malformed, _) => None,
        _ => return GateVerdict::Other,
    };
    if !node.may_speak(now_ns) {
        return GateVerdict::Closed;
    }
    match tcp {
        Some(tcp)
            if tcp.flags & (tcp_flags::FIN | tcp_flags::RST) != 0
                && is_service(tcp.flow.service_port)
                && !is_approved(tcp) =>
        {
            GateVerdict::Held
        }
        None if matches!(frame.class, FrameClass::Vip) && refuses_service() => GateVerdict::Held,
        _ => GateVerdict::Passed,
    }
}

/// The last word on a packet that [`gate_decide`] judged: a copy is what the gate passes to the
/// standby's hardware address.
///
/// A copy is told by its address and not by a mark: marks are the host's to use. So it has to pass the
/// gate like everything else, and whoever forges one gains nothing: the standby is where it goes.
/// `destination` is asked only where there is a standby.
#[inline(always)]
pub fn tell_copy(
    verdict: GateVerdict,
    peer: MirrorPeer,
    destination: impl FnOnce() -> Option<MirrorPeer>,
) -> GateVerdict {
    let passed = matches!(verdict, GateVerdict::Passed);
    if passed && !peer.is_nobody() && destination().is_some_and(|to| to.word() == peer.word()) {
        GateVerdict::Copy
    } else {
        verdict
    }
}

/// Whether a segment is a SYN-ACK: the VIP accepts a connection.
///
/// At the gate it ends the approval of its flow: the new connection must not inherit what an older one with
/// the same addresses and ports was granted.
#[inline(always)]
pub const fn is_syn_ack(tcp: &TcpPart) -> bool {
    const SYN_ACK: u8 = tcp_flags::SYN | tcp_flags::ACK;
    tcp.flags & SYN_ACK == SYN_ACK
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::classify;
    use crate::frame::tcp_flags::{ACK, FIN, RST, SYN};
    use crate::frame::testing::{
        CLIENT, SERVICE, VIP, arp, port_unreachable, tcp_from_vip, tcp_to_vip,
    };

    const OPEN: NodeState = NodeState {
        state: State::Active as u64,
        lease_ns: 1000,
    };

    #[test]
    fn a_rest_is_ended_by_a_held_syn_ack_and_by_what_would_wait_longer_than_it_may() {
        const NOW: u64 = 1_000_000;
        let (long, small, bare) = (LONG_FRAME + 1, LONG_FRAME, BARE_FRAME);
        for (len, held, until, expected) in [
            (bare, false, 0, Wake::WhenCaughtUp),
            (bare, true, NOW - 200_000, Wake::WhenCaughtUp),
            (long, false, NOW - 200_000, Wake::WhenCaughtUp),
            // It oversleeps.
            (bare, true, NOW - 199_999, Wake::Now),
            (long, false, NOW - 199_999, Wake::Later),
            (long, false, NOW, Wake::Later),
            (bare, false, NOW + 1, Wake::Later),
            (bare, true, NOW + 1, Wake::Now),
            (bare, false, u64::MAX, Wake::Later),
            (small, false, NOW + 200_000, Wake::Later),
            (small, false, NOW + 200_001, Wake::Now),
            (bare + 1, false, NOW + 200_001, Wake::Now),
            (long, false, NOW + 60_000, Wake::Later),
            (long, false, NOW + 60_001, Wake::Now),
        ] {
            let found = wake_decide(len, held, NOW, until);
            assert_eq!(found, expected, "{len} bytes, held {held}, until {until}");
        }
    }

    #[test]
    fn a_lease_ends_after_its_last_nanosecond_and_only_the_active_has_one() {
        assert!(OPEN.may_speak(1000));
        assert!(!OPEN.may_speak(1001));
        for state in [0, 2, 3, 4, 5, u64::MAX] {
            assert!(!NodeState { state, ..OPEN }.may_speak(0), "state {state}");
        }
        // Half-written in either order: the new state with the old lease, the old with the new.
        assert!(
            !NodeState {
                lease_ns: 0,
                ..OPEN
            }
            .may_speak(1)
        );
        assert!(!NodeState { state: 0, ..OPEN }.may_speak(1));
    }

    #[test]
    fn the_active_mirrors_live_flows_only_and_asks_for_tcp_only() {
        let tcp = tcp_to_vip(ACK);
        let frame = classify(&&tcp[..], VIP);
        let ask = |state, live| xdp_decide(&frame, state, |_| live);
        assert_eq!(ask(State::Active, true), XdpAction::Mirror);
        assert_eq!(
            ask(State::Active, false),
            XdpAction::Pass(XdpVerdict::PassVip)
        );
        for state in State::ALL {
            if state == State::Active {
                continue;
            }
            let action = xdp_decide(&frame, state, |_| panic!("asked on {state:?}"));
            assert_eq!(action, XdpAction::Mirror);
        }
        let request = arp(1, CLIENT, VIP);
        let action = xdp_decide(&classify(&&request[..], VIP), State::Active, |_| {
            panic!("asked")
        });
        assert_eq!(action, XdpAction::Pass(XdpVerdict::PassVip));
    }

    #[test]
    fn what_the_gate_cannot_read_leaves_only_while_it_is_open() {
        let short = [0; 13];
        let frame = classify(&&short[..], VIP);
        let decide = |node| gate_decide(&frame, node, 1000, |_| true, |_| false, || false);
        assert_eq!(decide(&OPEN), GateVerdict::Passed);
        assert_eq!(decide(&NodeState::default()), GateVerdict::Closed);
    }

    #[test]
    fn only_an_approved_fin_or_rst_of_a_service_leaves() {
        for (flags, service, approved, expected) in [
            (ACK, true, false, GateVerdict::Passed),
            (SYN | ACK, true, false, GateVerdict::Passed),
            (FIN | ACK, true, false, GateVerdict::Held),
            (RST, true, false, GateVerdict::Held),
            (FIN | ACK, true, true, GateVerdict::Passed),
            (RST, false, false, GateVerdict::Passed),
        ] {
            let segment = tcp_from_vip(flags);
            let frame = classify(&&segment[..], VIP);
            let is_service = |port| service && port == SERVICE;
            let verdict = gate_decide(&frame, &OPEN, 0, is_service, |_| approved, || false);
            assert_eq!(
                verdict, expected,
                "flags {flags:#x}, service {service}, {approved}"
            );
            // Closed beats everything.
            let verdict = gate_decide(&frame, &OPEN, 1001, is_service, |_| approved, || true);
            assert_eq!(verdict, GateVerdict::Closed);
        }
    }

    #[test]
    fn a_refusal_of_a_services_datagram_is_held_and_of_another_passes() {
        let (refusal, len) = port_unreachable(9999, 0);
        let frame = classify(&&refusal[..len], VIP);
        for (service, expected) in [(true, GateVerdict::Held), (false, GateVerdict::Passed)] {
            let verdict = gate_decide(&frame, &OPEN, 0, |_| true, |_| false, || service);
            assert_eq!(verdict, expected);
        }
        // It is asked of nothing but an IPv4 packet from the VIP without a TCP part.
        for frame in [&arp(2, VIP, CLIENT)[..], &tcp_from_vip(ACK)] {
            let frame = classify(&frame, VIP);
            let ask = || panic!("asked of {frame:?}");
            gate_decide(&frame, &OPEN, 0, |_| true, |_| false, ask);
        }
    }

    #[test]
    fn a_copy_is_what_passes_to_the_standby_and_nothing_that_the_gate_stops() {
        let peer = MirrorPeer::at([2, 0, 0, 0, 0, 2]);
        let client = MirrorPeer::at([2, 0, 0, 0, 0, 50]);
        use GateVerdict::{Closed, Copy, Held, Other, Passed};
        assert_eq!(tell_copy(Passed, peer, || Some(peer)), Copy);
        assert_eq!(tell_copy(Passed, peer, || Some(client)), Passed);
        assert_eq!(tell_copy(Passed, peer, || None), Passed);
        let nobody = MirrorPeer::NOBODY;
        let asked = || panic!("asked without a standby");
        assert_eq!(tell_copy(Passed, nobody, asked), Passed);
        for verdict in [Other, Closed, Held] {
            assert_eq!(tell_copy(verdict, peer, || Some(peer)), verdict);
        }
    }

    #[test]
    fn a_syn_ack_has_both_flags() {
        for (flags, expected) in [
            (SYN | ACK, true),
            (SYN, false),
            (ACK, false),
            (FIN | ACK, false),
            (RST | ACK, false),
        ] {
            let segment = tcp_from_vip(flags);
            let frame = classify(&&segment[..], VIP);
            assert_eq!(
                is_syn_ack(frame.tcp().unwrap()),
                expected,
                "flags {flags:#x}"
            );
        }
    }
}
