//! What the programs should do, in user space: the functions of `rfsis-common` over a slice, put together
//! as the design has it, and the maps a struct.

use rfsis_agent::bpf::Program;
use rfsis_common::ack_gate::{
    AckGateVerdict, AckVerdict, Guarded, OpeningKind, Outgoing, RELEASE_MARK, Sent, ack_decide,
    is_opening, note_open, note_release, syn_ack_decide,
};
use rfsis_common::frame::{Classified, TcpPart, classify, refused_udp_port};
use rfsis_common::maps::{Direction, FrameHeader, HEARTBEAT_CAPTURE, HeldEvent, MirrorPeer};
use rfsis_common::mirror::{
    HELD_URGENT, MirrorAction, MirrorEgress, MirrorVerdict, URGENT_OFFSET, mirror_decide,
};
use rfsis_common::options::{TcpOptions, is_told, tcp_options};
use rfsis_common::verdict::{
    GateVerdict, XdpAction, XdpVerdict, gate_decide, is_syn_ack, tell_copy, xdp_decide,
};

use crate::frames::{FLOW, OBSERVED, OWN_MAC, SERVICE, STANDBY, VIP};
use crate::host::GUARD;
use crate::rig::{Effects, Known, NOW, Setup, World};

/// Between a lease that has lapsed and one that has not.
const TIME: u64 = 2;

/// What a run should do. `ifindex` is that of the interface on which the program finds the frame.
pub fn expected(
    setup: Setup,
    world: &World,
    program: Program,
    frame: &[u8],
    mark: u32,
    ifindex: u32,
) -> Effects {
    let known = world.guarded.filter(|_| setup.ack_gate);
    let mut run = Run {
        setup,
        world,
        class: classify(&frame, u32::from(VIP)),
        frame: frame.to_vec(),
        mark,
        ifindex,
        effects: Effects {
            // The agent asks for slots that are there.
            sent: known
                .filter(|known| known.guarded.slot < GUARD.slots)
                .map(|known| known.sent),
            ..Effects::default()
        },
    };
    let goes_on = match program {
        Program::Xdp => run.capture(),
        Program::Ingress => run.capture() && run.ingress(),
        Program::Mirror => run.ingress(),
        Program::Gate => run.gate(),
    };
    run.effects.output = goes_on.then_some(run.frame);
    run.effects
}

struct Run<'a> {
    setup: Setup,
    world: &'a World,
    class: Classified,
    frame: Vec<u8>,
    mark: u32,
    ifindex: u32,
    effects: Effects,
}

impl Run<'_> {
    fn capture(&mut self) -> bool {
        let node = self.world.node();
        let is_live = |tcp: &TcpPart| self.world.live && tcp.flow == FLOW;
        match xdp_decide(&self.class, node.state(), is_live) {
            XdpAction::Pass(verdict) => {
                self.effects.xdp.push(verdict);
                return true;
            }
            XdpAction::Mirror => {
                self.effects.xdp.push(XdpVerdict::Mirrored);
                let header = FrameHeader {
                    arrival_ns: 0,
                    len: self.frame.len() as u32,
                    ifindex: self.ifindex,
                    direction: self.class.direction as u16,
                    state: node.state() as u16,
                    l3_offset: self.class.l3_offset as u16,
                    flags: 0,
                };
                self.effects.frames.push((header, self.frame.clone()));
            }
            XdpAction::Heartbeat => {
                self.effects.xdp.push(XdpVerdict::Heartbeat);
                let len = self.frame.len().min(HEARTBEAT_CAPTURE);
                let event = (self.ifindex, self.frame[..len].to_vec());
                self.effects.heartbeats.push(event);
            }
        }
        false
    }

    fn ingress(&mut self) -> bool {
        if self.class.direction == Direction::FromVip || !self.frame.starts_with(&OWN_MAC) {
            return true;
        }
        if let Some(tcp) = self.class.tcp().copied()
            && self.setup.ack_gate
            && is_opening(&tcp)
            && is_service(tcp.flow.service_port)
            && !self.report(&tcp, OpeningKind::Syn)
        {
            self.effects.ack_gate.push(AckGateVerdict::OpeningLost);
        }
        self.offer();
        true
    }

    fn gate(&mut self) -> bool {
        let verdict = gate_decide(
            &self.class,
            &self.world.node(),
            TIME,
            is_service,
            |tcp| self.world.approved && tcp.flow == FLOW,
            || refused_udp_port(&&self.frame[..], self.class.l3_offset) == Some(SERVICE),
        );
        let destination = MirrorPeer::at(*self.frame.first_chunk().unwrap());
        let verdict = tell_copy(verdict, self.world.standby, || Some(destination));
        self.effects.gate.push(verdict);
        match verdict {
            GateVerdict::Other | GateVerdict::Copy => true,
            GateVerdict::Closed => false,
            GateVerdict::Passed => self.judge(),
            GateVerdict::Held => {
                if let Some(tcp) = self.class.tcp() {
                    self.effects.held.push(HeldEvent {
                        at_ns: 0,
                        flow: tcp.flow,
                        seq: tcp.seq,
                        ack: tcp.ack,
                        flags: u32::from(tcp.flags),
                        reserved: 0,
                    });
                }
                false
            }
        }
    }

    /// The ACK gate, and the copy of what it lets go or holds for the standby.
    fn judge(&mut self) -> bool {
        let tcp = self.class.tcp().copied();
        let Some(tcp) = tcp.filter(|_| self.setup.ack_gate) else {
            self.offer();
            return true;
        };
        let known = self.world.guarded.filter(|_| tcp.flow == FLOW);
        let verdict = match known {
            Some(known) => self.judge_known(&tcp, known),
            None if !is_service(tcp.flow.service_port) => {
                self.offer();
                return true;
            }
            None if self.mark == RELEASE_MARK => AckGateVerdict::Released,
            None if is_syn_ack(&tcp) => self.judge_syn_ack(&tcp, None),
            None => AckGateVerdict::Unguarded,
        };
        self.effects.ack_gate.push(verdict);
        match verdict {
            AckGateVerdict::Held | AckGateVerdict::OpeningLost => false,
            AckGateVerdict::Opening => {
                let urgent = tcp.offset + URGENT_OFFSET;
                if self.setup.mirror.is_some() {
                    self.write(&tcp, urgent, &HELD_URGENT.to_be_bytes());
                    self.offer();
                }
                false
            }
            AckGateVerdict::Released if is_syn_ack(&tcp) && self.world.guards => true,
            _ => {
                self.offer();
                true
            }
        }
    }

    fn judge_known(&mut self, tcp: &TcpPart, known: Known) -> AckGateVerdict {
        let Some(sent) = self.effects.sent else {
            return AckGateVerdict::Unguarded;
        };
        let shift = known.guarded.shift;
        if self.mark == RELEASE_MARK {
            let mut told = sent;
            let segment = Outgoing::new(tcp, &TcpOptions::default());
            note_release(&segment, &mut told, shift);
            self.effects.sent = Some(told);
            return AckGateVerdict::Released;
        }
        if is_syn_ack(tcp) {
            return self.judge_syn_ack(tcp, Some(known.guarded));
        }
        let options = tcp_options(&&self.frame[..], tcp);
        let segment = Outgoing::new(tcp, &options);
        let mut noted = Sent {
            at_ns: NOW,
            version: (sent.version | 1).wrapping_add(1),
            ..sent
        };
        let verdict = if !self.world.guards || known.confirmation.is_open() {
            note_open(&segment, &mut noted, shift);
            AckGateVerdict::Open
        } else {
            let decision = ack_decide(&segment, &mut noted, known.confirmation, shift);
            match decision.verdict {
                AckVerdict::Held => AckGateVerdict::Held,
                _ if !self.erase_sack(tcp, &options, decision.ack) => {
                    (noted.told, noted.told_edge) = (sent.told, sent.told_edge);
                    AckGateVerdict::Held
                }
                verdict => {
                    // RFC 9293 section 3.1.
                    self.write(tcp, tcp.offset + 8, &decision.ack.to_be_bytes());
                    self.write(tcp, tcp.offset + 14, &decision.window.to_be_bytes());
                    if verdict == AckVerdict::Lowered {
                        AckGateVerdict::Lowered
                    } else {
                        AckGateVerdict::Passed
                    }
                }
            }
        };
        self.effects.sent = Some(noted);
        verdict
    }

    fn judge_syn_ack(&mut self, tcp: &TcpPart, guarded: Option<Guarded>) -> AckGateVerdict {
        let verdict = syn_ack_decide(tcp.ack, guarded, self.world.guards);
        if guarded.is_some() && verdict != AckGateVerdict::Passed {
            self.effects.sent = None;
        }
        match verdict {
            AckGateVerdict::Opening if !self.report(tcp, OpeningKind::Held) => {
                AckGateVerdict::OpeningLost
            }
            AckGateVerdict::Open => {
                self.report(tcp, OpeningKind::Passed);
                verdict
            }
            verdict => verdict,
        }
    }

    /// Reports the headers; `false` where they are longer than the frame.
    fn report(&mut self, tcp: &TcpPart, kind: OpeningKind) -> bool {
        let headers = self.class.l3_offset..tcp.offset + tcp.header_len;
        let Some(packet) = self.frame.get(headers) else {
            return false;
        };
        let opening = (kind, tcp.flow, packet.to_vec());
        self.effects.openings.push(opening);
        true
    }

    /// The copy for the standby.
    fn offer(&mut self) {
        let Some(egress) = self.setup.mirror else {
            return;
        };
        let sent_next = |tcp: &TcpPart| {
            let is_known = self.setup.ack_gate && tcp.flow == FLOW;
            self.effects.sent.filter(|_| is_known).map(|sent| sent.next)
        };
        let egress = || match self.class.tcp() {
            Some(tcp) if tcp.flow.service_port == OBSERVED => MirrorEgress::Full,
            Some(tcp) if self.setup.ack_gate && sent_next(tcp).is_none() => MirrorEgress::Full,
            _ => egress,
        };
        let (node, peer) = (self.world.node(), self.world.standby);
        match mirror_decide(&self.class, &node, || TIME, peer, egress, sent_next) {
            MirrorAction::Ignore => {}
            MirrorAction::Skip(verdict) => self.effects.mirror.push(verdict),
            MirrorAction::Clone => {
                self.effects.mirror.push(MirrorVerdict::Cloned);
                let copy = [&STANDBY[..], &OWN_MAC, &self.frame[12..]].concat();
                self.effects.copies.push(copy);
            }
        }
    }

    /// Overwrites a SACK option by NOPs, its blocks in words, but for a first one of what is acknowledged; `false` where
    /// they end behind the frame.
    fn erase_sack(&mut self, tcp: &TcpPart, options: &TcpOptions, ack: u32) -> bool {
        if options.sack_offset == 0 {
            return true;
        }
        let words = (options.sack_len - 2).div_ceil(4).min(9);
        let end = options.sack_offset + 2 + 4 * words;
        if end > self.frame.len() {
            return false;
        }
        let first_right = || {
            let bytes = self.frame.get(options.sack_offset + 6..)?.first_chunk()?;
            Some(u32::from_be_bytes(*bytes))
        };
        let keeps =
            options.sack_len >= 10 && first_right().is_some_and(|right| is_told(ack, right));
        if keeps {
            let kind = self.frame[options.sack_offset];
            self.write(tcp, options.sack_offset, &[kind, 10]);
        }
        let kept = if keeps { 10 } else { 0 };
        for at in (options.sack_offset + kept..end).step_by(2) {
            self.write(tcp, at, &[1, 1]);
        }
        true
    }

    /// Overwrites an even number of bytes at an even offset into the segment, and adjusts the checksum
    /// (RFC 1624 section 3).
    fn write(&mut self, tcp: &TcpPart, at: usize, bytes: &[u8]) {
        let checksum = tcp.offset + 16;
        let word = |frame: &[u8], at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        let mut sum = u32::from(!word(&self.frame, checksum));
        for (offset, pair) in (at..).step_by(2).zip(bytes.chunks(2)) {
            sum += u32::from(!word(&self.frame, offset)) + u32::from(word(pair, 0));
        }
        self.frame[at..at + bytes.len()].copy_from_slice(bytes);
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        self.frame[checksum..checksum + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
}

fn is_service(port: u16) -> bool {
    port == SERVICE || port == OBSERVED
}
