//! What is done with a frame: pure functions that the eBPF programs and the simulation both call.

use crate::frame::{FrameClass, TcpPart, VipPacket, tcp_flags};
use crate::maps::{NodeState, State};

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
            _ => State::Standby,
        }
    }

    /// Whether output of the VIP may leave at `now` (ns, CLOCK_MONOTONIC).
    #[inline(always)]
    pub const fn may_speak(&self, now_ns: u64) -> bool {
        matches!(self.state(), State::Active) && now_ns <= self.lease_ns
    }
}

/// Decides for an ingress frame. `is_live` says whether a flow is in `LIVE_FLOWS`; it is asked only
/// on the active and only for TCP.
#[inline(always)]
pub fn xdp_decide(
    class: &FrameClass,
    state: State,
    is_live: impl FnOnce(&TcpPart) -> bool,
) -> XdpAction {
    match class {
        FrameClass::Heartbeat => XdpAction::Heartbeat,
        FrameClass::Tagged => XdpAction::Pass(XdpVerdict::Tagged),
        FrameClass::Malformed => XdpAction::Pass(XdpVerdict::Malformed),
        // Somebody else's claim to the VIP must reach the kernel's neighbour table like any ARP.
        FrameClass::Other | FrameClass::ArpFromVip => XdpAction::Pass(XdpVerdict::Other),
        FrameClass::ArpRequestForVip => match state {
            State::Active => XdpAction::Pass(XdpVerdict::PassVip),
            _ => XdpAction::Mirror,
        },
        FrameClass::Vip(VipPacket { tcp, .. }) => match (state, tcp) {
            (State::Active, Some(tcp)) if is_live(tcp) => XdpAction::Mirror,
            (State::Active, _) => XdpAction::Pass(XdpVerdict::PassVip),
            _ => XdpAction::Mirror,
        },
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
    /// FIN or RST that nobody approved: dropped and reported.
    Held = 3,
}

impl GateVerdict {
    /// All, in the order of their numbers.
    pub const ALL: [GateVerdict; 4] = [
        GateVerdict::Other,
        GateVerdict::Passed,
        GateVerdict::Closed,
        GateVerdict::Held,
    ];

    /// Value of the metrics label `verdict`.
    pub const fn as_str(self) -> &'static str {
        match self {
            GateVerdict::Other => "other",
            GateVerdict::Passed => "passed",
            GateVerdict::Closed => "closed",
            GateVerdict::Held => "held",
        }
    }
}

/// Decides for an egress frame: silence first, then the hold.
///
/// `is_service` says whether a TCP port is a service's; `is_approved` whether the flow's FIN or RST
/// may leave. Both are asked only when they matter.
#[inline(always)]
pub fn gate_decide(
    class: &FrameClass,
    node: &NodeState,
    now_ns: u64,
    is_service: impl FnOnce(u16) -> bool,
    is_approved: impl FnOnce(&TcpPart) -> bool,
) -> GateVerdict {
    let tcp = match class {
        FrameClass::ArpFromVip => None,
        FrameClass::Vip(VipPacket {
            direction: crate::maps::Direction::FromVip,
            tcp,
            ..
        }) => tcp.as_ref(),
        // Fails closed: what cannot be read may be the VIP's.
        FrameClass::Malformed => None,
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
        _ => GateVerdict::Passed,
    }
}

/// Whether a segment that leaves from the VIP ends the approval of its flow: a SYN-ACK begins a new
/// connection, which must not inherit what an older one with the same addresses and ports was granted.
#[inline(always)]
pub const fn revokes_approval(tcp: &TcpPart) -> bool {
    const SYN_ACK: u8 = tcp_flags::SYN | tcp_flags::ACK;
    tcp.flags & SYN_ACK == SYN_ACK
}
