//! What must hold of the flows, whatever the network does.

use super::lab::*;
use super::*;
use smoltcp::wire::{TcpControl, TcpRepr, TcpTimestampRepr};

use crate::wire::bare_repr;

mod adoption;
mod agreed;
mod by_hand;
mod guarded;
mod hand;
mod histories;
mod late;
mod opening;

fn lab() -> Lab {
    Lab::new(7)
}

/// Runs `plan` until the client got `got` bytes and sent `sent`, kills the active, goes on to the end.
fn survives(plan: Plan, tweaks: Tweaks, got: u64, sent: u64) -> Lab {
    let mut lab = lab();
    let conn = lab.connect(plan, tweaks);
    assert!(lab.run_until(60 * SECOND, |lab| lab.conns[conn].got >= got
        && lab.conns[conn].sent >= sent));
    let report = lab.fail_over(30 * MS);
    assert_eq!((report.live, report.resets.len()), (1, 0), "{report:?}");
    lab.finish();
    lab
}

#[test]
fn echo_goes_on_in_both_directions() {
    survives(Plan::echo(400_000), Tweaks::default(), 100_000, 0);
}

#[test]
fn typed_lines_are_echoed_across_the_crash() {
    survives(
        Plan::echo(2_000).typed(20, 7 * MS),
        Tweaks::default(),
        500,
        0,
    );
}

#[test]
fn an_idle_flow_goes_on_when_it_is_used_again() {
    let mut lab = lab();
    lab.connect(Plan::echo(100).typed(10, 10 * SECOND), Tweaks::default());
    lab.run_for(35 * SECOND);
    let report = lab.fail_over(30 * MS);
    assert_eq!((report.live, report.spoke), (1, 0));
    lab.finish();
}

#[test]
fn chargen_goes_on() {
    survives(Plan::chargen(500_000), Tweaks::default(), 100_000, 0);
}

#[test]
fn chargen_goes_on_for_a_slow_reader_with_a_zero_window() {
    let tweaks = Tweaks {
        client_buffer: 8_000,
        ..Tweaks::default()
    };
    survives(
        Plan::chargen(200_000).slow(3_000, 40 * MS),
        tweaks,
        20_000,
        0,
    );
}

#[test]
fn chargen_goes_on_for_a_reader_that_wakes_up_after_the_crash() {
    let tweaks = Tweaks {
        client_buffer: 8_000,
        ..Tweaks::default()
    };
    let plan = Plan {
        reads_from: 20 * SECOND,
        ..Plan::chargen(200_000)
    };
    let mut lab = lab();
    lab.connect(plan, tweaks);
    lab.run_for(5 * SECOND);
    lab.fail_over(30 * MS);
    lab.finish();
}

#[test]
fn echo_goes_on_for_a_slow_reader() {
    let tweaks = Tweaks {
        client_buffer: 16_000,
        ..Tweaks::default()
    };
    survives(Plan::echo(300_000).slow(4_000, 20 * MS), tweaks, 40_000, 0);
}

#[test]
fn discard_goes_on_swallowing() {
    survives(
        Plan::discard(600_000),
        Tweaks {
            client_buffer: 16_000,
            ..Tweaks::default()
        },
        0,
        200_000,
    );
}

#[test]
fn a_half_closed_echo_comes_to_its_end() {
    let tweaks = Tweaks {
        client_buffer: 200_000,
        ..Tweaks::default()
    };
    let mut lab = lab();
    let conn = lab.connect(
        Plan::echo(150_000).half_close().slow(5_000, 10 * MS),
        tweaks,
    );
    assert!(lab.run_until(60 * SECOND, |lab| lab.conns[conn].ended
        && lab.conns[conn].got > 20_000));
    lab.fail_over(30 * MS);
    lab.finish();
}

#[test]
fn a_half_closed_chargen_goes_on() {
    let mut lab = lab();
    let plan = Plan {
        ending: Ending::HalfClose,
        want: 200_000,
        ..Plan::chargen(0)
    };
    let conn = lab.connect(plan.slow(5_000, 10 * MS), Tweaks::default());
    lab.run_until(60 * SECOND, |lab| lab.conns[conn].got > 50_000);
    lab.fail_over(30 * MS);
    assert!(lab.run_until(60 * SECOND, |lab| lab.conns[conn].got > 300_000));
    assert_eq!(lab.told, []);
}

#[test]
fn daytime_read_to_the_end_goes_on_and_closes() {
    let mut lab = lab();
    let conn = lab.connect(Plan::daytime(10 * SECOND), Tweaks::default());
    assert!(lab.run_until(SECOND, |lab| lab.conns[conn].eof));
    let report = lab.fail_over(30 * MS);
    assert_eq!((report.live, report.resets.len()), (1, 0), "{report:?}");
    lab.finish();
}

#[test]
fn daytime_interrupted_is_reset() {
    let mut lab = lab();
    let conn = lab.connect(Plan::daytime(10 * SECOND), Tweaks::default());
    lab.lose_copy = Box::new(|segment, direction| direction == Direction::FromVip && segment.fin);
    assert!(lab.run_until(SECOND, |lab| lab.conns[conn].eof));
    let report = lab.fail_over(MS);
    assert_eq!(report.resets, [(ResetReason::Unpredictable, 1)]);
    assert!(lab.run_until(5 * SECOND, |lab| lab.conns[conn].reset));
}

#[test]
fn nothing_wrong_happens_whatever_the_options() {
    for bits in 0..8 {
        let tweaks = Tweaks {
            timestamps: bits & 1 > 0,
            window_scale: bits & 2 > 0,
            sack: bits & 4 > 0,
            ..Tweaks::default()
        };
        survives(Plan::echo(200_000), tweaks, 50_000, 0);
    }
}

#[test]
fn numbers_wrap_around_on_both_sides() {
    for (client, active) in [
        (-2000, -90_000),
        (-150_000, -1),
        (-1, -2000),
        (-60_000, 10_000),
    ] {
        let tweaks = Tweaks {
            client_isn: Some(client as u32),
            active_isn: Some(active as u32),
            ..Tweaks::default()
        };
        survives(Plan::echo(400_000), tweaks, 50_000, 0);
        survives(Plan::chargen(400_000), tweaks, 50_000, 0);
    }
}

#[test]
fn a_window_larger_than_the_shadows_is_kept_open() {
    let tweaks = Tweaks {
        client_buffer: 512 * 1024,
        active_buffer: 512 * 1024,
        ..Tweaks::default()
    };
    survives(Plan::discard(2 << 20), tweaks, 0, 1 << 20);
    // The handler stands still, so everything in flight is kept by the shadow.
    let plan = Plan {
        reads_from: 10 * SECOND,
        ..Plan::echo(2 << 20)
    };
    let mut lab = lab();
    lab.connect(plan, tweaks);
    lab.run_for(5 * SECOND);
    let report = lab.fail_over(30 * MS);
    assert_eq!(
        (report.live, report.resets.len()),
        (1, 0),
        "{report:?} {:?}",
        lab.flows
    );
    lab.finish();
}

#[test]
fn a_bad_network_changes_nothing() {
    for seed in 0..6 {
        let mut lab = Lab::new(seed);
        lab.faults = Faults {
            loss: 20,
            duplicates: 20,
            jitter: 3 * MS,
            tap_loss: 0,
            tap_swaps: 100,
        };
        lab.connect(Plan::echo(100_000), Tweaks::default());
        lab.connect(Plan::chargen(100_000), Tweaks::default());
        lab.connect(Plan::discard(100_000), Tweaks::default());
        lab.run_until(60 * SECOND, |lab| {
            lab.conns.iter().all(|c| c.got + c.sent > 30_000)
        });
        let report = lab.fail_over(30 * MS);
        assert_eq!(report.resets, []);
        lab.finish();
    }
}

/// Loses what `lost` says on the way, crashes after `wait`, goes on.
fn handshake_survives(wait: Nanos, lost: fn(&Segment<'_>, Direction) -> bool, live: usize) {
    for plan in [Plan::echo(5000), Plan::chargen(50_000), Plan::discard(5000)] {
        let mut lab = lab();
        lab.connect(plan, Tweaks::default());
        lab.lose = Box::new(lost);
        lab.run_for(wait);
        let report = lab.fail_over(10 * MS);
        lab.lose = Box::new(|_, _| false);
        assert_eq!((report.live, report.resets.len()), (live, 0), "{report:?}");
        lab.finish();
    }
}

#[test]
fn a_handshake_of_which_only_the_syn_was_seen_begins_anew() {
    handshake_survives(500_000, |_, direction| direction == Direction::FromVip, 0);
}

#[test]
fn a_handshake_goes_on_whether_the_client_has_the_syn_ack_or_not() {
    handshake_survives(500_000, |s, d| d == Direction::ToVip && !s.syn, 1);
    handshake_survives(120_000, |_, _| false, 1);
}

#[test]
fn an_opening_whose_answer_reached_the_standby_alone_goes_on() {
    let mut lab = lab();
    lab.connect(Plan::echo(5000), Tweaks::default());
    lab.run_for(70_000);
    // The SYN-ACK is on the wire: show it to the tap, and lose it for the client.
    lab.lose_at_client = true;
    lab.run_for(80_000);
    lab.lose_at_client = false;
    let report = lab.fail_over(MS);
    assert_eq!((report.live, report.spoke), (1, 1));
    lab.finish();
}

/// A service that has answered before, then a connection whose SYN-ACK the tap lost.
fn without_syn_ack(plan: Plan, primed: bool, tweaks: Tweaks) -> Lab {
    let mut lab = lab();
    if primed {
        lab.connect(
            Plan {
                upload: plan.upload.min(1),
                want: plan.want.min(1),
                ..plan
            },
            tweaks,
        );
        lab.run_for(20 * SECOND);
        assert!(lab.world.live.is_empty());
    }
    lab.lose_copy = Box::new(|s, d| d == Direction::FromVip && s.syn);
    let conn = lab.connect(plan, tweaks);
    assert!(
        lab.run_until(SECOND, |lab| lab.conns[conn].got + lab.conns[conn].sent
            > 3000)
    );
    lab
}

#[test]
fn a_lost_copy_of_the_syn_ack_is_made_up_from_the_services_last_answer() {
    for plan in [
        Plan::echo(90_000),
        Plan::chargen(90_000),
        Plan::discard(90_000),
    ] {
        let mut lab = without_syn_ack(plan, true, Tweaks::default());
        lab.fail_over(10 * MS);
        lab.finish();
    }
}

#[test]
fn a_flow_without_a_known_answer_is_reset_at_takeover() {
    let mut lab = without_syn_ack(Plan::echo(9_000_000), false, Tweaks::default());
    let report = lab.fail_over(10 * MS);
    assert_eq!(report.resets, [(ResetReason::Unprotected, 1)]);
    assert!(
        lab.run_until(MS, |lab| lab.conns[0].reset),
        "by the first RST"
    );
    lab.settle();
}

#[test]
fn a_lost_copy_makes_a_flow_lag_and_a_retransmission_heals_it() {
    let mut lab = lab();
    let conn = lab.connect(Plan::echo(1000).typed(100, 20 * MS), Tweaks::default());
    let mut lost = 0;
    lab.lose_copy = Box::new(move |s, d| {
        let hit = d == Direction::ToVip && !s.payload.is_empty() && lost == 0;
        lost += usize::from(hit);
        hit
    });
    assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got >= 500));
    assert_eq!(lab.flows.census().lagging, 1);
    assert_eq!(lab.flows.census().lag_bytes, 500);
    let report = lab.fail_over(10 * MS);
    assert_eq!(report.resets, [(ResetReason::Lagging, 1)]);
    assert!(
        lab.run_until(MS, |lab| lab.conns[0].reset),
        "by the first RST"
    );
    lab.settle();

    // The active did not get it either: the client sends it again, and all have it.
    let mut lab = Lab::new(8);
    let conn = lab.connect(Plan::echo(1000).typed(100, 20 * MS), Tweaks::default());
    let mut lost = 0;
    lab.lose = Box::new(move |s, d| {
        let hit = d == Direction::ToVip && !s.payload.is_empty() && lost == 0;
        lost += usize::from(hit);
        hit
    });
    assert!(lab.run_until(9 * SECOND, |lab| lab.conns[conn].got >= 300));
    assert_eq!(lab.flows.census().lagging, 0);
    lab.fail_over(10 * MS);
    lab.finish();
}

#[test]
fn an_active_of_another_mind_makes_a_flow_diverge_and_it_is_reset() {
    let mut lab = lab();
    lab.other_mind = Some(HandlerKind::Chargen);
    lab.connect(
        Plan {
            reads_from: 99 * SECOND,
            ..Plan::echo(9000)
        },
        Tweaks::default(),
    );
    lab.run_for(100 * MS);
    assert_eq!(lab.flows.census().diverged, 1);
    let report = lab.fail_over(10 * MS);
    assert_eq!(report.resets, [(ResetReason::Diverged, 1)]);
    assert!(lab.run_until(SECOND, |lab| lab.conns[0].reset));
}

#[test]
fn ports_may_be_used_again_on_the_standby_and_after_a_takeover() {
    let mut lab = lab();
    for round in 0..4 {
        if round == 2 {
            lab.fail_over(10 * MS);
        }
        let isn = Some(1000u32.wrapping_sub(round * 500_000));
        let tweaks = Tweaks {
            client_isn: isn,
            ..Tweaks::default()
        };
        let conn = lab.connect_from(40_000, Plan::echo(3000), tweaks);
        lab.run_until(60 * SECOND, |lab| lab.conns[conn].eof);
        lab.run_for(20 * SECOND);
    }
    lab.finish();
}

#[test]
fn an_inferred_flow_goes_on_with_the_clock_of_its_own_syn_ack() {
    let mut lab = lab();
    lab.connect(Plan::echo(1), Tweaks::default());
    lab.run_for(20 * SECOND);
    lab.lose_copy = Box::new(|s, d| d == Direction::FromVip && s.syn);
    lab.lose = Box::new(|s, d| d == Direction::FromVip && !s.syn);
    lab.connect(Plan::echo(100), Tweaks::default());
    lab.run_for(5 * MS);
    lab.lose = Box::new(|_, _| false);
    assert_eq!(lab.fail_over(MS).live, 1);
    lab.finish();
}

#[test]
fn a_half_closed_flow_goes_on_when_a_closed_window_opens() {
    for want in [8_001, 20_000, 60_000] {
        let tweaks = Tweaks {
            client_buffer: 8_000,
            ..Tweaks::default()
        };
        let mut lab = lab();
        let plan = Plan {
            reads_from: 20 * SECOND,
            ..Plan::echo(want).half_close()
        };
        lab.connect(plan, tweaks);
        lab.run_for(5 * SECOND);
        lab.fail_over(30 * MS);
        lab.run_for(20 * SECOND - lab.now);
        let all = lab.run_until(SECOND / 10, |lab| lab.conns[0].got == want);
        assert!(all, "at once, not at the next window probe");
        lab.finish();
    }
}

#[test]
fn a_half_closed_flow_never_waits_for_a_window_probe() {
    let tweaks = Tweaks {
        client_buffer: 8_000,
        ..Tweaks::default()
    };
    let mut lab = lab();
    // More than the shadow's send buffer holds when the client's FIN comes.
    let conn = lab.connect(
        Plan::echo(100_000).half_close().slow(8_000, 20 * MS),
        tweaks,
    );
    assert!(lab.run_until(SECOND, |lab| lab.conns[conn].ended
        && lab.conns[conn].got >= 8_000));
    lab.fail_over(30 * MS);
    assert!(lab.run_until(SECOND, |lab| lab.conns[conn].eof));
    lab.finish();
}

#[test]
fn what_one_client_did_not_ask_for_is_not_inferred_for_the_next() {
    let plain = Tweaks {
        timestamps: false,
        window_scale: false,
        sack: false,
        ..Tweaks::default()
    };
    let mut lab = lab();
    for tweaks in [Tweaks::default(), plain] {
        lab.connect(Plan::echo(1), tweaks);
        lab.run_for(20 * SECOND);
    }
    lab.lose_copy = Box::new(|s, d| d == Direction::FromVip && s.syn);
    let conn = lab.connect(Plan::echo(300_000), Tweaks::default());
    assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got > 100_000));
    assert_eq!(lab.fail_over(MS).live, 1);
    lab.finish();
}
