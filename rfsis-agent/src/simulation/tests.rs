//! The simulation finds what is wrong, and says nothing where nothing is.

use super::invariant::Violation;
use super::run::{Fault, History, Tally, caught};

fn holds(seed: u64) -> Tally {
    History::of(seed)
        .run(None, false)
        .unwrap_or_else(|violation: Violation| panic!("seed {seed}: {violation}"))
}

#[test]
fn many_seeds_hold_and_the_runs_are_not_empty() {
    let mut tally = Tally::default();
    for seed in 100_000..100_400 {
        tally.add(&holds(seed));
    }
    assert!(tally.survived > 50, "{tally}");
    assert!(tally.agreed > 50, "{tally}");
    assert!(tally.pledges_kept > 500, "{tally}");
    assert!(tally.again > 0 || tally.adopted > 5, "{tally}");
    assert!(tally.exempt.len() > 2 && tally.lost > 0, "{tally}");
    assert!(tally.ended * 10 > tally.connections * 8, "{tally}");
}

#[test]
fn seeds_that_failed_once_hold() {
    let seeds = include_str!("regressions.txt")
        .lines()
        .filter_map(|line| line.split('#').next())
        .flat_map(str::split_whitespace);
    for seed in seeds {
        holds(seed.parse().unwrap());
    }
}

#[test]
fn a_seed_is_the_same_history_each_time() {
    for seed in 0..20 {
        assert_eq!(holds(seed).to_string(), holds(seed).to_string());
    }
}

#[test]
fn what_is_left_of_a_failing_seed_still_fails() {
    let (seed, violation) = caught(Fault::HoldNothing, 100).unwrap();
    let smallest = History::of(seed).minimise(Some(Fault::HoldNothing), &violation);
    let again = smallest.run(Some(Fault::HoldNothing), false).unwrap_err();
    assert_eq!(again.invariant, violation.invariant);
    assert!(
        smallest.command().contains("--keep none"),
        "{}",
        smallest.command()
    );
}

#[test]
fn faults_that_any_history_shows_are_caught_at_once() {
    for fault in [
        Fault::HoldNothing,
        Fault::LowerNoAck,
        Fault::ConfirmTooMuch,
        Fault::PledgeLost,
        Fault::TakeOverEarly,
        Fault::OfferTooEarly,
        Fault::IgnoreLease,
        Fault::LongLease,
        Fault::SkipRing,
        Fault::SpeakOneOff,
        Fault::AcceptReplays,
    ] {
        assert!(caught(fault, 400).is_some(), "{fault:?}");
    }
}
