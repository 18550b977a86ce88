//! Random histories: any plans, any network, a crash at any event. `RFSIS_SEED=n` replays one,
//! `RFSIS_TRACE=1` prints what arrives.

use super::*;

/// Names the case that fails.
pub(super) struct Named(pub u64);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay with RFSIS_SEED={}", self.0);
        }
    }
}

/// A first sequence number: perhaps one that soon wraps around, perhaps the stack's own.
pub(super) fn wrapping(rng: &mut Rng) -> Option<u32> {
    match rng.below(3) {
        0 => Some((rng.below(1 << 18) as u32).wrapping_neg()),
        1 => Some(rng.next() as u32),
        _ => None,
    }
}

/// What became of one random history: flows that went on, flows that were reset.
fn history(seed: u64) -> (usize, usize) {
    let _named = Named(seed);
    let mut rng = Rng(seed);
    let mut lab = Lab::new(seed);
    lab.world.adopts = seed.is_multiple_of(2);
    // Each service has answered somebody before, and has the same buffers for all.
    let service = Tweaks {
        active_buffer: 4096 << rng.below(8),
        ..Tweaks::default()
    };
    for plan in [
        Plan::echo(1),
        Plan::chargen(1),
        Plan::discard(1),
        Plan::daytime(0),
    ] {
        lab.connect(plan, service);
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
        let tweaks = Tweaks {
            client_isn: wrapping(&mut rng),
            active_isn: wrapping(&mut rng),
            timestamps: rng.below(2) == 0,
            window_scale: rng.below(2) == 0,
            sack: rng.below(2) == 0,
            client_buffer: 2048 << rng.below(9),
            ..service
        };
        lab.connect(plan, tweaks);
    }
    let latest = [40, 400, 3000][rng.below(3) as usize];
    let crash_at = rng.below(latest);
    lab.run_until(30 * SECOND, |lab| lab.events >= crash_at);
    // What the active sent arrives before anybody takes over.
    let report = lab.fail_over((10 + rng.below(90)) * MS);
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
    let count = count(HISTORIES);
    for seed in 0..count {
        let (went_on, told) = history(seed);
        live += went_on;
        reset += told;
    }
    assert!(live > count as usize, "{live} flows went on");
    assert!(reset > count as usize / 100, "{reset} flows were reset");
}

const HISTORIES: u64 = 600;

/// `RFSIS_HISTORIES=n` runs more.
pub(super) fn count(usual: u64) -> u64 {
    std::env::var("RFSIS_HISTORIES").map_or(usual, |count| count.parse().unwrap())
}
