//! What must hold of the flows, whatever the network does.

use super::lab::*;
use super::*;

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
