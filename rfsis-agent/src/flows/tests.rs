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

/// Names the case that fails.
struct Named(u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay with RFSIS_SEED={}", self.0);
        }
    }
}

/// What became of one random history: flows that went on, flows that were reset.
fn history(seed: u64) -> (usize, usize) {
    let _named = Named(seed);
    let mut rng = Rng(seed);
    let mut lab = Lab::new(seed);
    // Each service has answered somebody before.
    for plan in [
        Plan::echo(1),
        Plan::chargen(1),
        Plan::discard(1),
        Plan::daytime(0),
    ] {
        lab.connect(plan, Tweaks::default());
    }
    lab.run_for(20 * SECOND);
    lab.events = 0;
    let rough = [0, 5, 30][rng.below(3) as usize];
    lab.faults = Faults {
        loss: rng.below(rough + 1),
        duplicates: rng.below(rough + 1),
        jitter: rng.below(5) * rng.below(MS),
        tap_loss: if rng.below(3) == 0 { rng.below(30) } else { 0 },
        tap_swaps: rng.below(100),
    };
    for _ in 0..=rng.below(4) {
        let size = 1 << rng.below(19);
        let plan = match rng.below(5) {
            0 => Plan::echo(size),
            1 => Plan::echo(size).half_close(),
            2 => Plan::chargen(size),
            3 => Plan::discard(size),
            _ => Plan::daytime(rng.below(3) * SECOND),
        };
        let plan = match rng.below(4) {
            0 => plan.slow(1 + (size as usize >> rng.below(6)), rng.below(30) * MS),
            1 => plan.typed(1 + (size as usize >> rng.below(6)), rng.below(30) * MS),
            2 => Plan {
                reads_from: SECOND + rng.below(3) * SECOND,
                ..plan
            },
            _ => plan,
        };
        let mut wrapping = || match rng.below(3) {
            0 => Some((rng.below(1 << 18) as u32).wrapping_neg()),
            1 => Some(rng.next() as u32),
            _ => None,
        };
        let tweaks = Tweaks {
            client_isn: wrapping(),
            active_isn: wrapping(),
            timestamps: rng.below(2) == 0,
            window_scale: rng.below(2) == 0,
            sack: rng.below(2) == 0,
            client_buffer: 2048 << rng.below(9),
            active_buffer: 4096 << rng.below(8),
        };
        lab.connect(plan, tweaks);
    }
    let crash_at = if rng.below(3) == 0 {
        rng.below(40)
    } else {
        rng.below(3000)
    };
    lab.run_until(30 * SECOND, |lab| lab.events >= crash_at);
    let report = lab.fail_over(rng.below(100) * MS);
    lab.settle();
    if lab.faults.tap_loss == 0 {
        for conn in lab.conns.iter().filter(|conn| conn.plan.service != DAYTIME) {
            assert!(!conn.reset, "{conn:?} was reset: {report:?}");
        }
        // A late segment of a flow that has ended makes it one without a shadow: nobody is there.
        let lost = [ResetReason::Lagging, ResetReason::Diverged];
        assert!(
            report
                .resets
                .iter()
                .all(|(reason, _)| !lost.contains(reason)),
            "{report:?} {:?}",
            lab.conns
        );
    }
    (
        report.live,
        lab.conns.iter().filter(|conn| conn.reset).count(),
    )
}

#[test]
fn every_history_ends_exact_or_reset_and_reset_only_where_copies_were_lost() {
    if let Ok(seed) = std::env::var("RFSIS_SEED") {
        history(seed.parse().unwrap());
        return;
    }
    let (mut live, mut reset) = (0, 0);
    for seed in 0..HISTORIES {
        let (went_on, told) = history(seed);
        live += went_on;
        reset += told;
    }
    assert!(live > HISTORIES as usize, "{live} flows went on");
    assert!(reset > HISTORIES as usize / 50, "{reset} flows were reset");
}

const HISTORIES: u64 = 5000;
