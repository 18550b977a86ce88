//! Confirmations that the standby's kernel gives by itself: of what, and of what not.

use std::sync::atomic::Ordering;

use aya::maps::{MapData, RingBuf};
use rfsis_agent::bpf::XdpMode;
use rfsis_agent::pledge::Words;
use rfsis_agent::sync::{Confirm, Sack};
use rfsis_common::ack_gate::Confirmation;
use rfsis_common::frame::tcp_flags::{ACK, ECE, FIN, RST, SYN, URG};
use rfsis_common::maps::{FrameHeader, MirrorPeer, Promise, State};
use rfsis_common::pledge::{HELD, Held, Pledged, ROOM, Room, TAKEN, TOLD, WORDS};
use rfsis_common::prompt::PromptSeen;

use crate::agree::{ACTIVE_MAC, Node, peers, standby};
use crate::frames::{FLOW, OWN, OWN_MAC, with, with_ip_options};
use crate::host::{in_namespace, index_of, receive, run, set_state, transmit};
use crate::prompt::{PEER, QUIET};
use crate::segments::{FIRST, FIRST_EDGE, Segment, folded, pseudo_header, pure};

const SLOT: u32 = 9;
const ISN: u32 = FIRST - 1;
/// Bytes before this one are taken for certain.
const LIMIT: u32 = FIRST + 1200;
const PSH: u8 = 0x08;

/// A standby whose agent has pledged to take the flow.
struct Pledging {
    node: Node,
    frames: RingBuf<MapData>,
    words: Words,
}

impl Pledging {
    fn new(mode: XdpMode) -> Self {
        let (node, frames) = standby(mode, u64::MAX);
        let words = node.programs.pledges().unwrap();
        let pledged = Pledged {
            slot: SLOT,
            client_isn: ISN,
        };
        node.maps.pledge(FLOW, pledged).unwrap();
        let this = Self {
            node,
            frames,
            words,
        };
        this.write(ROOM, Room::new(LIMIT, FIRST_EDGE).word());
        this.write(HELD, Held::new(ISN, FIRST).word());
        this
    }

    fn write(&self, place: usize, word: u64) {
        let at = self.words.get(SLOT as usize * WORDS + place).unwrap();
        at.store(word, Ordering::SeqCst);
    }

    fn read(&self, place: usize) -> u64 {
        let at = self.words.get(SLOT as usize * WORDS + place).unwrap();
        at.load(Ordering::SeqCst)
    }

    fn held(&self) -> Held {
        Held::from_word(self.read(HELD))
    }

    /// A copy comes. Gives what the active is told; the copy is in the ring in any case.
    fn said(&mut self, copy: &[u8]) -> Option<Vec<u8>> {
        transmit(&self.node.lan, copy);
        let said = receive(&self.node.lan, QUIET, |frame| {
            frame.get(42..46) == Some(b"RFSP")
        });
        let entry = self.frames.next().expect("the copy is in the ring");
        let (header, frame) = FrameHeader::split(&entry).unwrap();
        assert_eq!((header.len as usize, frame), (copy.len(), copy));
        said
    }
}

/// A copy of what the client sends, whose checksum a device is still to finish.
fn copy(segment: &Segment) -> Vec<u8> {
    let frame = segment.client_frame();
    let sum = folded(&pseudo_header(frame.len() - 34));
    with(frame, 50, &sum.to_be_bytes())
}

fn data(seq: u32, len: usize) -> Segment {
    pure(5000, 9000)
        .seq(seq)
        .flags(ACK | PSH)
        .data(&vec![7; len])
}

#[test]
fn what_follows_what_is_held_is_confirmed_when_it_is_in_the_ring() {
    in_namespace(|| {
        let mut standby = Pledging::new(XdpMode::Tc);
        let (active, mut seen) = (peers(PEER, OWN, (1, 2)).0, PromptSeen::default());
        for (number, (seq, len)) in [(FIRST, 1000), (FIRST + 1000, 1), (FIRST + 1001, 199)]
            .into_iter()
            .enumerate()
        {
            let frame = standby.said(&copy(&data(seq, len))).unwrap();
            assert_eq!(frame[..12], [ACTIVE_MAC, OWN_MAC].concat());
            assert_eq!(folded(&frame[14..34]), 0xffff, "checksum of IPv4");
            let (said, now) = active.open(&frame[42..], OWN, seen).unwrap();
            let ack = seq + len as u32;
            let expected = Confirm {
                flow: FLOW,
                client_isn: ISN,
                ack,
                edge: FIRST_EDGE,
                sack: Sack::default(),
            };
            assert_eq!(said, [expected]);
            assert_eq!(now.highest, number as u64 + 1);
            assert_eq!(frame[47], 1, "a device has still to finish a checksum");
            assert_eq!(standby.held(), Held::new(ISN, ack));
            let told = Confirmation::new(ack, FIRST_EDGE);
            assert_eq!(standby.read(TOLD), told.word());
            seen = now;
        }
        let sequence = standby.node.programs.prompted().unwrap();
        assert_eq!(sequence.get(0).unwrap().load(Ordering::SeqCst), 3);
    });
}

#[test]
fn of_long_segments_that_come_closely_every_second_is_confirmed_at_once() {
    const LONG: usize = 40_000;
    in_namespace(|| {
        let mut standby = Pledging::new(XdpMode::Tc);
        for name in ["eth0", "peer0"] {
            run(&format!("ip link set {name} mtu 65535"));
        }
        let room = FIRST + 10 * LONG as u32;
        standby.write(ROOM, Room::new(room, FIRST_EDGE).word());
        let told = Confirmation::new(FIRST, FIRST_EDGE);
        standby.write(TOLD, told.word());
        let mut seq = FIRST;
        let mut next = |standby: &mut Pledging, taken| {
            standby.write(TAKEN, taken);
            let said = standby.said(&copy(&data(seq, LONG))).is_some();
            seq += LONG as u32;
            assert_eq!(standby.held(), Held::new(ISN, seq));
            let told = Confirmation::new(seq, FIRST_EDGE).word();
            assert_eq!(standby.read(TOLD) == told, said);
            assert!((1..u64::MAX).contains(&standby.read(TAKEN)));
            said
        };
        const JUST_NOW: u64 = u64::MAX;
        const LONG_AGO: u64 = 0;
        let stream = [(); 4].map(|()| next(&mut standby, JUST_NOW));
        assert_eq!(stream, [false, true, false, true]);
        assert!(next(&mut standby, LONG_AGO));
    });
}

#[test]
fn all_else_is_left_to_the_agent() {
    in_namespace(|| {
        let mut standby = Pledging::new(XdpMode::Tc);
        let next = data(FIRST, 1000);
        let whole = copy(&next);
        let flags = |flags| copy(&next.clone().flags(flags));
        let mut refused = vec![
            ("what is held", copy(&data(FIRST - 1000, 1000))),
            ("half of it held", copy(&data(FIRST - 1, 1000))),
            ("behind a hole", copy(&data(FIRST + 1, 1000))),
            ("no room", copy(&data(FIRST, 1201))),
            ("no data", copy(&data(FIRST, 0))),
            ("FIN", flags(ACK | FIN)),
            ("RST", flags(ACK | RST)),
            ("SYN", flags(ACK | SYN)),
            ("URG", flags(ACK | URG)),
            ("no ACK", flags(PSH)),
            ("a finished checksum", next.client_frame()),
            ("a wrong checksum", with(whole.clone(), 50, &[0x12, 0x34])),
            (
                "a wrong checksum of IPv4",
                with(whole.clone(), 24, &[0x12, 0x34]),
            ),
            (
                "from elsewhere",
                with(whole.clone(), 6, &[2, 0, 0, 0, 0, 9]),
            ),
            ("options of IPv4", with_ip_options(whole.clone(), 1)),
            ("another port", with(whole.clone(), 34, &[0x12, 0x34])),
        ];
        for size in [0, 4] {
            refused.push(("a short header", with(whole.clone(), 46, &[size << 4])));
        }
        for (name, frame) in &refused {
            assert_eq!(standby.said(frame), None, "{name}");
            assert_eq!(standby.held(), Held::new(ISN, FIRST), "{name}");
        }
        assert!(standby.said(&flags(ACK | ECE)).is_some());
    });
}

#[test]
fn no_pledge_and_no_standby_confirms_nothing() {
    let promise = || Promise {
        until_ns: u64::MAX,
        from: MirrorPeer::at(ACTIVE_MAC),
        ifindex: index_of("eth0").into(),
    };
    type Change = fn(&Pledging, Promise);
    let changes: [(&str, Change); 9] = [
        ("nothing pledged", |s, _| s.write(HELD, 0)),
        ("of another connection", |s, _| {
            s.write(HELD, Held::new(ISN + 1, FIRST).word());
        }),
        ("given back", |s, _| s.node.maps.retract(&FLOW).unwrap()),
        ("the agent is not at work", |s, promise| {
            s.node
                .maps
                .promise(Promise {
                    until_ns: 1,
                    ..promise
                })
                .unwrap();
        }),
        ("nobody copies", |s, promise| {
            let from = MirrorPeer::NOBODY;
            s.node.maps.promise(Promise { from, ..promise }).unwrap();
        }),
        ("copies come in elsewhere", |s, promise| {
            s.node
                .maps
                .promise(Promise {
                    ifindex: 1,
                    ..promise
                })
                .unwrap();
        }),
        ("nobody to tell", |s, _| {
            s.node
                .maps
                .agree_with(rfsis_common::agree::AgreePeer::default())
                .unwrap();
        }),
        ("takes over", |s, _| {
            set_state(&s.node.programs, State::TakingOver, u64::MAX);
        }),
        ("as it was", |_, _| {}),
    ];
    for (name, change) in changes {
        in_namespace(move || {
            let mut standby = Pledging::new(XdpMode::Tc);
            change(&standby, promise());
            let before = standby.held();
            let said = standby.said(&copy(&data(FIRST, 1000)));
            assert_eq!(said.is_some(), name == "as it was", "{name}");
            assert_eq!(standby.held() == before, said.is_none(), "{name}");
        });
    }
    in_namespace(|| {
        let mut standby = Pledging::new(XdpMode::Native);
        assert_eq!(
            standby.said(&copy(&data(FIRST, 1000))),
            None,
            "in the driver"
        );
    });
}
