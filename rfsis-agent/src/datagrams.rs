//! UDP across a takeover: what the old active has not answered, the new one does.
//!
//! Sans-IO. While standby, [`Datagrams`] keeps each datagram for a service of the VIP until the copy of
//! its answer is seen, at the most for a window of time. At takeover the handlers answer what is left.
//!
//! UDP has no numbers to tell which datagram an answer is for. Every service here answers each datagram
//! once, in order, so an answer is taken for that to the oldest of its sender. Where the copy of an
//! answer is lost, a datagram is answered twice: at least once, not exactly once. A datagram in fragments
//! is not kept.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::Ipv4Addr;

use rfsis_common::maps::{Direction, FlowKey};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    IPV4_HEADER_LEN, IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr, UDP_HEADER_LEN, UdpPacket,
    UdpRepr,
};

use crate::handler::HandlerKind;
use crate::heartbeat::Nanos;
use crate::metrics::{Counters, FrameResult, ReplayResult};
use crate::segment::{SegmentError, flow_key, parse_ipv4};
use crate::services::LoopSources;

/// Datagrams kept at the most, and bytes of data in them: some times what the active's sockets can hold
/// unanswered. By default (`net.core.rmem_default`) that is 208 KiB a service with the kernel's
/// bookkeeping, or 270 small datagrams. All are answered at once, and at most 2 ms of a takeover are theirs.
const MAX_DATAGRAMS: usize = 1024;
const MAX_BYTES: usize = 1 << 20;

/// Surroundings of the datagrams.
#[derive(Clone, Debug)]
pub struct DatagramsConfig {
    /// The virtual IP.
    pub vip: Ipv4Addr,
    /// UDP services by port.
    pub services: HashMap<u16, HandlerKind>,
    /// How long a datagram waits for its answer, ns; 0: none is kept.
    pub window: Nanos,
}

/// A datagram whose answer was not seen.
#[derive(Debug)]
struct Unanswered {
    flow: FlowKey,
    arrival: Nanos,
    data: Vec<u8>,
}

/// The datagrams to the VIP that nobody has answered yet.
#[derive(Debug)]
pub struct Datagrams {
    vip: Ipv4Addr,
    /// Services that answer.
    answering: HashMap<u16, HandlerKind>,
    /// Ports of all services.
    known: BTreeSet<u16>,
    loops: LoopSources,
    window: Nanos,
    /// By number, which grows with each arrival.
    kept: BTreeMap<u64, Unanswered>,
    /// The numbers again, by sender.
    by_flow: BTreeSet<(FlowKey, u64)>,
    next_number: u64,
    bytes: usize,
    counters: Counters<ReplayResult>,
}

impl Datagrams {
    /// None yet.
    pub fn new(config: DatagramsConfig, counters: Counters<ReplayResult>) -> Self {
        let known: BTreeSet<u16> = config.services.keys().copied().collect();
        Self {
            vip: config.vip,
            loops: LoopSources::new(config.vip, known.iter().copied().collect()),
            known,
            // Whether a handler answers does not depend on what it is sent.
            answering: config
                .services
                .into_iter()
                .filter(|(_, handler)| handler.datagram(&[]).is_some())
                .collect(),
            window: config.window,
            kept: BTreeMap::new(),
            by_flow: BTreeSet::new(),
            next_number: 0,
            bytes: 0,
            counters,
        }
    }

    /// Takes a mirrored IPv4 packet with UDP in it. `arrival` is in ns.
    pub fn process_frame(
        &mut self,
        packet: &[u8],
        direction: Direction,
        arrival: Nanos,
    ) -> FrameResult {
        if self.window == 0 {
            return FrameResult::NotTcp;
        }
        let (flow, data) = match parse(packet, direction) {
            Ok(parsed) => parsed,
            Err(error) => return error.into(),
        };
        if !self.known.contains(&flow.service_port) {
            return FrameResult::Outside;
        }
        self.expire(arrival);
        match direction {
            Direction::ToVip => self.keep(flow, data, arrival),
            Direction::FromVip => self.forget_oldest_of(flow),
        }
        FrameResult::Datagram
    }

    /// Answers what is left and no older than the window, in the order of arrival. `send` takes whole
    /// IPv4 packets from the VIP.
    pub fn go_live(&mut self, now: Nanos, mut send: impl FnMut(&[u8])) {
        self.expire(now);
        for datagram in self.kept.values() {
            if let Some(packet) = self.answer(datagram) {
                send(&packet);
                self.counters.inc(ReplayResult::Answered);
            }
        }
        self.forget_all();
    }

    /// The peer is active: what came in before is its own to answer.
    pub fn go_standby(&mut self) {
        self.forget_all();
    }

    fn keep(&mut self, flow: FlowKey, data: &[u8], arrival: Nanos) {
        if !self.answering.contains_key(&flow.service_port) || !self.may_answer(flow) {
            return;
        }
        self.by_flow.insert((flow, self.next_number));
        self.bytes += data.len();
        let datagram = Unanswered {
            flow,
            arrival,
            data: data.to_vec(),
        };
        self.kept.insert(self.next_number, datagram);
        self.next_number += 1;
        // The newest has the best chance that somebody still waits for its answer.
        while self.kept.len() > MAX_DATAGRAMS || self.bytes > MAX_BYTES {
            self.forget_first(ReplayResult::Dropped);
        }
    }

    /// Whether an answer may go there: to one host and a port, and not to where it would be answered.
    fn may_answer(&self, flow: FlowKey) -> bool {
        let client = Ipv4Addr::from(flow.client_addr);
        // What is no unicast address is no source either (RFC 1122 section 3.2.1.3).
        let unicast = (1..224).contains(&client.octets()[0]) && !client.is_loopback();
        unicast && flow.client_port != 0 && !self.loops.contains((client, flow.client_port).into())
    }

    fn answer(&self, datagram: &Unanswered) -> Option<Vec<u8>> {
        let FlowKey {
            client_addr,
            client_port,
            service_port,
        } = datagram.flow;
        let data = self
            .answering
            .get(&service_port)?
            .datagram(&datagram.data)?;
        let udp = UdpRepr {
            src_port: service_port,
            dst_port: client_port,
        };
        Some(emit(self.vip, client_addr.into(), udp, &data))
    }

    fn forget_oldest_of(&mut self, flow: FlowKey) {
        let of_flow = (flow, 0)..=(flow, u64::MAX);
        if let Some(&(_, number)) = self.by_flow.range(of_flow).next() {
            self.forget(number);
        }
    }

    /// Drops what has waited for longer than the window.
    fn expire(&mut self, now: Nanos) {
        while let Some((_, oldest)) = self.kept.first_key_value()
            && now.saturating_sub(oldest.arrival) > self.window
        {
            self.forget_first(ReplayResult::Expired);
        }
    }

    fn forget_first(&mut self, result: ReplayResult) {
        if let Some((&number, _)) = self.kept.first_key_value() {
            self.forget(number);
            self.counters.inc(result);
        }
    }

    fn forget(&mut self, number: u64) {
        if let Some(datagram) = self.kept.remove(&number) {
            self.by_flow.remove(&(datagram.flow, number));
            self.bytes -= datagram.data.len();
        }
    }

    fn forget_all(&mut self) {
        self.kept.clear();
        self.by_flow.clear();
        self.bytes = 0;
    }
}

/// Whether an IPv4 packet has UDP in it. For packets of any length.
pub fn is_udp(packet: &[u8]) -> bool {
    packet.get(9) == Some(&u8::from(IpProtocol::Udp))
}

/// Parses a datagram to or from the VIP (RFC 768). Checksums are right as in [`crate::segment::parse`], or
/// absent.
fn parse(packet: &[u8], direction: Direction) -> Result<(FlowKey, &[u8]), SegmentError> {
    let ip = parse_ipv4(packet, IpProtocol::Udp)?;
    let udp = UdpPacket::new_checked(ip.payload()).map_err(|_| SegmentError::Malformed)?;
    let (source, destination) = (ip.src_addr(), ip.dst_addr());
    let (from, to) = (source.into(), destination.into());
    if !udp.verify_partial_checksum(&from, &to) && !udp.verify_checksum(&from, &to) {
        return Err(SegmentError::BadChecksum);
    }
    let flow = match direction {
        Direction::ToVip => flow_key(source, udp.src_port(), udp.dst_port()),
        Direction::FromVip => flow_key(destination, udp.dst_port(), udp.src_port()),
    };
    Ok((flow, udp.payload()))
}

/// A whole IPv4 packet with checksums. `data` is no longer than what fits a datagram: an answer is as long
/// as what came in a packet, or shorter than the smallest MTU.
fn emit(from: Ipv4Addr, to: Ipv4Addr, udp: UdpRepr, data: &[u8]) -> Vec<u8> {
    let checksums = ChecksumCapabilities::default();
    let ip = Ipv4Repr {
        src_addr: from,
        dst_addr: to,
        next_header: IpProtocol::Udp,
        payload_len: UDP_HEADER_LEN + data.len(),
        hop_limit: 64,
    };
    let mut packet = vec![0; IPV4_HEADER_LEN + ip.payload_len];
    ip.emit(&mut Ipv4Packet::new_unchecked(&mut packet[..]), &checksums);
    udp.emit(
        &mut UdpPacket::new_unchecked(&mut packet[IPV4_HEADER_LEN..]),
        &IpAddress::Ipv4(from),
        &IpAddress::Ipv4(to),
        data.len(),
        |room| room.copy_from_slice(data),
        &checksums,
    );
    packet
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;
    use proptest::prelude::*;

    const VIP: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 100);
    const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 50);
    const PORT: u16 = 40_000;
    const ECHO: u16 = 7;
    const DISCARD: u16 = 9;
    const CHARGEN: u16 = 19;
    const WINDOW: Nanos = 1000;

    struct Standby {
        datagrams: Datagrams,
        metrics: Metrics,
    }

    impl Standby {
        fn new(window: Nanos) -> Self {
            let metrics = Metrics::new("test").unwrap();
            let services = [
                (ECHO, HandlerKind::Echo),
                (DISCARD, HandlerKind::Discard),
                (13, HandlerKind::Daytime),
                (CHARGEN, HandlerKind::Chargen),
            ];
            let config = DatagramsConfig {
                vip: VIP,
                services: services.into(),
                window,
            };
            Self {
                datagrams: Datagrams::new(config, metrics.datagrams_replayed.clone()),
                metrics,
            }
        }

        fn asked(&mut self, (from, port): (Ipv4Addr, u16), service: u16, data: &[u8], at: Nanos) {
            let packet = datagram((from, port), (VIP, service), data);
            self.datagrams.process_frame(&packet, Direction::ToVip, at);
        }

        fn answered(&mut self, (to, port): (Ipv4Addr, u16), service: u16, data: &[u8], at: Nanos) {
            let packet = datagram((VIP, service), (to, port), data);
            let direction = Direction::FromVip;
            self.datagrams.process_frame(&packet, direction, at);
        }

        /// Client, port, service and data of each answer at a takeover.
        fn go_live(&mut self, now: Nanos) -> Vec<(Ipv4Addr, u16, u16, Vec<u8>)> {
            let mut sent = Vec::new();
            self.datagrams.go_live(now, |packet| {
                let (flow, data) = parse(packet, Direction::FromVip).unwrap();
                let ip = Ipv4Packet::new_checked(packet).unwrap();
                assert_eq!(ip.src_addr(), VIP);
                let udp = UdpPacket::new_checked(ip.payload()).unwrap();
                assert_ne!(udp.checksum(), 0, "checksums are complete");
                let client = flow.client_addr.into();
                sent.push((client, flow.client_port, flow.service_port, data.to_vec()));
            });
            sent
        }

        fn count(&self, result: ReplayResult) -> u64 {
            self.metrics.datagrams_replayed.get(result)
        }
    }

    fn datagram(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), data: &[u8]) -> Vec<u8> {
        let udp = UdpRepr {
            src_port: from.1,
            dst_port: to.1,
        };
        emit(from.0, to.0, udp, data)
    }

    #[test]
    fn what_the_active_left_unanswered_is_answered_once_and_in_order() {
        let mut standby = Standby::new(WINDOW);
        standby.asked((CLIENT, PORT), ECHO, b"one", 1);
        standby.asked((CLIENT, PORT + 1), ECHO, b"two", 2);
        standby.asked((CLIENT, PORT), CHARGEN, b"", 3);
        standby.asked((CLIENT, PORT), ECHO, b"three", 4);
        standby.answered((CLIENT, PORT), ECHO, b"one", 5);
        let sent = standby.go_live(6);
        let line = HandlerKind::Chargen.datagram(&[]).unwrap();
        let expected = [
            (CLIENT, PORT + 1, ECHO, b"two".to_vec()),
            (CLIENT, PORT, CHARGEN, line),
            (CLIENT, PORT, ECHO, b"three".to_vec()),
        ];
        assert_eq!(sent, expected);
        assert_eq!(standby.count(ReplayResult::Answered), 3);
        assert_eq!(standby.go_live(7), [], "a second time");
    }

    #[test]
    fn what_is_older_than_the_window_is_not_answered() {
        let mut standby = Standby::new(WINDOW);
        for at in 1..=3 {
            standby.asked((CLIENT, PORT), ECHO, &[at], at.into());
        }
        let sent = standby.go_live(2 + WINDOW);
        assert_eq!(sent.len(), 2, "{sent:?}");
        assert_eq!(standby.count(ReplayResult::Expired), 1);
        assert_eq!(standby.count(ReplayResult::Answered), 2);
    }

    #[test]
    fn nothing_is_kept_with_a_window_of_zero_nor_across_a_yield() {
        let mut off = Standby::new(0);
        let packet = datagram((CLIENT, PORT), (VIP, ECHO), b"x");
        let result = off.datagrams.process_frame(&packet, Direction::ToVip, 1);
        assert_eq!(result, FrameResult::NotTcp);
        assert_eq!(off.go_live(1), []);

        let mut standby = Standby::new(WINDOW);
        standby.asked((CLIENT, PORT), ECHO, b"x", 1);
        standby.datagrams.go_standby();
        assert_eq!(standby.go_live(2), []);
        assert_eq!(standby.datagrams.bytes, 0);
    }

    #[test]
    fn no_answer_goes_where_it_would_be_answered_or_heard_by_many() {
        let mut standby = Standby::new(WINDOW);
        for source in [
            (CLIENT, ECHO),
            (CLIENT, DISCARD),
            (CLIENT, 37),
            (CLIENT, 0),
            (VIP, PORT),
            (Ipv4Addr::UNSPECIFIED, PORT),
            (Ipv4Addr::LOCALHOST, PORT),
            (Ipv4Addr::new(224, 0, 0, 1), PORT),
            (Ipv4Addr::new(240, 0, 0, 1), PORT),
            (Ipv4Addr::BROADCAST, PORT),
        ] {
            standby.asked(source, ECHO, b"loop", 1);
        }
        // Nor is there an answer to discard, or from a port without a service.
        standby.asked((CLIENT, PORT), DISCARD, b"x", 1);
        standby.asked((CLIENT, PORT), 8, b"x", 1);
        assert_eq!(standby.go_live(2), []);
    }

    #[test]
    fn at_the_bounds_the_oldest_gives_way() {
        let mut standby = Standby::new(WINDOW);
        for number in 0..MAX_DATAGRAMS as u32 + 3 {
            standby.asked((CLIENT, PORT), ECHO, &number.to_be_bytes(), 1);
        }
        assert_eq!(standby.count(ReplayResult::Dropped), 3);
        let sent = standby.go_live(1);
        assert_eq!(sent.len(), MAX_DATAGRAMS);
        assert_eq!(sent[0].3, 3_u32.to_be_bytes());

        let long = vec![0; 60_000];
        let fit = MAX_BYTES / long.len();
        for _ in 0..=fit {
            standby.asked((CLIENT, PORT), ECHO, &long, 1);
        }
        assert_eq!(standby.count(ReplayResult::Dropped), 4);
        assert_eq!(standby.go_live(1).len(), fit);
    }

    #[test]
    fn a_frame_is_counted_as_what_it_is() {
        let good = datagram((CLIENT, PORT), (VIP, ECHO), b"good");
        let with = |at: usize, bytes: &[u8]| {
            let mut packet = good.clone();
            packet[at..at + bytes.len()].copy_from_slice(bytes);
            let mut ip = Ipv4Packet::new_unchecked(&mut packet[..]);
            ip.fill_checksum();
            packet
        };
        let partial = {
            let mut packet = good.clone();
            let sum = u32::from(CLIENT) as u64 + u32::from(VIP) as u64 + 17 + 12;
            let folded = (sum >> 16) + (sum & 0xffff);
            let folded = ((folded >> 16) + (folded & 0xffff)) as u16;
            packet[26..28].copy_from_slice(&folded.to_be_bytes());
            packet
        };
        let mut bad_header = good.clone();
        bad_header[10] ^= 1;
        use FrameResult::{BadChecksum, Datagram, Malformed, NotTcp, Outside};
        let table = [
            ("whole", good.clone(), Datagram),
            ("partial checksum", partial, Datagram),
            ("no checksum", with(26, &[0, 0]), Datagram),
            ("bad checksum", with(28, b"B"), BadChecksum),
            ("bad checksum of the header", bad_header, BadChecksum),
            ("first fragment", with(6, &[0x20, 0]), NotTcp),
            ("last fragment", with(6, &[0, 1]), NotTcp),
            ("longer than its packet", with(24, &[0, 13]), Malformed),
            ("shorter than its header", with(24, &[0, 7]), Malformed),
            ("cut", good[..27].to_vec(), Malformed),
            (
                "of no service",
                datagram((CLIENT, PORT), (VIP, 8), b""),
                Outside,
            ),
        ];
        for (name, packet, expected) in table {
            let mut standby = Standby::new(WINDOW);
            let result = standby
                .datagrams
                .process_frame(&packet, Direction::ToVip, 1);
            assert_eq!(result, expected, "{name}");
            let kept = usize::from(expected == Datagram);
            assert_eq!(standby.go_live(1).len(), kept, "{name}");
        }
    }

    /// What happens to a standby: (client, service, answer?, nanoseconds since the last).
    fn event() -> impl Strategy<Value = (u8, u16, bool, Nanos)> {
        let service = prop::sample::select(vec![ECHO, DISCARD, CHARGEN]);
        (0_u8..3, service, any::<bool>(), 0..WINDOW / 4)
    }

    proptest! {
        /// Against a list that is searched from its start.
        #[test]
        fn exactly_what_was_neither_answered_nor_too_old_is_answered(
            events in prop::collection::vec(event(), 0..60), pause in 0..WINDOW * 2,
        ) {
            let mut standby = Standby::new(WINDOW);
            let mut expected: Vec<(Nanos, Ipv4Addr, u16, Vec<u8>)> = Vec::new();
            let mut now = 1;
            for (number, (client, service, answer, pause)) in events.into_iter().enumerate() {
                now += pause;
                let client = Ipv4Addr::new(10, 0, 0, 50 + client);
                let data = number.to_be_bytes();
                expected.retain(|(at, ..)| now - at <= WINDOW);
                if answer {
                    standby.answered((client, PORT), service, &data, now);
                    let same = |(_, to, port, _): &_| (to, port) == (&client, &service);
                    if let Some(at) = expected.iter().position(same) {
                        expected.remove(at);
                    }
                } else {
                    standby.asked((client, PORT), service, &data, now);
                    let kinds = &standby.datagrams.answering;
                    if let Some(answer) = kinds.get(&service).and_then(|kind| kind.datagram(&data)) {
                        expected.push((now, client, service, answer));
                    }
                }
            }
            now += pause;
            expected.retain(|(at, ..)| now - at <= WINDOW);
            let expected: Vec<_> = expected
                .into_iter()
                .map(|(_, client, service, data)| (client, PORT, service, data))
                .collect();
            prop_assert_eq!(standby.go_live(now), expected);
        }

        #[test]
        fn a_flipped_bit_in_ports_length_or_data_is_found(bit in 0_usize..96) {
            let mut packet = datagram((CLIENT, PORT), (VIP, ECHO), b"data");
            packet[20 + bit / 8] ^= 1 << (bit % 8);
            prop_assert!(parse(&packet, Direction::ToVip).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..120), cut in 0_usize..60,
        ) {
            let mut standby = Standby::new(WINDOW);
            let mut good = datagram((CLIENT, PORT), (VIP, ECHO), &bytes);
            good.truncate(cut);
            for packet in [&bytes, &good] {
                is_udp(packet);
                for direction in [Direction::ToVip, Direction::FromVip] {
                    standby.datagrams.process_frame(packet, direction, 1);
                }
            }
            standby.go_live(1);
        }
    }
}
