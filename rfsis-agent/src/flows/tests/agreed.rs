//! Openings on which the kernels agree by themselves: what the active's guard and the standby make of them.

use std::net::Ipv4Addr;

use rfsis_common::agree::Answer;

use super::*;
use crate::simulation::{Opening, SLOTS};
use crate::sync::{Open, Prompts, Term};

const CLIENT_ISN: u32 = 1000;
const ACTIVE_ISN: u32 = 5000;

/// An active's gate and guard, the standby, and segments by hand.
struct Hand {
    gate: Gate,
    standby: Flows,
    /// The maps of the standby's programs.
    programs: Maps,
    world: World,
    now: Nanos,
}

fn prompts(node: u8, peer: u8) -> Prompts {
    let address = |last| Ipv4Addr::new(10, 0, 0, last);
    let mut prompts = Prompts::new(b"0123456789abcdef", "demo", address(node), address(peer), 1);
    prompts.set_term(Some(Term {
        own_session: node.into(),
        peer_session: peer.into(),
        epoch: 1,
    }));
    prompts
}

impl Hand {
    /// A standby answers the guard.
    fn guarding() -> Self {
        let now = SECOND;
        let mut gate = Gate::new(now);
        gate.guard.heard(now, &mut gate.maps);
        gate.maps.copied = true;
        gate.maps.agreement.peer = prompts(1, 2).agreeing();
        let mut programs = Maps::default();
        programs.agreement.peer = prompts(2, 1).agreeing();
        programs.agreement.promise = Nanos::MAX;
        let config = FlowsConfig {
            guarded: true,
            copied: true,
            ..config()
        };
        Self {
            gate,
            standby: Flows::new(config).unwrap(),
            programs,
            world: World::default(),
            now,
        }
    }

    fn open(port: u16) -> Open {
        let options = |mss| segment::Options {
            mss: Some(mss),
            ..segment::Options::default()
        };
        Open {
            flow: segment::flow_key(CLIENT, port, ECHO),
            client_isn: CLIENT_ISN,
            active_isn: ACTIVE_ISN,
            client_window: 60_000,
            client: options(1460),
            active: options(1400),
        }
    }

    /// SYN and SYN-ACK.
    fn handshake(port: u16) -> [Vec<u8>; 2] {
        let syn = TcpRepr {
            seq_number: seq(CLIENT_ISN),
            window_len: 60_000,
            max_seg_size: Some(1460),
            ..bare_repr(port, ECHO, TcpControl::Syn)
        };
        let answer = TcpRepr {
            seq_number: seq(ACTIVE_ISN),
            ack_number: Some(seq(CLIENT_ISN + 1)),
            window_len: 64_000,
            max_seg_size: Some(1400),
            ..bare_repr(ECHO, port, TcpControl::Syn)
        };
        [
            by_hand(&syn, Direction::ToVip),
            by_hand(&answer, Direction::FromVip),
        ]
    }

    /// The kernel answers a client, and the gate keeps that.
    fn shake(&mut self, port: u16) {
        let [syn, answer] = Self::handshake(port);
        let maps = &mut self.gate.maps;
        maps.agreement.note_syn(&syn, false);
        let syn = Opening::Packet(rfsis_common::ack_gate::OpeningKind::Syn, syn);
        maps.openings.push_back(syn);
        let (_, left) = maps.judge(answer);
        assert_eq!(left, None);
    }

    /// What the standby's program says to the copies.
    fn answer(&mut self, port: u16) -> Vec<u8> {
        let [syn, answer] = Self::handshake(port);
        let agreement = &mut self.programs.agreement;
        agreement.note_syn(&syn, true);
        agreement.answer(&held(answer), self.now).unwrap()
    }

    /// The guard hears what the gate has reported.
    fn report(&mut self) {
        let (guard, maps) = (&mut self.gate.guard, &mut self.gate.maps);
        while let Some(opening) = maps.openings.pop_front() {
            match opening {
                Opening::Packet(kind, packet) => {
                    guard.process_opening(&packet, kind, self.now, maps);
                }
                Opening::Agreed(flow, agreed, at) => guard.process_agreed(flow, agreed, at, maps),
            }
        }
    }

    /// What has left.
    fn left(&mut self) -> usize {
        self.gate.maps.take_released().len()
    }

    fn hears(&mut self, record: Record) {
        let maps = &mut self.gate.maps;
        self.gate.guard.process_record(&record, self.now, maps);
    }

    /// The agent's half of an answer that the programs have left to it.
    fn agent_takes(&mut self, datagram: &[u8]) -> bool {
        let answer: Answer = prompts(1, 2)
            .open_answer(datagram, Ipv4Addr::new(10, 0, 0, 2))
            .unwrap();
        let key = prompts(1, 2).agreeing().taking;
        let (guard, maps) = (&mut self.gate.guard, &mut self.gate.maps);
        guard.process_answer(&answer, key, self.now, maps)
    }

    /// The standby's agent gets the copies, of which its program has answered the second.
    fn follow(&mut self, port: u16) -> Vec<Record> {
        let [syn, answer] = Self::handshake(port);
        let (flows, world) = (&mut self.standby, &mut self.world);
        flows.process_frame(&syn, Direction::ToVip, self.now, world);
        flows.process_answered(&held(answer), self.now, world);
        let mut records = vec![];
        flows.take_confirmations(|record| records.push(record));
        records
    }
}

const PORT: u16 = 50_000;

#[test]
fn a_flow_on_which_the_kernels_agree_is_guarded_before_the_agents_hear_of_it() {
    let mut hand = Hand::guarding();
    let flow = Hand::open(PORT).flow;
    hand.shake(PORT);
    let answer = hand.answer(PORT);
    assert!(hand.gate.maps.take_answer(&answer, hand.now));
    assert_eq!(hand.left(), 1);
    assert!(hand.gate.maps.guarded.contains_key(&flow));
    hand.report();
    assert!(hand.gate.guard.guards(flow));
    assert_eq!(hand.left(), 0, "once");
    // It is not told of it, nor asked.
    let mut said = vec![];
    hand.gate.guard.take_records(&mut said);
    hand.gate
        .guard
        .poll(hand.now + 100 * MS, &mut hand.gate.maps);
    hand.gate.guard.take_records(&mut said);
    assert_eq!(said, []);
    // What the standby says of it later counts.
    let client_isn = CLIENT_ISN;
    hand.hears(Record::Close { flow, client_isn });
    assert!(!hand.gate.maps.guarded.contains_key(&flow));
}

#[test]
fn who_is_first_lets_it_go_and_the_other_does_not() {
    let mut hand = Hand::guarding();
    hand.shake(PORT);
    hand.report();
    let answer = hand.answer(PORT);
    hand.hears(Record::Known(Hand::open(PORT)));
    assert_eq!(hand.left(), 1, "the agent");
    assert!(!hand.gate.maps.take_answer(&answer, hand.now));
    assert!(!hand.agent_takes(&answer));
    assert_eq!(hand.left(), 0);

    let other = PORT + 1;
    hand.shake(other);
    hand.report();
    let answer = hand.answer(other);
    assert!(hand.gate.maps.take_answer(&answer, hand.now));
    assert_eq!(hand.left(), 1, "the program");
    hand.hears(Record::Known(Hand::open(other)));
    assert_eq!(hand.left(), 0);
    hand.report();
    assert!(hand.gate.guard.guards(Hand::open(other).flow));
}

#[test]
fn what_the_program_cannot_take_the_agent_does() {
    let mut hand = Hand::guarding();
    hand.gate.maps.agreement.spare.clear();
    hand.shake(PORT);
    let answer = hand.answer(PORT);
    assert!(!hand.gate.maps.take_answer(&answer, hand.now), "no slot");
    hand.report();
    assert_eq!(hand.left(), 0);
    // One that speaks of another handshake says nothing of this.
    let mut other = prompts(1, 2)
        .open_answer(&answer, Ipv4Addr::new(10, 0, 0, 2))
        .unwrap();
    other.digest ^= 1;
    let (guard, maps) = (&mut hand.gate.guard, &mut hand.gate.maps);
    let key = prompts(1, 2).agreeing().taking;
    assert!(!guard.process_answer(&other, key, hand.now, maps));
    assert!(hand.agent_takes(&answer));
    assert_eq!(hand.left(), 1);
    assert!(hand.gate.guard.guards(Hand::open(PORT).flow));
}

#[test]
fn what_the_program_got_wrong_the_guard_puts_right() {
    for wrong in [(0, 0), (1, 3)] {
        let mut hand = Hand::guarding();
        let flow = Hand::open(PORT).flow;
        hand.shake(PORT);
        let answer = hand.answer(PORT);
        assert!(hand.gate.maps.take_answer(&answer, hand.now));
        for opening in &mut hand.gate.maps.openings {
            if let Opening::Agreed(_, agreed, _) = opening {
                (agreed.guarded, agreed.shift) = wrong;
            }
        }
        let published = hand.gate.maps.guarded.remove(&flow).unwrap();
        hand.report();
        assert_eq!(hand.gate.maps.guarded.get(&flow), Some(&published));
        assert!(hand.gate.guard.guards(flow));
    }
}

/// A standby that is silent from then on, or another one, does not hold what was agreed on with it.
#[test]
fn what_was_agreed_on_with_a_standby_that_is_gone_is_not_guarded() {
    for (name, heard_again) in [("silent", false), ("another one", true)] {
        let mut hand = Hand::guarding();
        let flow = Hand::open(PORT).flow;
        hand.shake(PORT);
        hand.report();
        let answer = hand.answer(PORT);
        assert!(hand.gate.maps.take_answer(&answer, hand.now));
        hand.now += MS;
        hand.gate.guard.peer_changed(hand.now, &mut hand.gate.maps);
        if heard_again {
            hand.now += MS;
            hand.gate.guard.heard(hand.now, &mut hand.gate.maps);
        }
        hand.report();
        assert!(!hand.gate.guard.guards(flow), "{name}");
        let slot = hand.gate.maps.guarded[&flow].slot as usize;
        assert!(hand.gate.maps.confirmed[slot].is_open(), "{name}");
        assert_eq!(hand.left(), 1, "{name}");
    }
}

#[test]
fn what_is_still_held_when_the_standby_is_gone_leaves_once() {
    let mut hand = Hand::guarding();
    hand.shake(PORT);
    hand.report();
    let answer = hand.answer(PORT);
    hand.gate.guard.peer_changed(hand.now, &mut hand.gate.maps);
    assert_eq!(hand.left(), 1);
    hand.gate.maps.guarding = true;
    assert!(!hand.gate.maps.take_answer(&answer, hand.now));
    // Nor does it where the guard hears of both at once.
    let mut hand = Hand::guarding();
    hand.shake(PORT);
    hand.gate.guard.peer_changed(hand.now, &mut hand.gate.maps);
    hand.report();
    assert_eq!(hand.left(), 1);
    assert!(hand.gate.maps.agreement.pending.is_empty());
}

/// Each takes one, and gives one back.
#[test]
fn no_slot_is_lost() {
    let mut hand = Hand::guarding();
    for round in 0..4 * SLOTS as u16 {
        let port = PORT + round;
        hand.shake(port);
        let answer = hand.answer(port);
        assert!(hand.gate.maps.take_answer(&answer, hand.now), "{round}");
        hand.report();
        hand.hears(Record::Close {
            flow: Hand::open(port).flow,
            client_isn: CLIENT_ISN,
        });
    }
    // As many as there are flows open at once.
    for round in 0..SLOTS as u16 {
        let port = 100 + round;
        hand.shake(port);
        hand.report();
        hand.hears(Record::Known(Hand::open(port)));
        assert!(hand.gate.guard.guards(Hand::open(port).flow), "{round}");
    }
    assert_eq!(hand.gate.guard.census().refused, 0);
}

#[test]
fn a_node_that_is_standby_by_now_guards_nothing_of_it() {
    let mut hand = Hand::guarding();
    hand.shake(PORT);
    let answer = hand.answer(PORT);
    hand.report();
    assert!(hand.gate.maps.take_answer(&answer, hand.now));
    hand.gate.guard.go_standby(&mut hand.gate.maps);
    hand.report();
    assert!(hand.gate.maps.guarded.is_empty());
    let mut said = vec![];
    hand.gate.guard.take_records(&mut said);
    assert_eq!(said, []);
}

#[test]
fn the_standby_follows_what_its_program_has_answered_and_says_nothing() {
    let mut hand = Hand::guarding();
    assert_eq!(hand.follow(PORT), []);
    let open = Hand::open(PORT);
    assert!(hand.standby.guards(open.flow, CLIENT_ISN, ACTIVE_ISN));
    assert!(!hand.standby.guards(open.flow, CLIENT_ISN, ACTIVE_ISN + 1));
    // What is asked is answered.
    assert!(hand.standby.process_open(&open, hand.now, &mut hand.world));
    let mut records = vec![];
    hand.standby
        .take_confirmations(|record| records.push(record));
    assert_eq!(records, [Record::Known(open)]);
}

#[test]
fn the_standby_says_which_of_them_it_does_not_follow() {
    let mut hand = Hand::guarding();
    let (flow, client_isn) = (Hand::open(PORT).flow, CLIENT_ISN);
    let refuse = [Record::Refuse { flow, client_isn }];
    hand.world.live_limit = Some(0);
    assert_eq!(hand.follow(PORT), refuse);
    // Its SYN never came.
    let mut hand = Hand::guarding();
    let [_, answer] = Hand::handshake(PORT);
    let (flows, world) = (&mut hand.standby, &mut hand.world);
    flows.process_answered(&held(answer), hand.now, world);
    let mut records = vec![];
    flows.take_confirmations(|record| records.push(record));
    assert_eq!(records, refuse);

    // It is not the peer's, or its checksum is wrong.
    let mut hand = Hand::guarding();
    let [syn, mut answer] = Hand::handshake(PORT);
    let (flows, world) = (&mut hand.standby, &mut hand.world);
    flows.process_frame(&syn, Direction::ToVip, hand.now, world);
    flows.disclaim(&answer);
    answer[34] ^= 1;
    flows.process_answered(&answer, hand.now, world);
    let mut records = vec![];
    flows.take_confirmations(|record| records.push(record));
    assert_eq!(records, [&refuse[..], &refuse[..]].concat());

    // The active hands it over anew.
    let mut hand = Hand::guarding();
    hand.shake(PORT);
    let answer = hand.answer(PORT);
    assert!(hand.gate.maps.take_answer(&answer, hand.now));
    hand.report();
    let [refuse] = refuse;
    hand.hears(refuse);
    assert!(!hand.gate.guard.guards(flow));
}

#[test]
fn a_standby_promises_while_it_has_room() {
    let mut hand = Hand::guarding();
    assert!(hand.standby.has_room());
    let of = |max_flows| {
        Flows::new(FlowsConfig {
            max_flows,
            ..config()
        })
        .unwrap()
    };
    hand.standby = of(80);
    for port in 1..=16 {
        assert!(hand.standby.has_room(), "{port}");
        let open = Hand::open(port);
        assert!(hand.standby.process_open(&open, hand.now, &mut hand.world));
    }
    assert!(!hand.standby.has_room());
    hand.standby = of(64);
    assert!(!hand.standby.has_room(), "few are the agent's to judge");
}
