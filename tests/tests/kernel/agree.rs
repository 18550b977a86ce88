//! Openings on which the kernels agree: what either program says and believes, and what is left to the agents.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::OwnedFd;

use aya::maps::{MapData, RingBuf};
use rfsis_agent::bpf::{GuardMaps, Program, Programs, SkbContext, XdpMode};
use rfsis_agent::sync::{Prompts, Term};
use rfsis_common::ack_gate::{AckGateVerdict, Agreed, OpeningEvent, OpeningKind, Sent};
use rfsis_common::agree::{AgreePeer, Answer, PAYLOAD, TcpHeader, digest};
use rfsis_common::frame::tcp_flags::{ACK, SYN};
use rfsis_common::maps::{FrameHeader, MirrorPeer, Promise, State, frame_flags};
use rfsis_common::mirror::{HELD_URGENT, URGENT_OFFSET};
use tests::patience::wait_until;

use crate::frames::{FLOW, OWN, OWN_MAC, STANDBY, from_vip, with, with_ip_options};
use crate::host::{
    in_namespace, index_of, load_guarding_mirror, now_ns, packet_socket, receive, run, set_state,
    transmit, veth,
};
use crate::prompt::{PEER, PORT, QUIET, folded, udp};
use crate::segments::{FIRST, NEXT, Segment, pseudo_header, pure};

const KEY: &[u8] = b"0123456789abcdef0123456789abcdef";
const SLOT: u32 = 5;
const SHIFT: u8 = 7;
const WINDOW: u16 = 64_000;
/// The active's end of the LAN, as the standby sees it.
pub const ACTIVE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// What a node agrees by.
pub fn peers(node: Ipv4Addr, peer: Ipv4Addr, sessions: (u64, u64)) -> (Prompts, AgreePeer) {
    let mut prompts = Prompts::new(KEY, "demo", node, peer, PORT);
    let term = Term {
        own_session: sessions.0,
        peer_session: sessions.1,
        epoch: 3,
    };
    let (_, agree) = prompts.set_term(Some(term)).unwrap();
    (prompts, agree)
}

/// A node on one end of a cable, and at the other the LAN.
pub struct Node {
    pub programs: Programs,
    pub maps: GuardMaps,
    pub lan: OwnedFd,
    openings: RingBuf<MapData>,
    /// The agent's end of the sync channel.
    agent: UdpSocket,
}

impl Node {
    fn new(mode: XdpMode, state: State, peer: AgreePeer) -> Self {
        veth(1500);
        run("ip link set eth0 address 02:00:00:00:00:01");
        let mut programs = load_guarding_mirror("eth0");
        programs.attach_gate("eth0").unwrap();
        assert_eq!(programs.attach_ingress("eth0", mode).unwrap(), mode);
        if mode == XdpMode::Native {
            programs.attach_mirror("eth0").unwrap();
        }
        set_state(&programs, state, u64::MAX);
        let maps = programs.guard_maps().unwrap();
        maps.agree_with(peer).unwrap();
        let agent = UdpSocket::bind((OWN, PORT)).unwrap();
        agent.set_read_timeout(Some(QUIET)).unwrap();
        Self {
            lan: packet_socket("peer0"),
            openings: programs.take_openings().unwrap(),
            programs,
            maps,
            agent,
        }
    }

    /// An active that has a standby, and room for one agreement.
    fn active(mode: XdpMode) -> Self {
        let (_, peer) = peers(OWN, PEER, (1, 2));
        let node = Self::new(mode, State::Active, peer);
        node.copy_to(STANDBY);
        node.maps.set_mode(true).unwrap();
        node.maps.lend(SLOT).unwrap();
        node
    }

    fn copy_to(&self, mac: [u8; 6]) {
        let mirror = self.programs.mirror().unwrap();
        mirror.write(MirrorPeer::at(mac)).unwrap();
    }

    fn next_opening(&mut self) -> OpeningEvent {
        let ring = &mut self.openings;
        let next = || {
            ring.next()
                .map(|entry| OpeningEvent::parse(&entry).unwrap())
        };
        wait_until("the gate's report", next, Option::is_some).unwrap()
    }

    /// The client's SYN comes in, the kernel answers it, and the gate holds that. Gives what it reports.
    fn open(&mut self, syn: &[u8], syn_ack: &[u8]) -> OpeningKind {
        transmit(&self.lan, syn);
        assert_eq!(self.next_opening().kind, OpeningKind::Syn as u32);
        let context = SkbContext::default();
        let (verdict, _) = self
            .programs
            .test_run(Program::Gate, syn_ack, context)
            .unwrap();
        assert_eq!(verdict, 4, "TC_ACT_STOLEN");
        OpeningKind::from_u32(self.next_opening().kind).unwrap()
    }

    /// What the client gets within a moment.
    fn told(&self) -> Option<Vec<u8>> {
        let copied = |frame: &[u8]| frame[..6] == STANDBY;
        receive(&self.lan, QUIET, |frame| from_vip(frame) && !copied(frame))
    }

    /// What the agent gets.
    fn left_to_agent(&self) -> Option<Vec<u8>> {
        let mut buffer = [0; 2000];
        let (len, _) = self.agent.recv_from(&mut buffer).ok()?;
        Some(buffer[..len].to_vec())
    }

    fn count(&self, verdict: AckGateVerdict) -> u64 {
        let counters = self.programs.counters().unwrap();
        counters.ack_gate().unwrap().get(verdict)
    }
}

fn options(shift: u8) -> Vec<u8> {
    [
        &[2, 4, 5, 0xb4, 4, 2, 8, 10][..],
        &[0, 0, 0, 7, 0, 0, 0, 9],
        &[1, 3, 3, shift],
    ]
    .concat()
}

fn syn() -> Segment {
    pure(0, WINDOW)
        .flags(SYN)
        .seq(FIRST - 1)
        .options(&[&options(10)])
}

fn syn_ack() -> Segment {
    pure(FIRST, WINDOW)
        .flags(SYN | ACK)
        .seq(NEXT - 1)
        .options(&[&options(SHIFT)])
}

/// The copy of a SYN-ACK that is held.
fn held() -> Vec<u8> {
    let urgent = HELD_URGENT.to_be_bytes();
    with_checksum(with(syn_ack().frame(), 34 + URGENT_OFFSET, &urgent))
}

fn with_checksum(frame: Vec<u8>) -> Vec<u8> {
    let frame = with(frame, 50, &[0; 2]);
    let sum = !folded(&[&pseudo_header(frame.len() - 34)[..], &frame[34..]].concat());
    with(frame, 50, &sum.to_be_bytes())
}

/// As one leaves it to a device, which would write it where it does here.
fn unfinished(frame: Vec<u8>) -> Vec<u8> {
    let sum = folded(&pseudo_header(frame.len() - 34));
    with(frame, 50, &sum.to_be_bytes())
}

fn header(frame: &[u8]) -> TcpHeader {
    let mut header = TcpHeader::default();
    let tcp = &frame[34..34 + usize::from(frame[46] >> 4) * 4];
    for (word, bytes) in header.iter_mut().zip(tcp.as_chunks().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    header
}

/// What a standby with this key says to it.
fn answer(key: [u64; 2]) -> Answer {
    let before = digest(key, 0, &header(&syn().client_frame()));
    Answer {
        flow: FLOW,
        client_isn: FIRST - 1,
        active_isn: NEXT - 1,
        digest: digest(key, before, &header(&syn_ack().frame())),
        unfinished: false,
    }
}

fn sealed(answer: &Answer, key: [u64; 2]) -> Vec<u8> {
    let words = answer.seal(key);
    words.into_iter().flat_map(u64::to_ne_bytes).collect()
}

fn key_of_standby() -> [u64; 2] {
    peers(PEER, OWN, (2, 1)).1.giving
}

#[test]
fn the_active_lets_a_syn_ack_go_that_the_standbys_kernel_answers_and_guards_the_flow() {
    for mode in [XdpMode::Tc, XdpMode::Native] {
        in_namespace(move || {
            let mut node = Node::active(mode);
            let frame = with(syn_ack().frame(), 0, &[2, 0, 0, 0, 0, 0x50]);
            // As the kernel leaves it to a device.
            let unfinished = with(frame.clone(), 50, &[0x12, 0x34]);
            let kind = node.open(&syn().client_frame(), &unfinished);
            assert_eq!(kind, OpeningKind::Kept);
            assert_eq!(node.told(), None);

            let key = key_of_standby();
            let datagram = sealed(&answer(key), key);
            let kept = node.maps.kept(&FLOW).unwrap();
            assert!(kept.is_answered_by(&answer(key), key));
            // The device may have finished a checksum where it is not read.
            let on_its_way = with(datagram.clone(), 8, &[0xab, 0xcd]);
            transmit(&node.lan, &udp(PEER, (PORT, PORT), 0, &on_its_way));
            assert_eq!(node.told().unwrap(), frame, "with its checksum");

            let event = node.next_opening();
            assert_eq!((event.kind, event.flow), (OpeningKind::Agreed as u32, FLOW));
            let agreed = Agreed {
                slot: SLOT,
                client_isn: FIRST - 1,
                shift: SHIFT.into(),
                guarded: 1,
            };
            assert_eq!(event.agreed(), Some(agreed));
            assert!(node.maps.is_published(&FLOW));
            let begun = Sent::new(FIRST - 1, NEXT - 1, WINDOW);
            assert_eq!(node.maps.confirmed(SLOT), begun.everything());
            let sent = node.maps.sent(SLOT).unwrap();
            assert_eq!((sent.ack, sent.told_edge), (begun.ack, begun.told_edge));
            assert!(now_ns() - sent.at_ns < 1_000_000_000);
            assert_eq!(node.count(AckGateVerdict::Agreed), 1);
            assert_eq!(node.count(AckGateVerdict::Released), 1);
            assert_eq!(node.left_to_agent(), None);

            // Once: nothing is held any more.
            transmit(&node.lan, &udp(PEER, (PORT, PORT), 0, &datagram));
            assert_eq!(node.told(), None);
            assert_eq!(node.left_to_agent(), Some(datagram));
            assert!(!node.maps.claim(&FLOW));
        });
    }
}

#[test]
fn the_active_believes_nothing_else_and_leaves_it_to_its_agent() {
    in_namespace(|| {
        let mut node = Node::active(XdpMode::Tc);
        node.open(&syn().client_frame(), &syn_ack().frame());
        let key = key_of_standby();
        let right = answer(key);
        let of_active = peers(OWN, PEER, (1, 2)).1.giving;
        let older = peers(PEER, OWN, (3, 1)).1.giving;
        let datagram = sealed(&right, key);
        let flipped = |at: usize| with(datagram.clone(), at, &[datagram[at] ^ 1]);
        let another = |change: fn(&mut Answer)| {
            let mut answer = right;
            change(&mut answer);
            sealed(&answer, key)
        };
        for (name, datagram) in [
            ("another digest", another(|answer| answer.digest ^= 1)),
            ("another client", another(|answer| answer.client_isn ^= 1)),
            ("another active", another(|answer| answer.active_isn ^= 1)),
            (
                "another flow",
                another(|answer| answer.flow.client_port ^= 1),
            ),
            ("its own words", sealed(&right, of_active)),
            ("another session", sealed(&right, older)),
            ("no key", sealed(&right, [0; 2])),
            ("magic", flipped(0)),
            ("version", flipped(4)),
            ("reserved", flipped(7)),
            ("flow", flipped(16)),
            ("tag", flipped(40)),
            ("tag", flipped(55)),
            ("short", datagram[..55].to_vec()),
            ("long", [&datagram[..], &[0; 8]].concat()),
        ] {
            transmit(&node.lan, &udp(PEER, (PORT, PORT), 0, &datagram));
            assert_eq!(node.left_to_agent(), Some(datagram), "{name}");
        }
        let elsewhere = [
            udp(Ipv4Addr::new(192, 168, 1, 9), (PORT, PORT), 0, &datagram),
            udp(PEER, (PORT + 1, PORT), 0, &datagram),
        ];
        for frame in elsewhere {
            transmit(&node.lan, &frame);
        }
        node.maps.set_mode(false).unwrap();
        transmit(&node.lan, &udp(PEER, (PORT, PORT), 0, &datagram));
        assert_eq!(node.told(), None, "by none of these");
        node.maps.set_mode(true).unwrap();
        assert!(!node.maps.is_published(&FLOW));

        // The agent has been faster.
        assert!(node.maps.claim(&FLOW));
        transmit(&node.lan, &udp(PEER, (PORT, PORT), 0, &datagram));
        assert_eq!(node.told(), None);

        // It is held once more, and there is room for one agreement.
        node.open(&syn().client_frame(), &syn_ack().frame());
        transmit(&node.lan, &udp(PEER, (PORT, PORT), 0, &datagram));
        assert!(node.told().is_some());
        node.next_opening();
        node.maps.withdraw(&FLOW).unwrap();
        node.open(&syn().client_frame(), &syn_ack().frame());
        transmit(&node.lan, &udp(PEER, (PORT, PORT), 0, &datagram));
        assert_eq!(node.told(), None, "no slot");
        assert!(node.maps.claim(&FLOW), "the agent may let it go");

        // Of other options than Linux writes it does not know the shift.
        node.maps.lend(SLOT).unwrap();
        let odd = syn_ack()
            .options(&[&[1, 3, 3, 7], &[2, 4, 5, 0xb4]])
            .frame();
        node.open(&syn().client_frame(), &odd);
        let before = digest(key, 0, &header(&syn().client_frame()));
        let of_odd = Answer {
            digest: digest(key, before, &header(&odd)),
            ..right
        };
        let datagram = sealed(&of_odd, key);
        while node.left_to_agent().is_some() {}
        transmit(&node.lan, &udp(PEER, (PORT, PORT), 0, &datagram));
        assert_eq!(node.left_to_agent(), Some(datagram));
        let kept = node.maps.kept(&FLOW).unwrap();
        assert!(kept.is_answered_by(&of_odd, key), "as the agent finds");
        assert_eq!(node.count(AckGateVerdict::Agreed), 1);
    });
}

#[test]
fn the_active_keeps_only_what_it_can_let_go_by_itself() {
    in_namespace(|| {
        let mut node = Node::active(XdpMode::Tc);
        let (syn, whole) = (syn().client_frame(), syn_ack().frame());
        assert_eq!(node.open(&syn, &whole), OpeningKind::Kept);
        let with_options = with_ip_options(whole.clone(), 1);
        assert_eq!(node.open(&syn, &with_options), OpeningKind::Held);
        assert!(!node.maps.claim(&FLOW), "nor the one before");
        assert_eq!(node.open(&syn, &whole), OpeningKind::Kept);
        node.copy_to([0; 6]);
        assert_eq!(node.open(&syn, &whole), OpeningKind::Held, "no copies");
        node.copy_to(STANDBY);
        node.maps.agree_with(AgreePeer::default()).unwrap();
        assert_eq!(node.open(&syn, &whole), OpeningKind::Held, "nobody");
    });
}

/// A standby whose agent lets it promise until then, and its frame ring.
pub fn standby(mode: XdpMode, until: u64) -> (Node, RingBuf<MapData>) {
    let (_, peer) = peers(OWN, PEER, (2, 1));
    let mut node = Node::new(mode, State::Standby, peer);
    let promise = Promise {
        until_ns: until,
        from: MirrorPeer::at(ACTIVE_MAC),
        ifindex: index_of("eth0").into(),
    };
    node.maps.promise(promise).unwrap();
    let frames = node.programs.take_frames().unwrap();
    (node, frames)
}

/// Whether the standby's program says that it has answered the next of these copies.
fn is_answered(frames: &mut RingBuf<MapData>) -> bool {
    let mut next = || {
        let entry = frames.next()?;
        FrameHeader::split(&entry).map(|(header, _)| header.flags)
    };
    let flags = wait_until("a copy in the ring", &mut next, Option::is_some).unwrap();
    flags & frame_flags::ANSWERED != 0
}

pub fn is_answer(frame: &[u8]) -> bool {
    frame[..12] == [ACTIVE_MAC, OWN_MAC].concat()
}

#[test]
fn the_standby_answers_for_a_handshake_that_is_in_its_ring_once() {
    in_namespace(|| {
        let (node, mut frames) = standby(XdpMode::Tc, u64::MAX);
        // Without its SYN the agent knows nothing of the connection.
        transmit(&node.lan, &held());
        assert!(!is_answered(&mut frames));
        transmit(&node.lan, &syn().client_frame());
        assert!(!is_answered(&mut frames));
        // Not the copy of one that is held.
        transmit(&node.lan, &syn_ack().frame());
        assert!(!is_answered(&mut frames));
        assert_eq!(receive(&node.lan, QUIET, is_answer), None);

        transmit(&node.lan, &held());
        assert!(is_answered(&mut frames));
        let frame = receive(&node.lan, QUIET, is_answer).unwrap();
        assert_eq!(folded(&frame[14..34]), 0xffff, "checksum of IPv4");
        assert_eq!(frame[26..34], [OWN.octets(), PEER.octets()].concat());
        assert_eq!(
            frame[36..42],
            [&PORT.to_be_bytes()[..], &[0, 64, 0, 0]].concat()
        );
        let (active, _) = peers(PEER, OWN, (1, 2));
        let found = active.open_answer(&frame[PAYLOAD..], OWN).unwrap();
        let key = peers(OWN, PEER, (2, 1)).1.giving;
        assert_eq!(found, answer(key));

        transmit(&node.lan, &held());
        assert!(!is_answered(&mut frames), "a second time");

        for (copy, expected) in [
            (with(held(), 50, &[0x12, 0x34]), None),
            (unfinished(held()), Some(true)),
            (held(), Some(false)),
        ] {
            transmit(&node.lan, &syn().client_frame());
            assert!(!is_answered(&mut frames));
            transmit(&node.lan, &copy);
            assert_eq!(is_answered(&mut frames), expected.is_some());
            let frame = receive(&node.lan, QUIET, is_answer);
            let answer = frame.map(|frame| active.open_answer(&frame[PAYLOAD..], OWN).unwrap());
            assert_eq!(answer.map(|answer| answer.unfinished), expected);
        }
    });
}

#[test]
fn the_standby_promises_nothing_that_its_agent_may_not_keep() {
    for (name, mode, state, until, forgets) in [
        ("room", XdpMode::Tc, State::Standby, u64::MAX, false),
        (
            "no room, or no agent",
            XdpMode::Tc,
            State::Standby,
            1,
            false,
        ),
        ("nobody", XdpMode::Tc, State::Standby, u64::MAX, true),
        (
            "in the driver",
            XdpMode::Native,
            State::Standby,
            u64::MAX,
            false,
        ),
        (
            "takes over",
            XdpMode::Tc,
            State::TakingOver,
            u64::MAX,
            false,
        ),
    ] {
        in_namespace(move || {
            let (node, mut frames) = standby(mode, until);
            set_state(&node.programs, state, u64::MAX);
            transmit(&node.lan, &syn().client_frame());
            assert!(!is_answered(&mut frames), "{name}: a SYN");
            if forgets {
                node.maps.agree_with(AgreePeer::default()).unwrap();
            }
            transmit(&node.lan, &held());
            assert_eq!(is_answered(&mut frames), name == "room", "{name}");
            let answer = receive(&node.lan, QUIET, is_answer);
            assert_eq!(answer.is_some(), name == "room", "{name}");
        });
    }
}

/// The buffer of the answer is that of the SYN-ACK. If it came from a copy of which a device was to finish the checksum, it
/// depends on whether one has done so on the way what the checksum must be.
#[test]
fn a_checksum_that_a_device_is_to_finish_is_left_to_it() {
    in_namespace(|| {
        let mut node = Node::active(XdpMode::Tc);
        let key = key_of_standby();
        let whole = syn_ack().frame();
        for (unfinished_copy, written, expected) in [
            (false, [0, 0], whole.clone()),
            (false, [7, 7], whole.clone()),
            (true, [7, 7], whole.clone()),
            (true, [0, 0], unfinished(whole.clone())),
        ] {
            node.open(&syn().client_frame(), &whole);
            let answer = Answer {
                unfinished: unfinished_copy,
                ..answer(key)
            };
            let datagram = with(sealed(&answer, key), 8, &written);
            transmit(&node.lan, &udp(PEER, (PORT, PORT), 0, &datagram));
            assert_eq!(node.told(), Some(expected), "{unfinished_copy} {written:?}");
            node.next_opening();
            node.maps.withdraw(&FLOW).unwrap();
            node.maps.lend(SLOT).unwrap();
        }
    });
}

#[test]
fn a_syn_ack_that_is_let_go_is_one_that_clients_take() {
    in_namespace(|| {
        let mut node = Node::active(XdpMode::Tc);
        let key = key_of_standby();
        // All that Linux may send, and nothing but what it must.
        let all = options(14);
        for options in [&all[..], &all[..4], &all[..16], &[]] {
            let syn_ack = syn_ack().options(&[options]).frame();
            let kind = node.open(&syn().client_frame(), &syn_ack);
            assert_eq!(kind, OpeningKind::Kept, "{options:?}");
            let before = digest(key, 0, &header(&syn().client_frame()));
            let answer = Answer {
                digest: digest(key, before, &header(&syn_ack)),
                ..answer(key)
            };
            transmit(
                &node.lan,
                &udp(PEER, (PORT, PORT), 0, &sealed(&answer, key)),
            );
            let told = node.told().unwrap();
            assert_eq!(told, syn_ack, "{options:?}");
            let tcp = &told[34..];
            let sum = folded(&[&pseudo_header(tcp.len())[..], tcp].concat());
            assert_eq!(sum, 0xffff, "{options:?}");
            let agreed = node.next_opening().agreed().unwrap();
            let shift = if options.len() == all.len() { 14 } else { 0 };
            assert_eq!(agreed.shift, shift, "{options:?}");
            node.maps.withdraw(&FLOW).unwrap();
            node.maps.lend(SLOT).unwrap();
        }
    });
}
