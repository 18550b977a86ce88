//! Single segments and what they may and may not do.

use rfsis_common::maps::HeldEvent;

use super::hand::{ACTIVE_ISN, CLIENT_ISN, Hand};
use super::*;
use crate::flows::sweep::{LINGER, OPENING_TIMEOUT, TIME_WAIT};
use crate::lockstep::before;

#[test]
fn forged_segments_change_nothing() {
    let mut hand = Hand::open(ECHO);
    hand.client(1, TcpControl::Psh, b"abc", Some(1));
    hand.active(1, TcpControl::Psh, b"abc", Some(4));
    let before = format!("{:?}", hand.flows.flows[&hand.flow]);
    let far = 1 << 25;
    hand.client(5, TcpControl::Rst, b"", None);
    hand.client(3, TcpControl::Rst, b"", Some(1));
    hand.client(0, TcpControl::Rst, b"", None);
    hand.client(far, TcpControl::Psh, b"evil", Some(1));
    hand.client(0u32.wrapping_sub(far), TcpControl::Psh, b"evil", Some(1));
    hand.client(4, TcpControl::Psh, b"evil", Some(far));
    hand.client(4, TcpControl::None, b"", Some(60_000));
    hand.client(77, TcpControl::Syn, b"", None);
    hand.client(78, TcpControl::Psh, b"evil", None);
    hand.client(1, TcpControl::Psh, b"xyz", Some(1));
    assert_eq!(format!("{:?}", hand.flows.flows[&hand.flow]), before);
    assert_eq!(hand.live().live, 1);
    assert_eq!(hand.said(), [(1, "", 3, 4)], "the echo, and no byte more");
    // Live: answered with the right numbers at the most.
    for ack in [60_000, 60_001, far] {
        hand.client(4, TcpControl::None, b"", Some(ack));
        hand.client(5, TcpControl::Rst, b"", None);
        hand.client(4, TcpControl::None, b"", Some(4));
        assert!(hand.said().iter().all(|said| *said == (4, "", 0, 4)));
    }
    hand.client(4, TcpControl::Rst, b"", Some(4));
    assert!(hand.world.live.is_empty(), "the true RST ends it");
}

#[test]
fn a_client_that_has_more_than_the_shadow_can_write_is_told() {
    let mut hand = Hand::open(ECHO);
    assert_eq!(hand.live().live, 1);
    for _ in 0..4 {
        hand.client(101, TcpControl::Psh, b"x", Some(101));
    }
    assert_eq!(hand.said().last(), Some(&(101, "RST", 0, 1)));
    assert!(hand.world.live.is_empty() && hand.flows.flows.is_empty());
}

#[test]
fn bounds_leave_new_flows_unprotected_and_old_ones_alone() {
    for config in [
        FlowsConfig {
            max_flows: 3,
            ..config()
        },
        FlowsConfig {
            max_bytes: 1,
            ..config()
        },
    ] {
        let by_bytes = config.max_bytes == 1;
        let mut hand = Hand::with(config, CHARGEN);
        for port in 0..5 {
            hand.flow.client_port = 1000 + port;
            hand.shake();
        }
        let kept = if by_bytes { 1 } else { 3 };
        assert_eq!(hand.flows.refused(), 5 - kept);
        assert_eq!(hand.world.live.len(), kept as usize);
        assert!((0..kept as u16).all(|port| {
            hand.flow.client_port = 1000 + port;
            hand.world.live.contains(&hand.flow)
        }));
        let report = hand.live();
        assert_eq!(report.live, kept as usize);
        assert_eq!(
            report.resets,
            [(ResetReason::Unprotected, 5 - kept as usize)]
        );
    }
    // The map is full.
    let mut hand = Hand::with(config(), ECHO);
    hand.world.live_limit = Some(0);
    hand.shake();
    assert_eq!(
        (hand.flows.refused(), hand.flows.census().unprotected),
        (1, 1)
    );
}

#[test]
fn a_syn_flood_stays_bounded_and_leaves_flows_alone() {
    let mut hand = Hand::open(ECHO);
    let kept = hand.flow;
    for at in 0..100_000u32 {
        hand.flow = FlowKey {
            client_addr: at,
            client_port: 9,
            service_port: ECHO,
        };
        let syn = TcpRepr {
            seq_number: seq(CLIENT_ISN),
            ..bare_repr(9, ECHO, TcpControl::Syn)
        };
        let answer = TcpRepr {
            seq_number: seq(ACTIVE_ISN),
            ack_number: Some(seq(CLIENT_ISN.wrapping_add(1))),
            ..bare_repr(ECHO, 9, TcpControl::Syn)
        };
        let caps = smoltcp::phy::ChecksumCapabilities::default();
        let mut bytes = vec![];
        crate::wire::emit_packet(&mut bytes, at.into(), VIP, &syn, &caps);
        hand.show(&bytes, Direction::ToVip);
        if at % 2 == 0 {
            crate::wire::emit_packet(&mut bytes, VIP, at.into(), &answer, &caps);
            hand.show(&bytes, Direction::FromVip);
        }
        assert!(hand.flows.openings.len() <= MAX_OPENINGS);
        assert!(hand.world.live.len() <= MAX_OPENINGS / 2 + 2);
    }
    assert!(hand.world.live.contains(&kept));
    assert!(hand.flows.opening_order.len() <= MAX_OPENINGS);
    hand.poll(hand.now + OPENING_TIMEOUT);
    assert_eq!(hand.world.live.iter().collect::<Vec<_>>(), [&kept]);
    hand.flow = kept;
    hand.client(1, TcpControl::Psh, b"abc", Some(1));
    hand.live();
    assert_eq!(hand.said(), [(1, "", 3, 4)]);
}

#[test]
fn a_new_syn_on_the_ports_of_a_flow_in_time_wait_finds_the_kernel() {
    let mut hand = Hand::open(DAYTIME);
    hand.active(1, TcpControl::Fin, b"now", Some(1));
    hand.client(1, TcpControl::Fin, b"", Some(5));
    hand.active(5, TcpControl::None, b"", Some(2));
    let report = hand.live();
    assert_eq!(
        (report.live, report.spoke, report.resets.len()),
        (1, 0, 0),
        "{report:?}"
    );
    hand.client(500, TcpControl::Syn, b"", None);
    assert!(hand.world.live.is_empty() && hand.said().is_empty());
}

#[test]
fn what_has_ended_or_is_idle_is_reaped() {
    for live in [false, true] {
        let mut hand = Hand::open(DAYTIME);
        hand.active(1, TcpControl::Fin, b"now", Some(1));
        hand.client(1, TcpControl::Fin, b"", Some(5));
        hand.active(5, TcpControl::None, b"", Some(2));
        if live {
            hand.live();
        }
        assert_eq!(hand.flows.census(), Census::default(), "nothing to lose");
        hand.flows
            .poll(hand.now + TIME_WAIT - SECOND, &mut hand.world);
        assert_eq!(hand.world.live.len(), 1);
        hand.flows
            .poll(hand.now + TIME_WAIT + SECOND, &mut hand.world);
        assert!(hand.world.live.is_empty() && hand.flows.flows.is_empty());

        let mut hand = Hand::open(ECHO);
        if live {
            hand.live();
        }
        hand.flows
            .poll(hand.now + config().idle_timeout, &mut hand.world);
        assert_eq!(hand.world.live.len(), 1);
        hand.flows
            .poll(hand.now + config().idle_timeout + SECOND, &mut hand.world);
        assert!(hand.world.live.is_empty() && hand.flows.flows.is_empty());
    }
}

#[test]
fn a_node_that_yields_forgets_everything() {
    let mut hand = Hand::open(CHARGEN);
    hand.flow.client_port = 1;
    hand.client(0, TcpControl::Syn, b"", None);
    hand.active(0, TcpControl::Syn, b"", Some(1));
    assert_eq!(hand.world.live.len(), 2);
    hand.live();
    hand.flows.go_standby(&mut hand.world);
    assert!(hand.world.live.is_empty());
    assert_eq!(hand.flows.census(), Census::default());
    hand.shake();
    assert_eq!(hand.flows.census().lockstep, 1, "it is a standby again");
}

#[test]
fn a_held_fin_goes_only_on_a_live_node_and_only_for_the_kernels_flows() {
    let mut hand = Hand::open(ECHO);
    let mine = hand.flow;
    let held = |port, flags| HeldEvent {
        flow: FlowKey {
            client_port: port,
            ..mine
        },
        seq: 77,
        ack: 99,
        flags,
        ..HeldEvent::default()
    };
    assert!(
        !hand.flows.process_held(&held(1, 1), &mut hand.world),
        "standby"
    );
    hand.live();
    assert!(
        !hand
            .flows
            .process_held(&held(mine.client_port, 1), &mut hand.world)
    );
    assert!(hand.world.approved.is_empty() && hand.world.sent.is_empty());
    assert!(hand.flows.process_held(&held(1, 1), &mut hand.world));
    assert!(hand.world.sent.is_empty(), "the kernel repeats a FIN");
    assert!(hand.flows.process_held(&held(2, 4 | 16), &mut hand.world));
    let sent = hand.said();
    assert_eq!(sent.len(), 1);
    assert_eq!(sent[0].1, "RST");
    assert_eq!(sent[0].0.wrapping_add(ACTIVE_ISN), 77);
}

#[test]
fn of_ten_thousand_flows_only_those_speak_that_must() {
    let mut hand = Hand::with(config(), ECHO);
    for port in 1..=10_000 {
        hand.flow.client_port = port;
        hand.shake();
        if port % 1000 == 0 {
            hand.client(1, TcpControl::Psh, b"abc", Some(1));
        } else if port % 2 == 0 {
            hand.client(1, TcpControl::Psh, b"abc", Some(1));
            hand.active(1, TcpControl::Psh, b"abc", Some(4));
            hand.client(4, TcpControl::None, b"", Some(4));
        }
    }
    let report = hand.live();
    assert_eq!(
        (report.live, report.spoke, report.resets.len()),
        (10_000, 10, 0)
    );
    assert_eq!(hand.said(), [(1, "", 3, 4); 10]);
    assert_eq!(hand.flows.timers.len(), 10, "idle flows cost no timer");
}

#[test]
fn a_syn_ack_copy_that_comes_after_the_ack_still_counts() {
    let mut hand = Hand::with(config(), ECHO);
    hand.client(0, TcpControl::Syn, b"", None);
    hand.client(1, TcpControl::None, b"", Some(1));
    hand.active(0, TcpControl::Syn, b"", Some(1));
    assert_eq!(hand.flows.census().lockstep, 1);
}

#[test]
fn a_flow_that_lost_a_frame_in_the_ring_lags_until_the_active_acknowledges_what_is_held() {
    let mut hand = Hand::open(ECHO);
    hand.flows.mark_lost(hand.flow, hand.now);
    assert_eq!(hand.flows.census().lagging, 1);
    hand.client(1, TcpControl::Psh, b"abc", Some(1));
    hand.active(1, TcpControl::Psh, b"abc", Some(4));
    assert_eq!(hand.flows.census().lockstep, 1);
}

#[test]
fn an_ack_starts_behind_what_the_active_sent() {
    let mut hand = Hand::open(CHARGEN);
    let mut pattern = [0; 30_000];
    crate::handler::chargen_fill(0, &mut pattern);
    hand.active(1, TcpControl::Psh, &pattern, Some(1));
    hand.live();
    let first_flight: usize = hand.said().iter().map(|said| said.2).sum();
    assert!((1..30_000).contains(&first_flight));
    hand.client(5, TcpControl::Psh, b"x", Some(1));
    assert_eq!(hand.said(), [(30_001, "", 0, 1)]);
}

#[test]
fn a_fin_is_repeated_whatever_duplicates_came() {
    let mut hand = Hand::open(ECHO);
    hand.client(1, TcpControl::Fin, b"", Some(1));
    hand.live();
    assert_eq!(hand.said(), [(1, "FIN", 0, 2)]);
    for _ in 0..5 {
        hand.client(2, TcpControl::None, b"", Some(1));
    }
    hand.said();
    hand.poll(hand.now + 2 * SECOND);
    assert_eq!(hand.said(), [(1, "FIN", 0, 2)]);
    hand.client(2, TcpControl::None, b"", Some(2));
    assert_eq!(hand.flows.census().live, 0, "closed by both sides");
}

#[test]
fn the_window_is_the_furthest_that_was_announced_in_whatever_order() {
    let mut hand = Hand::open(ECHO);
    hand.window = 0;
    hand.client(1, TcpControl::Psh, b"abc", Some(1));
    hand.live();
    assert_eq!(
        hand.said(),
        [(1, "", 3, 4)],
        "what the handshake had announced"
    );
    // Lost; an older ACK with no window comes after, and the bytes are repeated all the same.
    hand.client(4, TcpControl::None, b"", Some(1));
    hand.said();
    hand.poll(hand.now + 2 * SECOND);
    assert_eq!(hand.said(), [(1, "", 3, 4)]);
}

#[test]
fn a_closed_window_is_probed_and_goes_on_when_it_opens() {
    let mut hand = Hand::with(config(), CHARGEN);
    hand.window = 100;
    hand.shake();
    hand.live();
    assert_eq!(hand.said(), [(1, "", 100, 1)]);
    hand.window = 0;
    hand.client(1, TcpControl::None, b"", Some(101));
    assert_eq!(hand.said(), []);
    hand.poll(hand.now + 2 * SECOND);
    assert_eq!(hand.said(), [(101, "", 1, 1)], "a probe");
    hand.window = 50;
    hand.client(1, TcpControl::None, b"", Some(101));
    assert_eq!(hand.said(), [(101, "", 50, 1)]);
}

#[test]
fn a_fin_is_acknowledged_at_once() {
    let mut hand = Hand::open(DAYTIME);
    hand.active(1, TcpControl::Fin, b"now", Some(1));
    hand.client(1, TcpControl::None, b"", Some(5));
    hand.live();
    hand.said();
    hand.client(1, TcpControl::Fin, b"", Some(5));
    assert_eq!(hand.said(), [(5, "", 0, 2)]);
}

#[test]
fn an_ack_from_the_other_side_of_the_sequence_space_is_of_another_connection() {
    let mut hand = Hand::open(ECHO);
    hand.live();
    hand.said();
    for behind in [0, 1, 2] {
        let ack = (1_u32 << 31) - 1 + behind;
        hand.client(1, TcpControl::Psh, b"x", Some(ack));
        assert_eq!(hand.said(), [(1, "", 0, 1)], "{behind}");
    }
}

#[test]
fn an_ack_of_the_actives_behind_its_fin_is_no_divergence() {
    let mut hand = Hand::open(ECHO);
    hand.client(1, TcpControl::Fin, b"", Some(1));
    hand.active(1, TcpControl::Fin, b"", Some(2));
    hand.active(2, TcpControl::None, b"", Some(2));
    let census = hand.flows.census();
    assert_eq!((census.lockstep, census.diverged), (1, 0));
    hand.active(2, TcpControl::Psh, b"more", Some(2));
    assert_eq!(hand.flows.census().diverged, 1, "but bytes are");
}

#[test]
fn the_tail_that_was_lost_at_the_takeover_is_repeated_before_a_second_has_passed() {
    let mut hand = Hand::open(ECHO);
    hand.client(1, TcpControl::Psh, b"abc", Some(1));
    assert_eq!(hand.live().spoke, 1);
    assert_eq!(hand.said(), [(1, "", 3, 4)], "the echo, lost on its way");
    let start = hand.now;
    let mut repeated = Vec::new();
    while hand.now < start + SECOND {
        hand.now = hand.flows.next_wakeup().max(hand.now + MS);
        hand.poll(hand.now);
        for said in hand.said() {
            assert_eq!(said, (1, "", 3, 4));
            repeated.push((hand.now - start) / MS);
        }
    }
    assert_eq!(&repeated[..5], [20, 60, 140, 300, 620]);
    // What was heard is not repeated.
    hand.client(4, TcpControl::None, b"", Some(4));
    hand.now += 10 * SECOND;
    hand.poll(hand.now);
    assert_eq!(hand.said(), []);
}

#[test]
fn a_hole_that_the_client_never_fills_ends_in_a_reset_and_one_that_it_fills_does_not() {
    for fills in [true, false] {
        let mut hand = Hand::open(DISCARD);
        // The copy of bytes 1..101 was lost, and so was that of the active's ACK.
        assert_eq!(hand.live().live, 1);
        for second in 0..13 {
            hand.now += SECOND;
            hand.client(101 + second, TcpControl::Psh, b"x", Some(1));
            if fills && second == 3 {
                hand.client(1, TcpControl::Psh, &[0; 100], Some(1));
            }
        }
        let said = hand.said();
        let reset = said.iter().any(|(_, flag, ..)| *flag == "RST");
        assert_eq!(reset, !fills, "{said:?}");
        assert_eq!(hand.flows.gave_up(), u64::from(!fills));
    }
}

#[test]
fn the_last_segments_of_a_closed_flow_do_not_reach_the_kernel() {
    let mut hand = Hand::open(ECHO);
    assert_eq!(hand.live().live, 1);
    hand.client(1, TcpControl::Fin, b"", Some(1));
    assert_eq!(hand.said(), [(1, "FIN", 0, 2)]);
    hand.client(2, TcpControl::None, b"", Some(2));
    assert_eq!(hand.flows.census().live, 0, "closed by both sides");
    assert!(hand.world.live.contains(&hand.flow));
    hand.client(2, TcpControl::None, b"", Some(2));
    assert_eq!(hand.said(), [], "nothing is owed to it");
    hand.now += 4 * SECOND;
    hand.poll(hand.now);
    assert!(hand.world.live.is_empty() && hand.flows.flows.is_empty());
}

#[test]
fn an_unprotected_client_is_reset_at_the_furthest_number_that_it_acknowledged() {
    let mut hand = Hand::with(config(), ECHO);
    hand.active(50, TcpControl::Psh, b"older than this standby", Some(1));
    hand.client(1, TcpControl::None, b"", Some(100));
    hand.client(1, TcpControl::None, b"", Some(50));
    assert_eq!(hand.live().resets, [(ResetReason::Unprotected, 1)]);
    let said = hand.said();
    assert_eq!((said[0].0, said[0].1), (100, "RST"));
    // Were that not exact, the client would answer this with the number that is.
    assert_eq!((said.len(), said[1].1, said[1].2), (2, "", 0));
    assert!(before(said[1].0, 100));
    // It is repeated, for it may have been lost.
    for pause in [200 * MS, 800 * MS] {
        hand.now += pause;
        hand.poll(hand.now - MS);
        assert_eq!(hand.said(), []);
        hand.poll(hand.now);
        assert_eq!(hand.said(), said);
    }
    hand.poll(hand.now + 10 * SECOND);
    assert_eq!(hand.said(), []);
}

#[test]
fn an_unprotected_flow_that_both_sides_have_closed_is_lost_by_nobody_and_forgotten() {
    let mut hand = Hand::with(config(), ECHO);
    hand.active(50, TcpControl::Psh, b"older than this standby", Some(1));
    hand.active(73, TcpControl::Fin, b"", Some(1));
    assert_eq!(hand.flows.census().unprotected, 1, "half closed");
    hand.client(1, TcpControl::Fin, b"", Some(74));
    // Its last segment is no new flow.
    hand.active(74, TcpControl::None, b"", Some(2));
    assert_eq!(hand.flows.census().unprotected, 0);
    hand.poll(hand.now + LINGER);
    assert_eq!(hand.flows.flows.len(), 1);
    hand.poll(hand.now + LINGER + SECOND);
    assert!(hand.flows.flows.is_empty());
    assert_eq!(hand.live().resets, []);
    // Nor does one stay of which only the active's half is seen.
    let mut hand = Hand::with(config(), ECHO);
    hand.active(
        50,
        TcpControl::Psh,
        b"the other half is not copied",
        Some(1),
    );
    hand.active(78, TcpControl::Fin, b"", Some(1));
    assert_eq!(hand.flows.census().unprotected, 1);
    hand.poll(hand.now + LINGER + SECOND);
    assert!(hand.flows.flows.is_empty());
}

/// What the gate closed upon, or held unheard: the client would wait for a second.
#[test]
fn a_syn_without_an_answer_is_left_to_the_kernel_as_it_was_said_and_an_old_one_to_its_client() {
    let syn = TcpRepr {
        seq_number: seq(CLIENT_ISN),
        window_len: 4321,
        window_scale: Some(7),
        max_seg_size: Some(1460),
        sack_permitted: true,
        timestamp: Some(TcpTimestampRepr::new(5, 0)),
        ..bare_repr(50_000, ECHO, TcpControl::Syn)
    };
    let syn = by_hand(&syn, Direction::ToVip);
    for (age, expected) in [(SECOND / 2, vec![syn.clone()]), (2 * SECOND, vec![])] {
        let mut hand = Hand::with(config(), ECHO);
        hand.show(&syn, Direction::ToVip);
        hand.now += age;
        assert_eq!(hand.live().unanswered, expected);
    }
    let mut answered = Hand::with(config(), ECHO);
    answered.show(&syn, Direction::ToVip);
    answered.active(0, TcpControl::Syn, b"", Some(1));
    let report = answered.live();
    assert_eq!((report.live, report.unanswered.len()), (1, 0));
}

/// The client was told by the active of bytes of which no copy came, and has nothing to repeat.
#[test]
fn a_client_that_waits_for_an_answer_to_what_is_lacking_here_is_reset_and_not_adopted() {
    let mut hand = Hand::open(DISCARD);
    hand.world.adopts = true;
    hand.live();
    let start = hand.now;
    let mut reset_at = None;
    while reset_at.is_none() && hand.now < start + 20 * SECOND {
        hand.poll(hand.now + 10 * MS);
        hand.now += 10 * MS;
        let said = hand.said();
        if said.iter().any(|said| said.1 == "RST") {
            reset_at = Some(hand.now - start);
        } else if !said.is_empty() {
            hand.client(11, TcpControl::None, b"", Some(1));
        }
    }
    let took = reset_at.expect("a reset");
    assert!((5 * SECOND..12 * SECOND).contains(&took), "{took}");
    assert_eq!(hand.flows.gave_up(), 1);
}

/// It has not heard even of what is held: its retransmissions are far apart by then.
#[test]
fn a_client_that_repeats_what_is_held_is_waited_for() {
    for repeats in [true, false] {
        let mut hand = Hand::open(DISCARD);
        hand.client(1, TcpControl::Psh, &[0; 100], Some(1));
        assert_eq!(hand.live().live, 1);
        for second in 0..13 {
            hand.now += SECOND;
            hand.client(201 + second, TcpControl::Psh, b"x", Some(1));
            if repeats && second % 4 == 2 {
                hand.client(1, TcpControl::Psh, &[0; 100], Some(1));
            }
        }
        assert_eq!(hand.flows.gave_up(), u64::from(!repeats));
    }
}

/// Of the client's first bytes nothing was kept: the shadow would wait for them for good.
#[test]
fn a_syn_ack_copy_that_comes_after_data_makes_no_shadow() {
    let mut hand = Hand::with(config(), ECHO);
    hand.client(0, TcpControl::Syn, b"", None);
    hand.active(1, TcpControl::Psh, b"abc", Some(4));
    hand.client(1, TcpControl::Psh, b"abc", Some(1));
    hand.active(0, TcpControl::Syn, b"", Some(1));
    hand.client(4, TcpControl::None, b"", Some(4));
    let census = hand.flows.census();
    assert_eq!((census.lockstep, census.unprotected), (0, 1));
}

#[test]
fn a_flow_whose_answer_is_not_all_there_is_called_unprotected() {
    let mut hand = Hand::open(DAYTIME);
    hand.active(1, TcpControl::Psh, b"1 Jan", Some(1));
    assert_eq!(hand.flows.census().unprotected, 1);
    hand.active(6, TcpControl::Fin, b" 1970", Some(1));
    let census = hand.flows.census();
    assert_eq!((census.lockstep, census.unprotected), (1, 0));
}
