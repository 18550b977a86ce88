//! `protect: sync`: no byte of which a client was told is lost with the active, whatever gets lost on the
//! way to the standby.

use super::*;

/// Runs `plan` with copies and datagrams lost, kills the active half-way, and goes on to the end.
fn survives_loss(seed: u64, plan: Plan, tweaks: Tweaks, tap_loss: u64, sync_loss: u64) -> Lab {
    let mut lab = Lab::guarded(seed);
    lab.faults.tap_loss = tap_loss;
    lab.gate.as_mut().unwrap().sync_loss = sync_loss;
    let conn = lab.connect(plan, tweaks);
    let (half_sent, half_got) = (plan.upload / 2, plan.want / 2);
    assert!(
        lab.run_until(900 * SECOND, |lab| lab.conns[conn].sent >= half_sent
            && lab.conns[conn].got >= half_got),
        "stuck before the crash: {:?} {:?}",
        lab.conns[conn],
        lab.gate
    );
    let report = lab.fail_over(30 * MS);
    assert_eq!((report.live, report.resets.len()), (1, 0), "{report:?}");
    lab.finish();
    lab
}

#[test]
fn without_loss_everything_is_guarded_and_nothing_is_repeated() {
    let mut lab = Lab::guarded(1);
    let conn = lab.connect(Plan::echo(300_000), Tweaks::default());
    assert!(lab.run_until(60 * SECOND, |lab| lab.conns[conn].got >= 100_000));
    let census = lab.gate.as_ref().unwrap().guard.census();
    assert_eq!((census.guarded, census.exposed, census.refused), (1, 0, 0));
    lab.fail_over(30 * MS);
    lab.finish();
}

#[test]
fn lost_copies_are_repaired_by_the_client() {
    for (seed, loss) in [(1, 10), (2, 50), (3, 200), (4, 200)] {
        for plan in [
            Plan::echo(200_000),
            Plan::discard(300_000),
            Plan::chargen(200_000),
        ] {
            survives_loss(seed, plan, Tweaks::default(), loss, 0);
        }
    }
}

#[test]
fn lost_confirmations_are_repaired_by_the_next() {
    for (seed, loss) in [(1, 10), (2, 50), (3, 200), (4, 200)] {
        for plan in [Plan::echo(200_000), Plan::discard(300_000)] {
            survives_loss(seed, plan, Tweaks::default(), 0, loss);
        }
    }
}

#[test]
fn both_at_once_and_without_options() {
    let plain = Tweaks {
        timestamps: false,
        window_scale: false,
        sack: false,
        ..Tweaks::default()
    };
    for seed in 0..6 {
        for tweaks in [plain, Tweaks::default()] {
            survives_loss(seed, Plan::echo(100_000), tweaks, 100, 100);
        }
    }
}

/// Whatever happens, and whenever the active dies: exact, and nobody is reset.
#[test]
fn every_guarded_history_ends_exact() {
    let seeds = match std::env::var("RFSIS_SEED") {
        Ok(seed) => {
            let seed = seed.parse().unwrap();
            seed..seed + 1
        }
        Err(_) => 0..histories::count(HISTORIES),
    };
    for seed in seeds {
        history(seed);
    }
}

/// Any of the ways in which copies, datagrams and the client's packets get lost.
pub(super) fn rough_guarded(lab: &mut Lab, rng: &mut Rng) {
    let rough = [0, 20, 200][rng.below(3) as usize];
    let lossy = [1, 5, 30][rng.below(3) as usize];
    lab.faults = Faults {
        loss: rng.below(lossy),
        duplicates: rng.below(20),
        jitter: rng.below(3) * rng.below(MS),
        tap_loss: rng.below(rough + 1),
        tap_swaps: rng.below(100),
    };
    lab.gate.as_mut().unwrap().sync_loss = rng.below(rough + 1);
}

/// A connection of less than 2^`bits` bytes.
pub(super) fn any_plan(rng: &mut Rng, bits: u64) -> Plan {
    let size = 1 << rng.below(bits);
    let plan = match rng.below(4) {
        0 => Plan::echo(size),
        1 => Plan::echo(size).half_close(),
        2 => Plan::chargen(size),
        _ => Plan::discard(size),
    };
    match rng.below(3) {
        0 => plan.slow(1 + (size as usize >> rng.below(6)), rng.below(30) * MS),
        1 => plan.typed(1 + (size as usize >> rng.below(6)), rng.below(30) * MS),
        _ => plan,
    }
}

const HISTORIES: u64 = 300;

fn history(seed: u64) {
    let _named = histories::Named(seed);
    let mut rng = Rng(seed ^ 0x5a5a);
    let mut lab = Lab::guarded(seed);
    lab.world.adopts = seed.is_multiple_of(2);
    rough_guarded(&mut lab, &mut rng);
    for _ in 0..=rng.below(4) {
        let plan = any_plan(&mut rng, 17);
        let tweaks = Tweaks {
            client_isn: histories::wrapping(&mut rng),
            active_isn: histories::wrapping(&mut rng),
            timestamps: rng.below(2) == 0,
            window_scale: rng.below(2) == 0,
            sack: rng.below(2) == 0,
            client_buffer: 2048 << rng.below(9),
            active_buffer: 4096 << rng.below(7),
        };
        lab.connect(plan, tweaks);
    }
    let latest = [60, 600, 6000][rng.below(3) as usize];
    let crash_at = lab.events + rng.below(latest);
    lab.run_until(60 * SECOND, |lab| lab.events >= crash_at);
    let report = lab.fail_over((10 + rng.below(90)) * MS);
    lab.settle();
    for conn in &lab.conns {
        assert!(!conn.reset, "{conn:?} was reset: {report:?}");
    }
}

#[test]
fn a_silent_standby_opens_the_gate_and_its_return_guards_again() {
    let mut lab = Lab::guarded(5);
    let conn = lab.connect(Plan::echo(2_000_000).typed(2_000, MS), Tweaks::default());
    assert!(lab.run_until(60 * SECOND, |lab| lab.conns[conn].got >= 100_000));
    lab.gate.as_mut().unwrap().silent_standby = true;
    lab.run_for(40 * MS);
    let guard = &lab.gate.as_ref().unwrap().guard;
    assert!(!guard.is_guarding());
    assert_eq!(guard.census().exposed, 1);
    let before = lab.conns[conn].got;
    assert!(
        lab.run_until(5 * SECOND, |lab| lab.conns[conn].got >= before + 200_000),
        "the client waits for a standby that is silent:"
    );
    // All copies came: it has only not said so.
    lab.gate.as_mut().unwrap().silent_standby = false;
    assert!(lab.run_until(SECOND, |lab| {
        lab.gate.as_ref().unwrap().guard.census().guarded == 1
    }));
    let report = lab.fail_over(30 * MS);
    assert_eq!((report.live, report.resets.len()), (1, 0));
    lab.finish();
}

/// What the client was told while nobody guarded is not on the standby, and never will be unless the
/// connection can tell.
#[test]
fn a_flow_that_lost_copies_while_the_gate_was_open_is_reset_and_no_protection_is_claimed() {
    let mut lab = Lab::guarded(6);
    lab.gate.as_mut().unwrap().no_snapshots = true;
    let conn = lab.connect(Plan::echo(20_000_000).typed(2_000, MS), Tweaks::default());
    assert!(lab.run_until(60 * SECOND, |lab| lab.conns[conn].got >= 100_000));
    lab.gate.as_mut().unwrap().silent_standby = true;
    lab.faults.tap_loss = 1000;
    let before = lab.conns[conn].got;
    assert!(lab.run_until(5 * SECOND, |lab| lab.conns[conn].got >= before + 200_000));
    lab.gate.as_mut().unwrap().silent_standby = false;
    lab.faults.tap_loss = 0;
    lab.run_for(2 * SECOND);
    let census = lab.gate.as_ref().unwrap().guard.census();
    assert_eq!((census.guarded, census.exposed, census.joining), (0, 1, 0));
    assert_eq!(lab.flows.census().lockstep, 0);
    let before = lab.conns[conn].got;
    assert!(lab.run_until(5 * SECOND, |lab| lab.conns[conn].got >= before + 100_000));
    let report = lab.fail_over(30 * MS);
    assert_eq!((report.live, report.resets.len()), (0, 1));
    lab.settle();
    assert!(lab.conns[conn].reset);
}

/// Opened while nobody guarded: it goes on undisturbed, and is guarded once the standby holds all that the
/// client was told, by what the tap has shown or by a snapshot.
#[test]
fn a_flow_opened_while_the_standby_is_silent_is_guarded_once_that_has_caught_up() {
    for tap_loss in [0, 50, 1000] {
        let mut lab = Lab::guarded(7);
        lab.gate.as_mut().unwrap().silent_standby = true;
        lab.run_for(50 * MS);
        lab.faults.tap_loss = tap_loss;
        let conn = lab.connect(Plan::echo(2_000_000).typed(2_000, MS), Tweaks::default());
        assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got >= 200_000));
        let census = lab.gate.as_ref().unwrap().guard.census();
        assert_eq!((census.guarded, census.exposed), (0, 1));
        assert_eq!(lab.flows.census().lockstep, 0);
        lab.faults.tap_loss = 0;
        lab.gate.as_mut().unwrap().silent_standby = false;
        lab.run_for(150 * MS);
        let gate = lab.gate.as_mut().unwrap();
        let census = gate.guard.census();
        assert_eq!((census.guarded, census.exposed), (1, 0));
        assert_eq!(gate.guard.take_joins().len(), usize::from(tap_loss > 0));
        assert_eq!(lab.flows.census().lockstep, 1);
        let report = lab.fail_over(30 * MS);
        assert_eq!((report.live, report.resets.len()), (1, 0));
        lab.finish();
    }
}

/// A handshake that is never completed holds no slot for good, and no flow of the standby's.
#[test]
fn half_open_handshakes_are_forgotten_on_both_nodes() {
    for sync_loss in [0, 1000] {
        let mut lab = Lab::guarded(8);
        lab.lose = Box::new(|segment, direction| {
            direction == Direction::ToVip && segment.ack.is_some() && !segment.syn
        });
        lab.connect(Plan::echo(10), Tweaks::default());
        lab.run_for(100 * MS);
        let census = lab.gate.as_ref().unwrap().guard.census();
        assert_eq!(census.guarded, 1);
        lab.run_for(120 * SECOND);
        // The word of it is lost: then it is asked for.
        lab.gate.as_mut().unwrap().sync_loss = sync_loss;
        lab.run_for(20 * SECOND);
        assert!(lab.flows.openings.is_empty());
        lab.gate.as_mut().unwrap().sync_loss = 0;
        lab.run_for(210 * SECOND);
        let census = lab.gate.as_ref().unwrap().guard.census();
        assert_eq!((census.guarded, census.exposed, census.opening), (0, 0, 0));
    }
}

/// Of one that a takeover finds half-open the new active waits for the client as long as a kernel does. It is no
/// connection yet that the next death could cost.
#[test]
fn a_handshake_that_nobody_completes_ends_behind_a_takeover() {
    let mut lab = Lab::guarded(10);
    lab.lose = Box::new(|segment, direction| {
        direction == Direction::ToVip && segment.ack.is_some() && !segment.syn
    });
    lab.connect(Plan::echo(10), Tweaks::default());
    lab.run_for(100 * MS);
    assert_eq!(lab.fail_over(30 * MS).live, 1);
    lab.run_for(50 * SECOND);
    let census = lab.flows.census();
    assert_eq!((census.handshake, census.live), (1, 0));
    lab.run_for(20 * SECOND);
    assert_eq!(lab.flows.census().handshake, 0);
}

/// An idle connection is asked for now and then, and stays what it is.
#[test]
fn an_idle_flow_stays_guarded() {
    let mut lab = Lab::guarded(9);
    let conn = lab.connect(Plan::echo(200).typed(100, 1000 * SECOND), Tweaks::default());
    lab.run_for(900 * SECOND);
    let census = lab.gate.as_ref().unwrap().guard.census();
    assert_eq!((census.guarded, census.refused), (1, 0));
    assert_eq!(lab.conns[conn].got, 100);
    lab.fail_over(30 * MS);
    lab.run_for(300 * SECOND);
    assert_eq!(lab.conns[conn].got, 200);
}

/// The client has got more of the active's answers than a shadow's send buffer holds, and the standby lacks
/// what they answer.
#[test]
fn a_client_that_is_far_ahead_of_the_standby_is_caught_up_with() {
    for sack in [true, false] {
        let tweaks = Tweaks {
            client_buffer: 1 << 20,
            active_buffer: 1 << 20,
            sack,
            ..Tweaks::default()
        };
        let mut lab = Lab::guarded(11);
        let conn = lab.connect(Plan::echo(3_000_000), tweaks);
        assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got >= 500_000));
        lab.faults.tap_loss = 1000;
        let before = lab.conns[conn].got;
        lab.run_for(20 * MS);
        assert!(lab.conns[conn].got > before + 200_000, "not far ahead");
        let report = lab.fail_over(30 * MS);
        assert_eq!((report.live, report.resets.len()), (1, 0));
        lab.faults.tap_loss = 0;
        lab.finish();
    }
}

/// More acknowledgements of a fast download were lost to the standby than may lie between two lives of a flow. The
/// flow is as guarded as any: the client has sent nothing that the standby lacks.
#[test]
fn a_download_of_which_the_standby_missed_20_mib_goes_on() {
    for heard_again in [true, false] {
        let tweaks = Tweaks {
            client_buffer: 1 << 20,
            active_buffer: 1 << 20,
            ..Tweaks::default()
        };
        let mut lab = Lab::guarded(12);
        let conn = lab.connect(Plan::chargen(64 << 20), tweaks);
        assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got >= 500_000));
        lab.faults.tap_loss = 1000;
        let before = lab.conns[conn].got;
        assert!(lab.run_until(60 * SECOND, |lab| lab.conns[conn].got > before + (20 << 20)));
        if heard_again {
            lab.faults.tap_loss = 0;
            assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got > before + (22 << 20)));
        }
        let report = lab.fail_over(30 * MS);
        assert_eq!((report.live, report.resets.len()), (1, 0));
        lab.faults.tap_loss = 0;
        lab.finish();
    }
}

/// The active did not reach the standby at the end, and may have told its clients of anything: a hole is not
/// waited for as if the client were sure to fill it.
#[test]
fn a_client_of_a_standby_that_was_not_asked_does_not_wait_long_behind_a_hole() {
    for exposed in [false, true] {
        let mut lab = Lab::guarded(14);
        let plan = Plan::echo(2_000_000).typed(2_000, MS);
        let conn = lab.connect(plan, Tweaks::default());
        assert!(lab.run_until(SECOND, |lab| lab.conns[conn].got >= 50_000));
        lab.gate.as_mut().unwrap().silent_standby = true;
        lab.faults.tap_loss = 1000;
        lab.run_for(40 * MS);
        assert!(!lab.gate.as_ref().unwrap().guard.is_guarding());
        let before = lab.conns[conn].got;
        assert!(lab.run_until(5 * SECOND, |lab| lab.conns[conn].got >= before + 50_000));
        if exposed {
            lab.flows.expose();
        }
        let report = lab.fail_over(30 * MS);
        assert_eq!(report.live, 1, "nothing has told it what it lacks");
        lab.faults.tap_loss = 0;
        lab.run_for(20 * SECOND);
        assert_eq!(lab.conns[conn].reset, exposed);
    }
}
