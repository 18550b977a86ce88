//! Tap `mirror`: which frames of the VIP the active copies to the standby. Pure functions, as in
//! [`crate::verdict`].

use crate::ack_gate::after;
use crate::frame::{Classified, FrameClass, TcpPart, tcp_flags};
use crate::maps::{Direction, MirrorPeer, NodeState};

/// Urgent pointer of the copy of a SYN-ACK that the ACK gate holds until the standby knows the flow. Without
/// URG the field means nothing (RFC 9293 section 3.1), so no kernel has written it there.
pub const HELD_URGENT: u16 = 0x5246;
/// Where that is in a TCP header.
pub const URGENT_OFFSET: usize = 18;

/// What of the VIP's output is copied. Input is always copied whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum MirrorEgress {
    /// What carries SYN, FIN or RST, and what is not TCP: enough to know which connections there are, and
    /// which datagrams were answered.
    Handshake = 0,
    /// Everything: the standby also sees what was acknowledged, and can compare content.
    Full = 1,
}

impl MirrorEgress {
    /// Both, in the order of their numbers.
    pub const ALL: [MirrorEgress; 2] = [MirrorEgress::Handshake, MirrorEgress::Full];

    /// The word used in the config.
    pub const fn as_str(self) -> &'static str {
        match self {
            MirrorEgress::Handshake => "handshake",
            MirrorEgress::Full => "full",
        }
    }
}

/// What became of the copy of a frame of the VIP; index into `MIRROR_COUNTERS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum MirrorVerdict {
    /// Handed to the interface.
    Cloned = 0,
    /// Could not be made, or the interface refused it.
    Failed = 1,
    /// Not made: this node may not speak for the VIP, or no longer.
    Closed = 2,
    /// Not made: no standby is heard.
    NoStandby = 3,
    /// Not made: output that [`MirrorEgress`] leaves out.
    Spared = 4,
    /// Not made: the client acknowledges what the active has not sent.
    BeyondSent = 5,
}

impl MirrorVerdict {
    /// All, in the order of their numbers.
    pub const ALL: [MirrorVerdict; 6] = [
        MirrorVerdict::Cloned,
        MirrorVerdict::Failed,
        MirrorVerdict::Closed,
        MirrorVerdict::NoStandby,
        MirrorVerdict::Spared,
        MirrorVerdict::BeyondSent,
    ];

    /// Value of the metrics label `verdict`.
    pub const fn as_str(self) -> &'static str {
        match self {
            MirrorVerdict::Cloned => "cloned",
            MirrorVerdict::Failed => "failed",
            MirrorVerdict::Closed => "closed",
            MirrorVerdict::NoStandby => "no_standby",
            MirrorVerdict::Spared => "spared",
            MirrorVerdict::BeyondSent => "beyond_sent",
        }
    }
}

/// What the programs are to do about a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorAction {
    /// Nothing: not a frame of the VIP's that the tap carries.
    Ignore,
    /// Make none, and count it so.
    Skip(MirrorVerdict),
    /// Send one to the standby.
    Clone,
}

/// Decides about the copy of a frame: one that came in for the VIP, or one that the gate has passed.
///
/// ARP is not copied: each node asks and answers for itself. `now_ns` gives the time (CLOCK_MONOTONIC), which an active
/// without a standby is spared to read. `egress` says what of this flow's output is copied; it is asked of output that
/// would be spared. `sent_next` gives the number behind the last that the active sent on a flow, where that is known;
/// it is asked of input that would be copied.
#[inline(always)]
pub fn mirror_decide(
    frame: &Classified,
    node: &NodeState,
    now_ns: impl FnOnce() -> u64,
    peer: MirrorPeer,
    egress: impl FnOnce() -> MirrorEgress,
    sent_next: impl FnOnce(&TcpPart) -> Option<u32>,
) -> MirrorAction {
    if !matches!(frame.class, FrameClass::Vip) {
        return MirrorAction::Ignore;
    }
    if peer.is_nobody() {
        return MirrorAction::Skip(MirrorVerdict::NoStandby);
    }
    let may_copy = match frame.direction {
        Direction::ToVip => node.may_copy_input(now_ns()),
        Direction::FromVip => node.may_speak(now_ns()),
    };
    if !may_copy {
        return MirrorAction::Skip(MirrorVerdict::Closed);
    }
    if matches!(frame.direction, Direction::FromVip)
        && !is_handshake(frame)
        && matches!(egress(), MirrorEgress::Handshake)
    {
        return MirrorAction::Skip(MirrorVerdict::Spared);
    }
    if matches!(frame.direction, Direction::ToVip)
        && let Some(tcp) = frame.tcp()
        && tcp.flags & tcp_flags::ACK != 0
        && let Some(next) = sent_next(tcp)
        && after(tcp.ack, next)
    {
        // The kernel does not believe it either (RFC 5961 section 5.2), and knows better than the
        // standby: that need not see what the active sends.
        return MirrorAction::Skip(MirrorVerdict::BeyondSent);
    }
    MirrorAction::Clone
}

/// Whether [`MirrorEgress::Handshake`] has it.
#[inline(always)]
fn is_handshake(frame: &Classified) -> bool {
    const BOUNDS: u8 = tcp_flags::SYN | tcp_flags::FIN | tcp_flags::RST;
    match frame.tcp() {
        Some(tcp) => tcp.flags & BOUNDS != 0,
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::classify;
    use crate::frame::tcp_flags::{ACK, FIN, RST, SYN};
    use crate::frame::testing::{CLIENT, VIP, arp, tcp, tcp_from_vip, tcp_to_vip};
    use crate::maps::State;

    const OPEN: NodeState = NodeState {
        state: State::Active as u64,
        lease_ns: 1000,
    };
    const PEER: MirrorPeer = MirrorPeer::at([2, 0, 0, 0, 0, 2]);

    fn decide(frame: &[u8], egress: MirrorEgress) -> MirrorAction {
        let frame = classify(&frame, VIP);
        mirror_decide(&frame, &OPEN, || 1000, PEER, || egress, |_| None)
    }

    #[test]
    fn input_is_copied_whole_and_output_as_far_as_asked() {
        use MirrorEgress::{Full, Handshake};
        let spared = MirrorAction::Skip(MirrorVerdict::Spared);
        for flags in [ACK, SYN, SYN | ACK, FIN | ACK, RST, 0] {
            for egress in MirrorEgress::ALL {
                assert_eq!(decide(&tcp_to_vip(flags), egress), MirrorAction::Clone);
            }
            let frame = tcp_from_vip(flags);
            assert_eq!(decide(&frame, Full), MirrorAction::Clone);
            let bounds = flags & (SYN | FIN | RST) != 0;
            let expected = if bounds { MirrorAction::Clone } else { spared };
            assert_eq!(decide(&frame, Handshake), expected, "flags {flags:#x}");
        }
        // The standby must know which datagrams were answered. Later fragments have no flags either.
        let mut udp = tcp_from_vip(SYN);
        udp[23] = 17;
        assert_eq!(decide(&udp, Full), MirrorAction::Clone);
        assert_eq!(decide(&udp, Handshake), MirrorAction::Clone);
    }

    #[test]
    fn only_ipv4_of_the_vip_is_copied() {
        let between_others = tcp((CLIENT, 1), (CLIENT + 1, 2), SYN);
        assert_eq!(
            decide(&between_others, MirrorEgress::Full),
            MirrorAction::Ignore
        );
        for frame in [arp(1, CLIENT, VIP), arp(2, VIP, CLIENT)] {
            assert_eq!(decide(&frame, MirrorEgress::Full), MirrorAction::Ignore);
        }
        let short = &tcp_to_vip(ACK)[..40];
        assert_eq!(decide(short, MirrorEgress::Full), MirrorAction::Ignore);
    }

    #[test]
    fn nothing_is_copied_without_state_lease_and_standby() {
        let frame = tcp_to_vip(ACK);
        let frame = classify(&&frame[..], VIP);
        let ask = |node: &NodeState, now, peer| {
            mirror_decide(&frame, node, || now, peer, || MirrorEgress::Full, |_| None)
        };
        let closed = MirrorAction::Skip(MirrorVerdict::Closed);
        assert_eq!(ask(&OPEN, 1000, PEER), MirrorAction::Clone);
        assert_eq!(ask(&OPEN, 1001, PEER), closed);
        for state in [0, 2, 3, 5, 99] {
            assert_eq!(ask(&NodeState { state, ..OPEN }, 0, PEER), closed);
        }
        // The clock is not even looked at.
        let (no_clock, nobody) = (|| panic!("asked for the time"), MirrorPeer::NOBODY);
        let egress = || MirrorEgress::Full;
        let action = mirror_decide(&frame, &OPEN, no_clock, nobody, egress, |_| None);
        assert_eq!(action, MirrorAction::Skip(MirrorVerdict::NoStandby));
    }

    #[test]
    fn while_the_vip_is_handed_over_input_is_copied_until_the_lease_lapses_and_output_is_not() {
        let handing_over = NodeState {
            state: State::HandingOver as u64,
            ..OPEN
        };
        let ask = |frame: &[u8], now| {
            let frame = classify(&frame, VIP);
            let egress = || MirrorEgress::Full;
            mirror_decide(&frame, &handing_over, || now, PEER, egress, |_| None)
        };
        let closed = MirrorAction::Skip(MirrorVerdict::Closed);
        assert_eq!(ask(&tcp_to_vip(ACK), 1000), MirrorAction::Clone);
        assert_eq!(ask(&tcp_to_vip(ACK), 1001), closed);
        assert_eq!(ask(&tcp_from_vip(ACK), 1000), closed);
    }

    #[test]
    fn a_client_that_acknowledges_what_was_not_sent_is_not_copied() {
        let beyond = MirrorAction::Skip(MirrorVerdict::BeyondSent);
        // The frames of these tests acknowledge 2000.
        for (flags, next, expected) in [
            (ACK, Some(2000), MirrorAction::Clone),
            (ACK, Some(2001), MirrorAction::Clone),
            (ACK, Some(1999), beyond),
            (ACK | FIN, Some(1999), beyond),
            (ACK | RST, Some(1999), beyond),
            (ACK, Some(2001_u32.wrapping_add(1 << 31)), beyond),
            // Its acknowledgement field means nothing.
            (SYN, Some(1999), MirrorAction::Clone),
            (RST, Some(1999), MirrorAction::Clone),
            (ACK, None, MirrorAction::Clone),
        ] {
            let segment = tcp_to_vip(flags);
            let frame = classify(&&segment[..], VIP);
            let egress = || panic!("asked of input");
            let action = mirror_decide(&frame, &OPEN, || 0, PEER, egress, |_| next);
            assert_eq!(action, expected, "flags {flags:#x}, next {next:?}");
        }
        let segment = tcp_from_vip(ACK);
        let frame = classify(&&segment[..], VIP);
        let asked = |_: &TcpPart| panic!("asked of output");
        mirror_decide(&frame, &OPEN, || 0, PEER, || MirrorEgress::Full, asked);
    }
}
