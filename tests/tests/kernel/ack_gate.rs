//! The ACK gate: what leaves with which numbers, what is held, and that nothing else changes.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use nix::sys::socket::{MsgFlags, send};
use rfsis_agent::bpf::{Counters, GuardMaps, Programs};
use rfsis_common::ack_gate::{
    AckGateVerdict, Confirmation, Guarded, OPENING_CAPTURE, OpeningEvent, OpeningKind,
    RELEASE_MARK, Sent, release,
};
use rfsis_common::frame::tcp_flags::{ACK, FIN, RST, SYN};
use rfsis_common::maps::{MirrorPeer, State};
use rfsis_common::mirror::{HELD_URGENT, MirrorVerdict, URGENT_OFFSET};

use tests::patience::wait_until;

use crate::frames::{CLIENT, CLIENT_PORT, FLOW, SERVICE, VIP, ethernet, from_vip, ipv4, tagged};
use crate::host::{
    in_namespace, load, load_guarded, load_guarded_mirror, now_ns, packet_socket, receive, run,
    set_state, veth,
};

const UNSPEC: i32 = -1;
const STOLEN: i32 = 4;

const SLOT: u32 = 3;
const SHIFT: u32 = 2;
/// The client's first byte, the active's next, the edge that the SYN-ACK offered.
const FIRST: u32 = 2000;
const NEXT: u32 = 5000;
const FIRST_EDGE: u32 = FIRST + 64_000;

/// A TCP segment to be, from the VIP to the client.
#[derive(Clone)]
struct Segment {
    flags: u8,
    seq: u32,
    ack: u32,
    window: u16,
    options: Vec<u8>,
    payload: Vec<u8>,
}

/// A pure ACK that the active's kernel sends.
fn pure(ack: u32, window: u16) -> Segment {
    Segment {
        flags: ACK,
        seq: NEXT,
        ack,
        window,
        options: Vec::new(),
        payload: Vec::new(),
    }
}

impl Segment {
    fn flags(self, flags: u8) -> Self {
        Self { flags, ..self }
    }

    fn seq(self, seq: u32) -> Self {
        Self { seq, ..self }
    }

    fn options(self, options: &[&[u8]]) -> Self {
        let options = options.concat();
        Self { options, ..self }
    }

    fn data(self, payload: &[u8]) -> Self {
        let payload = payload.to_vec();
        Self { payload, ..self }
    }

    fn tcp(&self, source: u16, destination: u16) -> Vec<u8> {
        let mut tcp = [source.to_be_bytes(), destination.to_be_bytes()].concat();
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        let words = 5 + self.options.len() / 4;
        tcp.extend([(words << 4) as u8, self.flags]);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(&self.options);
        tcp.extend(&self.payload);
        tcp
    }

    /// With its checksum (RFC 9293 section 3.1).
    fn frame(&self) -> Vec<u8> {
        let mut tcp = self.tcp(SERVICE, CLIENT_PORT);
        let sum = !folded(&[&pseudo_header(tcp.len())[..], &tcp].concat());
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        ethernet(0x0800, &ipv4(6, VIP, CLIENT, &tcp))
    }

    /// From the client.
    fn client_frame(&self) -> Vec<u8> {
        let mut frame = self.to_vip();
        let sum = !folded(&[&pseudo_header(frame.len() - 34)[..], &frame[34..]].concat());
        frame[50..52].copy_from_slice(&sum.to_be_bytes());
        let sum = !folded(&frame[14..34]);
        frame[24..26].copy_from_slice(&sum.to_be_bytes());
        frame
    }

    /// The same without a checksum.
    fn to_vip(&self) -> Vec<u8> {
        let tcp = self.tcp(CLIENT_PORT, SERVICE);
        ethernet(0x0800, &ipv4(6, CLIENT, VIP, &tcp))
    }
}

fn pseudo_header(len: usize) -> Vec<u8> {
    let mut bytes = [VIP.octets(), CLIENT.octets()].concat();
    bytes.extend([0, 6]);
    bytes.extend((len as u16).to_be_bytes());
    bytes
}

/// Ones' complement sum (RFC 1071).
fn folded(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// An active node with one flow that the standby knows.
struct Gate {
    programs: Programs,
    maps: GuardMaps,
    counters: Counters,
}

impl Gate {
    fn new(programs: Programs) -> Self {
        set_state(&programs, State::Active, u64::MAX);
        let maps = programs.guard_maps().unwrap();
        maps.set_mode(true).unwrap();
        Self {
            counters: programs.counters().unwrap(),
            maps,
            programs,
        }
    }

    /// The flow as it is behind its handshake.
    fn open_flow(&self, confirmation: Confirmation) {
        let sent = Sent::new(FIRST - 1, NEXT - 1, (FIRST_EDGE - FIRST) as u16);
        self.maps.reset(SLOT, sent).unwrap();
        self.maps.confirm(SLOT, confirmation).unwrap();
        let guarded = Guarded {
            slot: SLOT,
            client_isn: FIRST - 1,
            shift: SHIFT,
        };
        self.maps.publish(FLOW, guarded).unwrap();
    }

    /// Code, frame that leaves, and the verdicts that were counted meanwhile.
    fn run(&mut self, frame: &[u8], mark: u32) -> (i32, Vec<u8>, Vec<AckGateVerdict>) {
        let before = self.counters.ack_gate().unwrap();
        let (code, output) = self.programs.test_gate(frame, mark).unwrap();
        let after = self.counters.ack_gate().unwrap();
        let moved = |verdict| after.get(verdict) - before.get(verdict);
        let verdicts = AckGateVerdict::ALL
            .into_iter()
            .flat_map(|verdict| (0..moved(verdict)).map(move |_| verdict));
        (code, output, verdicts.collect())
    }

    /// That a frame leaves as `expected`, or not at all.
    fn expect(
        &mut self,
        name: &str,
        frame: &[u8],
        mark: u32,
        verdict: AckGateVerdict,
        expected: Option<&[u8]>,
    ) {
        let (code, output, verdicts) = self.run(frame, mark);
        assert_eq!(verdicts, [verdict], "{name}");
        let Some(expected) = expected else {
            assert_eq!(code, STOLEN, "{name}");
            return;
        };
        assert_eq!(code, UNSPEC, "{name}");
        assert_eq!(output, expected, "{name}");
    }

    fn sent(&self) -> Sent {
        self.maps.sent(SLOT).unwrap()
    }
}

const STAMPS: &[u8] = &[1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9];

/// Two NOPs and a SACK option with so many blocks.
fn sack(blocks: u8) -> Vec<u8> {
    let mut option = vec![1, 1, 5, 2 + 8 * blocks];
    option.extend((0..8 * blocks).map(|byte| 0xa0 + byte));
    option
}

/// So many NOPs.
fn nops(count: usize) -> Vec<u8> {
    vec![1; count]
}

#[test]
fn a_client_is_told_what_is_confirmed_and_checksums_stay_right() {
    use AckGateVerdict::{Held, Lowered, Passed};
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        let approvals = gate.programs.approvals().unwrap();
        approvals.approve(FLOW).unwrap();
        // 1000 bytes, and room for 100,000.
        let confirmed = Confirmation::new(FIRST + 1000, FIRST + 100_000);
        let (held, ahead) = (FIRST + 1000, FIRST + 3001);
        let odd = b"odd number";
        // Name, what the kernel sends, what leaves.
        let mut table = vec![
            (
                "ACK of what is confirmed",
                pure(held, 9000),
                Passed,
                Some(pure(held, 9000)),
            ),
            (
                "ACK of less",
                pure(held - 1, 9000),
                Passed,
                Some(pure(held - 1, 9000)),
            ),
            ("ACK of one more", pure(held + 1, 9000), Held, None),
            (
                "ACK ahead with timestamps",
                pure(ahead, 9000).options(&[STAMPS]),
                Held,
                None,
            ),
            (
                "data",
                pure(held, 9000).data(odd),
                Passed,
                Some(pure(held, 9000).data(odd)),
            ),
            // 2001 bytes are 500 units of four.
            (
                "data ahead",
                pure(ahead, 9000).data(odd),
                Lowered,
                Some(pure(held, 9500).data(odd)),
            ),
            (
                "data ahead with timestamps",
                pure(ahead, 9000).data(b"1").options(&[STAMPS]),
                Lowered,
                Some(pure(held, 9500).data(b"1").options(&[STAMPS])),
            ),
            (
                "FIN ahead",
                pure(ahead, 9000).flags(ACK | FIN),
                Lowered,
                Some(pure(held, 9500).flags(ACK | FIN)),
            ),
            (
                "RST ahead",
                pure(ahead, 0).flags(ACK | RST),
                Lowered,
                Some(pure(held, 500).flags(ACK | RST)),
            ),
            (
                "RST without ACK",
                pure(0, 0).flags(RST).seq(1),
                Passed,
                Some(pure(0, 0).flags(RST).seq(1)),
            ),
            (
                "window probe ahead",
                pure(ahead, 9000).seq(NEXT - 1),
                Lowered,
                Some(pure(held, 9500).seq(NEXT - 1)),
            ),
            (
                "more room than the standby has",
                pure(held, 60_000),
                Passed,
                Some(pure(held, 24_750)),
            ),
            (
                "more room than the standby has, ahead",
                pure(ahead, 60_000).data(b"12"),
                Lowered,
                Some(pure(held, 24_750).data(b"12")),
            ),
        ];
        for blocks in 1..=4 {
            let (option, erased) = (sack(blocks), nops(4 + 8 * usize::from(blocks)));
            table.push((
                "SACK alone",
                pure(held, 9000).options(&[&option]),
                Passed,
                Some(pure(held, 9000).options(&[&erased])),
            ));
            if blocks == 4 {
                break;
            }
            for payload in [&b""[..], b"odd"] {
                table.push((
                    "SACK behind timestamps",
                    pure(held, 9000).options(&[STAMPS, &option]).data(payload),
                    Passed,
                    Some(pure(held, 9000).options(&[STAMPS, &erased]).data(payload)),
                ));
            }
            table.push((
                "SACK on data ahead",
                pure(ahead, 9000).options(&[STAMPS, &option]).data(odd),
                Lowered,
                Some(pure(held, 9500).options(&[STAMPS, &erased]).data(odd)),
            ));
        }
        for (name, kernel, verdict, leaves) in &table {
            gate.open_flow(confirmed);
            let frame = leaves.as_ref().map(Segment::frame);
            gate.expect(name, &kernel.frame(), 0, *verdict, frame.as_deref());
            // Behind IP options, and behind a priority tag.
            let with_ip_options = |segment: &Segment| {
                let mut frame = segment.frame();
                frame.splice(34..34, [1, 1, 1, 0]);
                frame[14] = 0x46;
                frame[17] += 4;
                frame
            };
            gate.open_flow(confirmed);
            let frame = leaves.as_ref().map(with_ip_options);
            let input = with_ip_options(kernel);
            gate.expect(name, &input, 0, *verdict, frame.as_deref());
            gate.open_flow(confirmed);
            let frame = leaves.as_ref().map(|segment| tagged(0, &segment.frame()));
            let input = tagged(0, &kernel.frame());
            gate.expect(name, &input, 0, *verdict, frame.as_deref());
        }
    });
}

#[test]
fn what_is_held_is_released_by_the_agents_mark_and_the_next_segment_goes_on_from_there() {
    use AckGateVerdict::{Held, Passed, Released};
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        let edge = FIRST + 200_000;
        gate.open_flow(Confirmation::new(FIRST, edge));
        let ahead = pure(FIRST + 1448, 20_000).options(&[STAMPS]);
        gate.expect("ahead", &ahead.frame(), 0, Held, None);
        let sent = gate.sent();
        assert_eq!((sent.ack, sent.told), (FIRST + 1448, FIRST));
        assert_eq!(sent.edge, FIRST + 1448 + 80_000);
        assert_eq!((sent.told_edge, sent.next), (FIRST_EDGE, NEXT));
        assert_eq!((sent.tsval, sent.tsecr), (7, 9));
        assert_eq!(sent.version % 2, 0);
        assert!(now_ns() - sent.at_ns < 1_000_000_000);

        let confirmed = Confirmation::new(FIRST + 1448, edge);
        gate.maps.confirm(SLOT, confirmed).unwrap();
        let pending = release(&sent, confirmed, SHIFT).unwrap();
        assert_eq!(pending.timestamp, Some((7, 9)));
        // The agent's SACK blocks are the standby's: they stay.
        let blocks = sack(1);
        let released = pure(pending.ack, pending.window).options(&[STAMPS, &blocks]);
        let frame = released.frame();
        gate.expect("released", &frame, RELEASE_MARK, Released, Some(&frame));
        let sent = gate.sent();
        assert_eq!((sent.told, sent.told_edge), (sent.ack, sent.edge));
        assert_eq!(release(&sent, confirmed, SHIFT), None);
        let again = ahead.frame();
        gate.expect("again", &again, 0, Passed, Some(&again));
        // Data is counted in `next`.
        let long = pure(FIRST + 1448, 20_000).data(&[7; 3001]);
        gate.expect("data", &long.frame(), 0, Passed, Some(&long.frame()));
        assert_eq!(gate.sent().next, NEXT + 3001);
        assert_eq!(gate.maps.sent(16), None, "there is no such slot");
    });
}

#[test]
fn an_open_gate_changes_nothing_and_remembers_what_it_told() {
    use AckGateVerdict::{Lowered, Open};
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        gate.open_flow(Confirmation::new(FIRST, FIRST_EDGE));
        gate.maps.set_mode(false).unwrap();
        let blocks = sack(2);
        let ahead = pure(FIRST + 5000, 40_000).options(&[STAMPS, &blocks]);
        gate.expect("open", &ahead.frame(), 0, Open, Some(&ahead.frame()));
        let sent = gate.sent();
        assert_eq!((sent.told, sent.ack), (FIRST + 5000, FIRST + 5000));
        assert_eq!(sent.told_edge, FIRST + 5000 + 160_000);
        // What was told is not taken back: neither the ACK nor the edge.
        gate.maps.set_mode(true).unwrap();
        let data = pure(FIRST + 6000, 39_750).data(b"x");
        let lowered = pure(FIRST + 5000, 40_000).data(b"x");
        gate.expect("shut", &data.frame(), 0, Lowered, Some(&lowered.frame()));
    });
}

#[test]
fn what_the_standby_does_not_know_passes_and_no_services_port_is_counted() {
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        let blocks = sack(1);
        let data = pure(FIRST + 5000, 1).options(&[&blocks]).data(b"x").frame();
        let unguarded = AckGateVerdict::Unguarded;
        gate.expect("unknown flow", &data, 0, unguarded, Some(&data));
        gate.open_flow(Confirmation::new(FIRST, FIRST_EDGE));
        gate.maps.withdraw(&FLOW).unwrap();
        gate.maps.withdraw(&FLOW).unwrap();
        gate.expect("withdrawn", &data, 0, unguarded, Some(&data));
        let mut other = pure(FIRST + 5000, 1).frame();
        other[34..36].copy_from_slice(&9999_u16.to_be_bytes());
        assert_eq!(gate.run(&other, 0), (UNSPEC, other, vec![]));
        // A slot that is not there guards nothing.
        let guarded = Guarded {
            slot: 16,
            ..Guarded::default()
        };
        gate.maps.publish(FLOW, guarded).unwrap();
        gate.expect("slot 16", &data, 0, unguarded, Some(&data));
        assert!(gate.maps.confirm(16, Confirmation::default()).is_err());
    });
}

fn next_opening(ring: &mut RingBuf<MapData>) -> OpeningEvent {
    OpeningEvent::parse(&ring.next().unwrap()).unwrap()
}

/// Maximum segment size, SACK permitted, timestamps, NOP, window scale: 20 bytes.
const SYN_OPTIONS: &[u8] = &[
    2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9, 1, 3, 3, 7,
];

#[test]
fn a_syn_ack_is_held_and_reported_until_the_standby_knows_the_flow() {
    use AckGateVerdict::{Open, Opening, Passed};
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        let mut ring = gate.programs.take_openings().unwrap();
        let syn_ack = pure(FIRST, 64_000)
            .flags(SYN | ACK)
            .seq(NEXT - 1)
            .options(&[SYN_OPTIONS]);
        let frame = syn_ack.frame();
        gate.expect("unknown", &frame, 0, Opening, None);
        let event = next_opening(&mut ring);
        assert_eq!(event.flow, FLOW);
        assert_eq!(event.kind, OpeningKind::Held as u32);
        assert_eq!(event.packet(), &frame[14..]);
        assert!(now_ns() - event.at_ns < 1_000_000_000);

        // The longest headers that there are, and data behind them, which is left out.
        let longest = syn_ack.clone().options(&[&nops(40)]).data(b"fast open");
        let mut long = longest.frame();
        long.splice(34..34, nops(40));
        long[14] = 0x4f;
        long[17] += 40;
        gate.expect("longest", &tagged(0, &long), 0, Opening, None);
        assert_eq!(
            next_opening(&mut ring).packet(),
            &long[14..14 + OPENING_CAPTURE]
        );

        // The agent lets it go: the standby has no room for it.
        let released = AckGateVerdict::Released;
        gate.expect("let go", &frame, RELEASE_MARK, released, Some(&frame));
        assert!(ring.next().is_none());

        gate.open_flow(Confirmation::new(FIRST, FIRST_EDGE));
        gate.expect("known", &frame, 0, Passed, Some(&frame));
        assert!(ring.next().is_none());
        // The agent's own, should it send one.
        gate.expect("marked", &frame, RELEASE_MARK, released, Some(&frame));
        assert_eq!(gate.sent().told_edge, FIRST_EDGE, "not scaled");

        // A later connection of the same addresses and ports.
        let later = Segment {
            ack: FIRST + 1,
            ..syn_ack
        };
        gate.expect("later", &later.frame(), 0, Opening, None);
        assert_eq!(next_opening(&mut ring).flow, FLOW);
        let data = pure(FIRST + 9000, 1).frame();
        let unguarded = AckGateVerdict::Unguarded;
        gate.expect("forgotten", &data, 0, unguarded, Some(&data));

        gate.maps.set_mode(false).unwrap();
        gate.expect("open", &frame, 0, Open, Some(&frame));
        let event = next_opening(&mut ring);
        assert_eq!(event.flow, FLOW);
        assert_eq!(event.kind, OpeningKind::Passed as u32);

        gate.maps.set_mode(true).unwrap();
        let released = AckGateVerdict::Released;
        gate.expect("not taken", &frame, RELEASE_MARK, released, Some(&frame));
        assert!(ring.next().is_none());
    });
}

#[test]
fn a_full_ring_of_openings_is_counted_and_the_syn_ack_is_held_all_the_same() {
    in_namespace(|| {
        let mut gate = Gate::new(load_guarded());
        let frame = pure(FIRST, 64_000).flags(SYN | ACK).frame();
        let mut taken = 0;
        loop {
            let (code, _, verdicts) = gate.run(&frame, 0);
            assert_eq!(code, STOLEN);
            if verdicts != [AckGateVerdict::Opening] {
                assert_eq!(verdicts, [AckGateVerdict::OpeningLost]);
                break;
            }
            taken += 1;
            assert!(taken < 100_000);
        }
        assert!(taken > 6000, "the ring holds {taken}");
    });
}

#[test]
fn without_an_ack_gate_nothing_is_held_or_counted() {
    in_namespace(|| {
        let mut gate = Gate::new(load());
        let mut ring = gate.programs.take_openings().unwrap();
        for segment in [
            pure(FIRST, 1).flags(SYN | ACK),
            pure(FIRST + 5000, 1).data(b"x"),
        ] {
            let frame = segment.frame();
            assert_eq!(gate.run(&frame, 0), (UNSPEC, frame, vec![]));
        }
        assert!(ring.next().is_none());
    });
}

/// Nothing comes within this time: it was not sent.
const QUIET: Duration = Duration::from_millis(60);

fn transmit(socket: &OwnedFd, frame: &[u8]) {
    send(socket.as_raw_fd(), frame, MsgFlags::empty()).unwrap();
}

#[test]
fn a_syn_that_comes_in_is_reported_whether_or_not_the_gate_guards() {
    in_namespace(|| {
        veth(1500);
        run("ip link set eth0 address 02:00:00:00:00:01");
        let mut gate = Gate::new(load_guarded());
        gate.programs.attach_gate("eth0").unwrap();
        gate.programs.attach_mirror("eth0").unwrap();
        let mut ring = gate.programs.take_openings().unwrap();
        let lan = packet_socket("peer0");
        let syn = pure(0, 64_000).flags(SYN).options(&[SYN_OPTIONS]).to_vip();
        transmit(&lan, &syn);
        let event = next_opening(&mut ring);
        assert_eq!(event.flow, FLOW);
        assert_eq!(event.kind, OpeningKind::Syn as u32);
        assert_eq!(event.packet(), &syn[14..]);

        let mut to_other_port = syn.clone();
        to_other_port[36..38].copy_from_slice(&9999_u16.to_be_bytes());
        let mut to_other_host = syn.clone();
        to_other_host[5] = 0x77;
        for (name, frame) in [
            ("no service", to_other_port),
            ("another host", to_other_host),
            ("VLAN 5", tagged(5, &syn)),
            ("SYN-ACK", pure(1, 1).flags(SYN | ACK).to_vip()),
            ("SYN with RST", pure(1, 1).flags(SYN | RST).to_vip()),
            ("ACK", pure(1, 1).to_vip()),
        ] {
            transmit(&lan, &frame);
            assert!(ring.next().is_none(), "{name}");
        }
        gate.maps.set_mode(false).unwrap();
        transmit(&lan, &syn);
        assert_eq!(next_opening(&mut ring).kind, OpeningKind::Syn as u32);
    });
}

#[test]
fn the_standby_gets_a_held_syn_ack_marked_so_and_the_released_one_not_again() {
    in_namespace(|| {
        veth(1500);
        run("ip link set eth0 address 02:00:00:00:00:01");
        let mut gate = Gate::new(load_guarded_mirror("eth0"));
        gate.programs.attach_gate("eth0").unwrap();
        let standby = [2, 0, 0, 0, 0, 0x42];
        let mirror = gate.programs.mirror().unwrap();
        mirror.write(MirrorPeer::at(standby)).unwrap();
        let lan = packet_socket("peer0");
        let copy = || receive(&lan, QUIET, |frame| frame.starts_with(&standby));
        let frame = pure(FIRST, 64_000)
            .flags(SYN | ACK)
            .seq(NEXT - 1)
            .options(&[SYN_OPTIONS])
            .frame();
        gate.expect("held", &frame, 0, AckGateVerdict::Opening, None);
        let found = copy().unwrap();
        let tcp = &found[34..];
        let sum = folded(&[&pseudo_header(tcp.len())[..], tcp].concat());
        assert_eq!(sum, 0xffff, "the checksum is right");
        let marked = HELD_URGENT.to_be_bytes();
        assert_eq!(tcp[URGENT_OFFSET..][..2], marked);
        let mut rest = found[14..].to_vec();
        rest[20 + 16..20 + 20].copy_from_slice(&frame[50..54]);
        assert_eq!(rest, frame[14..], "nothing else differs");

        let released = AckGateVerdict::Released;
        gate.open_flow(Confirmation::new(FIRST, FIRST_EDGE));
        gate.expect("released", &frame, RELEASE_MARK, released, Some(&frame));
        assert_eq!(copy(), None);
        // While the gate is open nobody has held it, and the copy says so.
        gate.maps.withdraw(&FLOW).unwrap();
        gate.maps.set_mode(false).unwrap();
        gate.expect("open", &frame, 0, AckGateVerdict::Open, Some(&frame));
        assert_eq!(copy().unwrap()[14..], frame[14..]);
        gate.expect("let go", &frame, RELEASE_MARK, released, Some(&frame));
        assert_eq!(copy().unwrap()[14..], frame[14..]);
    });
}

#[test]
fn a_client_that_acknowledges_what_was_not_sent_is_not_copied() {
    use MirrorVerdict::{BeyondSent, Cloned};
    in_namespace(|| {
        veth(1500);
        run("ip link set eth0 address 02:00:00:00:00:01");
        let mut gate = Gate::new(load_guarded_mirror("eth0"));
        gate.programs.attach_gate("eth0").unwrap();
        gate.programs.attach_mirror("eth0").unwrap();
        let standby = MirrorPeer::at([2, 0, 0, 0, 0, 0x42]);
        gate.programs.mirror().unwrap().write(standby).unwrap();
        let lan = packet_socket("peer0");
        let from_client = |ack, flags| pure(ack, 1).flags(flags).seq(FIRST).to_vip();
        let table = |gate: &Gate, cases: &[(u32, u8, MirrorVerdict)]| {
            for (ack, flags, expected) in cases {
                let before = gate.counters.mirror().unwrap();
                transmit(&lan, &from_client(*ack, *flags));
                let after = gate.counters.mirror().unwrap();
                let moved = |verdict| after.get(verdict) - before.get(verdict);
                let verdicts = MirrorVerdict::ALL.into_iter().filter(|it| moved(*it) > 0);
                assert!(verdicts.eq([*expected]), "ack {ack}, flags {flags:#x}");
            }
        };
        table(&gate, &[(NEXT + 1, ACK, Cloned)]);
        gate.open_flow(Confirmation::new(FIRST, FIRST_EDGE));
        table(
            &gate,
            &[
                (NEXT, ACK, Cloned),
                (NEXT + 1, ACK, BeyondSent),
                (NEXT + 1, ACK | FIN, BeyondSent),
                (NEXT + 1, SYN, Cloned),
            ],
        );
        // The active sends ten bytes.
        let data = pure(FIRST, 1).data(&[7; 10]).frame();
        gate.run(&data, 0);
        table(
            &gate,
            &[
                (NEXT + 1, ACK, Cloned),
                (NEXT + 10, ACK, Cloned),
                (NEXT + 11, ACK, BeyondSent),
            ],
        );
    });
}

/// Sequence number, acknowledgement and options of a frame of this length, all headers plain.
fn numbers(frame: &[u8]) -> (u32, u32, &[u8]) {
    let word = |at: usize| u32::from_be_bytes(*frame[at..].first_chunk().unwrap());
    let header_len = usize::from(frame[46] >> 4) * 4;
    (word(38), word(42), &frame[54..34 + header_len])
}

/// That the checksum is the pseudo-header's only: the device completes it.
fn assert_partial(frame: &[u8]) {
    let expected = folded(&pseudo_header(frame.len() - 34));
    let found = u16::from_be_bytes([frame[50], frame[51]]);
    assert_eq!(found, expected, "the device would complete it wrong");
}

#[test]
fn a_kernels_own_segments_are_told_apart_and_their_checksums_left_to_the_device() {
    in_namespace(|| {
        veth(1500);
        run("ip link set eth0 address 02:00:00:00:00:01");
        run(&format!("ip addr add {VIP}/24 dev eth0"));
        run(&format!(
            "ip neigh add {CLIENT} lladdr 02:00:00:00:00:02 dev eth0"
        ));
        let mut gate = Gate::new(load_guarded());
        gate.programs.attach_gate("eth0").unwrap();
        let listener = TcpListener::bind((VIP, SERVICE)).unwrap();
        let lan = packet_socket("peer0");
        let hear = || receive(&lan, QUIET, from_vip);
        // Without timestamps, though they were agreed on: the kernel would compare them with its own.
        let say = |seq, ack, flags, options: &[u8], data: &[u8]| {
            let segment = pure(ack, 64_000).seq(seq).flags(flags);
            transmit(&lan, &segment.options(&[options]).data(data).client_frame());
        };
        let room = Confirmation::new(FIRST, FIRST + (1 << 20));
        gate.open_flow(room);
        say(FIRST - 1, 0, SYN, SYN_OPTIONS, b"");
        let syn_ack = hear().unwrap();
        let (isn, _, options) = numbers(&syn_ack);
        let [.., 1, 3, 3, shift] = *options else {
            panic!("no window scale in {options:?}");
        };
        let next = isn.wrapping_add(1);
        let window = u16::from_be_bytes([syn_ack[48], syn_ack[49]]);
        let sent = Sent::new(FIRST - 1, isn, window);
        gate.maps.reset(SLOT, sent).unwrap();
        let guarded = Guarded {
            slot: SLOT,
            client_isn: FIRST - 1,
            shift: u32::from(shift),
        };
        gate.maps.publish(FLOW, guarded).unwrap();
        say(FIRST, next, ACK, &[], b"");
        listener.set_nonblocking(true).unwrap();
        let accept = || listener.accept().ok();
        let (mut server, _) = wait_until("connection", accept, Option::is_some).unwrap();
        server.set_nonblocking(false).unwrap();
        server
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();

        // Behind a hole: the kernel says so, and is not heard.
        say(FIRST + 1000, next, ACK, &[], &[7; 500]);
        let duplicate = hear().unwrap();
        let (_, ack, options) = numbers(&duplicate);
        assert_eq!((ack, &options[12..]), (FIRST, &nops(12)[..]));
        assert_eq!(options[..4], STAMPS[..4]);
        assert_partial(&duplicate);

        // The hole is filled. The standby has not said so, and data goes on.
        say(FIRST, next, ACK, &[], &[7; 1000]);
        server.read_exact(&mut [0; 1500]).unwrap();
        assert_eq!(hear(), None, "an ACK ahead of the standby");
        server.write_all(&[9; 5000]).unwrap();
        let data = hear().unwrap();
        let (seq, ack, _) = numbers(&data);
        assert_eq!((seq, ack), (next, FIRST));
        assert_partial(&data);
        let sent = gate.sent();
        assert_eq!((sent.ack, sent.told), (FIRST + 1500, FIRST));
        assert_eq!(sent.next, next.wrapping_add(5000));
        let counts = gate.counters.ack_gate().unwrap();
        assert!(counts.get(AckGateVerdict::Held) > 0);
        assert!(counts.get(AckGateVerdict::Lowered) > 0);
    });
}
