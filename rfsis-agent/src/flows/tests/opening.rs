//! A SYN-ACK is held until the standby knows the very handshake, by its copy or by the active's word.

use rfsis_common::ack_gate::{OpeningKind, sent_flags};
use rfsis_common::frame::tcp_flags;

use super::*;
use crate::sync::{Confirm, Open, Sack};

const CLIENT_ISN: u32 = 1000;
const ACTIVE_ISN: u32 = 5000;

/// An active's gate and guard, and segments by hand.
struct Hand {
    gate: Gate,
    now: Nanos,
}

impl Hand {
    /// A standby answers it.
    fn guarding() -> Self {
        let mut hand = Self::alone();
        hand.gate.guard.heard(hand.now, &mut hand.gate.maps);
        hand
    }

    /// None does.
    fn alone() -> Self {
        let now = SECOND;
        let gate = Gate::new(now);
        Self { gate, now }
    }

    fn shake(&mut self) -> Open {
        let syn = TcpRepr {
            seq_number: seq(CLIENT_ISN),
            window_len: 60_000,
            max_seg_size: Some(1460),
            ..bare_repr(50_000, ECHO, TcpControl::Syn)
        };
        let answer = TcpRepr {
            seq_number: seq(ACTIVE_ISN),
            ack_number: Some(seq(CLIENT_ISN + 1)),
            window_len: 64_000,
            max_seg_size: Some(1400),
            ..bare_repr(ECHO, 50_000, TcpControl::Syn)
        };
        let syn = by_hand(&syn, Direction::ToVip);
        let answer = by_hand(&answer, Direction::FromVip);
        for (packet, kind) in [(syn, OpeningKind::Syn), (answer, OpeningKind::Held)] {
            let maps = &mut self.gate.maps;
            self.gate
                .guard
                .process_opening(&packet, kind, self.now, maps);
        }
        let options = |mss| segment::Options {
            mss: Some(mss),
            ..segment::Options::default()
        };
        Open {
            flow: segment::flow_key(CLIENT, 50_000, ECHO),
            client_isn: CLIENT_ISN,
            active_isn: ACTIVE_ISN,
            client_window: 60_000,
            client: options(1460),
            active: options(1400),
        }
    }

    /// The standby says it; gives what leaves thereupon.
    fn hears(&mut self, record: Record) -> Vec<Vec<u8>> {
        let maps = &mut self.gate.maps;
        self.gate.guard.process_record(&record, self.now, maps);
        self.gate.maps.take_released()
    }

    fn says(&mut self) -> Vec<Record> {
        let mut records = vec![];
        self.gate.guard.take_records(&mut records);
        records
    }
}

#[test]
fn a_syn_ack_leaves_when_the_standby_knows_this_number_and_these_options_and_no_others() {
    let mut hand = Hand::guarding();
    let open = hand.shake();
    let first = CLIENT_ISN + 1;
    let others = [
        Open {
            active_isn: ACTIVE_ISN + 1,
            ..open
        },
        Open {
            client_window: 1,
            ..open
        },
        Open {
            client: open.active,
            ..open
        },
        Open {
            active: open.client,
            ..open
        },
    ];
    for other in others {
        assert!(hand.hears(Record::Known(other)).is_empty(), "{other:?}");
    }
    let confirm = Confirm {
        flow: open.flow,
        client_isn: CLIENT_ISN,
        ack: first,
        edge: first + 1000,
        sack: Sack::default(),
    };
    assert!(hand.hears(Record::Confirm(confirm)).is_empty());
    let (flow, client_isn) = (open.flow, CLIENT_ISN);
    assert!(hand.hears(Record::Close { flow, client_isn }).is_empty());
    assert_eq!(hand.gate.guard.census().opening, 1);
    assert_eq!(hand.hears(Record::Known(open)).len(), 1);
    assert!(hand.gate.guard.guards(open.flow));
    assert!(hand.hears(Record::Known(open)).is_empty(), "said twice");
}

#[test]
fn the_active_tells_of_an_opening_only_when_the_standby_has_not_answered_its_copy() {
    let mut hand = Hand::guarding();
    let open = hand.shake();
    assert_eq!(hand.says(), []);
    hand.now += 2 * MS;
    hand.gate.guard.poll(hand.now, &mut hand.gate.maps);
    assert_eq!(hand.says(), [Record::Open(open)]);
}

#[test]
fn a_standby_that_knows_what_the_active_does_not_is_told_so() {
    let mut hand = Hand::guarding();
    let open = hand.shake();
    let (flow, client_isn) = (open.flow, CLIENT_ISN + 1);
    let other = Open { client_isn, ..open };
    assert!(hand.hears(Record::Known(other)).is_empty());
    assert_eq!(hand.says(), [Record::Close { flow, client_isn }]);
}

/// The gate has held it, and was opened before the agent looked.
#[test]
fn a_syn_ack_held_just_as_the_gate_opens_leaves_and_its_flow_is_noted() {
    let mut hand = Hand::alone();
    hand.shake();
    assert_eq!(hand.gate.maps.take_released().len(), 1);
    let census = hand.gate.guard.census();
    assert_eq!((census.exposed, census.opening, census.refused), (1, 0, 0));
}

#[test]
fn a_released_acknowledgement_echoes_congestion_as_the_kernels_did() {
    for congested in [false, true] {
        let mut hand = Hand::guarding();
        let open = hand.shake();
        hand.hears(Record::Known(open));
        let first = CLIENT_ISN + 1;
        // The kernel wanted to acknowledge 100 bytes.
        let flags = if congested { sent_flags::ECE } else { 0 };
        hand.gate.maps.holds(open.flow, first + 100, flags);
        let said = hand.hears(Record::Confirm(Confirm {
            flow: open.flow,
            client_isn: CLIENT_ISN,
            ack: first + 100,
            edge: first + 60_000,
            sack: Sack::default(),
        }));
        let [packet] = &said[..] else {
            panic!("{said:?}");
        };
        let (_, segment) = segment::parse(packet, Direction::FromVip).unwrap();
        assert_eq!(segment.ack, Some(first + 100));
        assert_eq!(packet[33] & tcp_flags::ECE != 0, congested);
    }
}

#[test]
fn a_connection_opens_by_its_copies_alone_and_by_the_actives_word_where_they_are_lost() {
    for lost in [None, Some(Direction::ToVip), Some(Direction::FromVip)] {
        let mut lab = Lab::guarded(12);
        lab.lose_copy = Box::new(move |segment, direction| segment.syn && lost == Some(direction));
        let conn = lab.connect(Plan::echo(20_000), Tweaks::default());
        assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got >= 10_000));
        let gate = lab.gate.as_ref().unwrap();
        assert_eq!(gate.guard.census().guarded, 1, "{lost:?}");
        assert_eq!(gate.told_of > 0, lost.is_some(), "{lost:?}");
        let report = lab.fail_over(30 * MS);
        assert_eq!((report.live, report.resets.len()), (1, 0));
        lab.finish();
    }
}

/// An older SYN-ACK's copy comes late, or somebody forged one: what OPEN said stands.
#[test]
fn a_copy_does_not_replace_what_the_active_said() {
    let mut lab = Lab::guarded(13);
    lab.lose_copy = Box::new(|segment, _| segment.syn);
    lab.lose_at_client = true;
    lab.connect(Plan::echo(10), Tweaks::default());
    assert!(lab.run_until(SECOND, |lab| lab.flows.census().handshake == 1));
    let (&flow, opening) = lab.flows.openings.iter().next().unwrap();
    let answer = opening.answer;
    let forged = TcpRepr {
        seq_number: seq(answer.unwrap().0 ^ 0x55),
        ack_number: Some(seq(opening.client_isn.wrapping_add(1))),
        ..bare_repr(flow.service_port, flow.client_port, TcpControl::Syn)
    };
    let copy = held(by_hand(&forged, Direction::FromVip));
    lab.flows
        .process_frame(&copy, Direction::FromVip, lab.now, &mut lab.world);
    assert_eq!(lab.flows.openings[&flow].answer, answer);
}

/// An agent that was started anew hears the confirmations that are meant for the old one: what it says to them
/// must not end what the standby is about to take over.
#[test]
fn a_node_that_is_not_active_disowns_nothing() {
    let mut hand = Hand::guarding();
    let open = hand.shake();
    hand.gate.guard.go_standby(&mut hand.gate.maps);
    let confirm = Record::Confirm(Confirm {
        flow: open.flow,
        client_isn: open.client_isn,
        ack: CLIENT_ISN + 1,
        edge: CLIENT_ISN + 60_000,
        sack: Sack::default(),
    });
    for record in [Record::Known(open), confirm] {
        hand.hears(record);
        assert_eq!(hand.says(), []);
    }
}

/// An offer would end the shadow that has confirmed it, and might be declined.
#[test]
fn a_flow_that_is_confirmed_before_it_was_offered_is_not_offered() {
    for confirmed in [true, false] {
        let mut hand = Hand::guarding();
        let open = hand.shake();
        let Open {
            flow, client_isn, ..
        } = open;
        hand.hears(Record::Known(open));
        hand.hears(Record::Refuse { flow, client_isn });
        assert!(!hand.gate.guard.guards(flow));
        if confirmed {
            let (ack, edge) = (CLIENT_ISN + 1, CLIENT_ISN + 60_001);
            let sack = Sack::default();
            hand.gate.maps.speaks(flow, ack);
            hand.hears(Record::Confirm(Confirm {
                flow,
                client_isn,
                ack,
                edge,
                sack,
            }));
        }
        assert_eq!(hand.gate.guard.guards(flow), confirmed);
        hand.now += 100 * MS;
        hand.gate.guard.heard(hand.now, &mut hand.gate.maps);
        hand.gate.guard.poll(hand.now, &mut hand.gate.maps);
        let says = hand.says();
        let offers = says.iter().any(|said| matches!(said, Record::Offer(_)));
        assert_eq!(offers, !confirmed, "{says:?}");
    }
}
