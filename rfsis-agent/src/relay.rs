//! What still comes to a node that hands the VIP over: a client that has not heard yet of the new owner
//! would repeat what it lost after 200 ms, a SYN after a second.
//!
//! Sans-IO. From the moment at which the gate is closed such frames are kept, and sent on when the peer has
//! taken over; later ones at once, until the neighbours have surely been told. Not before: a standby has use
//! for a copy, and none for a SYN, which only the kernel of an active answers.

use std::collections::VecDeque;

use rfsis_common::maps::{Direction, FrameHeader, State};
use smoltcp::wire::{Ipv4Packet, TcpPacket};

use crate::heartbeat::{MacAddr, Nanos};
use crate::metrics::FrameResult;
use crate::segment;

/// Bytes of frames that are kept at the most; what is beyond is lost as on a full queue.
const KEPT_BYTES: usize = 8 << 20;

/// The first announcement may be lost, and so may the second, 50 ms later: see `announce`.
const PATIENCE: Nanos = 2_000_000_000;

const ETHERNET: usize = 14;
const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];

/// The interface that carries the VIP.
#[derive(Clone, Copy, Debug)]
pub struct RelayConfig {
    /// Its hardware address: what is sent to it was meant for this node.
    pub mac: MacAddr,
    /// Its index.
    pub ifindex: u32,
    /// Its MTU, bytes.
    pub mtu: usize,
    /// The peer sees frames that come here without being sent them (`tap: lan`): it lacks SYNs only.
    pub overheard: bool,
}

/// Who answers for the VIP.
#[derive(Clone, Copy, Debug)]
enum Owner {
    /// This node, or the peer for long.
    Settled,
    /// Nobody: it was offered to the peer.
    Nobody,
    /// The peer, at this hardware address.
    Peer { to: MacAddr, until: Nanos },
}

/// Frames that are the peer's to answer.
#[derive(Debug)]
pub struct Relay {
    config: RelayConfig,
    kept: VecDeque<Vec<u8>>,
    bytes: usize,
    owner: Owner,
}

impl Relay {
    /// Nothing is handed over.
    pub fn new(config: RelayConfig) -> Self {
        Self {
            config,
            kept: VecDeque::new(),
            bytes: 0,
            owner: Owner::Settled,
        }
    }

    /// Takes a frame of the ring, if it is one of those; `None` where it is not. `tap` is the hardware
    /// address of the peer's tap.
    pub fn process(
        &mut self,
        header: &FrameHeader,
        frame: &[u8],
        tap: Option<MacAddr>,
        send: impl FnMut(&[u8]),
    ) -> Option<FrameResult> {
        let handing_over = header.state == State::HandingOver as u16;
        let standby = header.state == State::Standby as u16;
        let owner = match self.owner {
            Owner::Peer { to, until } => (header.arrival_ns < until).then_some(to),
            Owner::Settled | Owner::Nobody => None,
        };
        // The kernel is told of the peer's takeover before this thread is.
        let late = standby && (owner.is_some() || matches!(self.owner, Owner::Nobody));
        if !handing_over && !late {
            return None;
        }
        // What the peer itself sends here are copies.
        let from_peer = |mac| frame.get(6..12) == Some(&mac as &[u8]);
        let meant_for_us = header.ifindex == self.config.ifindex
            && header.direction == Direction::ToVip as u16
            && frame.get(..6) == Some(&self.config.mac)
            && !tap.is_some_and(from_peer)
            && !owner.is_some_and(from_peer);
        let l3 = header.l3_offset as usize;
        let packet = match (frame.get(l3.wrapping_sub(2)..l3), frame.get(l3..)) {
            (Some(ethertype), Some(packet)) if meant_for_us && ethertype == ETHERTYPE_IPV4 => {
                packet
            }
            // On a handover nothing else has a use for it.
            _ => return handing_over.then_some(FrameResult::Foreign),
        };
        let result = self.take(packet, owner.is_some(), send);
        // A standby overhears it as well, whether it is sent on or not.
        (handing_over || !self.config.overheard).then_some(result)
    }

    fn take(&mut self, packet: &[u8], is_open: bool, send: impl FnMut(&[u8])) -> FrameResult {
        let parsed = segment::parse(packet, Direction::ToVip);
        let syn = parsed.is_ok_and(|(_, segment)| segment.syn);
        let pieces = match parsed {
            _ if self.config.overheard && !syn => return FrameResult::Foreign,
            Ok(_) => in_pieces(packet, self.config.mtu),
            Err(segment::SegmentError::NotTcp) if packet.len() <= self.config.mtu => {
                vec![packet.to_vec()]
            }
            Err(error) => return error.into(),
        };
        for piece in pieces {
            self.keep(piece);
        }
        if is_open {
            self.flush(send);
        }
        FrameResult::Relayed
    }

    /// Keeps an IPv4 packet for the VIP until the peer has taken over.
    fn keep(&mut self, packet: Vec<u8>) {
        if self.bytes + packet.len() <= KEPT_BYTES {
            self.bytes += packet.len();
            self.kept.push_back(packet);
        }
    }

    /// The VIP is offered to the peer, and nobody answers for it.
    pub fn begin(&mut self) {
        self.owner = Owner::Nobody;
    }

    /// The peer, at hardware address `to`, has taken over at `now`.
    pub fn open(&mut self, to: MacAddr, now: Nanos, send: impl FnMut(&[u8])) {
        let until = now.saturating_add(PATIENCE);
        self.owner = Owner::Peer { to, until };
        self.flush(send);
    }

    /// Whether somebody waits for what comes at `now`.
    pub fn is_open(&self, now: Nanos) -> bool {
        match self.owner {
            Owner::Settled => false,
            Owner::Nobody => true,
            Owner::Peer { until, .. } => now < until,
        }
    }

    /// The peer has not taken over, or this node is active again.
    pub fn close(&mut self) {
        self.owner = Owner::Settled;
        self.kept.clear();
        self.bytes = 0;
    }

    fn flush(&mut self, mut send: impl FnMut(&[u8])) {
        let Owner::Peer { to, .. } = self.owner else {
            return;
        };
        let mut frame = Vec::with_capacity(ETHERNET + self.config.mtu);
        for packet in self.kept.drain(..) {
            frame.clear();
            frame.extend_from_slice(&to);
            frame.extend_from_slice(&self.config.mac);
            frame.extend_from_slice(&ETHERTYPE_IPV4);
            frame.extend_from_slice(&packet);
            send(&frame);
        }
        self.bytes = 0;
    }
}

/// A TCP packet with complete checksums, in pieces that fit the MTU: the kernel hands up what several
/// frames brought, or what a sender on the same machine has not cut yet, as one.
fn in_pieces(packet: &[u8], mtu: usize) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    let Ok(ip) = Ipv4Packet::new_checked(packet) else {
        return pieces;
    };
    let Ok(tcp) = TcpPacket::new_checked(ip.payload()) else {
        return pieces;
    };
    let head = usize::from(ip.header_len()) + usize::from(tcp.header_len());
    let total = usize::from(ip.total_len());
    let room = mtu.saturating_sub(head).max(1);
    let mut start = head;
    loop {
        let end = total.min(start + room);
        let mut piece = packet[..head].to_vec();
        piece.extend_from_slice(&packet[start..end]);
        let mut ip = Ipv4Packet::new_unchecked(&mut piece[..]);
        ip.set_total_len((head + end - start) as u16);
        ip.fill_checksum();
        let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
        let mut tcp = TcpPacket::new_unchecked(ip.payload_mut());
        tcp.set_seq_number(tcp.seq_number() + (start - head));
        if end < total {
            tcp.set_fin(false);
            tcp.set_psh(false);
        }
        tcp.fill_checksum(&from, &to);
        pieces.push(piece);
        if end == total {
            return pieces;
        }
        start = end;
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use smoltcp::phy::ChecksumCapabilities;
    use smoltcp::wire::{TcpControl, TcpRepr, TcpSeqNumber};

    use super::*;
    use crate::wire::{bare_repr, emit_packet};

    const OWN: MacAddr = [2, 0, 0, 0, 0, 1];
    const PEER: MacAddr = [2, 0, 0, 0, 0, 2];
    const TAP: MacAddr = [2, 0, 0, 0, 1, 2];
    const CLIENT: MacAddr = [2, 0, 0, 0, 0, 50];
    const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);
    const LAN: u32 = 3;

    fn relay(overheard: bool) -> Relay {
        Relay::new(RelayConfig {
            mac: OWN,
            ifindex: LAN,
            mtu: 1500,
            overheard,
        })
    }

    fn segment(control: TcpControl, seq: i32, payload: &[u8]) -> Vec<u8> {
        let repr = TcpRepr {
            seq_number: TcpSeqNumber(seq),
            ack_number: (control != TcpControl::Syn).then_some(TcpSeqNumber(9)),
            payload,
            ..bare_repr(4000, 7, control)
        };
        let mut packet = Vec::new();
        let caps = ChecksumCapabilities::default();
        emit_packet(&mut packet, Ipv4Addr::new(10, 0, 0, 9), VIP, &repr, &caps);
        packet
    }

    fn frame(to: MacAddr, from: MacAddr, packet: &[u8]) -> Vec<u8> {
        [&to[..], &from, &ETHERTYPE_IPV4, packet].concat()
    }

    fn header(frame: &[u8], state: State, arrival_ns: Nanos) -> FrameHeader {
        FrameHeader {
            arrival_ns,
            len: frame.len() as u32,
            ifindex: LAN,
            direction: Direction::ToVip as u16,
            state: state as u16,
            l3_offset: 14,
            flags: 0,
        }
    }

    /// What becomes of a frame, and what is sent.
    fn process(
        relay: &mut Relay,
        frame: &[u8],
        header: FrameHeader,
    ) -> (Option<FrameResult>, Vec<Vec<u8>>) {
        let mut sent = Vec::new();
        let result = relay.process(&header, frame, Some(TAP), |frame| sent.push(frame.to_vec()));
        (result, sent)
    }

    #[test]
    fn what_comes_while_nobody_speaks_waits_for_the_new_owner_and_what_comes_later_does_not() {
        let mut relay = relay(false);
        let packets = [1, 2, 3].map(|seq| segment(TcpControl::Psh, seq, b"data"));
        for packet in &packets[..2] {
            let frame = frame(OWN, CLIENT, packet);
            let header = header(&frame, State::HandingOver, 5);
            let kept = process(&mut relay, &frame, header);
            assert_eq!(kept, (Some(FrameResult::Relayed), vec![]));
        }
        // The kernel knows already, this thread does not.
        relay.begin();
        let early = frame(OWN, CLIENT, &packets[2]);
        let kept = process(&mut relay, &early, header(&early, State::Standby, 9));
        assert_eq!(kept, (Some(FrameResult::Relayed), vec![]));
        let mut sent = Vec::new();
        relay.open(PEER, 10, |frame| sent.push(frame.to_vec()));
        let expected = [0, 1, 2].map(|i| frame(PEER, OWN, &packets[i]));
        assert_eq!(sent, expected);
        let late = frame(OWN, CLIENT, &packets[2]);
        let expected = vec![frame(PEER, OWN, &packets[2])];
        let until = 10 + PATIENCE;
        let last = process(&mut relay, &late, header(&late, State::Standby, until - 1));
        assert_eq!(last, (Some(FrameResult::Relayed), expected));
        let over = process(&mut relay, &late, header(&late, State::Standby, until));
        assert_eq!(over, (None, vec![]), "neighbours have been told");
    }

    #[test]
    fn copies_of_the_peer_and_frames_for_others_are_not_sent_back() {
        let mut relay = relay(false);
        relay.open(PEER, 0, |_| panic!("nothing was kept"));
        let packet = segment(TcpControl::Psh, 1, b"data");
        for (to, from) in [(OWN, PEER), (OWN, TAP), (PEER, CLIENT), ([0xff; 6], CLIENT)] {
            let frame = frame(to, from, &packet);
            let header = header(&frame, State::Standby, 1);
            assert_eq!(process(&mut relay, &frame, header), (None, vec![]));
        }
        let ours = frame(OWN, CLIENT, &packet);
        let elsewhere = FrameHeader {
            ifindex: LAN + 1,
            ..header(&ours, State::Standby, 1)
        };
        assert_eq!(process(&mut relay, &ours, elsewhere), (None, vec![]));
        let active = header(&ours, State::Active, 1);
        assert_eq!(process(&mut relay, &ours, active), (None, vec![]));
    }

    #[test]
    fn on_a_handover_frames_that_are_not_ours_are_nobodys() {
        let mut relay = relay(false);
        let packet = segment(TcpControl::Psh, 1, b"data");
        let mut arp = frame(OWN, CLIENT, &packet);
        arp[12..14].copy_from_slice(&[0x08, 0x06]);
        let outgoing = |header| FrameHeader {
            direction: Direction::FromVip as u16,
            ..header
        };
        for frame in [frame(PEER, CLIENT, &packet), frame(OWN, TAP, &packet), arp] {
            let header = header(&frame, State::HandingOver, 1);
            let nobodys = (Some(FrameResult::Foreign), vec![]);
            assert_eq!(process(&mut relay, &frame, header), nobodys);
        }
        let ours = frame(OWN, CLIENT, &packet);
        let header = outgoing(header(&ours, State::HandingOver, 1));
        let result = process(&mut relay, &ours, header).0;
        assert_eq!(result, Some(FrameResult::Foreign), "from the VIP");
        relay.open(PEER, 2, |_| panic!("sent"));
    }

    #[test]
    fn a_datagram_is_sent_on_as_it_is_and_one_beyond_the_mtu_is_not() {
        for (len, count) in [(1500, 1), (1501, 0)] {
            let mut relay = relay(false);
            let mut packet = vec![0; len];
            let mut ip = Ipv4Packet::new_unchecked(&mut packet[..]);
            ip.set_version(4);
            ip.set_header_len(20);
            ip.set_total_len(len as u16);
            ip.set_next_header(smoltcp::wire::IpProtocol::Udp);
            ip.set_src_addr(Ipv4Addr::new(10, 0, 0, 9));
            ip.set_dst_addr(VIP);
            ip.fill_checksum();
            let frame = frame(OWN, CLIENT, &packet);
            process(&mut relay, &frame, header(&frame, State::HandingOver, 1));
            let mut sent = Vec::new();
            relay.open(PEER, 2, |frame| sent.push(frame[14..].to_vec()));
            assert_eq!(sent, vec![packet; count], "{len} bytes");
        }
    }

    #[test]
    fn it_is_open_from_the_offer_until_the_neighbours_have_been_told() {
        let mut relay = relay(false);
        assert!(!relay.is_open(0));
        relay.begin();
        assert!(relay.is_open(Nanos::MAX));
        relay.open(PEER, 10, |_| {});
        assert!(relay.is_open(10 + PATIENCE - 1) && !relay.is_open(10 + PATIENCE));
        relay.begin();
        relay.close();
        assert!(!relay.is_open(0));
    }

    #[test]
    fn a_packet_whose_checksum_is_wrong_is_not_mended_by_sending_it_on() {
        let mut relay = relay(false);
        let mut packet = segment(TcpControl::Psh, 1, b"data");
        *packet.last_mut().unwrap() ^= 1;
        let frame = frame(OWN, CLIENT, &packet);
        let header = header(&frame, State::HandingOver, 1);
        let result = process(&mut relay, &frame, header).0;
        assert_eq!(result, Some(FrameResult::BadChecksum));
        relay.open(PEER, 2, |_| panic!("sent"));
    }

    #[test]
    fn a_super_frame_is_cut_to_the_mtu_and_says_the_same() {
        let mut relay = relay(false);
        let data: Vec<u8> = (0..10_000_u32).map(|i| i as u8).collect();
        let frame = frame(OWN, CLIENT, &segment(TcpControl::Fin, -5000, &data));
        process(&mut relay, &frame, header(&frame, State::HandingOver, 1));
        let (mut heard, mut next, mut fins) = (Vec::new(), -5000_i32, Vec::new());
        relay.open(PEER, 2, |frame| {
            assert!(frame.len() <= 1514);
            let (_, segment) = segment::parse(&frame[14..], Direction::ToVip).unwrap();
            assert_eq!(segment.seq, next as u32);
            next += segment.payload.len() as i32;
            heard.extend_from_slice(segment.payload);
            fins.push(segment.fin);
        });
        assert_eq!(heard, data);
        assert_eq!(fins.iter().filter(|fin| **fin).count(), 1);
        assert_eq!(fins.last(), Some(&true));
    }

    #[test]
    fn a_peer_that_overhears_the_lan_is_sent_syns_only_and_the_standby_hears_all() {
        let mut relay = relay(true);
        for (control, expected) in [(TcpControl::Syn, 1), (TcpControl::Psh, 0)] {
            let frame = frame(OWN, CLIENT, &segment(control, 1, b""));
            process(&mut relay, &frame, header(&frame, State::HandingOver, 1));
            let mut sent = 0;
            relay.open(PEER, 2, |_| sent += 1);
            assert_eq!(sent, expected, "{control:?}");
            let (result, sent) = process(&mut relay, &frame, header(&frame, State::Standby, 3));
            assert_eq!((result, sent.len()), (None, expected));
        }
    }

    #[test]
    fn no_more_is_kept_than_is_allowed_and_nothing_when_the_vip_stays() {
        let mut relay = relay(false);
        let packet = segment(TcpControl::Psh, 1, &[0; 1400]);
        for _ in 0..2 * KEPT_BYTES / packet.len() {
            relay.keep(packet.clone());
        }
        let mut sent = 0;
        relay.open(PEER, 1, |frame| sent += frame.len() - 14);
        assert!((KEPT_BYTES - packet.len()..=KEPT_BYTES).contains(&sent));
        relay.keep(packet);
        relay.close();
        relay.open(PEER, 2, |_| panic!("sent"));
    }
}
