//! Prompt datagrams: what the programs take of them, what the client is told, and what is left to the agent.

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, send};
use rfsis_agent::bpf::{GuardMaps, Program, Programs, SkbContext, XdpMode};
use rfsis_agent::sync::{Confirm, Prompts, Sack, Term};
use rfsis_common::ack_gate::{Confirmation, Guarded, Sent};
use rfsis_common::frame::tcp_flags::ACK;
use rfsis_common::maps::{FlowKey, State};
use rfsis_common::prompt::{Delegated, MAX_RECORDS, PromptRecord, PromptSeen, seal};

use crate::frames::{CLIENT, FLOW, OWN, SERVICE, VIP, ethernet, from_vip, ipv4, tagged, with};
use crate::host::{in_namespace, load_guarding, packet_socket, receive, run, set_state, veth};
use crate::segments::pseudo_header;

pub const PEER: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 2);
pub const PORT: u16 = 9501;
const KEY: &[u8] = b"0123456789abcdef0123456789abcdef";
/// Nothing comes within this time: it was not sent.
pub const QUIET: Duration = Duration::from_millis(60);

/// The client's first byte, the active's next, the edge that the SYN-ACK offered.
const FIRST: u32 = 2000;
const NEXT: u32 = 5000;
const FIRST_EDGE: u32 = FIRST + 64_000;
const SHIFT: u32 = 2;
const STAMPS: [u8; 12] = [1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9];

fn term(own_session: u64, peer_session: u64) -> Option<Term> {
    Some(Term {
        own_session,
        peer_session,
        epoch: 3,
    })
}

/// An active node on one end of a cable, and at the other the LAN with a standby.
struct Node {
    programs: Programs,
    maps: GuardMaps,
    lan: OwnedFd,
    /// The agent's end of the sync channel.
    agent: UdpSocket,
    standby: Prompts,
    active: Prompts,
    element: u32,
}

impl Node {
    fn new(mode: Option<XdpMode>) -> Self {
        veth(1500);
        run("ip link set eth0 address 02:00:00:00:00:01");
        run(&format!(
            "ip neigh add {PEER} lladdr 02:00:00:00:00:02 dev eth0"
        ));
        let mut programs = load_guarding("eth0");
        programs.attach_gate("eth0").unwrap();
        match mode {
            Some(mode) => assert_eq!(programs.attach_ingress("eth0", mode).unwrap(), mode),
            None => programs.attach_mirror("eth0").unwrap(),
        }
        set_state(&programs, State::Active, u64::MAX);
        let maps = programs.guard_maps().unwrap();
        maps.set_mode(true).unwrap();
        let end = |node, peer| Prompts::new(KEY, "demo", node, peer, PORT);
        let (mut standby, mut active) = (end(PEER, OWN), end(OWN, PEER));
        standby.set_term(term(2, 1));
        let (peer, _) = active.set_term(term(1, 2)).unwrap();
        maps.take_prompts(peer).unwrap();
        let agent = UdpSocket::bind((OWN, PORT)).unwrap();
        agent.set_read_timeout(Some(QUIET)).unwrap();
        Self {
            lan: packet_socket("peer0"),
            programs,
            maps,
            agent,
            standby,
            active,
            element: peer.seen,
        }
    }

    /// A flow behind its handshake, whose kernel has said `ack` and was held.
    fn open(&mut self, slot: u32, flow: FlowKey, ack: u32, stamps: &[u8]) {
        let sent = Sent::new(FIRST - 1, NEXT - 1, (FIRST_EDGE - FIRST) as u16);
        let confirmed = Confirmation::new(FIRST, FIRST_EDGE);
        self.maps.reset(slot, sent).unwrap();
        assert!(self.maps.confirm(slot, confirmed));
        let guarded = Guarded {
            slot,
            client_isn: FIRST - 1,
            shift: SHIFT,
        };
        self.maps.publish(flow, guarded).unwrap();
        let delegated = Delegated::of(FIRST - 1);
        self.maps.delegate(slot, delegated).unwrap();
        assert_eq!(self.judge(&ack_of(flow, ack, stamps)), 4, "held");
    }

    /// The gate's answer to a packet of the active's kernel.
    fn judge(&mut self, packet: &[u8]) -> i32 {
        let context = SkbContext::default();
        let run = self.programs.test_run(Program::Gate, packet, context);
        run.unwrap().0
    }

    fn datagrams(&mut self, confirms: &[Confirm]) -> Vec<Vec<u8>> {
        let mut made = Vec::new();
        self.standby
            .seal(confirms, |datagram| made.push(datagram.to_vec()));
        made
    }

    fn transmit(&self, frame: &[u8]) {
        send(self.lan.as_raw_fd(), frame, MsgFlags::empty()).unwrap();
    }

    /// What the client hears next.
    fn told(&self) -> Option<Vec<u8>> {
        receive(&self.lan, QUIET, from_vip)
    }

    /// What the agent gets.
    fn left_to_agent(&self) -> Option<Vec<u8>> {
        let mut buffer = [0; 2000];
        let (len, _) = self.agent.recv_from(&mut buffer).ok()?;
        Some(buffer[..len].to_vec())
    }

    fn seen(&self) -> PromptSeen {
        self.maps.prompts_seen(self.element)
    }
}

/// A pure ACK that the active's kernel sends.
fn ack_of(flow: FlowKey, ack: u32, options: &[u8]) -> Vec<u8> {
    let mut tcp = [
        flow.service_port.to_be_bytes(),
        flow.client_port.to_be_bytes(),
    ]
    .concat();
    tcp.extend(NEXT.to_be_bytes());
    tcp.extend(ack.to_be_bytes());
    tcp.extend([((5 + options.len() / 4) << 4) as u8, ACK]);
    tcp.extend(9000_u16.to_be_bytes());
    tcp.extend([0; 4]);
    tcp.extend(options);
    // To the client's next hop: other addresses than those of the sync channel.
    let frame = ethernet(0x0800, &ipv4(6, VIP, CLIENT, &tcp));
    with(frame, 0, &[2, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 1])
}

fn flow(number: u16) -> FlowKey {
    FlowKey {
        client_port: FLOW.client_port + number,
        ..FLOW
    }
}

fn confirm(flow: FlowKey, ack: u32) -> Confirm {
    Confirm {
        flow,
        client_isn: FIRST - 1,
        ack,
        edge: FIRST + 100_000,
        sack: Sack::default(),
    }
}

pub fn udp(source: Ipv4Addr, ports: (u16, u16), checksum: u16, datagram: &[u8]) -> Vec<u8> {
    let mut udp = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    udp.extend((8 + datagram.len() as u16).to_be_bytes());
    udp.extend(checksum.to_be_bytes());
    udp.extend(datagram);
    let mut frame = ethernet(0x0800, &ipv4(17, source, OWN, &udp));
    let sum = !folded(&frame[14..34]);
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    frame
}

fn from_peer(datagram: &[u8]) -> Vec<u8> {
    udp(PEER, (PORT, PORT), 0, datagram)
}

/// Ones' complement sum (RFC 1071).
pub fn folded(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let mut sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn assert_tells(frame: &[u8], flow: FlowKey, ack: u32, options: &[u8]) {
    assert_eq!(frame[..12], [2, 0, 0, 0, 0, 0x50, 2, 0, 0, 0, 0, 1]);
    assert_eq!(folded(&frame[14..34]), 0xffff, "checksum of IPv4");
    let tcp = &frame[34..];
    let mut pseudo = [VIP.octets(), CLIENT.octets()].concat();
    pseudo.extend([0, 6, 0, tcp.len() as u8]);
    assert_eq!(folded(&[&pseudo, tcp].concat()), 0xffff, "checksum of TCP");
    assert_eq!(usize::from(frame[17]), 20 + tcp.len());
    assert_eq!(tcp[..2], SERVICE.to_be_bytes());
    assert_eq!(tcp[2..4], flow.client_port.to_be_bytes());
    assert_eq!(tcp[4..8], NEXT.to_be_bytes());
    assert_eq!(tcp[8..12], ack.to_be_bytes());
    assert_eq!((tcp[13], &tcp[20..]), (ACK, options));
}

#[test]
fn the_kernel_tells_clients_what_the_standby_confirms_and_the_agent_sleeps() {
    for mode in [None, Some(XdpMode::Tc), Some(XdpMode::Native)] {
        in_namespace(move || {
            let mut node = Node::new(mode);
            if mode == Some(XdpMode::Native) {
                node.programs.attach_mirror("eth0").unwrap();
            }
            let ahead = FIRST + 3000;
            node.open(3, flow(0), ahead, &STAMPS);
            node.open(4, flow(1), ahead, &[]);
            // The second has nothing more to be told.
            let confirms = [confirm(flow(0), FIRST + 1000), confirm(flow(1), ahead)];
            let datagram = node.datagrams(&confirms).remove(0);
            node.transmit(&from_peer(&datagram));
            assert_tells(&node.told().unwrap(), flow(0), FIRST + 1000, &STAMPS);
            assert_tells(&node.told().unwrap(), flow(1), ahead, &[]);
            assert_eq!(node.maps.sent(3).unwrap().told, FIRST + 1000);
            assert_eq!(node.maps.sent(4).unwrap().told, ahead);
            assert_eq!(
                node.maps.confirmed(3),
                Confirmation::new(FIRST + 1000, FIRST + 100_000)
            );
            assert_eq!(node.left_to_agent(), None);
            assert_eq!((node.seen().highest, node.seen().taken), (1, 1));
            assert!(node.seen().at_ns > 0);
            // What the kernel says later passes as far as it is confirmed.
            let within = ack_of(flow(0), FIRST + 900, &STAMPS);
            assert_eq!(node.judge(&within), -1);
            let beyond = ack_of(flow(0), FIRST + 1001, &STAMPS);
            assert_eq!(node.judge(&beyond), 4);
            // Less than before says nothing, and the rest is told once.
            for (ack, tells) in [(FIRST + 500, false), (ahead, true), (ahead, false)] {
                let datagram = node.datagrams(&[confirm(flow(0), ack)]).remove(0);
                node.transmit(&from_peer(&datagram));
                assert_eq!(node.told().is_some(), tells, "{ack}");
            }
            assert_eq!(node.seen().taken, 4);
        });
    }
}

/// Numbers wrap, and those that lie more than 2 GiB apart cannot be compared: nobody may remember an old one.
#[test]
fn a_client_that_sends_for_ever_is_told_of_it_whoever_hears_the_standby() {
    const STEP: u32 = 1 << 29;
    in_namespace(|| {
        let mut node = Node::new(Some(XdpMode::Tc));
        node.open(3, flow(0), FIRST + 1, &STAMPS);
        let mut ack = FIRST;
        // Twice around by the kernel alone, twice by the agent alone, and once by the kernel again.
        for step in 0..40 {
            ack = ack.wrapping_add(STEP);
            let confirm = Confirm {
                ack,
                edge: ack.wrapping_add(100_000),
                ..confirm(flow(0), ack)
            };
            let confirmation = Confirmation::new(confirm.ack, confirm.edge);
            assert_eq!(
                node.judge(&ack_of(flow(0), ack, &STAMPS)),
                4,
                "{step}: held"
            );
            if (16..32).contains(&step) {
                assert_eq!(node.maps.confirm_more(3, confirmation), confirmation);
                let held = ack_of(flow(0), ack, &STAMPS);
                assert_eq!(node.judge(&held), -1, "{step}: passes");
            } else {
                let datagram = node.datagrams(&[confirm]).remove(0);
                node.transmit(&from_peer(&datagram));
                let told = node
                    .told()
                    .unwrap_or_else(|| panic!("{step}: nothing is told"));
                assert_tells(&told, flow(0), ack, &STAMPS);
            }
            assert_eq!(node.maps.confirmed(3), confirmation, "{step}");
        }
    });
}

#[test]
fn a_full_datagram_is_taken_and_more_go_into_another() {
    in_namespace(|| {
        let mut node = Node::new(Some(XdpMode::Tc));
        let flows: Vec<_> = (0..=MAX_RECORDS as u16).map(flow).collect();
        for (slot, flow) in (0..).zip(&flows) {
            node.open(slot, *flow, FIRST + 10, &STAMPS);
        }
        let confirms: Vec<_> = flows.iter().map(|f| confirm(*f, FIRST + 10)).collect();
        let datagrams = node.datagrams(&confirms);
        assert_eq!(datagrams.len(), 2);
        for datagram in &datagrams {
            node.transmit(&from_peer(datagram));
        }
        for flow in flows {
            assert_tells(&node.told().unwrap(), flow, FIRST + 10, &STAMPS);
        }
        assert_eq!(node.left_to_agent(), None);
    });
}

/// The buffer of the ACK is that of the datagram. If the standby's kernel made that of a copy of which a device was to finish
/// the checksum, it depends on whether one has done so on the way what the checksum must be.
#[test]
fn what_the_standbys_kernel_confirms_counts_and_a_checksum_is_left_to_who_finishes_it() {
    in_namespace(|| {
        let mut node = Node::new(Some(XdpMode::Tc));
        node.open(3, flow(0), FIRST + 3000, &STAMPS);
        let key = node.standby.agreeing().prompting;
        let mut sequence = 0;
        for (unfinished, written, is_left) in [
            (false, [0, 0], false),
            (true, [7, 7], false),
            (true, [0, 0], true),
        ] {
            sequence += 1;
            let ack = FIRST + 100 * sequence as u32;
            let record = PromptRecord {
                flow: flow(0),
                client_isn: FIRST - 1,
                confirmation: Confirmation::new(ack, FIRST + 100_000),
            };
            let words = seal(&record, sequence, unfinished, key);
            let bytes = words.into_iter().flat_map(u64::to_ne_bytes).collect();
            node.transmit(&from_peer(&with(bytes, 8, &written)));
            let mut told = node.told().unwrap();
            if is_left {
                let sum = folded(&pseudo_header(told.len() - 34));
                assert_eq!(told[50..52], sum.to_be_bytes(), "as much as a device needs");
                // As the device does it: the sum of all from the TCP header on.
                let sum = !folded(&told[34..]);
                told[50..52].copy_from_slice(&sum.to_be_bytes());
            }
            assert_tells(&told, flow(0), ack, &STAMPS);
            assert_eq!(node.left_to_agent(), None, "{unfinished} {written:?}");
        }
    });
}

#[test]
fn what_is_forged_replayed_or_cut_has_no_effect_in_the_kernel() {
    in_namespace(|| {
        let mut node = Node::new(Some(XdpMode::Tc));
        node.open(3, flow(0), FIRST + 3000, &STAMPS);
        let genuine = node.datagrams(&[confirm(flow(0), FIRST + 1000)]).remove(0);
        // But for what a device may write.
        let signed = (0..genuine.len()).filter(|at| !(8..16).contains(at));
        let mut table: Vec<(String, Vec<u8>)> = signed
            .map(|at| {
                let changed = with(genuine.clone(), at, &[genuine[at] ^ 0x10]);
                (format!("byte {at} changed"), from_peer(&changed))
            })
            .collect();
        let cut = |len: usize| from_peer(&genuine[..len]);
        let mut long = genuine.clone();
        long.extend([0; 24]);
        let mut lies = from_peer(&genuine);
        lies[39] += 24;
        table.extend([
            ("one byte short".into(), cut(genuine.len() - 1)),
            ("one record short".into(), cut(genuine.len() - 24)),
            ("a record more".into(), from_peer(&long)),
            ("longer than it is".into(), lies),
            ("empty".into(), cut(0)),
            ("nobody's".into(), udp(CLIENT, (PORT, PORT), 0, &genuine)),
            ("of another port".into(), udp(PEER, (1, PORT), 0, &genuine)),
            (
                "with a checksum".into(),
                udp(PEER, (PORT, PORT), 1, &genuine),
            ),
            ("VLAN 5".into(), tagged(5, &from_peer(&genuine))),
        ]);
        // Of another session, of another epoch, and what this node says itself.
        for (other, epoch, of_active) in [(9, 3, false), (2, 4, false), (1, 3, true)] {
            let end = if of_active {
                &mut node.active
            } else {
                &mut node.standby
            };
            let term = Term {
                own_session: other,
                peer_session: if of_active { 2 } else { 1 },
                epoch,
            };
            end.set_term(Some(term));
            let mut made = Vec::new();
            end.seal(&[confirm(flow(0), FIRST + 1000)], |d| made = d.to_vec());
            table.push((format!("{term:?}"), from_peer(&made)));
        }
        for (name, frame) in &table {
            node.transmit(frame);
            assert_eq!(node.maps.confirmed(3).ack(), FIRST, "{name}");
            assert_eq!(node.seen(), PromptSeen::default(), "{name}");
        }
        assert_eq!(node.told(), None);
        // The genuine one counts, once.
        node.transmit(&from_peer(&genuine));
        assert_tells(&node.told().unwrap(), flow(0), FIRST + 1000, &STAMPS);
        let before = Confirmation::new(FIRST, FIRST_EDGE);
        assert!(node.maps.confirm(3, before));
        node.transmit(&from_peer(&genuine));
        assert_eq!(node.maps.confirmed(3).ack(), FIRST, "replayed");
    });
}

#[test]
fn what_the_agent_has_to_hear_of_is_left_to_it_unchanged() {
    in_namespace(|| {
        let mut node = Node::new(Some(XdpMode::Tc));
        node.open(3, flow(0), FIRST + 3000, &STAMPS);
        let known = confirm(flow(0), FIRST + 1000);
        let other_isn = Confirm {
            client_isn: FIRST,
            ..known
        };
        let left = |name: &str, node: &mut Node, confirms: &[Confirm]| {
            let datagram = node.datagrams(confirms).remove(0);
            node.transmit(&from_peer(&datagram));
            assert_eq!(node.left_to_agent(), Some(datagram), "{name}");
            assert_eq!(node.told(), None, "{name}");
            assert_eq!(node.seen().taken, 0, "{name}");
        };
        left("unknown flow", &mut node, &[confirm(flow(1), FIRST + 1000)]);
        left("another connection", &mut node, &[other_isn]);
        node.maps.delegate(3, Delegated::default()).unwrap();
        left("the agent's own", &mut node, &[known]);
        node.maps.set_mode(false).unwrap();
        left("an open gate", &mut node, &[known]);
    });
}
